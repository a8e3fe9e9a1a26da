"""The ONNX export: the logits of one task, its adapter and head folded in, and what travels with the graph."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import (
    ENCODERS,
    FORMS,
    FROZEN_TEXTS,
    PAIR_TASKS,
    SIZES,
    add_new,
    lived_in,
    make_frozen_texts_model,
    make_method_model,
    make_model,
    make_plus_model,
    pair_examples,
    state_of,
    stirred,
    tiny_backbone,
    tiny_tokenizer,
    tokenizer_of,
)
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, BatchEncoding

from hyperadapters.config import ModelConfig, Task, parse
from hyperadapters.core import AdapterWeights, OwnAdapter
from hyperadapters.data.examples import Example
from hyperadapters.errors import ExportError, MissingPackageError, OutputError, TaskError
from hyperadapters.interop import onnx
from hyperadapters.interop.onnx import OneTask, export_onnx
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.text_heads import fit_text_heads

FILES = ["config.json", "hyperadapters_head.safetensors", "hyperadapters_task.json", "model.onnx"]
# (rows, positions, real tokens of the last row); the graph is traced with 2 and 3
SHAPES = ((1, 4, 4), (2, 3, 3), (5, 9, 4), (3, 60, 31))


def batch_of(rows: int, length: int, last: int, is_pair: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Token ids and mask, padded on the right; 1 is the separator, in the middle of a pair and at the end.

    For a pair also `sequence_ids`, of a tokenizer whose inputs start with no special token.
    """
    ids = torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[-1, last:] = 0
    sequence_ids = torch.full_like(ids, -1)
    for row, end in enumerate(mask.sum(dim=1).tolist()):
        ids[row, end - 1] = 1
        if is_pair:
            ids[row, end // 2] = 1
            sequence_ids[row, : end // 2], sequence_ids[row, end // 2 + 1 : end - 1] = 0, 1
    batch = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    return {**batch, "sequence_ids": sequence_ids} if is_pair else batch


def sequence_ids_of(lower_output: BatchEncoding) -> np.ndarray[Any, Any]:
    """As docs/export.md has it."""
    rows = range(len(lower_output["input_ids"]))
    return np.array([[-1 if text is None else text for text in lower_output.sequence_ids(row)] for row in rows])


def expected(model: HyperAdapterModel, task_id: int, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch, task_ids=torch.full((len(batch["input_ids"]),), task_id)).logits


def assert_same_logits(model: HyperAdapterModel) -> None:
    for task_id, task in enumerate(model.tasks):
        one_task = OneTask(model, task_id).eval()
        for shape in SHAPES:
            batch = batch_of(*shape, is_pair=task.is_pair)
            with torch.no_grad():
                found = one_task(**batch)
            assert found.shape == (shape[0], len(task.labels) or 1)
            torch.testing.assert_close(found, expected(model, task_id, batch), atol=1e-5, rtol=1e-5)


# What is traced


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["bert", "mpnet", "deberta-v2", "distilbert", "modernbert"])
def test_every_architecture_and_form_answers_as_in_the_model(kind: str, form: str) -> None:
    assert_same_logits(make_model(kind, form))


@pytest.mark.parametrize("features", ["layer", "backbone"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_tasks_of_every_kind_answer_as_in_the_model(kind: str, features: str) -> None:
    model = make_model(kind, features=features)
    assert model.heads is not None
    model.heads.set_target_scale(1, [1.0, 2.5, 7.0])
    assert_same_logits(model)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kind": "roberta", "features": "backbone"},
        FROZEN_TEXTS,
        {**FROZEN_TEXTS, "kind": "roberta"},
        {**FROZEN_TEXTS, "head_inputs": "text_features"},
        {**FROZEN_TEXTS, "features": "backbone"},
    ],
)
def test_heads_that_read_texts_answer_as_in_the_model(settings: dict[str, Any]) -> None:
    assert_same_logits(stirred(make_plus_model(**settings)))


def test_labels_that_do_not_exclude_each_other_answer_as_in_the_model() -> None:
    model = stirred(make_plus_model([Task.multi_label("topics", ["a", "b", "c"]), Task.multi_label("one", ["x"])]))
    assert model.heads is not None
    model.heads.temperature.copy_(torch.tensor([0.7, 2.0]))
    assert_same_logits(model)


def test_heads_that_have_not_learned_to_read_texts_answer_as_in_the_model() -> None:
    model = make_frozen_texts_model()
    assert not OneTask(model, 0).reads_features
    assert_same_logits(model)


@pytest.mark.parametrize("settings", [{}, {"features": "backbone"}])
def test_added_tasks_and_own_adapters_answer_as_in_the_model(settings: dict[str, Any]) -> None:
    model = lived_in("bert", **settings)
    add_new(model)
    assert_same_logits(model)


@pytest.mark.parametrize("method", ["hyperformer", "shared_adapter", "task_adapter"])
def test_other_methods_answer_as_in_the_model(method: str) -> None:
    assert_same_logits(make_method_model("bert", method))


def test_types_of_tokens_are_read() -> None:
    model, batch = make_model("bert"), batch_of(2, 5, 4)
    types = torch.tensor([[0, 0, 1, 1, 1]]).expand(2, -1)
    found = OneTask(model, 0).eval()(**batch, token_type_ids=types)
    torch.testing.assert_close(found, expected(model, 0, {**batch, "token_type_ids": types}), atol=1e-5, rtol=1e-5)
    assert (found - expected(model, 0, batch)).abs().max() > 1e-3


# Whole exports: each takes seconds, so the tests share two


class Exported:
    """A model, the folder of one of its tasks, and the model's state before and after."""

    def __init__(self, model: HyperAdapterModel, task: str, folder: Path) -> None:
        self.model, self.folder, self.before = model, folder, state_of(model)
        self.task_id = model.task_id(task)
        with warnings.catch_warnings(record=True) as self.warnings:
            warnings.simplefilter("always")
            export_onnx(model, task, folder)
        self.files = sorted(path.name for path in folder.iterdir())
        self.after = state_of(model)
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def __call__(self, batch: dict[str, Tensor]) -> np.ndarray[Any, Any]:
        (logits,) = self.session.run(["logits"], {name: value.numpy() for name, value in batch.items()})
        return logits


def small_model(kind: str, tasks: list[Task], **settings: Any) -> HyperAdapterModel:
    return HyperAdapterModel(tiny_backbone(kind, num_hidden_layers=2), tasks, parse(ModelConfig, {**SIZES, **settings}))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A pair task with a fitted head that also reads the frozen texts, on a backbone that has a tokenizer."""
    torch.manual_seed(0)
    model = small_model("bert", PAIR_TASKS[:2], **FROZEN_TEXTS)
    model.tokenizer, rows = tiny_tokenizer(), [row for row in pair_examples(16) if row.task_id != 2]
    fit_text_heads(model, rows[:24], rows[24:], batch_size=8)
    return Exported(stirred(model).train(), "same", tmp_path_factory.mktemp("pair") / "made" / "onnx")


@pytest.fixture(scope="module")
def number(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A regression of the preset `paper` with an adapter of its own, on a backbone without a name."""
    torch.manual_seed(0)
    model = small_model("bert", [Task.classification("mood", ["bad", "good"]), Task.regression("size")], preset="paper")
    weights = model.method.adapters(torch.tensor([1]))
    model.method.own_adapters["1"] = OwnAdapter(
        AdapterWeights({name: torch.randn_like(tensor) for name, tensor in weights.items()})
    )
    assert model.heads is not None
    model.heads.set_target_scale(1, [10.0, 25.0, 70.0])
    return Exported(model.eval(), "size", tmp_path_factory.mktemp("number"))


@pytest.fixture(params=["pair", "number"])
def exported(request: pytest.FixtureRequest) -> Exported:
    found: Exported = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_onnxruntime_gives_the_logits_of_the_model(exported: Exported, shape: tuple[int, int, int]) -> None:
    batch = batch_of(*shape, is_pair=exported.model.tasks[exported.task_id].is_pair)
    if "token_type_ids" in {value.name for value in exported.session.get_inputs()}:
        batch["token_type_ids"] = (torch.arange(shape[1]) > 2).long().expand(shape[0], -1).contiguous()
    logits = expected(exported.model.eval(), exported.task_id, batch)
    np.testing.assert_allclose(exported(batch), logits.numpy(), atol=1e-4, rtol=1e-4)


def test_texts_get_the_answers_of_the_model(pair: Exported) -> None:
    spelt = "red </s> w2"
    rows = [
        *pair_examples(8)[::3],
        Example(0, spelt, spelt),
        Example(0, "</s>", "w3"),
        Example(0, "w4", f"{spelt} </s>"),
    ]
    tokenizer = AutoTokenizer.from_pretrained(pair.folder)
    lower_output = tokenizer(
        [row.text for row in rows], [row.text_pair for row in rows], padding=True, truncation=True, return_tensors="np"
    )
    (found,) = pair.session.run(["logits"], {**lower_output, "sequence_ids": sequence_ids_of(lower_output)})
    batch = pair.model.eval().collator.inputs(rows)
    np.testing.assert_allclose(found, expected(pair.model, pair.task_id, batch).numpy(), atol=1e-4, rtol=1e-4)
    assert tokenizer.model_max_length == pair.model.lengths.input
    assert pair.model.tokenizer.model_max_length == 64


@pytest.mark.slow
def test_token_types_split_pairs_where_the_tokenizer_makes_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small_model("bert", PAIR_TASKS[:1], **FROZEN_TEXTS)
    model.tokenizer = tokenizer_of("bert")
    session = Exported(stirred(model).eval(), "same", tmp_path / "onnx").session
    assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    spelt = "red [SEP] w2"
    rows = [Example(0, spelt, spelt), Example(0, "[SEP]", f"w3 w4 {spelt} [SEP]"), Example(0, "w1", "w2 w5")]
    batch = model.collator.inputs(rows)
    logits = expected(model, 0, batch)
    names = ("input_ids", "attention_mask", "token_type_ids")
    (found,) = session.run(["logits"], {name: batch[name].numpy() for name in names})
    np.testing.assert_allclose(found, logits.numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "style"), [("same", "plain"), ("same", "bert"), ("mood", "plain")])
