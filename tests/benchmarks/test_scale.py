"""The measurement of task stores: its table in the document is that of its rows, and the exponents are right."""

from __future__ import annotations

import pytest
import scale
from tables import read


def test_the_table_of_the_document_is_that_of_the_rows() -> None:
    text = scale.DOCUMENT.read_text(encoding="utf-8")
    rows = read(scale.RESULTS)
    assert [row["tasks"] >= size for row, size in zip(rows[:-1], scale.SIZES, strict=True)] == [True] * 4
    assert scale.filled(text, rows) == text
    assert text.count("<!-- table: scale -->") == 1


def test_exponents_are_those_of_power_laws() -> None:
    rows = [{"tasks": tasks, **dict.fromkeys(scale.FIGURES, 3.0)} for tasks in (10, 100, 1000)]
    for row in rows:
        row["open_ms"], row["after_open_mb"] = 2.0 * row["tasks"] ** 0.5, 0.0
    found = scale.exponents(rows)
    assert found["open_ms"] == pytest.approx(0.5)
    assert found["bytes_a_task"] == pytest.approx(0.0)
    assert found["after_open_mb"] is None
