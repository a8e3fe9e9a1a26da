"""Rows in a file: they are those of a list, whatever is done with them, and take no memory."""

from __future__ import annotations

import copy
import datetime
import json
import pickle
import random
import resource
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import save_backbone

from hyperadapters import HyperAdapterModel, Task, Trainer, TrainingArguments
from hyperadapters.config import DataConfig, Recipe, TaskEntry, parse
from hyperadapters.data import stored_rows
from hyperadapters.data.examples import EXAMPLES, Example, by_task
from hyperadapters.data.loading import load_task
from hyperadapters.data.memory import read_examples
from hyperadapters.data.short_forms import SHORT_FORMS
from hyperadapters.data.sources import ROWS, Row, read_file
from hyperadapters.data.stored_rows import StoredRows, collect, joined, take
from hyperadapters.errors import DataError, OutputError
from hyperadapters.inference import routing
from hyperadapters.training import text_heads
from hyperadapters.training.run import train
from hyperadapters.training.text_heads import regression_examples

WORDS = [f"w{number}" for number in range(20)]


@pytest.fixture(params=["in memory", "in a file"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let rows be kept in a file from the fourth row on."""
    if request.param == "in a file":
        monkeypatch.setattr(stored_rows, "ROWS_IN_MEMORY", 3)
    return str(request.param)


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


@contextmanager
def rows_in_memory(monkeypatch: pytest.MonkeyPatch, count: int) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(stored_rows, "ROWS_IN_MEMORY", count)
        yield


def examples(count: int, task_id: int = 0) -> list[Example]:
    return [Example(task_id, f"text {number}", None, number % 2) for number in range(count)]


def stored(count: int, monkeypatch: pytest.MonkeyPatch, task_id: int = 0) -> StoredRows[Example]:
    with rows_in_memory(monkeypatch, 3):
        found = collect(examples(count, task_id), EXAMPLES)
    assert isinstance(found, StoredRows)
    return found


def test_few_rows_are_a_list() -> None:
    assert collect(iter(examples(5)), EXAMPLES) == examples(5)
    assert collect([], EXAMPLES) == []


def test_the_sequence_has_what_a_list_has(monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = stored(20, monkeypatch), examples(20)
    assert len(found) == 20
    assert list(found) == expected
    assert found[3] == expected[3]
    assert found[-1] == expected[-1]
    assert list(found[4:17:3]) == expected[4:17:3]
    assert list(found[::-1]) == expected[::-1]
    assert expected[7] in found
    assert found.index(expected[7]) == 7
    with pytest.raises(IndexError):
        found[20]


def test_selections_and_joined_sequences_refer_to_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, few = stored(10, monkeypatch), stored(7, monkeypatch, task_id=1), examples(2, task_id=2)
    all_rows = [*examples(10), *examples(2, 2), *examples(7, 1)]
    found = joined([first, few, second])
    assert isinstance(found, StoredRows)
    assert list(found) == all_rows
    order = random.Random(0).sample(range(19), 12)
    chosen = take(found, order)
    assert isinstance(chosen, StoredRows)
    assert list(chosen) == [all_rows[row] for row in order]
    assert list(take(chosen, [3, 0])) == [all_rows[order[3]], all_rows[order[0]]]
    assert [list(rows) for rows in by_task(found, 3)] == [examples(10), examples(7, 1), examples(2, 2)]
    assert joined([few, few]) == [*few, *few]


@pytest.mark.parametrize(
    "values",
    [
        {"text": "\x00\n\u2028\U0001f600", "label": "b"},
        {"text": "two surrogates, which are no character: \ud83d\ude00", "label": "\udc00"},
        {"text": 3, "label": None},
        {"text": float("nan"), "label": [1, "b", None]},
        {"text": 1e308, "label": {"a": {1: [True]}}},
        {"text": b"bytes", "label": datetime.date(2026, 1, 1)},
        {"text": "a", "label": 10**5000},
    ],
    ids=["text", "surrogates", "number", "list", "mapping", "bytes", "large"],
)
def test_each_value_comes_back(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with rows_in_memory(monkeypatch, 1):
        found = collect([Row(values, "line 1"), Row({}, "line 2")] * 2, ROWS)
    assert isinstance(found, StoredRows)
    for row, expected in zip(found, [Row(values, "line 1"), Row({}, "line 2")] * 2, strict=True):
        assert row == expected or repr(row) == repr(expected)  # as for NaN


VALID = {
    "numpy": ("a", np.int64(1), 1),
    "tensor": ("a", torch.tensor(1), 1),
    "array": ("a", np.array(["b", "c"]), ["b", "c"]),
    "set": ("a", {"b"}, ["b"]),
    "tuple": ("a", ("b",), ["b"]),
    "decimal": ("a", Decimal("2.5"), 2.5),
    "missing": ("a", pd.NA, None),
}


@pytest.mark.parametrize("name", VALID)
def test_valid_rows_are_in_the_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the types of their cells are, and whatever is in columns that are not read."""
    text, label, expected = VALID[name]
    others = {"date": datetime.date(2026, 1, 1), "image": {"bytes": b"c", "path": None}, 3: [datetime.time()]}
    with rows_in_memory(monkeypatch, 1):
        found = collect([Row({"text": text, "label": label, **others}, "row 1")] * 3, ROWS)
    assert found[2] == Row({"text": text, "label": expected, "date": None, "image": None, "3": None}, "row 1")
    assert isinstance(found, StoredRows)
    (part,) = found._parts
    assert not part._in_memory  # type: ignore[attr-defined]


def test_a_copy_and_a_pickle_are_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    found = stored(10, monkeypatch)[2:6]
    assert pickle.loads(pickle.dumps(found)) == copy.deepcopy(found) == examples(10)[2:6]
    assert repr(found) == "<StoredRows of 4 rows>"


def text(generator: random.Random) -> str:
    return " ".join(generator.sample(WORDS, 4))


LABELS: dict[str, Callable[[random.Random], Any]] = {
    "classification": lambda generator: generator.choice(["no", " No ", "yes"]),
    "multi-label": lambda generator: generator.sample(["a", "b", "c"], generator.randrange(3)),
    "regression": lambda generator: generator.random(),
    "text-to-text": text,
}


@pytest.mark.parametrize("fields", [("text",), ("text", "text_pair")], ids=["single", "pairs"])
@pytest.mark.parametrize("kind", LABELS)
def test_a_task_has_the_same_examples(
    kind: str,
    fields: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    generator = random.Random(0)
    rows = [{name: text(generator) for name in fields} | {"label": LABELS[kind](generator)} for _ in range(60)]
    path = write_lines(tmp_path / "rows.jsonl", *map(json.dumps, rows), '{"text": 3}')
    source = {"path": str(path), "held_out": {"validation": {"size": 10}, "test": {"size": 0.2}}}
    entry = parse(TaskEntry, {"name": "task", "kind": kind, "fields": fields, "source": source})
    for settings in ({}, {"n_train": 12, "n_validation": 3}, {"k_per_label": 2}):
        data = DataConfig(on_bad_row="skip", **settings)
        caplog.clear()
        expected, said = load_task(entry, 0, data, seed=1), caplog.messages[:]
        caplog.clear()
        with rows_in_memory(monkeypatch, 3):
            found = load_task(entry, 0, data, seed=1)
        assert found.task == expected.task
        assert found.num_skipped == expected.num_skipped == 1
        assert {split: list(of_split) for split, of_split in found.splits.items()} == expected.splits
        assert isinstance(found.splits["test"], StoredRows)
        assert caplog.messages == said


def test_errors_name_the_line(tmp_path: Path, place: str) -> None:
    lines = [json.dumps({"text": "w1", "label": label}) for label in ("no", "yes", "no", "yes", "maybe")]
    path = write_lines(tmp_path / "rows.jsonl", *lines)
    entry = parse(TaskEntry, {"name": "task", "labels": ["no", "yes"], "source": {"path": str(path)}})
    with pytest.raises(DataError, match=r"rows\.jsonl, line 5: unknown label 'maybe'"):
        load_task(entry, 0, DataConfig(), seed=0)


def test_a_run_is_the_same_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(0)
    for split in ("train", "validation", "test"):
        lines = [{"text": text(generator), "label": generator.choice(["no", "yes"])} for _ in range(24)]
        write_lines(tmp_path / f"{split}.jsonl", *map(json.dumps, lines))
    source = {"path": str(tmp_path / "{split}.jsonl")}
    recipe = parse(
        Recipe,
        {
            "backbone": str(save_backbone(tmp_path / "bert", "bert")),
            "model": {"adapter_dim": 4, "feature_layer": 1},
            "data": {"max_length": 16},
            "training": {"max_steps": 6, "batch_size": 8, "eval_steps": 3},
            "tasks": [{"name": name, "labels": ["no", "yes"], "source": source} for name in ("a", "b")],
        },
    )
    expected = train(recipe, tmp_path / "expected")
    with rows_in_memory(monkeypatch, 3):
        found = train(recipe, tmp_path / "found")
    state = found.model.adapter_state_dict()
    for name, value in expected.model.adapter_state_dict().items():
        assert torch.equal(state[name], value), name
    assert found.metrics | {"seconds": 0} == expected.metrics | {"seconds": 0}


def test_data_in_memory_may_be_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(0)
    table = pd.DataFrame({"text": [text(generator) for _ in range(20)], "label": ["no", "yes"] * 10})
    backbone = save_backbone(tmp_path / "bert", "bert")
    states = []
    for count in (3, 100):
        torch.manual_seed(0)
        model = HyperAdapterModel.from_backbone(str(backbone), [Task.classification("mood", ["no", "yes"])])
        with rows_in_memory(monkeypatch, count):
            trainer = Trainer(model, {"mood": table}, {"mood": table}, TrainingArguments(str(tmp_path), max_steps=2))
        assert isinstance(trainer.train_dataset, StoredRows) == (count == 3)
        trainer.train()
        assert trainer.evaluate()["eval_mean"] >= 0
        states.append(model.adapter_state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_stored_examples_are_checked_as_those_of_a_list_are(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [Task.classification(name, ["no", "yes"]) for name in ("first", "second")]
    same = stored(10, monkeypatch)
    assert list(read_examples(tasks, {"first": same}, "data")) == examples(10)
    bad = [*examples(9), Example(0, "text", None, 2)]
    with rows_in_memory(monkeypatch, 3):
        for rows in (bad, collect(bad, EXAMPLES)):
            with pytest.raises(DataError, match=r"data, task 'first', row 10: unknown label '2'"):
                read_examples(tasks, {"first": rows}, "data")
        for rows in (examples(10), collect(examples(10), EXAMPLES)):
            with pytest.raises(DataError, match="row 1: expected an example with task_id 1 or None, found 0"):
                read_examples(tasks, {"second": rows}, "data")


def test_heads_are_fitted_to_a_limited_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [Task.classification("large", ["no", "yes"]), Task.classification("small", ["no", "yes"])]
    backbone = save_backbone(tmp_path / "bert", "bert")
    model = HyperAdapterModel.from_backbone(str(backbone), tasks, label_names=False)
    rows = [*examples(40), Example(0, "rare", None, 1), *examples(6, task_id=1)]
    assert regression_examples(model, rows) == rows
    monkeypatch.setattr(text_heads, "HEAD_ROWS", 16)
    found = regression_examples(model, rows)
    assert [len(of_task) for of_task in by_task(found, 2)] == [10, 6]
    assert {row.target for row in by_task(found, 2)[0]} == {0, 1}
    assert set(found) <= set(rows)
    assert regression_examples(model, rows) == found
    # The features of validation rows are limited as well.
    seen = []
    monkeypatch.setattr(
        text_heads, "_set_adapted_heads", lambda model, train, validation, size: seen.extend(validation)
    )
    text_heads.fit_text_heads(model, rows, rows)
    assert seen == found


def test_thresholds_need_a_limited_number_of_training_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = save_backbone(tmp_path / "bert", "bert")
    model = HyperAdapterModel.from_backbone(str(backbone), [Task.classification("mood", ["no", "yes"])])
    counted = []
    monkeypatch.setattr(routing, "ROWS_FOR_THRESHOLDS", 12)
    compute = routing.similarities
    monkeypatch.setattr(routing, "similarities", lambda *given: counted.append(len(given[1])) or compute(*given))
    routing.calibrate(model, examples(40), [])
    assert max(counted) <= 12 * (1 + SHORT_FORMS)


def test_rows_in_a_file_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of what Python allocates is far below the size of the file."""
    monkeypatch.setattr(stored_rows, "ROWS_IN_MEMORY", 100)
    generator = random.Random(0)
    lines = (json.dumps({"text": text(generator) * 100, "label": generator.choice(["no", "yes"])}) for _ in range(4000))
    path = write_lines(tmp_path / "rows.jsonl", *lines)
    entry = parse(TaskEntry, {"name": "task", "source": {"path": str(path), "held_out": {"test": {"size": 0.1}}}})
    tracemalloc.start()
    try:
        found = load_task(entry, 0, DataConfig(), seed=0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.splits["train"]) == 3600
    assert peak < path.stat().st_size / 2


@contextmanager
def limit(kind: int, value: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_a_full_disk_a_missing_folder_and_too_many_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", *[json.dumps({"text": "w" * 1000})] * 50)
    monkeypatch.setattr(stored_rows, "ROWS_IN_MEMORY", 3)
    rows = read_file(path)
    with limit(resource.RLIMIT_FSIZE, 20_000), pytest.raises(OutputError, match=r"rows of large data .* set TMPDIR"):
        collect(rows, ROWS)
    kept = []
    with limit(resource.RLIMIT_NOFILE, 200), pytest.raises(OutputError, match="raise the limit of open files"):
        kept = [collect(rows, ROWS) for _ in range(200)]
    assert not kept
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(OutputError, match=r"missing: the rows of large data .* set TMPDIR"):
        collect(rows, ROWS)


def test_a_system_without_a_folder_for_temporary_files_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    monkeypatch.setattr(stored_rows, "ROWS_IN_MEMORY", 3)
    with pytest.raises(OutputError, match=r"the folder for temporary files: .* No usable temporary directory"):
        collect(examples(5), EXAMPLES)
