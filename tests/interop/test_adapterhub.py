"""The AdapterHub export: files, names, shapes, refusals. `make interop-adapterhub` compares outputs with `adapters`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    HEAD_TASKS,
    PAIR_TASKS,
    add_new,
    lived_in,
    make_batch,
    make_method_model,
    make_model,
    make_plus_model,
    state_of,
    stirred,
)
from safetensors.torch import load_file
from tolerance import rounding
from torch import Tensor

from hyperadapters.config import Task, parse
from hyperadapters.core import masked_mean
from hyperadapters.errors import ExportError, OutputError, TaskError
from hyperadapters.heads.task_heads import wide_inputs
from hyperadapters.interop import adapterhub
from hyperadapters.interop.adapterhub import adapter_name, export_adapterhub, reduction_factor
from hyperadapters.interop.task_files import HEAD_FILE
from hyperadapters.model.model import HyperAdapterModel

FILES = {"adapter.safetensors", "adapter_config.json", "hyperadapters_task.json"}
D = 16


def read(folder: Path, name: str) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads((folder / name).read_text())
    return contents


def parts(path: str, name: str, bottleneck: int) -> dict[str, tuple[int, ...]]:
    prefix = f"{path}.adapters.{name}.adapter"
    return {
        f"{prefix}_down.0.weight": (bottleneck, D),
        f"{prefix}_down.0.bias": (bottleneck,),
        f"{prefix}_up.weight": (D, bottleneck),
        f"{prefix}_up.bias": (D,),
    }


def assert_names_and_shapes(folder: Path, expected: dict[str, tuple[int, ...]]) -> None:
    found = load_file(folder / "adapter.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


# Adapters


def test_layers_of_an_encoder_have_their_adapters(tmp_path: Path) -> None:
    (note,) = export_adapterhub(make_model("bert", feature_layer=1), "size", tmp_path / "out")
    assert "no head that reads the mean of the tokens" in note
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES, HEAD_FILE}
    expected = {k: v for layer in (1, 2, 3) for k, v in parts(f"encoder.layer.{layer}.output", "size", 4).items()}
    assert_names_and_shapes(tmp_path / "out", expected)
    config = read(tmp_path / "out", "adapter_config.json")
    assert (config["name"], config["model_type"], config["hidden_size"]) == ("size", "bert", D)
    settings = config["config"]
    assert (settings["reduction_factor"], settings["leave_out"]) == (4.0, [0])
    assert (settings["is_parallel"], settings["scaling"], settings["non_linearity"]) == (True, 1.0, "relu")


def test_layers_of_an_encoder_decoder_have_shared_and_generated_adapters(tmp_path: Path) -> None:
    model = make_model("t5", adapter_norm_input=False, shared_adapter_dim=5, frozen_encoder_layers=1)
    assert export_adapterhub(model, "mood", tmp_path / "out") == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    expected = parts("encoder.block.1.layer.1", "mood", 5)
    for layer in range(3):
        expected.update(parts(f"decoder.block.{layer}.layer.2", "mood", 4))
    assert_names_and_shapes(tmp_path / "out", expected)
    settings = read(tmp_path / "out", "adapter_config.json")["config"]
    assert settings["leave_out"] == [0]
    assert settings["reduction_factor"] == {"1": reduction_factor(D, 5), "2": 4.0, "3": 4.0, "4": 4.0}


def test_the_written_weights_are_those_of_the_task(tmp_path: Path) -> None:
    model, inputs = lived_in("bert"), torch.randn(3, D)
    for name in ("size", "mood"):  # generated, and its own
        export_adapterhub(model, name, tmp_path / name)
        found = load_file(tmp_path / name / "adapter.safetensors")
        weights = model.method.adapters(torch.tensor([model.task_id(name)]))
        for site, layer in enumerate((2, 3)):
            down, down_bias, up, up_bias = (tensor[site, 0] for tensor in weights.values())
            prefix = f"encoder.layer.{layer}.output.adapters.{name}.adapter"
            hidden = F.linear(inputs, found[f"{prefix}_down.0.weight"], found[f"{prefix}_down.0.bias"]).relu()
            written = F.linear(hidden, found[f"{prefix}_up.weight"], found[f"{prefix}_up.bias"])
            expected = torch.relu(inputs @ down + down_bias) @ up + up_bias
            tolerance = rounding(2 * D, expected.abs().max().item())
            torch.testing.assert_close(written, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("width", [16, 384, 768, 1024])
def test_the_reduction_factor_gives_the_bottleneck_back(width: int) -> None:
    sizes = range(1, 1200)
    assert [int(width // reduction_factor(width, size)) for size in sizes] == list(sizes)
    assert reduction_factor(768, 64) == 12.0


@pytest.mark.parametrize(
    ("task", "name"), [("mood", "mood"), ("v1.2", "v1_2"), ("type", "type_task"), ("two words", "two words")]
)
def test_names_that_modules_cannot_have_are_changed(task: str, name: str) -> None:
    assert adapter_name(task) == name
    torch.nn.ModuleDict({name: torch.nn.Identity()})


# Heads and labels


def sequence_ids_of(batch: dict[str, Tensor]) -> Tensor:
    """As of pairs whose second texts start at the third token."""
    is_second = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) >= 2
    return is_second.long().masked_fill(batch["attention_mask"] == 0, -1)


def head_inputs(model: HyperAdapterModel, task_id: int, batch: dict[str, Tensor], reads: dict[str, Any]) -> Tensor:
    """What docs/export.md says that a head reads, but for what texts by themselves make."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"task_ids": torch.full((6,), task_id), "sequence_ids": sequence_ids_of(batch)}
    if reads["reads"] == ["adapted_texts"]:
        return model.head_inputs({**inputs, "sequence_ids": options["sequence_ids"]}, options["task_ids"])
    states = model(**inputs, **options, output_hidden_states=True).encoder_hidden_states
    adapted = masked_mean(states[-1], inputs["attention_mask"])
    if reads["reads"] == ["adapted"]:
        return adapted
    if reads["reads"] == ["layer", "adapted"]:
        features = masked_mean(states[reads["layer"]], inputs["attention_mask"])
    elif reads["reads"] == ["backbone", "adapted"]:
        with model.adapters_disabled():
            features = masked_mean(model.backbone(**inputs).last_hidden_state, inputs["attention_mask"])
    else:
        inputs["sequence_ids"] = sequence_ids_of(batch)
        features = model.head_features(inputs, adapted, [model.tasks[task_id].is_pair] * 6)
    return wide_inputs(adapted, features)