def test_adapted_texts_are_separated_in_the_graph(task: str, style: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small_model("bert", [PAIR_TASKS[0], PAIR_TASKS[2]])
    model.tokenizer = tokenizer_of(style)
    exported = Exported(stirred(model).eval(), task, tmp_path / "onnx")
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (style == "bert")
    names += ["sequence_ids"] * (style == "plain" and task == "same")
    assert [value.name for value in exported.session.get_inputs()] == names
    texts = [("w1 w2 w3", "red"), ("w4", "w5 w6 w7 w8"), ("w9 blue", ""), ("w1", "w1")]
    for rows in (texts, texts[:1], texts[2:]):
        examples = [Example(0, first, second if task == "same" else None) for first, second in rows]
        batch = model.collator.inputs(examples)
        logits = expected(model, exported.task_id, batch).numpy()
        found = exported({name: batch[name] for name in names})
        np.testing.assert_allclose(found, logits, atol=1e-4, rtol=1e-4)
    described = json.loads((exported.folder / "hyperadapters_task.json").read_text())
    assert described["head"]["reads"] == ["adapted_texts"]
    assert exported.warnings == []


def test_inputs_and_outputs_have_names_and_free_sizes(pair: Exported, number: Exported) -> None:
    names = ["input_ids", "attention_mask"]
    inputs = {value.name: (value.type, value.shape) for value in pair.session.get_inputs()}
    assert inputs == dict.fromkeys([*names, "sequence_ids"], ("tensor(int64)", ["batch", "sequence"]))
    assert [value.name for value in number.session.get_inputs()] == [*names, "token_type_ids"]
    assert [(value.name, value.shape) for value in pair.session.get_outputs()] == [("logits", ["batch", 2])]
    assert [value.shape for value in number.session.get_outputs()] == [["batch", 1]]


def test_labels_and_task_travel_with_the_graph(pair: Exported, number: Exported) -> None:
    config = AutoConfig.from_pretrained(pair.folder)
    assert (config.id2label, config.label2id) == ({0: "no", 1: "yes"}, {"no": 0, "yes": 1})
    assert (config.model_type, config.problem_type) == ("bert", "single_label_classification")
    config = AutoConfig.from_pretrained(number.folder)
    assert (config.num_labels, config.id2label, config.problem_type) == (1, {0: "size"}, "regression")
    described = json.loads((pair.folder / "hyperadapters_task.json").read_text())
    assert parse(Task, described["task"]) == PAIR_TASKS[0]
    assert described["lengths"] == pair.model.lengths.model_dump()
    assert described["backbone"]["fingerprint"] == pair.model.fingerprint.bfloat16


def test_the_folder_is_whole_and_nothing_is_left_beside_it(pair: Exported, number: Exported) -> None:
    assert {*FILES, "tokenizer.json", "tokenizer_config.json"} == set(pair.files)
    assert number.files == FILES
    assert list(pair.folder.parent.iterdir()) == [pair.folder]


def test_the_model_stays_as_it_is(exported: Exported) -> None:
    before, after = exported.before, exported.after
    torch.testing.assert_close(before.pop("values"), after.pop("values"), atol=0, rtol=0)
    assert before == after


def test_nothing_is_said_on_the_way(exported: Exported) -> None:
    assert [str(warning.message) for warning in exported.warnings] == []


# What is refused


def test_an_unknown_task_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"Unknown task 'sise'\. Did you mean 'size'"):
        export_onnx(make_model("bert"), "sise", tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_text_to_text_backbones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="for encoder backbones, which have task heads"):
        export_onnx(make_model("t5"), "size", tmp_path / "out")


def test_adapters_of_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="method 'hyperdecoder' generates adapters for inputs, not for tasks"):
        export_onnx(make_method_model("bert", "hyperdecoder"), "size", tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_other_floating_point_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"float32, found 'embeddings.word.* in bfloat16; call model.float\(\)"):
        export_onnx(make_model("bert").bfloat16(), "size", tmp_path / "out")


def test_a_folder_with_files_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(OutputError, match="already exists; choose another name, or remove it"):
        export_onnx(make_model("bert"), "size", tmp_path)
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(onnx, "_trace", lambda *_: type("Program", (), {"save": lambda self, path: path.touch()})())
    monkeypatch.setattr(onnx, "write_task_files", fail)
    with pytest.raises(OutputError, match="out: cannot be written: disk full"):
        export_onnx(make_model("bert"), "size", tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_missing_exporter_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingPackageError, match=r"'onnxscript', which is not installed.*hyperadapters\[onnx\]"):
        export_onnx(make_model("bert"), "size", tmp_path / "out")
