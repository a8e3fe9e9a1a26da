"""Checks of the numbers of rows, of empty texts, and of the labels that occur."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Literal

from hyperadapters.config import LABEL_SEPARATOR, Task
from hyperadapters.data.examples import similar_labels
from hyperadapters.quality.findings import MAX_EXAMPLES, CheckedRow, Finding, RowExample, row_examples
from hyperadapters.quality.rows import CheckedTask
from hyperadapters.utils.texts import counted, printable

FEW_ROWS = 8
"""Number of training rows below which a label is learned badly."""
DOMINANT = 0.9
"""Share of the training rows from which on one label is said to dominate."""
MAX_LABELS = 10
"""Number of labels that a message names."""


def check_rows(data: CheckedTask, on_bad_row: Literal["error", "skip"]) -> Iterator[Finding]:
    """Check for rows that cannot be read, rows without a text, and missing splits.

    Args:
        data: The task with its rows.
        on_bad_row: What the training does with rows that cannot be read.

    Yields:
        The findings.
    """
    name, count = data.task.name, data.bad_rows.count
    if count:
        yield Finding(
            "unreadable",
            "error" if on_bad_row == "error" else "warning",
            name,
            count,
            f"{counted(count, 'row')} cannot be read. The first: {printable(data.bad_rows.first)}",
            "Correct or remove them, or leave them out of the training with data.on_bad_row: skip.",
        )
    empty = [row for row in data.rows if any(not any(map(str.isalnum, text)) for text in row.texts)]
    if empty:
        yield Finding(
            "empty",
            "warning",
            name,
            len(empty),
            f"{counted(len(empty), 'row')} without a letter or digit in a text.",
            "Remove them, or find out where their texts were lost.",
            row_examples(empty),
        )
    if "test" not in data.splits:
        yield Finding(
            "no_test",
            "info",
            name,
            0,
            "There are no test rows, so that nothing says how good a trained model is.",
            "Add a test file. `quickstart` holds rows out by itself, and a recipe does with source.held_out: {test: "
            "{from: train, size: 0.2}}.",
        )


def check_labels(data: CheckedTask) -> Iterator[Finding]:
    """Check the labels of a classification or multi-label task: missing, rare, dominant and almost equal ones.

    Args:
        data: The task with its rows. There are no findings for other tasks.

    Yields:
        The findings.
    """
    if not data.task.is_labelled:
        return
    counts = label_counts(data)
    yield from _unseen(data, counts)
    rare = sorted((label for label in counts if 0 < counts[label] < FEW_ROWS), key=counts.__getitem__)
    if rare:
        shown = [f"{label} ({counts[label]})" for label in rare]
        yield Finding(
            "rare_label",
            "warning",
            data.task.name,
            len(rare),
            f"{counted(len(rare), 'label')} with fewer than {FEW_ROWS} training rows: {_listed(shown)}.",
            "Add examples of them, or merge them with a similar label.",
        )
    total = len(data.splits["train"])
    label, most = max(counts.items(), key=lambda item: item[1], default=("", 0))
    if most >= DOMINANT * total and len(counts) > 1:
        yield Finding(
            "dominant_label",
            "warning",
            data.task.name,
            most,
            f"{most / total:.0%} of the training rows have the label {printable(label)}.",
            "Choose a metric that does not reward this label alone: metrics: [macro_f1].",
        )
    if similar := similar_labels(counts):
        pairs = [" and ".join(map(ascii, group)) for group in similar]
        yield Finding(
            "similar_labels",
            "warning",
            data.task.name,
            len(similar),
            f"Labels that differ only in case, spaces or characters that look alike: {_listed(pairs)}.",
            "If they are one label, spell it in one way.",
        )


def label_counts(data: CheckedTask) -> dict[str, int]:
    """Return the number of training rows of each label that is declared or occurs in the training rows.

    Args:
        data: A classification or multi-label task with its rows.
    """
    found = Counter(label for row in data.splits["train"] for label in _labels_of(row, data.task))
    return {label: found[label] for label in data.task.labels or sorted(found)}


def _labels_of(row: CheckedRow, task: Task) -> list[str]:
    """Return the labels of a row, of which a multi-label task may have any number."""
    target = str(row.target)
    return [label for label in target.split(LABEL_SEPARATOR) if label] if task.is_multi_label else [target]


def _unseen(data: CheckedTask, counts: dict[str, int]) -> Iterator[Finding]:
    """Find labels that the training rows lack, with which the training is refused."""
    rows: dict[str, list[CheckedRow]] = defaultdict(list)
    for row in data.rows:
        for label in _labels_of(row, data.task):
            if not counts.get(label):
                rows[label].append(row)
    missing = sorted({label for label, count in counts.items() if not count} | set(rows))
    if missing:
        examples = [RowExample.of(row, f"label {printable(label)}") for label in missing for row in rows[label][:10]]
        yield Finding(
            "unseen_label",
            "error",
            data.task.name,
            len(missing),
            f"{counted(len(missing), 'label')} without a training row: {_listed(missing)}.",
            "Add training rows for them, or remove them from the labels and the other splits.",
            tuple(examples[:MAX_EXAMPLES]),
        )
    if len(counts) < (1 if data.task.is_multi_label else 2):
        yield Finding(
            "one_label",
            "error",
            data.task.name,
            len(counts),
            f"The training rows have only the label {_listed(list(counts))}." if counts else "No row has a label.",
            "Add rows of at least one other label, or name the right column of the label.",
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(printable, names[:MAX_LABELS]))
    return f"{shown} and {len(names) - MAX_LABELS} more" if len(names) > MAX_LABELS else shown
