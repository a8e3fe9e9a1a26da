"""Conversion of inputs in any supported form to examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from hyperadapters.config import Task
from hyperadapters.data.examples import Example, read_fields
from hyperadapters.data.rows import by_column, is_absent, iterate_rows, plain
from hyperadapters.data.sources import Row
from hyperadapters.errors import DataError, TaskError, shown, unknown_name

_ANY = Task(name="any", kind="text-to-text")
_ANY_PAIR = Task(name="any", kind="text-to-text", fields=("text", "text_pair"))


def read_inputs(inputs: Any, tasks: Sequence[Task], task: str | None) -> Iterator[Example]:
    """Return an iterator over inputs as examples. The collection and the task are checked immediately.

    Args:
        inputs: List, iterator, DataFrame, data set, Arrow table or array. Each row is a string, a pair of strings, a
            mapping with `text` and optionally `text_pair` and `task`, a `Row`, Series or named tuple with such values,
            or an `Example`.
        tasks: Tasks of the model.
        task: Name of the task of all inputs. If None, inputs have their own task, or none.

    Raises:
        DataError: If an input has another form or no text.
        TaskError: If a task is unknown.
    """
    rows = iterate_rows(inputs)
    read = input_reader(tasks, task)
    return (read(value, number) for number, value in enumerate(rows, start=1))


def input_reader(tasks: Sequence[Task], task: str | None) -> Callable[[Any, int], Example]:
    """Return a function that converts one input, with its number for messages, to an example.

    Args:
        tasks: Tasks of the model.
        task: Name of the task of all inputs. If None, inputs have their own task, or none.

    Returns:
        The function. It raises DataError if an input has another form or no text, and TaskError if its task is unknown.

    Raises:
        TaskError: If `task` is unknown.
    """
    names = {known.name: task_id for task_id, known in enumerate(tasks)}
    if task is not None and not isinstance(task, str):
        raise TaskError(f"task: expected the name of a task, found a {type(task).__name__}; pass its name")
    if task is not None and task not in names:
        raise TaskError(unknown_name("task", task, names))

    def read(value: Any, number: int) -> Example:
        if isinstance(value, Example):
            return _checked(value, number, tasks, None if task is None else names[task])
        return _read(as_row(value, f"input {number}"), tasks, names, task)

    return read


def _checked(value: Example, number: int, tasks: Sequence[Task], task_id: int | None) -> Example:
    """Check an example, and give it a task unless `task_id` is None."""
    if value.task_id is not None and not is_index(value.task_id, len(tasks)):
        raise TaskError(f"input {number}: task_id: expected 0 to {len(tasks) - 1}, found {shown(value.task_id)}")
    example = value if task_id is None else Example(task_id, value.text, value.text_pair, value.target)
    row = Row({"text": example.text, "text_pair": example.text_pair}, f"input {number}")
    known = None if example.task_id is None else tasks[example.task_id]
    read_fields(row, known or (_ANY if example.text_pair is None else _ANY_PAIR))
    return example


def is_index(value: Any, count: int) -> bool:
    """Return whether a value is an integer of Python or NumPy from 0 to `count - 1`.

    Args:
        value: Value to examine.
        count: Number of valid indices.
    """
    return not isinstance(value, bool) and hasattr(value, "__index__") and 0 <= int(value) < count


def as_row(value: Any, place: str) -> Row:
    """Return an input that is not an `Example` as a row.

    Args:
        value: The input.
        place: Description of the input for messages.

    Raises:
        DataError: If the input has an unsupported form.
    """
    if isinstance(value, Row):
        return value
    value = plain(by_column(value))
    if isinstance(value, Mapping):
        return Row(dict(value), place)
    if isinstance(value, str):
        return Row({"text": value}, place)
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return Row({"text": value[0], "text_pair": value[1]}, place)
    raise DataError(f"{place}: expected a string, a pair of strings or a mapping with 'text', found {shown(value)}")


def _read(row: Row, tasks: Sequence[Task], names: Mapping[str, int], task: str | None) -> Example:
    name = plain(row.values.get("task")) if task is None else task
    if is_absent(name):
        is_pair = not is_absent(plain(row.values.get("text_pair")))
        return Example(None, *read_fields(row, _ANY_PAIR if is_pair else _ANY))
    if not isinstance(name, str) or name not in names:
        raise TaskError(f"{row.place}: " + unknown_name("task", str(name), names))
    return Example(names[name], *read_fields(row, tasks[names[name]]))


def ids_of_tasks(known: Sequence[Task], tasks: Any) -> list[int]:
    """Return the ids of tasks that are to be answered for the same inputs.

    Args:
        known: Tasks of the model.
        tasks: Names of the tasks.

    Raises:
        TaskError: If `tasks` is not a list of names, a task is unknown or named twice, or some tasks read pairs and
            others single texts.
    """
    names = [] if isinstance(tasks, str) or not isinstance(tasks, Iterable) else list(tasks)
    if not names or not all(isinstance(name, str) for name in names):
        raise TaskError(
            f"tasks: expected names of tasks, or '*' for all of them, found {shown(tasks)}; pass a list of names"
        )
    ids = {task.name: task_id for task_id, task in enumerate(known)}
    for index, name in enumerate(names):
        if name not in ids:
            raise TaskError("tasks: " + unknown_name("task", name, ids))
        if name in names[:index]:
            raise TaskError(f"tasks: '{name}' is named twice; name each task once")
    found = [ids[name] for name in names]
    pairs = [name for name in names if known[ids[name]].is_pair]
    if 0 < len(pairs) < len(names):
        single = next(name for name in names if name not in pairs)
        raise TaskError(
            f"tasks: '{pairs[0]}' reads pairs of texts and '{single}' single texts, so that no input has both; "
            "predict them apart, or use '*'"
        )
    return found


def tasks_that_read(example: Example, number: int, known: Sequence[Task]) -> list[int]:
    """Return the ids of all tasks that read such an input.

    Args:
        example: Input without a task.
        number: Number of the input for messages, counted from 1.
        known: Tasks of the model.

    Raises:
        DataError: If the input has a task, or no task reads such inputs.
    """
    if example.task_id is not None:
        raise DataError(
            f"input {number}: names the task '{known[example.task_id].name}', but is answered for all tasks; "
            "remove the task from the input, or do not ask for all tasks"
        )
    is_pair = example.text_pair is not None
    task_ids = [task_id for task_id, task in enumerate(known) if task.is_pair == is_pair]
    if not task_ids:
        expected, found = ("a single text", "a pair of texts") if is_pair else ("a pair of texts", "a single text")
        raise DataError(f"input {number}: expected {expected}, which all tasks of the model read, found {found}")
    return task_ids


def with_columns(rows: Iterable[Row], texts: Sequence[str], label: str | None = None) -> Iterator[Row]:
    """Return rows whose texts are in the columns text and text_pair, and whose label is in the column label.

    Args:
        rows: The rows.
        texts: Columns of the first and of the second text. If there are none, the columns of texts keep their names.
        label: Column of the label. If None, it keeps its name.

    Returns:
        Iterator over the rows. Another column that is named text, text_pair or label is left out if a given one gets
        its name.

    Raises:
        DataError: If there are more than two columns of texts, or, during the iteration, a row does not have one of the
            columns.
    """
    if len(texts) > 2:
        raise DataError(f"expected one or two columns of texts, found {', '.join(texts)}")
    columns = dict(zip(("text", "text_pair"), texts, strict=False))
    if label is not None:
        columns["label"] = label
    return (_with_columns(row, columns) for row in rows) if columns else iter(rows)


def _with_columns(row: Row, columns: Mapping[str, str]) -> Row:
    for column in columns.values():
        if column not in row.values:
            raise DataError(f"{row.place}: {unknown_name('column', column, row.values)}")
    others = {name: value for name, value in row.values.items() if name not in (*columns, *columns.values())}
    return Row({**{name: row.values[column] for name, column in columns.items()}, **others}, row.place)
