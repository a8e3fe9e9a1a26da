"""The table of the benchmark of suggestions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import suggest
from tables import read

DOCUMENT = Path(suggest.__file__).parents[1] / "docs" / "tasks.md"


def test_the_table_of_the_document_is_that_of_the_rows() -> None:
    assert suggest.tables(read(suggest.RESULTS)) in DOCUMENT.read_text(encoding="utf-8")


def row(task: str, seed: int, strategy: str, space: str | None, *accuracy: float) -> dict[str, Any]:
    return {
        "fit": "regression",
        "task": task,
        "seed": seed,
        "strategy": strategy,
        "space": space,
        "accuracy": [0.5, *accuracy],
    }


def test_benefits_are_those_over_random_rows_of_the_same_task_and_seed() -> None:
    rows = [
        row("one", 0, "random", None, 0.5, 0.5, 0.5, 0.5),
        row("one", 1, "random", None, 0.6, 0.6, 0.6, 0.6),
        row("two", 0, "random", None, 0.7, 0.7, 0.7, 0.7),
        row("one", 0, "margin", None, 0.6, 0.6, 0.6, 0.6),
        row("one", 1, "margin", None, 0.6, 0.6, 0.6, 0.8),
        row("two", 0, "margin", None, 0.6, 0.6, 0.6, 0.6),
    ]
    *_, line = suggest.tables(rows).splitlines()
    # The means of task one are 5, 5, 5 and 15 points, those of task two -10; the three curves have 10, 5 and -10.
    assert line == "| regression | margin |  | -2.5 | -2.5 | -2.5 | +2.5 | -1.2 | 10.4 | 1 of 2 |"
