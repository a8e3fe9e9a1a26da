"""Promise 5: a checkpoint gives the same outputs back, holds nothing of the backbone, and damage is noticed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENCODER_DECODERS, ENCODERS, save_backbone, tiny_backbone
from safetensors import safe_open
from safetensors.torch import load_file, save
from test_hosts import make_batch, make_model

from hyperadapters.checkpoint import CONFIG_FILE
from hyperadapters.errors import CheckpointError, OutputError
from hyperadapters.inference.routing import decide
from hyperadapters.model import HyperAdapterModel
from hyperadapters.task_parts import set_task_parts, task_parts


def _weights_file(folder: Path) -> Path:
    (path,) = folder.glob("adapters-*.safetensors")
    return path


@pytest.mark.parametrize("kind", [*ENCODERS, *ENCODER_DECODERS])
def test_saving_and_loading_gives_the_same_outputs_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model, batch = make_model(kind), make_batch(kind)
    if model.heads is not None:
        model.heads.set_target_scale(1, [1.0, 2.5, 7.0])
    model.save_pretrained(tmp_path / "run")
    loaded = HyperAdapterModel.from_pretrained(tmp_path / "run", backbone=tiny_backbone(kind))
    assert loaded.tasks == model.tasks
    assert loaded.adapter_config == model.adapter_config
    before, after = model(**batch), loaded(**batch)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


def test_the_backbone_is_found_by_its_name(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "backbone", "t5")
    from hyperadapters.config import Task

    model = HyperAdapterModel.from_backbone(
        str(folder), [Task.text_to_text("a"), Task.text_to_text("b")], adapter_dim=4
    )
    model.eval().save_pretrained(tmp_path / "run")
    batch = make_batch("t5")
    batch["task_ids"] = batch["task_ids"].clamp(max=1)
    assert torch.equal(HyperAdapterModel.from_pretrained(tmp_path / "run")(**batch).logits, model(**batch).logits)


def test_the_official_preset_survives(tmp_path: Path) -> None:
    model, batch = make_model("t5", preset="official"), make_batch("t5")
    model.save_pretrained(tmp_path)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone("t5"))
    assert torch.equal(loaded(**batch).loss, model(**batch).loss)


def test_a_checkpoint_is_two_files_without_backbone_weights_or_pickle(tmp_path: Path) -> None:
    model = make_model("bert")
    model.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    with safe_open(_weights_file(tmp_path), framework="pt") as file:
        names = set(file.keys())
    assert names == {n for n in model.state_dict() if not n.startswith("backbone.")}
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["backbone"]["fingerprint"] == model.backbone_fingerprint
    assert config["format_version"] == 1


def test_saving_again_replaces_the_old_weights(tmp_path: Path) -> None:
    model = make_model("bert")
    model.save_pretrained(tmp_path)
    first = _weights_file(tmp_path).name
    with torch.no_grad():
        model.prototypes.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    assert _weights_file(tmp_path).name != first
    loaded = HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone("bert"))
    assert torch.equal(loaded.prototypes.weight, model.prototypes.weight)


@pytest.mark.parametrize("step", range(6))
def test_a_save_that_dies_anywhere_leaves_the_old_or_the_new_state(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps: fsync, replace and fsync of the folder for the weights, then the same for the JSON file."""
    model = make_model("bert")
    model.save_pretrained(tmp_path)
    old = model.prototypes.weight.detach().clone()
    new = old + 1.0
    with torch.no_grad():
        model.prototypes.weight.add_(1.0)
    calls = 0

    def dying(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > step:
                raise OSError("killed")
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying(os.fsync))
        patch.setattr(os, "replace", dying(os.replace))
        with pytest.raises(OutputError, match="cannot be written: killed"):
            model.save_pretrained(tmp_path)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone("bert"))
    assert torch.equal(loaded.prototypes.weight, old if step < 5 else new)
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_model("bert").save_pretrained(tmp_path)
    return tmp_path


def _load(run: Path) -> HyperAdapterModel:
    return HyperAdapterModel.from_pretrained(run, backbone=tiny_backbone("bert"))


def test_another_backbone_is_refused_and_left_unwrapped(run: Path) -> None:
    other = tiny_backbone("bert", seed=5)
    with pytest.raises(CheckpointError, match=r"was trained on backbone 'None' with fingerprint.*found one with"):
        HyperAdapterModel.from_pretrained(run, backbone=other)
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_truncated_weights_are_refused(run: Path) -> None:
    path = _weights_file(run)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"expected sha256 .* the file is truncated or altered"):
        _load(run)


def test_one_altered_byte_is_noticed(run: Path) -> None:
    path = _weights_file(run)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="truncated or altered"):
        _load(run)


def test_altered_tasks_are_noticed(run: Path) -> None:
    config = json.loads((run / CONFIG_FILE).read_text())
    config["tasks"].reverse()
    (run / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="was altered after it was written"):
        _load(run)


def test_missing_parts_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint here; expected a file hyperadapter\.json"):
        HyperAdapterModel.from_pretrained(tmp_path / "elsewhere")
    _weights_file(run).unlink()
    with pytest.raises(CheckpointError, match="the weights cannot be read"):
        _load(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable.*damaged"),
        ("[]", "fault"),
        ('{"format_version": 99}', r"has format 99, this library .* reads up to 1; upgrade"),
        ('{"format_version": 1, "tsks": []}', "tsks: unknown key. Did you mean 'tasks'"),
    ],
)
def test_a_damaged_or_newer_config_is_refused(run: Path, text: str, message: str) -> None:
    (run / CONFIG_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        _load(run)


def test_weights_outside_the_folder_are_refused(run: Path) -> None:
    config = json.loads((run / CONFIG_FILE).read_text())
    config["weights"]["file"] = "../" + config["weights"]["file"]
    (run / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="names no weights file in this folder"):
        _load(run)


def test_a_checkpoint_from_before_routing_was_calibrated_still_loads(tmp_path: Path) -> None:
    model, batch = make_model("bert"), make_batch("bert")
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG_FILE).read_text())
    del values["lengths"], values["model"]["features"], values["model"]["prototypes_per_task"]
    state = load_file(_weights_file(tmp_path))
    del state["thresholds"], state["prototypes.keys"]
    described = {key: value for key, value in values.items() if key != "weights"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    weights = save(state, metadata={"config_sha256": digest})
    _weights_file(tmp_path).write_bytes(weights)
    values["weights"]["sha256"] = hashlib.sha256(weights).hexdigest()
    (tmp_path / CONFIG_FILE).write_text(json.dumps(values))
    loaded = HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone("bert"))
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert all(result.accepted for result in decide(loaded, torch.randn(4, 64)))


def test_the_adapter_of_a_task_with_other_shapes_is_refused(tmp_path: Path) -> None:
    model = make_model("bert")
    small = make_model("bert", adapter_dim=2)
    parts = task_parts(model)
    parts[0].own_adapter = small.adapters(torch.tensor([0]))
    set_task_parts(model, parts)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the adapter of task 0 has other shapes"):
        HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone("bert"))
