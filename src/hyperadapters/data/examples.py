"""Rows of a task as the rest of the library sees them: checked, and free of column names and files."""

from __future__ import annotations

import logging
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hyperadapters.config import Split, Task, normalize_label
from hyperadapters.data.rows import is_absent, plain
from hyperadapters.data.sources import Row
from hyperadapters.errors import DataError, did_you_mean

FLOAT32_MAX = 3.4028234e38
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Example:
    """One input of one task.

    Attributes:
        task_id: index of its task in the model, or None when it is to be routed.
        text, text_pair: the fields.
        target: index of the label (classification), number (regression), text (text-to-text), or None when unknown.
    """

    task_id: int | None
    text: str
    text_pair: str | None = None
    target: int | float | str | None = None


@dataclass(frozen=True)
class TaskData:
    """A task with its labels known, and its examples for each split."""

    task: Task
    splits: dict[Split, list[Example]] = field(default_factory=dict)


def read_fields(row: Row, task: Task) -> tuple[str, str | None]:
    """Return the text and the second text (None unless the task has pairs) of a row.

    Raises:
        DataError: a field is missing or is not a text, or there is a second text that the task does not read.
    """
    if not task.is_pair and not is_absent(plain(row.values.get("text_pair"))):
        raise DataError(
            f"{row.place}: has a text_pair, which task '{task.name}' does not read; "
            "make the task with fields=('text', 'text_pair'), or remove the text_pair"
        )
    texts = []
    for name in task.fields:
        value = plain(_cell(row, name))
        if not isinstance(value, str):
            raise DataError(f"{row.place}: expected a text in '{name}', found {value!r}")
        _check_unicode(row, name, value)
        texts.append(value)
    return texts[0], texts[1] if task.is_pair else None


def read_target(row: Row, task: Task) -> int | float | str:
    """Return the target of a row: label index, number or text.

    Raises:
        DataError: it is missing, an unknown label, not a number, or not finite.
    """
    value = plain(_cell(row, "label"))
    if task.kind == "classification":
        label = _label_name(row, value)
        if label not in task.labels:
            raise DataError(
                f"{row.place}: unknown label '{label}' of task '{task.name}'."
                f"{did_you_mean(label, task.labels)} Known: {', '.join(task.labels)}"
            )
        return task.labels.index(label)
    if task.kind == "regression":
        return _number(row, value)
    if not isinstance(value, str):
        raise DataError(f"{row.place}: expected a target text, found {value!r}")
    _check_unicode(row, "label", value)
    return value


def infer_labels(rows: list[Row]) -> tuple[str, ...]:
    """Return the sorted labels of the rows."""
    return tuple(sorted(set(map(read_label, rows))))


def read_label(row: Row) -> str:
    """Return the normalised label of a row of a classification.

    Raises:
        DataError: it is missing, or cannot be a label.
    """
    return _label_name(row, _cell(row, "label"))


def warn_of_spellings(task: Task, rows: Iterable[Row]) -> None:
    """Log a warning if rows spell one label of a classification differently, and one if labels look almost alike."""
    spellings, cases = defaultdict(set), defaultdict(list)
    for row in rows if task.labels else ():
        label = plain(row.values.get("label"))
        if isinstance(label, str):
            spellings[normalize_label(label)].add(label)
    for name in task.labels:
        cases[_folded(name)].append(name)
    # ASCII, because the difference between two spellings need not be visible.
    merged = [" and ".join(map(ascii, sorted(found))) for found in spellings.values() if len(found) > 1]
    if merged:
        logger.warning(
            f"task '{task.name}': the rows spell a label in several ways, which are read as one label: "
            f"{'; '.join(merged)}"
        )
    kept = [" and ".join(map(ascii, found)) for found in cases.values() if len(found) > 1]
    if kept:
        logger.warning(
            f"task '{task.name}': labels differ only in case, spaces or characters that look alike or cannot be seen, "
            f"and stay labels of their own: {'; '.join(kept)}; if they are one label, spell it in one way"
        )


def _folded(label: str) -> str:
    """A label without case, the kind and number of its spaces, and what Unicode counts as format or compatibility."""
    compatible = unicodedata.normalize("NFKC", label).casefold()
    return " ".join("".join(char for char in compatible if unicodedata.category(char) != "Cf").split())


def label_examples(tasks: Sequence[Task]) -> list[Example]:
    """The names of labels as examples of them, of classifications that read one text and whose names have letters."""
    return [
        Example(task_id, name.replace("_", " "), None, label)
        for task_id, task in enumerate(tasks)
        if not task.is_pair and all(any(map(str.isalpha, name)) for name in task.labels)
        for label, name in enumerate(task.labels)
    ]


def _cell(row: Row, name: str) -> object:
    if name not in row.values:
        raise DataError(
            f"{row.place}: no column '{name}'.{did_you_mean(name, row.values)} Found: {', '.join(row.values)}. "
            f"Rename the column, or in a recipe name it in the source: columns: {{{name}: ...}}"
        )
    return row.values[name]


def _label_name(row: Row, value: object) -> str:
    value = plain(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))  # pandas reads integers as floats where some are missing
    label = normalize_label(value) if isinstance(value, str) else ""
    if not label:
        raise DataError(f"{row.place}: expected a label, found {value!r}")
    _check_unicode(row, "label", label)
    return label


def _check_unicode(row: Row, name: str, value: str) -> None:
    if any("\ud800" <= char <= "\udfff" for char in value):  # half of a pair, which JSON can spell: no character
        raise DataError(f"{row.place}: '{name}' is not valid Unicode: {value!r}")


def _number(row: Row, value: object) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError):
        raise DataError(f"{row.place}: expected a number as target, found {value!r}") from None
    if not abs(number) <= FLOAT32_MAX:
        raise DataError(f"{row.place}: expected a finite number as target, found {value!r}; remove or mend the row")
    return number
