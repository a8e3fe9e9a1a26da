"""What can be given as inputs, examples and labels."""

from __future__ import annotations

import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from conftest import tiny_backbone, tiny_language_model_tokenizer, tiny_tokenizer
from datasets import Dataset, DatasetDict

from hyperadapters.config import DataConfig, ModelConfig, Task, TaskEntry, parse
from hyperadapters.data.collate import Collator
from hyperadapters.data.examples import Example, infer_labels, read_target
from hyperadapters.data.loading import load_task
from hyperadapters.data.sources import Row
from hyperadapters.errors import DataError, HyperAdaptersError, TaskError
from hyperadapters.inference.inputs import read_inputs
from hyperadapters.inference.predictor import Predictor
from hyperadapters.model import HyperAdapterModel

TASKS = (Task.classification("mood", ["bad", "good"]), Task.regression("alike", fields=["text", "text_pair"]))
COLUMNS = {"text": ["a", "b"], "task": ["mood", "alike"], "text_pair": [None, "c"]}
EXPECTED = [Example(0, "a"), Example(1, "b", "c")]


@pytest.mark.parametrize("make", [pd.DataFrame, Dataset.from_dict, pa.table])
def test_tables_are_rows(make: Any) -> None:
    assert list(read_inputs(make(COLUMNS), TASKS, None)) == EXPECTED


@pytest.mark.parametrize("make", [pd.Series, np.array, pa.array])
def test_columns_of_texts_are_rows(make: Any) -> None:
    assert list(read_inputs(make(["a", "b"]), TASKS, "mood")) == [Example(0, "a"), Example(0, "b")]


def test_an_array_of_two_columns_holds_pairs() -> None:
    assert list(read_inputs(np.array([["a", "b"]]), TASKS, "alike")) == [Example(1, "a", "b")]


@pytest.mark.parametrize("wrong", [b"a", {"a": 1}, {"a"}, 3, None, DatasetDict(), np.array([["a", "b", "c"]])])
def test_what_has_no_rows_is_refused_at_the_call(wrong: Any) -> None:
    with pytest.raises(DataError, match=r"inputs: expected .*, found"):
        read_inputs(wrong, TASKS, None)


@pytest.mark.parametrize("pair", [("a", "b"), {"text": "a", "text_pair": "b"}, Example(None, "a", "b")])
def test_a_second_text_that_the_task_does_not_read_is_refused(pair: Any) -> None:
    with pytest.raises(DataError, match="input 1: has a text_pair, which task 'mood' does not read"):
        list(read_inputs([pair], TASKS, "mood"))


@pytest.mark.parametrize(
    "value", [1, 1.0, np.int64(1), np.float32(1), Decimal("1"), pa.scalar(1), "1\u00a0", "1\u200b"]
)
def test_labels_of_every_type_are_one_label(value: Any) -> None:
    assert infer_labels([Row({"label": value}, "row"), Row({"label": "1"}, "row")]) == ("1",)


@pytest.mark.parametrize("value", [2, np.float64(2), np.int8(2), Decimal("2"), pa.scalar(2.0), "2"])
def test_numbers_of_every_type_are_targets(value: Any) -> None:
    assert read_target(Row({"label": value}, "row"), TASKS[1]) == 2.0


@pytest.mark.parametrize("labels", ["abc", {"a", "b"}, 3])
def test_labels_without_an_order_are_refused(labels: Any) -> None:
    with pytest.raises(TaskError, match="expected a list of labels in order"):
        Task.classification("mood", labels)


@pytest.mark.parametrize("labels", [["yes", "yes "], ["caf\u00e9", "cafe\u0301"]])
def test_two_spellings_of_a_label_are_refused(labels: list[str]) -> None:
    with pytest.raises(TaskError, match=r"labels must be different from each other, found '.*' and '.*'"):
        Task.classification("mood", labels)


@pytest.mark.parametrize("labels", [["{}", "[]"], ["red  blue", "w1"], ["w1 w2 w3 w4 w5", "w1 w2 w3 w4 w6"]])
@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder"])
def test_labels_that_cannot_be_written_are_refused(kind: Any, labels: list[str]) -> None:
    tokenizer = tiny_language_model_tokenizer() if kind == "decoder" else tiny_tokenizer()
    collator = Collator(tokenizer, TASKS, kind, max_target_length=5)
    collator.check_labels(TASKS)
    with pytest.raises(TaskError, match="expected labels that the tokenizer can write, found"):
        collator.check_labels([Task.classification("odd", labels)])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [4, 0.2])
def test_a_cut_keeps_a_row_of_each_label_for_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: float, seed: int
) -> None:
    rows = [("t", label) for label in ["a"] * 14 + ["b"] * 5 + ["rare"]]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(f"{text},{label}" for text, label in rows))
    source = {"path": str(tmp_path / "rows.csv"), "cut": {"validation": {"size": size}, "test": {"size": 4}}}
    entry = parse(TaskEntry, {"name": "mood", "source": source})
    with caplog.at_level(logging.WARNING):
        data = load_task(entry, 0, DataConfig(), seed)
    assert data.task.labels == ("a", "b", "rare")
    assert [len(data.splits[split]) for split in ("train", "validation", "test")] == [12, 4, 4]
    for split in ("validation", "test"):
        assert sorted(example.target for example in data.splits[split]) == [0, 0, 0, 1]
        assert f"the {split} rows have no example of rare" in caplog.text


@pytest.mark.parametrize(
    "options", [{"cache_bytes": -1}, {"batch_size": "8"}, {"batch_size": True}, {"route": None}, {"decline": "no"}]
)
def test_wrong_options_of_a_predictor_are_refused_where_they_are_given(options: dict[str, Any]) -> None:
    with pytest.raises(HyperAdaptersError, match=r"expected|Unknown route 'None'"):
        Predictor(_model(), **options)


def test_wrong_arguments_of_a_call_are_refused_at_the_call() -> None:
    model = _model()
    with pytest.raises(DataError, match=r"inputs: expected .* found NoneType"):
        Predictor(model)(None)
    with pytest.raises(TaskError, match="Unknown task '3'"):
        Predictor(model)(["w1"], task=3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="batch_size: expected an integer of 1 or more, found 0"):
        model.route(["w1"], batch_size=0)


@pytest.mark.parametrize("tasks", [TASKS[0], ["mood"], set(TASKS), {"mood": TASKS[0]}])
def test_tasks_that_are_no_list_of_tasks_are_refused(tasks: Any) -> None:
    with pytest.raises(TaskError, match=r"tasks: expected .*, found|tasks: expected Task, .*; found 'mood'"):
        HyperAdapterModel(tiny_backbone("bert"), tasks)


@pytest.mark.parametrize("shape", [(1,), (2, 1), ()])
def test_head_labels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TaskError, match=r"labels: expected a tensor of shape \(2,\), found shape"):
        _model()(torch.ones(2, 3, dtype=torch.long), task_ids=torch.tensor([0, 1]), labels=torch.zeros(shape))


def _model() -> HyperAdapterModel:
    return HyperAdapterModel(tiny_backbone("bert"), TASKS, ModelConfig(adapter_dim=4))
