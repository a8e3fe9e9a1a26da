"""The report of repeated inputs, on invented rows."""

from __future__ import annotations

from typing import Any

from efficiency.leakage_tables import suites_table, texts_table
from leakage import comparable, report

from hyperadapters import Task
from hyperadapters.data.examples import Example, TaskData


def _task(name: str, train: list[Any], validation: list[Any], test: list[Any]) -> TaskData:
    rows = {"train": train, "validation": validation, "test": test}
    splits: Any = {
        split: [Example(0, *((text,) if isinstance(text, str) else text)) for text in texts]
        for split, texts in rows.items()
    }
    return TaskData(Task.classification(name, ["no", "yes"]), splits)


def test_case_and_spacing_do_not_count() -> None:
    assert comparable(Example(0, " Two  WORDS\n")) == comparable(Example(1, "two words")) == ("two words",)
    assert comparable(Example(0, "two words", "")) != comparable(Example(0, "two words"))


def test_repeated_and_shared_rows_are_counted() -> None:
    found = report([_task("mood", ["a", "A", "b", "a "], ["b", "c"], ["c", "a", "a", "d"])])
    assert found["tasks"] == [
        {
            "task": "mood",
            "rows": {"train": 4, "validation": 2, "test": 4},
            "repeated": {"train": 2, "validation": 0, "test": 1},
            "shared": {"train_validation": 1, "train_test": 2, "validation_test": 1},
        }
    ]
    assert found["tested"] == [{"test": "mood", "train": "mood", "rows": 4, "inputs": 2, "texts": 2}]


def test_rows_of_one_task_in_another_are_counted() -> None:
    pairs = _task("pairs", [("a", "b"), ("c", "d")], [], [("A", "b"), ("a", "e"), ("f", "g")])
    found = report([_task("one", ["a", "x"], [], ["c", "y"]), pairs, _task("other", ["X"], [], [])])
    assert found["tested"] == [
        {"test": "one", "train": "pairs", "rows": 2, "inputs": 0, "texts": 1},
        {"test": "pairs", "train": "one", "rows": 3, "inputs": 0, "texts": 2},
        {"test": "pairs", "train": "pairs", "rows": 3, "inputs": 1, "texts": 2},
    ]
    assert found["trained"] == [{"tasks": ["one", "other"], "inputs": 1}]


def test_tables() -> None:
    pairs = _task("pairs", [("a", "b"), ("c", "d"), ("c", "D")], [], [("A", "b"), ("a", "e"), ("f", "g")])
    found = report([pairs, _task("one", ["a"], ["a"], ["b"])])
    numbers = "2 | 4 | 1 | 4 | 1 | 2 | 0 | 3 | 0"  # one repeated row, one input in two splits, three texts across
    assert suites_table({"all": found}).splitlines()[2] == f"| all | {numbers} |"
    assert texts_table({"all": found}).splitlines()[2:] == [
        "| pairs (3) | pairs 2 (1 whole), one 2 |",
        "| one (1) | pairs 1 |",
    ]