@pytest.mark.parametrize("settings", [{}, {"features": "backbone"}])
@torch.no_grad()
def test_heads_of_all_kinds_are_linear_maps_of_what_they_read(settings: dict[str, Any], tmp_path: Path) -> None:
    model, batch = lived_in("bert", **settings), make_batch("bert")
    add_new(model)
    for task_id, task in enumerate(model.tasks):
        assert_head(model, task_id, batch, tmp_path / task.name)
    assert read(tmp_path / "size", "hyperadapters_task.json")["head"]["reads"] == ["adapted"]
    assert read(tmp_path / "new", "hyperadapters_task.json")["head"]["reads"][0] == settings.get("features", "layer")


@pytest.mark.parametrize("reads", ["text_features", "pair_features", "adapted_texts"])
@torch.no_grad()
def test_heads_that_read_texts_are_linear_maps_of_what_they_read(reads: str, tmp_path: Path) -> None:
    model, batch = stirred(make_plus_model(head_inputs=reads)), make_batch("bert")
    for task_id, task in enumerate(model.tasks):
        assert_head(model, task_id, batch, tmp_path / task.name)
        assert read(tmp_path / task.name, "hyperadapters_task.json")["head"]["reads"] == (
            [reads] if reads == "adapted_texts" else [reads, "adapted"]
        )


def assert_head(model: HyperAdapterModel, task_id: int, batch: dict[str, Tensor], folder: Path) -> None:
    task = model.tasks[task_id]
    export_adapterhub(model, task.name, folder)
    head = read(folder, "hyperadapters_task.json")["head"]
    weights = load_file(folder / HEAD_FILE)
    inputs = head_inputs(model, task_id, batch, head)
    task_ids = torch.full((6,), task_id)
    options = {"task_ids": task_ids, "sequence_ids": sequence_ids_of(batch)}
    expected = model(batch["input_ids"], batch["attention_mask"], **options).logits
    found = F.linear(inputs, weights["weight"], weights["bias"]) * head["target_std"] + head["target_mean"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_task_travels_with_its_adapter(tmp_path: Path) -> None:
    export_adapterhub(make_model("bert"), "colour", tmp_path / "colour")
    described = read(tmp_path / "colour", "hyperadapters_task.json")
    assert parse(Task, described["task"]) == HEAD_TASKS[0]
    export_adapterhub(make_plus_model(), "same", tmp_path / "same")
    described = read(tmp_path / "same", "hyperadapters_task.json")
    assert parse(Task, described["task"]) == PAIR_TASKS[0]


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = make_model("t5", adapter_norm_input=False).train()
    before = state_of(model)
    export_adapterhub(model, "mood", tmp_path / "out")
    after = state_of(model)
    torch.testing.assert_close(before.pop("values"), after.pop("values"), atol=0, rtol=0)
    assert before == after


# What is refused


def test_normed_inputs_are_refused_with_the_setting_that_makes_tasks_exportable(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"after the layer norm.* train with .* model.adapter_norm_input: false"):
        export_adapterhub(make_model("t5"), "mood", tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_another_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"form 'bottleneck', but those of this model have form 'lora'; export to PEFT"
    ):
        export_adapterhub(make_model("bert", "lora"), "mood", tmp_path / "out")


@pytest.mark.parametrize("kind", ["distilbert", "bart", "gpt2"])
def test_other_architectures_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"Unknown architecture for AdapterHub '{kind}'"):
        export_adapterhub(make_model(kind), "mood", tmp_path / "out")


def test_unknown_tasks_are_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"Unknown task 'mod'\. Did you mean 'mood'\?"):
        export_adapterhub(make_model("bert"), "mod", tmp_path / "out")


def test_adapters_of_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="method 'hyperdecoder' generates adapters for inputs, not for tasks"):
        export_adapterhub(make_method_model("bert", "hyperdecoder"), "mood", tmp_path / "out")


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(adapterhub, "write_task_files", fail)
    with pytest.raises(OutputError, match="out: cannot be written: disk full"):
        export_adapterhub(make_model("bert"), "mood", tmp_path / "out")
    assert not any(tmp_path.iterdir())
