"""The check of planned memory: its table in the documents is that of its rows."""

from __future__ import annotations

import plan_check
from tables import read


def test_the_table_of_the_document_is_that_of_the_rows() -> None:
    text = plan_check.DOCUMENT.read_text(encoding="utf-8")
    assert plan_check.filled(text, read(plan_check.RESULTS)) == text
    assert text.count("<!-- table: plan -->") == 1


def test_planned_memory_is_close_to_the_measured_peak() -> None:
    rows = read(plan_check.RESULTS)
    assert rows
    assert [row["name"] for row in rows if not 0.85 < row["planned"] / row["peak"] < 1.15] == []


def test_a_table_has_a_row_for_each_training() -> None:
    parts = {"backbone": 2**20, "activations for the backward pass": 3 * 2**20}
    row = {
        "name": "one",
        "rows": 4,
        "tokens": 8,
        "parts": parts,
        "planned": 5 * 2**20,
        "peak": 4 * 2**20,
        "ratio": 1.25,
    }
    table = plan_check.plan_table([{**row, "peak_default": None, "ratio_default": None}])
    assert table.splitlines()[2:] == ["| one | 4 x 8 | 1 | 3 | 5 | 4 | 1.25 | \N{EN DASH} | \N{EN DASH} |"]
