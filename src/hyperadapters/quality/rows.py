"""Reading the rows of tasks with their places, where rows that cannot be read are counted and left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hyperadapters.config import LABEL_SEPARATOR, Split, Task, TaskEntry
from hyperadapters.data.bad_rows import BadRows
from hyperadapters.data.examples import label_names_of, read_fields, read_target
from hyperadapters.data.loading import read_rows
from hyperadapters.data.sources import Row
from hyperadapters.quality.findings import CheckedRow


@dataclass(frozen=True)
class CheckedTask:
    """A task with all its readable rows.

    Attributes:
        task: Definition of the task. It has no labels if they are those of the training rows.
        splits: Rows of each split.
        bad_rows: Number of rows that cannot be read, and the error of the first of them.
    """

    task: Task
    splits: dict[Split, list[CheckedRow]]
    bad_rows: BadRows

    @property
    def rows(self) -> list[CheckedRow]:
        """Rows of all splits."""
        return [row for rows in self.splits.values() for row in rows]


def read_tasks(entries: Sequence[TaskEntry], seed: int) -> list[CheckedTask]:
    """Read all rows of the tasks of a recipe. Rows that cannot be read are left out.

    Args:
        entries: Tasks of the recipe.
        seed: Seed of held-out splits.

    Returns:
        The tasks with their rows.

    Raises:
        DataError: If a file is missing or cannot be read at all, or a task has no training rows.
    """
    return [_read_task(entry, seed) for entry in entries]


def _read_task(entry: TaskEntry, seed: int) -> CheckedTask:
    bad_rows, task = BadRows("skip"), entry.task
    found = read_rows(entry, bad_rows, seed)
    splits = {split: [_checked(row, split, task) for row in rows] for split, rows in found.items()}
    return CheckedTask(task, splits, bad_rows)


def _checked(row: Row, split: Split, task: Task) -> CheckedRow:
    texts = tuple(text for text in read_fields(row, task) if text is not None)
    if task.is_labelled:
        # The labels of a task need not be known yet.
        target: str | float = LABEL_SEPARATOR.join(sorted({*label_names_of(row, task)}))
    else:
        target = read_target(row, task)  # type: ignore[assignment]
    return CheckedRow(task.name, split, texts, target, row.place)
