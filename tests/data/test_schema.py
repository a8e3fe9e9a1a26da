"""Guesses of columns and kinds, on tables as people have them."""

from __future__ import annotations

from typing import Any

import pytest

from hyperadapters.data.schema import infer_schema
from hyperadapters.data.sources import Row
from hyperadapters.errors import DataError, HyperAdaptersError


def table(**columns: list[Any]) -> list[Row]:
    names = list(columns)
    return [Row(dict(zip(names, cells, strict=True)), "data.csv") for cells in zip(*columns.values(), strict=True)]


TEXTS = [f"this is the text of row {number}" for number in range(12)]
OTHERS = [f"quite another text stands here {number}" for number in range(12)]
CLASSES = ["yes", "no", "no"] * 4
IDS = [f"{number:04}" for number in range(12)]


@pytest.mark.parametrize(
    ("columns", "texts", "label", "kind"),
    [
        ({"text": TEXTS, "label": CLASSES}, ("text",), "label", "classification"),
        ({"id": IDS, "Utterance": TEXTS, "Intent": CLASSES}, ("Utterance",), "Intent", "classification"),
        ({"id": IDS, "what": TEXTS, "verdict": CLASSES}, ("what",), "verdict", "classification"),
        ({"title": OTHERS, "text": TEXTS, "label": CLASSES}, ("text",), "label", "classification"),
        ({"premise": TEXTS, "hypothesis": OTHERS, "label": [0, 1, 2] * 4}, ("premise", "hypothesis"), "label", "c"),
        ({"text": TEXTS, "text_pair": OTHERS, "label": CLASSES}, ("text", "text_pair"), "label", "c"),
        ({"text": TEXTS, "text_pair": [""] * 12, "label": CLASSES}, ("text",), "label", "c"),
        ({"review": TEXTS, "stars": ["1", "5", "3"] * 4}, ("review",), "stars", "regression"),
        ({"text": TEXTS, "label": [str(0.5 * n) for n in range(12)]}, ("text",), "label", "regression"),
        ({"text": TEXTS, "value": [0.1 * n for n in range(12)]}, ("text",), "value", "regression"),
        ({"text": TEXTS, "topics": [["a", str(n)] for n in range(11)] + [[]]}, ("text",), "topics", "multi-label"),
        ({"text": TEXTS, "label": ["a", "b", "a;b", "", "b;c", "c"] * 2}, ("text",), "label", "multi-label"),
        ({"text": TEXTS, "label": ["x"] * 12}, ("text",), "label", "classification"),
        ({"text": TEXTS, "label": [None, *range(1, 12)]}, ("text",), "label", None),
        ({"text": TEXTS * 3, "age": list(range(36)), "label": CLASSES * 3}, ("text",), "label", "c"),
    ],
)
def test_columns_and_kind_are_guessed(columns: Any, texts: tuple[str, ...], label: str, kind: str | None) -> None:
    if kind is None:
        with pytest.raises(DataError, match="'label' has 11 different values in 11 rows, too many for classes"):
            infer_schema(table(**columns), "data.csv")
        return
    found = infer_schema(table(**columns), "data.csv")
    assert (found.texts, found.label) == (texts, label)
    assert found.kind.startswith(kind)
    assert all(reason for reason in found.reasons.values())


def test_what_is_given_is_not_guessed() -> None:
    rows = table(text=TEXTS, other=OTHERS, label=CLASSES, stars=[1, 2, 3] * 4)
    found = infer_schema(rows, "data.csv", ["other", "text"], "stars", "classification")
    assert (found.texts, found.label, found.kind) == (("other", "text"), "stars", "classification")
    assert found.columns == {"text": "other", "text_pair": "text", "label": "stars"}
    assert found.fields == ["text", "text_pair"]
    assert set(found.reasons.values()) == {"it was given"}


def test_usual_names_need_no_columns() -> None:
    assert infer_schema(table(text=TEXTS, label=CLASSES), "data.csv").columns == {}


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {"a": TEXTS, "b": OTHERS, "label": CLASSES},
            {},
            "several columns could be the text: a, b; name it with --text",
        ),
        (
            {"text": TEXTS, "a": CLASSES, "b": CLASSES},
            {},
            "several columns could be the label: a, b; name it with --la",
        ),
        ({"text": TEXTS, "id": IDS}, {}, "no column looks like the label; the columns are: id"),
        ({"a": IDS, "b": CLASSES}, {}, "no column looks like the text"),
        ({"text": TEXTS, "label": CLASSES}, {"label": "lable"}, "Unknown column 'lable'. Did you mean 'label'"),
        ({"text": TEXTS, "label": CLASSES}, {"texts": ["txet"]}, "Unknown column 'txet'. Did you mean 'text'"),
        ({"text": TEXTS, "label": CLASSES}, {"texts": ["text"] * 3}, "expected one or two columns of texts"),
        ({"text": TEXTS, "label": CLASSES}, {"texts": ["text", "text"]}, "a column is given twice: text, text"),
        (
            {"text": TEXTS, "label": CLASSES},
            {"texts": ["text"], "label": "text"},
            "a column is given twice: text, text",
        ),
        ({"text": TEXTS, "label": CLASSES}, {"kind": "clasification"}, "Did you mean 'classification'"),
        ({"text": [], "label": []}, {}, "expected at least one row, found none"),
        ({"text,label": TEXTS}, {}, "the only column is 'text,label'; give the delimiter of the file with --delimiter"),
    ],
)
def test_what_is_ambiguous_or_wrong_is_refused(columns: Any, options: Any, message: str) -> None:
    with pytest.raises(HyperAdaptersError, match=message.replace("(", r"\(")):
        infer_schema(table(**columns), "data.csv", **options)
