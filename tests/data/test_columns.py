"""Texts from several columns, and rows that are chosen by their values."""

from __future__ import annotations

from typing import Any

import pytest

from hyperadapters.config import Source
from hyperadapters.data.columns import is_taken, rename, used_columns
from hyperadapters.errors import DataError

ROW: dict[str, Any] = {
    "premise": "It rains.",
    "choices": {"label": ["A", "B"], "text": ["a cat", "{premise}"]},
    "answers": ["first", "second"],
    "start": 3,
    "{odd}": "a column with braces",
}


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("premise", "It rains."),
        ("{premise}", "It rains."),
        ("so: {premise} {start}", "so: It rains. 3"),
        ("{answers[1]}", "second"),
        ("{answers}", "first, second"),
        ("A: {choices[text][0]}", "A: a cat"),
        ("{choices[text][1]}", "{premise}"),
        ("{odd}", "a column with braces"),
        ("start", 3),
    ],
)
def test_column_is_a_name_or_a_text_with_values_of_columns(column: str, text: object) -> None:
    assert rename(ROW, Source(demo="any", columns={"text": column}), "row 1") == {**ROW, "text": text}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("{premisse}", r"row 1: no column 'premisse' \(for text\)\. Did you mean 'premise'"),
        ("{answers[2]}", r"row 1: expected a part \[2\] of 'answers' \(for text: \{answers\[2\]\}\), found \['first'"),
        ("{choices[words]}", r"expected a part \[words\] of 'choices'"),
        ("{start[0]}", r"expected a part \[0\] of 'start' .*, found 3"),
        ("{answers[first]}", r"expected a part \[first\] of 'answers'"),
    ],
)
def test_missing_column_or_part_is_reported(column: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rename(ROW, Source(demo="any", columns={"text": column}), "row 1")


def test_attributes_of_values_are_not_read() -> None:
    with pytest.raises(DataError, match=r"no column 'premise\.__class__'"):
        rename(ROW, Source(demo="any", columns={"text": "{premise.__class__}"}), "row 1")


def test_rows_are_chosen_by_their_values() -> None:
    assert is_taken(ROW, Source(demo="any", where={}), "row 1")
    assert is_taken(ROW, Source(demo="any", where={"start": "3", "premise": "It rains."}), "row 1")
    assert not is_taken(ROW, Source(demo="any", where={"start": "3", "premise": "It snows."}), "row 1")
    with pytest.raises(DataError, match=r"row 1: no column 'stat' \(for where\)\. Did you mean 'start'"):
        is_taken(ROW, Source(demo="any", where={"stat": "3"}), "row 1")


def test_only_columns_that_are_used_are_read_unless_one_is_missing() -> None:
    known = ["id", "label", "tokens", "subset", "question", "context"]
    columns = {"text": "{question} of {context}"}
    source = Source(dataset="x", columns=columns, where={"subset": "s"})
    assert used_columns(source, known) == ["label", "subset", "question", "context"]
    assert used_columns(Source(dataset="x", columns={"text": "questoin"}), known) == known
