"""Conversion of data in memory to checked examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from hyperadapters.config import Task
from hyperadapters.data.examples import EXAMPLES, Example, example_row, read_fields, read_target, warn_of_spellings
from hyperadapters.data.loading import check_labels_seen, warn_of_missing_labels
from hyperadapters.data.rows import is_absent, iterate_rows, plain
from hyperadapters.data.sources import ROWS, Row, class_names, name_classes
from hyperadapters.data.stored_rows import StoredRows, collect, joined, take
from hyperadapters.errors import DataError, TaskError, unknown_name


@dataclass(frozen=True)
class _TaskRows:
    """Rows of one task.

    Attributes:
        examples: Example of each row.
        unchecked: Rows that were not given as `Example`, whose labels may be spelled in several ways.
    """

    examples: Sequence[Example]
    unchecked: Sequence[Row]


def read_train_and_eval_data(
    tasks: Sequence[Task], train_data: Any, eval_data: Any = None
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Read training data and evaluation data with the same checks as for the data of a recipe.

    Args:
        tasks: Tasks of the model in the order of their ids.
        train_data: Mapping from the name of each task to its data: a list of mappings with the keys `text`,
            `text_pair` and `label`, a DataFrame, a `datasets.Dataset`, a map-style dataset of PyTorch whose items are
            such mappings, or a list of `Example`.
        eval_data: Evaluation data of some or all tasks in the same form. Default: none.

    Returns:
        The training examples and the evaluation examples, in the order of the tasks.

    Raises:
        DataError: If the data of a task or one of its rows are invalid (the message names the task and the row), a task
            has no training data, or a label does not occur in them.
        TaskError: If a task is unknown.
    """
    train = _read(tasks, train_data, "train_data")
    if missing := [task.name for task_id, task in enumerate(tasks) if task_id not in train]:
        raise DataError(f"train_data: expected data of each task of the model, found none of {', '.join(missing)}")
    evaluation = {} if eval_data is None else _read(tasks, eval_data, "eval_data")
    for task_id, task in enumerate(tasks):
        check_labels_seen(task, train[task_id].examples)
        splits = [data[task_id] for data in (train, evaluation) if task_id in data]
        if any(found.unchecked for found in splits):
            warn_of_spellings(task, chain.from_iterable(found.unchecked for found in splits))
        if task_id in evaluation and evaluation[task_id].unchecked:
            warn_of_missing_labels(task, {"evaluation": evaluation[task_id].examples})
    return _joined(train), _joined(evaluation)


def read_examples(tasks: Sequence[Task], data: Any, what: str, needs_labels: bool = True) -> Sequence[Example]:
    """Read data of some or all tasks.

    Args:
        tasks: Tasks of the model in the order of their ids.
        data: Data by task in the form that `read_train_and_eval_data` reads.
        what: Name of the data in messages.
        needs_labels: If True (default), each row must have a label. If False, a task may also have no labels at all.

    Returns:
        The examples in the order of the data.

    Raises:
        DataError: If the data of a task or one of its rows are invalid.
        TaskError: If a task is unknown.
    """
    return _joined(_read(tasks, data, what, needs_labels))


def _joined(data: Mapping[int, _TaskRows]) -> Sequence[Example]:
    return joined(found.examples for found in data.values())


def _read(tasks: Sequence[Task], data: Any, what: str, needs_labels: bool = True) -> dict[int, _TaskRows]:
    """Return the rows of each task by its id, in the order of the ids."""
    if not isinstance(data, Mapping):
        raise DataError(
            f"{what}: expected a mapping from the names of tasks to their data, such as {{{tasks[0].name!r}: rows}}; "
            f"found {type(data).__name__}"
        )
    ids = {task.name: task_id for task_id, task in enumerate(tasks)}
    for name in data:
        if name not in ids:
            raise TaskError(f"{what}: " + unknown_name("task", str(name), ids))
    return {
        task_id: _read_task(task, task_id, data[task.name], f"{what}, task '{task.name}'", needs_labels)
        for task_id, task in enumerate(tasks)
        if task.name in data
    }


def _read_task(task: Task, task_id: int, data: Any, what: str, needs_labels: bool) -> _TaskRows:
    if needs_labels and isinstance(data, StoredRows) and _are_examples_of(task, task_id, data, what):
        return _TaskRows(data, [])
    names, unchecked = class_names(data), list[int]()

    def read() -> Iterator[Row]:
        for index, value in enumerate(iterate_rows(data, what)):
            row = example_row(value, f"{what}, row {index + 1}", task)
            if isinstance(value, Example):
                _check_task_id(value, task_id, row.place)
            else:
                row = Row(name_classes(row.values, names), row.place)
                unchecked.append(index)
            yield row

    rows = collect(read(), ROWS)
    if not rows:
        raise DataError(f"{what}: expected at least one row, found none")
    has_labels = needs_labels or any(not is_absent(plain(row.values.get("label"))) for row in rows)
    return _TaskRows(collect(_examples(rows, task, task_id, has_labels), EXAMPLES), take(rows, unchecked))


def _are_examples_of(task: Task, task_id: int, data: StoredRows[Any], what: str) -> bool:
    """Check stored examples, and return whether all of them are valid and have the id of the task."""
    for number, example in enumerate(data, start=1):
        row = example_row(example, f"{what}, row {number}", task)
        if example != Example(task_id, *read_fields(row, task), read_target(row, task)):
            return False
    return True


def _examples(rows: Iterable[Row], task: Task, task_id: int, has_labels: bool) -> Iterator[Example]:
    for row in rows:
        yield Example(task_id, *read_fields(row, task), read_target(row, task) if has_labels else None)


def _check_task_id(example: Example, task_id: int, place: str) -> None:
    if example.task_id not in (None, task_id):
        raise DataError(f"{place}: expected an example with task_id {task_id} or None, found {example.task_id}")
