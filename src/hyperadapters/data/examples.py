"""Examples, the checked rows of tasks, which no longer depend on files and names of columns."""

from __future__ import annotations

import logging
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hyperadapters.config import LABEL_SEPARATOR, Split, Task, normalize_label
from hyperadapters.data.rows import by_column, is_absent, plain
from hyperadapters.data.sources import Row
from hyperadapters.data.stored_rows import Codec, take
from hyperadapters.data.targets import Target
from hyperadapters.errors import DataError, did_you_mean, shown

FLOAT32_MAX = 3.4028234e38
MAX_DIGITS = 100
"""Number of digits up to which a label is read as a number; Python refuses to convert thousands of digits."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Example:
    """One input, with its task and its target if they are known.

    Attributes:
        task_id: Index of the task in the model, or None for an input that is to be routed.
        text: Text, or the first text of a pair.
        text_pair: Second text of a pair, or None.
        target: Index of the label (classification), indices of any number of labels in ascending order (multi-label),
            number (regression), text (text-to-text), or None if unknown.
    """

    task_id: int | None
    text: str
    text_pair: str | None = None
    target: Target | None = None


def _of_stored_values(values: list[Any]) -> Example:
    task_id, text, text_pair, target = values
    return Example(task_id, text, text_pair, tuple(target) if isinstance(target, list) else target)


EXAMPLES = Codec[Example](
    encode=lambda example: [example.task_id, example.text, example.text_pair, example.target],
    decode=_of_stored_values,
)


@dataclass(frozen=True)
class TaskData:
    """A task with its examples.

    Attributes:
        task: Definition of the task, including its labels.
        splits: Examples of each split.
        num_skipped: Number of rows that were skipped because they cannot be read.
    """

    task: Task
    splits: dict[Split, Sequence[Example]] = field(default_factory=dict)
    num_skipped: int = 0


def by_task(examples: Sequence[Example], num_tasks: int) -> list[Sequence[Example]]:
    """Return the examples of each task, in their order.

    Args:
        examples: Examples with task ids.
        num_tasks: Number of tasks of the model.
    """
    places: list[list[int]] = [[] for _ in range(num_tasks)]
    for place, example in enumerate(examples):
        assert example.task_id is not None
        places[example.task_id].append(place)
    return [take(examples, own) for own in places]


def example_row(example: Any, place: str, task: Task) -> Row:
    """Return an example of a task as a row.

    Args:
        example: Mapping with `text` and `label`, `Row`, or `Example`.
        place: Location of the example, for messages.
        task: Task of the example.

    Raises:
        DataError: If the example has another type.
    """
    if isinstance(example, Row):
        return example
    if isinstance(example, Example):
        label = _named(task, example.target)
        return Row({"text": example.text, "text_pair": example.text_pair, "label": label}, place)
    example = by_column(example)
    if isinstance(example, Mapping):
        return Row(dict(example), place)
    raise DataError(
        f"{place}: expected a mapping with text and label, found {shown(example)}; pass a dict for each example"
    )


def _named(task: Task, target: object) -> object:
    """Return a target in which indices of labels are names, as a row has them; others are not changed."""
    if task.is_multi_label and isinstance(target, tuple):
        return [_named_label(task, index) for index in target]
    return _named_label(task, target) if task.kind == "classification" else target


def _named_label(task: Task, index: object) -> object:
    return task.labels[index] if isinstance(index, int) and 0 <= index < len(task.labels) else index


def read_fields(row: Row, task: Task) -> tuple[str, str | None]:
    """Return the texts of a row, where the second one is None if the task does not have text pairs.

    Args:
        row: Row to read.
        task: Task of the row.

    Raises:
        DataError: If a field is missing or is not a string, or the row has a second text that the task does not read.
    """
    if not task.is_pair and not is_absent(plain(row.values.get("text_pair"))):
        raise DataError(
            f"{row.place}: found a text_pair, which task '{task.name}' does not read; "
            "define the task with fields=('text', 'text_pair'), or remove the text_pair"
        )
    texts = []
    for name in task.fields:
        value = plain(_cell(row, name))
        if not isinstance(value, str):
            raise DataError(f"{row.place}: expected a string in '{name}', found {shown(value)}")
        _check_unicode(row, name, value)
        texts.append(value)
    return texts[0], texts[1] if task.is_pair else None


def read_target(row: Row, task: Task) -> Target:
    """Return the target of a row, whose form depends on the kind of the task; see `Example`.

    Args:
        row: Row to read.
        task: Task of the row.

    Raises:
        DataError: If the target is missing, is an unknown label, or is not a finite number.
    """
    if task.is_multi_label:
        return tuple(sorted({_index(row, label, task) for label in read_labels(row)}))
    value = plain(_cell(row, "label"))
    if task.kind == "classification":
        return _index(row, _label_name(row, value), task)
    if task.kind == "regression":
        return _number(row, value)
    if not isinstance(value, str):
        raise DataError(f"{row.place}: expected a string as target, found {shown(value)}")
    _check_unicode(row, "label", value)
    return value


def _index(row: Row, label: str, task: Task) -> int:
    if label not in task.labels:
        raise DataError(
            f"{row.place}: unknown label '{label}' of task '{task.name}'."
            f"{_label_meant(label, task.labels)} Known: {', '.join(task.labels)}"
        )
    return task.labels.index(label)


def _label_meant(label: str, known: Sequence[str]) -> str:
    """Return a sentence with the label that an unknown one may stand for, or an empty text."""
    if label.isdecimal() and len(label) <= MAX_DIGITS and int(label) < len(known):
        name = known[int(label)]
        return f" If it is an index, write the label's name, '{name}' (in a recipe: label_names: {{{label}: {name}}})."
    return did_you_mean(label, known)


def infer_labels(rows: Iterable[Row], task: Task) -> tuple[str, ...]:
    """Return the sorted labels of rows.

    Args:
        rows: Rows of the task.
        task: A classification or multi-label task.

    Raises:
        DataError: If the label of a row is missing or invalid.
    """
    return tuple(sorted({label for row in rows for label in label_names_of(row, task)}))


def label_names_of(row: Row, task: Task) -> tuple[str, ...]:
    """Return the normalised labels of a row, which may be unknown.

    Args:
        row: Row of the task.
        task: A classification task, whose rows have one label, or a multi-label task.

    Raises:
        DataError: If the label is missing or invalid.
    """
    return read_labels(row) if task.is_multi_label else (read_label(row),)


def read_label(row: Row) -> str:
    """Return the normalised label of a row.

    Args:
        row: Row of a classification task.

    Raises:
        DataError: If the label is missing or invalid.
    """
    return _label_name(row, _cell(row, "label"))


def read_labels(row: Row) -> tuple[str, ...]:
    """Return the normalised labels of a row, of which there may be none.

    Args:
        row: Row of a multi-label task, with a list of labels, or one text with labels that `LABEL_SEPARATOR` separates.

    Raises:
        DataError: If the labels are missing or one of them is invalid.
    """
    labels = tuple(_label_name(row, value) for value in _written_labels(row, _cell(row, "label")))
    if joined := [label for label in labels if LABEL_SEPARATOR in label]:
        raise DataError(
            f"{row.place}: found '{LABEL_SEPARATOR}' in the label '{joined[0]}' of a list; it separates labels in "
            "cells, so rename the label"
        )
    return labels


def _written_labels(row: Row, value: Any) -> list[Any]:
    """Return the labels of a row of a multi-label task as they are written."""
    value = plain(value)
    if isinstance(value, str):
        return [part for part in value.split(LABEL_SEPARATOR) if part.strip()]
    if hasattr(value, "tolist"):  # an array, for example of a Parquet file that pandas has read
        value = value.tolist()
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if is_absent(value) or isinstance(value, Mapping):
        raise DataError(
            f"{row.place}: expected a list of labels, or a text with '{LABEL_SEPARATOR}' between labels, found "
            f"{shown(value)}; write an empty list for a row without labels"
        )
    return [value]


def warn_of_spellings(task: Task, rows: Iterable[Row]) -> None:
    """Log a warning if rows spell a label in several ways, and one if labels look almost alike.

    Args:
        task: Task of the rows. Only tasks with labels are examined.
        rows: Rows of the task.
    """
    spellings = defaultdict(set)
    for row in rows if task.labels else ():
        value = plain(row.values.get("label"))
        for label in _written_labels(row, value) if task.is_multi_label else [value]:
            if isinstance(label, str):
                spellings[normalize_label(label)].add(label.strip() if task.is_multi_label else label)
    # ASCII, because the difference between two spellings may be invisible.
    merged = [" and ".join(map(ascii, sorted(found))) for found in spellings.values() if len(found) > 1]
    if merged:
        logger.warning(
            f"task '{task.name}': the rows spell a label in several ways, which are read as one label: "
            f"{'; '.join(merged)}"
        )
    kept = [" and ".join(map(ascii, found)) for found in similar_labels(task.labels)]
    if kept:
        logger.warning(
            f"task '{task.name}': labels differ only in case, spaces or characters that look alike or are invisible, "
            f"and remain different labels: {'; '.join(kept)}; if they are one label, spell it in one way"
        )


def similar_labels(labels: Iterable[str]) -> list[list[str]]:
    """Return the groups of labels that differ only in case, spaces, or characters that look alike or are invisible.

    Args:
        labels: Different labels of a task.
    """
    groups = defaultdict(list)
    for name in labels:
        groups[_folded(name)].append(name)
    return [found for found in groups.values() if len(found) > 1]


def _folded(label: str) -> str:
    """Return a label without differences in case, spaces, format characters and compatibility characters."""
    compatible = unicodedata.normalize("NFKC", label).casefold()
    return " ".join("".join(char for char in compatible if unicodedata.category(char) != "Cf").split())


def label_examples(tasks: Sequence[Task]) -> list[Example]:
    """Return the descriptions or names of labels as additional examples of these labels (see `Task.label_texts`).

    Args:
        tasks: Tasks in the order of their ids.

    Returns:
        The examples. In a multi-label task, each of them has that label only.
    """
    return [
        Example(task_id, text, None, (label,) if task.is_multi_label else label)
        for task_id, task in enumerate(tasks)
        for label, text in enumerate(task.label_texts)
    ]


def _cell(row: Row, name: str) -> object:
    if name not in row.values:
        option = "--label-column" if name == "label" else "--text"
        raise DataError(
            f"{row.place}: no column '{name}'.{did_you_mean(name, row.values)} "
            f"Found: {', '.join(map(str, row.values))}. "
            f"Rename the column, give it to the command with {option} COLUMN, or in a recipe set its name in the "
            f"source: columns: {{{name}: ...}}"
        )
    return row.values[name]


def _label_name(row: Row, value: object) -> str:
    value = plain(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas reads a column of integers as floats if a value is missing
    if isinstance(value, int) and abs(value) < 10**MAX_DIGITS:
        return str(value)
    label = normalize_label(value) if isinstance(value, str) else ""
    if not label:
        raise DataError(f"{row.place}: expected a label, found {shown(value)}")
    _check_unicode(row, "label", label)
    return label


def _check_unicode(row: Row, name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:  # an unpaired surrogate, which JSON can represent
        raise DataError(f"{row.place}: '{name}' is not valid Unicode: {shown(value)}") from None


def _number(row: Row, value: object) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError):
        raise DataError(f"{row.place}: expected a number as target, found {shown(value)}") from None
    if not abs(number) <= FLOAT32_MAX:
        raise DataError(
            f"{row.place}: expected a finite number as target, found {shown(value)}; remove or correct the row"
        )
    return number
