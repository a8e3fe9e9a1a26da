"""Guesses of which columns of a table hold the text and the label of a task, and of the kind of the task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hyperadapters.config import LABEL_SEPARATOR, METRICS_OF_KIND, Kind
from hyperadapters.data.rows import is_absent, plain
from hyperadapters.data.sources import Row
from hyperadapters.errors import DataError, TaskError, shown, unknown_name

PAIRS = (
    ("text", "text_pair"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("sentence_a", "sentence_b"),
    ("question1", "question2"),
    ("question_1", "question_2"),
    ("premise", "hypothesis"),
    ("question", "passage"),
    ("question", "sentence"),
    ("question", "context"),
    ("query", "document"),
    ("query", "passage"),
)
"""Usual names of the columns of text pairs."""
TEXTS = (
    *("text", "sentence", "content", "message", "utterance", "review", "comment", "tweet", "question", "query"),
    *("prompt", "body", "document", "headline", "title"),
)
"""Usual names of columns of texts; if a table has several of them, the earliest is the text."""
LABELS = (
    *("label", "labels", "target", "class", "category", "intent", "sentiment", "topic", "rating", "stars", "score"),
    *("similarity", "relevance", "y"),
)
"""Usual names of columns of labels, in the same order of preference."""
SCALES = ("rating", "stars", "score", "similarity", "relevance")
"""Usual names of labels that are numbers on a scale."""
MIN_WORDS = 3
"""Mean number of words from which on a column of different strings is taken for texts."""
MAX_NUMERIC_LABELS = 20
"""Number of different whole numbers up to which they are taken for the names of classes."""


@dataclass(frozen=True)
class Schema:
    """Columns and kind of a task.

    Attributes:
        texts: Name of the column of the text, or names of the two columns of a pair.
        label: Name of the column of the label.
        kind: Kind of the task.
        reasons: Why the `texts`, the `label` and the `kind` were chosen, by these names.
    """

    texts: tuple[str, ...]
    label: str
    kind: Kind
    reasons: dict[str, str]

    @property
    def columns(self) -> dict[str, str]:
        """Names of the columns for text, text_pair and label that differ from these, as in a recipe."""
        names = dict(zip(("text", "text_pair"), self.texts, strict=False)) | {"label": self.label}
        return {name: column for name, column in names.items() if name != column}

    @property
    def fields(self) -> list[str]:
        """Fields of the task, as in a recipe."""
        return ["text", "text_pair"][: len(self.texts)]


def infer_schema(
    rows: Sequence[Row], place: str, texts: Sequence[str] = (), label: str | None = None, kind: Kind | None = None
) -> Schema:
    """Guess the columns of a task and its kind from the names and the values of the columns.

    Args:
        rows: Rows of the table.
        place: Name of the table, for messages.
        texts: One or two columns of texts, which are then not guessed. Default: none.
        label: Column of the label. Default: it is guessed.
        kind: Kind of the task. Default: it is guessed.

    Returns:
        The columns, the kind, and the reason of each choice.

    Raises:
        TaskError: If the kind is unknown.
        DataError: If a column that is given does not exist, or several columns or none could be the text or the label,
            or a column of classes has almost as many classes as rows.
    """
    if kind is not None and kind not in METRICS_OF_KIND:
        raise TaskError(unknown_name("kind", kind, METRICS_OF_KIND))
    if not rows:
        raise DataError(f"{place}: expected at least one row, found none")
    names = dict.fromkeys(str(name) for row in rows for name in row.values)
    columns = {name: _Column.of(name, [row.values.get(name) for row in rows]) for name in names}
    if len(columns) == 1 and any(mark in (only := next(iter(columns))) for mark in ",;|\t"):
        raise DataError(f"{place}: the only column is '{only}'; give the delimiter of the file with --delimiter")
    given = [*texts, *([] if label is None else [label])]
    for name in given:
        if name not in columns:
            raise DataError(f"{place}: {unknown_name('column', name, columns)}")
    if len(texts) > 2:
        raise DataError(f"{place}: expected one or two columns of texts, found {', '.join(texts)}")
    if len(set(given)) < len(given):
        raise DataError(f"{place}: a column is given twice: {', '.join(given)}; name each column once")
    reasons = dict.fromkeys(("texts", "label", "kind"), "it was given")
    found = tuple(texts)
    if not found:
        others = [column for name, column in columns.items() if name != label]
        found, reasons["texts"] = _choose_texts(others, place)
    if label is None:
        label, reasons["label"] = _choose_label(
            [column for name, column in columns.items() if name not in found], place
        )
    if kind is None:
        kind, reasons["kind"] = _choose_kind(columns[label], place)
    return Schema(found, label, kind, reasons)


@dataclass(frozen=True)
class _Column:
    """What is known of the values of a column.

    Attributes:
        name: Its name.
        filled: Number of values that are not missing.
        distinct: Number of different values.
        words: Mean number of words of strings that are not numbers; 0 if most values are not such strings.
        numeric: Whether all values are numbers.
        whole: Whether all values are whole numbers.
        lists: Whether all values are lists.
        joined: Whether some values are several labels with `LABEL_SEPARATOR` between them, which also occur elsewhere.
    """

    name: str
    filled: int
    distinct: int
    words: float
    numeric: bool
    whole: bool
    lists: bool
    joined: bool

    @classmethod
    def of(cls, name: str, cells: Sequence[object]) -> _Column:
        values = [value for value in map(plain, cells) if not is_absent(value)]
        numbers = [_number(value) for value in values]
        texts = [
            value for value, number in zip(values, numbers, strict=True) if number is None and isinstance(value, str)
        ]
        words = sum(len(text.split()) for text in texts) / len(texts) if 2 * len(texts) > len(values) else 0.0
        is_numeric = bool(values) and None not in numbers
        is_whole = is_numeric and all(number is not None and number.is_integer() for number in numbers)
        distinct = len({value if isinstance(value, str) else shown(value) for value in values})
        has_lists = bool(values) and all(isinstance(value, list) for value in values)
        return cls(name, len(values), distinct, words, is_numeric, is_whole, has_lists, _are_joined(texts))

    @property
    def holds_strings(self) -> bool:
        return self.words > 0

    @property
    def looks_like_text(self) -> bool:
        return self.words >= MIN_WORDS and 2 * self.distinct > self.filled

    @property
    def looks_like_label(self) -> bool:
        is_fraction = self.numeric and not self.whole
        return self.distinct >= 2 and (is_fraction or self.lists or self.joined or 2 * self.distinct <= self.filled)


def _are_joined(texts: Sequence[str]) -> bool:
    parts = [[part.strip() for part in text.split(LABEL_SEPARATOR) if part.strip()] for text in texts]
    counts = Counter(part for of_text in parts for part in of_text)
    several = [of_text for of_text in parts if len(of_text) > 1]
    return bool(several) and all(counts[part] > 1 for of_text in several for part in of_text)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _choose_texts(columns: Sequence[_Column], place: str) -> tuple[tuple[str, ...], str]:
    strings = {column.name.casefold(): column.name for column in columns if column.holds_strings}
    for first, second in PAIRS:
        if first in strings and second in strings:
            pair = (strings[first], strings[second])
            return pair, f"'{pair[0]}' and '{pair[1]}' are usual names of the columns of pairs"
    for name in TEXTS:
        if name in strings:
            return (strings[name],), f"'{strings[name]}' is a usual name of the column of the text"
    found = [column.name for column in columns if column.looks_like_text]
    if len(found) == 1:
        return (found[0],), "it is the only column of texts of several words that differ from row to row"
    advice = "name it with --text COLUMN, and for pairs give --text twice"
    raise DataError(_ambiguous("text", found, columns, place, advice))


def _choose_label(columns: Sequence[_Column], place: str) -> tuple[str, str]:
    if (named := _usual_label(columns, distinct=2)) is not None:
        return named
    found = [column.name for column in columns if column.looks_like_label]
    if len(found) == 1:
        return found[0], "it is the only other column whose values are repeated, or are numbers"
    if not found and (named := _usual_label(columns, distinct=1)) is not None:
        return named
    raise DataError(_ambiguous("label", found, columns, place, "name it with --label COLUMN"))


def _usual_label(columns: Sequence[_Column], distinct: int) -> tuple[str, str] | None:
    """Return the first column with a usual name and at least so many different values."""
    usable = {column.name.casefold(): column.name for column in columns if column.distinct >= distinct}
    for name in LABELS:
        if name in usable:
            return usable[name], f"'{usable[name]}' is a usual name of the column of the label"
    return None


def _ambiguous(what: str, found: Sequence[str], columns: Sequence[_Column], place: str, advice: str) -> str:
    known = ", ".join(column.name for column in columns) or "none"
    if not found:
        return f"{place}: no column looks like the {what}; the columns are: {known}; {advice}"
    return f"{place}: several columns could be the {what}: {', '.join(found)}; {advice}"


def _choose_kind(label: _Column, place: str) -> tuple[Kind, str]:
    if label.lists:
        return "multi-label", f"the values of '{label.name}' are lists"
    if label.joined:
        return "multi-label", f"'{label.name}' has values with several labels, separated by '{LABEL_SEPARATOR}'"
    if label.numeric and not label.whole:
        return "regression", f"the values of '{label.name}' are numbers with fractions"
    if label.numeric and label.name.casefold() in SCALES:
        return "regression", f"the values of '{label.name}' are numbers, and it is a usual name of a scale"
    if label.numeric and label.distinct > MAX_NUMERIC_LABELS:
        return "regression", f"'{label.name}' has {label.distinct} different whole numbers"
    if 2 * label.distinct > label.filled > 4:
        raise DataError(
            f"{place}: '{label.name}' has {label.distinct} different values in {label.filled} rows, too many for "
            "classes; name another column with --label, or the kind with --kind"
        )
    return "classification", f"'{label.name}' has {label.distinct} different values that are repeated"
