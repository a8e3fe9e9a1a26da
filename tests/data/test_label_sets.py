"""Sets of labels, the targets of multi-label tasks: how they are read, cut, collated and scored."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import tiny_tokenizer

from hyperadapters.config import DataConfig, Task, TaskEntry, parse
from hyperadapters.data.collate import make_collator
from hyperadapters.data.examples import Example, TaskData, label_examples, read_target
from hyperadapters.data.loading import load_task, subset
from hyperadapters.data.memory import read_examples, read_train_and_eval_data
from hyperadapters.data.sources import Row
from hyperadapters.errors import DataError
from hyperadapters.training.metrics import score
from hyperadapters.training.probes import majority

TASK = Task.multi_label("topics", ["a", "b", "c"], metrics=("micro_f1", "macro_f1", "subset_accuracy"))


def load(path: Path, **settings: Any) -> TaskData:
    source = {"path": str(path), **settings.pop("source", {})}
    values = {"name": "topics", "kind": "multi-label", "source": source, **settings}
    return load_task(parse(TaskEntry, values), 0, DataConfig(), seed=0)


@pytest.mark.parametrize(
    ("value", "target"),
    [
        (["c", "a"], (0, 2)),
        ([], ()),
        ("c; a", (0, 2)),
        ("", ()),
        (" ; ", ()),
        ("b", (1,)),
        (("b", "b"), (1,)),
        ({"b", "a"}, (0, 1)),
        (np.array(["a", "b"]), (0, 1)),
        (pa.array(["a"]).to_pylist(), (0,)),
        (pa.scalar(["a", "c"]), (0, 2)),
        (pd.Series(["a", " c "]), (0, 2)),
    ],
)
def test_labels_are_a_list_or_a_text_with_semicolons(value: Any, target: tuple[int, ...]) -> None:
    assert read_target(Row({"label": value}, "row 1"), TASK) == target


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["a", "d"], "row 1: unknown label 'd' of task 'topics'.*Known: a, b, c"),
        (["1"], "If it is an index, write the label's name, 'b'"),
        (None, "row 1: expected a list of labels.*found None; write an empty list for a row without labels"),
        (float("nan"), "expected a list of labels"),
        ({"a": 1}, "expected a list of labels"),
        ([["a"]], r"row 1: expected a label, found \['a'\]"),
        ([None], "row 1: expected a label, found None"),
    ],
)
def test_what_is_no_set_of_known_labels_is_refused(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_target(Row({"label": value}, "row 1"), TASK)


def test_whole_numbers_and_booleans_are_labels_as_in_classification() -> None:
    task = Task.multi_label("numbers", ["1", "true"])
    assert read_target(Row({"label": [1.0, True]}, "row"), task) == (0, 1)
    assert read_target(Row({"label": 1}, "row"), task) == (0,)


def test_files_of_every_kind_give_the_same_examples(tmp_path: Path) -> None:
    labels = [["b", "a"], [], ["a"]]
    rows = [{"text": f"w{n}", "label": found} for n, found in enumerate(labels)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.table({"text": ["w0", "w1", "w2"], "label": labels}), tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("text,label\nw0,b;a\nw1,\nw2,a\n")
    found = [load(tmp_path / f"rows.{ending}") for ending in ("jsonl", "parquet", "csv")]
    assert [one.task.labels for one in found] == [("a", "b")] * 3
    for one in found:
        assert {(row.text, row.target) for row in one.splits["train"]} == {("w0", (0, 1)), ("w1", ()), ("w2", (0,))}


def test_lists_of_class_indices_of_a_data_set_are_named() -> None:
    features = {"text": datasets.Value("string"), "label": datasets.Sequence(datasets.ClassLabel(names=["c", "a"]))}
    data = datasets.Dataset.from_dict(
        {"text": ["w1", "w2"], "label": [[0, 1], []]}, features=datasets.Features(features)
    )
    assert [row.target for row in read_examples((TASK,), {"topics": data}, "data")] == [(0, 2), ()]


def test_labels_in_lists_get_the_names_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "w1", "label": [0, 1]}\n{"text": "w2", "label": [1]}\n')
    found = load(tmp_path / "rows.jsonl", source={"label_names": {"0": "no", "1": "yes"}})
    assert found.task.labels == ("no", "yes")
    assert sorted(row.target for row in found.splits["train"]) == [(0, 1), (1,)]  # type: ignore[type-var]


def test_labels_that_no_training_row_has_are_refused_and_missing_ones_elsewhere_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError, match=r"label\(s\) c never occur in the training rows"):
        read_train_and_eval_data((TASK,), {"topics": [{"text": "w1", "label": ["a", "b"]}]})
    with caplog.at_level(logging.WARNING):
        read_train_and_eval_data(
            (TASK,),
            {"topics": [{"text": "w1", "label": "a;b; c"}, {"text": "w1", "label": ["c"]}]},
            {"topics": [{"text": "w1", "label": ["b"]}]},
        )
    assert "there are no evaluation rows with label a, c" in caplog.text
    (tmp_path / "rows.csv").write_text("text,label\nw0,\n")
    with pytest.raises(DataError, match="expected at least one label in the training rows"):
        load(tmp_path / "rows.csv")


def test_examples_in_memory_keep_their_targets() -> None:
    rows = [Example(0, "w1", None, (0, 2)), Example(None, "w2", None, ()), Example(0, "w3", None, (1,))]
    assert [row.target for row in read_examples((TASK,), {"topics": rows}, "data")] == [(0, 2), (), (1,)]
    with pytest.raises(DataError, match="unknown label '3'"):
        read_examples((TASK,), {"topics": [Example(0, "w1", None, (3,))]}, "data")


def test_the_names_of_labels_are_examples_with_this_label_only() -> None:
    task = Task.multi_label("topics", ["film_music", "sport"])
    assert label_examples([task]) == [Example(0, "film music", None, (0,)), Example(0, "sport", None, (1,))]


# Subsets


def rare(count: int = 40) -> list[Example]:
    """Rows of which few have the label c, and every third has none."""
    sets = [(), (0,), (0, 1)]
    return [Example(0, f"w{n}", None, (2,) if n in (17, 31) else sets[n % 3]) for n in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_a_subset_has_every_label_twice_and_subsets_are_nested(seed: int) -> None:
    small = subset(rare(), TASK, DataConfig(n_train=4), seed)
    large = subset(rare(), TASK, DataConfig(n_train=12), seed)
    assert large[: len(small)] == small
    assert len(large) == 12
    for chosen in (small, large):
        assert all(sum(label in row.target for row in chosen) >= 2 for label in range(3))  # type: ignore[operator,misc]


def test_k_per_label_takes_rows_until_each_label_has_k() -> None:
    chosen = subset(rare(), TASK, DataConfig(k_per_label=3), 0)
    counts = [sum(label in row.target for row in chosen) for label in range(3)]  # type: ignore[operator,misc]
    assert min(counts[:2]) >= 3
    assert counts[2] == 2
    assert sum(row.target == () for row in chosen) == 3
    assert len(chosen) < 15


@pytest.mark.parametrize("seed", range(5))
def test_held_out_rows_leave_each_label_in_the_training_rows(tmp_path: Path, seed: int) -> None:
    rows = [{"text": row.text, "label": ["abc"[label] for label in row.target]} for row in rare()]  # type: ignore[union-attr]
    rows = [row for row in rows if row["text"] != "w31"]  # one row with the label c remains
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "rows.jsonl"), "held_out": {"test": {"from": "train", "size": 30}}}
    entry = parse(TaskEntry, {"name": "topics", "kind": "multi-label", "source": source})
    found = load_task(entry, 0, DataConfig(), seed)
    assert found.task.labels == ("a", "b", "c")
    assert (len(found.splits["train"]), len(found.splits["test"])) == (9, 30)


# Batches


def test_a_batch_has_rows_of_zeros_and_ones_only_if_it_needs_them() -> None:
    tasks = [TASK, Task.classification("mood", ["bad", "good"]), Task.regression("size"), Task.multi_label("d", ["d"])]
    collator = make_collator("encoder", tiny_tokenizer(), tasks)
    mixed = [Example(0, "w1", None, (0, 2)), Example(1, "w1", None, 1), Example(2, "w1", None, 2.5)]
    labels = collator([*mixed, Example(3, "w1", None, ())])["labels"]
    assert labels.tolist() == [[1, 0, 1], [1, 0, 0], [2.5, 0, 0], [0, 0, 0]]
    assert labels.dtype == torch.float32
    assert collator(mixed[1:])["labels"].tolist() == [1, 2.5]
    assert collator([Example(3, "w1", None, (0,))])["labels"].tolist() == [[1]]


# Metrics


def test_metrics_are_those_of_scikit_learn() -> None:
    targets = [(0, 1), (), (1,), (0,)]
    answers = [(0,), (), (0, 1), None]
    found = score(TASK, targets, answers)
    # True positives 2 (a, b), false positives 1 (a), false negatives 2 (b, a).
    assert found["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    # a: tp 1, fp 1, fn 1; b: tp 1, fn 1; c occurs nowhere and does not count.
    assert found["macro_f1"] == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert found["subset_accuracy"] == pytest.approx(1 / 4)
    one = Task.multi_label("one", ["a"], metrics=TASK.metrics)
    targets = [(0,), (), (), ()]
    assert score(one, targets, [()] * 4) == {"micro_f1": 0.0, "macro_f1": 0.0, "subset_accuracy": 0.75}
    assert score(one, targets, [(0,), (0,), (), ()]) == pytest.approx(
        {"micro_f1": 2 / 3, "macro_f1": 2 / 3, "subset_accuracy": 0.75}
    )
    assert score(TASK, [()], [()]) == {"micro_f1": 0.0, "macro_f1": 0.0, "subset_accuracy": 1.0}
    assert score(TASK, [()], [None])["subset_accuracy"] == 0.0


def test_the_majority_is_the_most_frequent_set() -> None:
    rows = {"train": [Example(0, "w", None, found) for found in ((0,), (0, 1), (0, 1))]}
    data = TaskData(TASK, {**rows, "test": [Example(0, "w", None, (0, 1))]})  # type: ignore[dict-item]
    assert majority(data)["subset_accuracy"] == 1.0
