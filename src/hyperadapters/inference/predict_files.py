"""Prediction for the rows of a file, with the results written to a file."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from hyperadapters.config import LABEL_SEPARATOR, Task
from hyperadapters.data.bad_rows import BadRows, OnBadRow
from hyperadapters.data.examples import Example
from hyperadapters.data.sources import Row, iterate_file, iterate_standard_input
from hyperadapters.errors import DataError, TaskError
from hyperadapters.inference.inputs import ids_of_tasks, input_reader, with_columns
from hyperadapters.inference.predictor import Prediction, Predictor
from hyperadapters.inference.stored_tasks import StorePredictor
from hyperadapters.utils.files import check_target, open_atomically

OUTPUT_ENDINGS = (".jsonl", ".csv")
INPUT_COLUMNS = ("text", "text_pair", "task")


def predict_file(
    predictor: Predictor,
    input_file: Path,
    task: str | None,
    output: Path | None,
    progress: bool = False,
    delimiter: str | None = None,
    tasks: Sequence[str] | Literal["*"] | None = None,
    on_bad_row: OnBadRow = "error",
    texts: Sequence[str] = (),
) -> None:
    """Predict the targets of the rows of a file, as the command `predict` does.

    Further columns of the input are copied to the output, after the columns of the predictions. Their names must differ
    from those of the predictions. Numbers that JSON cannot represent, such as NaN, become null.

    Args:
        predictor: Predictor, whose tasks may be those of a task store.
        input_file: JSON-lines, CSV, TSV or Parquet file with the column text and optionally text_pair and task. "-" is
            standard input in JSON-lines.
        task: Name of the task of all rows. If None, the rows have their own tasks or are routed.
        output: JSON-lines or CSV file, which appears when it is complete. If None, each row is written to standard
            output in JSON-lines.
        progress: Whether to show a progress bar. Default: False.
        delimiter: Delimiter of a CSV or TSV file. Default: a comma for CSV and a tab for TSV.
        tasks: Names of several tasks that are answered for each row, or "*" for all that read such rows. The output has
            a row for each of them. Default: each row is answered for one task.
        on_bad_row: What is done with a row that cannot be read, see `data.bad_rows`: "error" (default), or "skip" to
            omit it from the output.
        texts: Columns of the texts. Default: text and text_pair.

    Raises:
        DataError: If the input file or one of its rows is invalid. An existing output file is unchanged.
        TaskError: If the name of a task is unknown, or both `task` and `tasks` are given.
        OutputError: If the output cannot be written.
        NotFiniteError: If the model computes a value that is not a finite number.
    """
    bad_rows = BadRows(on_bad_row)
    rows, known = open_rows(input_file, task, tasks, delimiter, bad_rows, texts), predictor.model.tasks
    if isinstance(predictor, StorePredictor):
        examples = predictor.read_rows(rows, task, bad_rows)
    else:
        if tasks is not None and tasks != "*":  # all of them read such rows as the first one
            task = known[ids_of_tasks(known, tasks)[0]].name
        examples = read_rows(rows, known, task, bad_rows)
    records = _records(predictor, examples, str(input_file), tasks, progress, bad_rows)
    if output is None:
        _write_jsonl(sys.stdout, records)
    else:
        check_target(output, OUTPUT_ENDINGS)
        write_records(output, records)
    bad_rows.report(str(input_file))


def open_rows(
    input_file: Path,
    task: str | None,
    tasks: Sequence[str] | Literal["*"] | None,
    delimiter: str | None,
    bad_rows: BadRows,
    texts: Sequence[str] = (),
) -> Iterator[Row]:
    """Open the input of `predict_file` and return an iterator over its rows.

    Args:
        input_file: Input file, or "-" for standard input.
        task: Name of the task of all rows, if there is one.
        tasks: Names of several tasks, if there are any.
        delimiter: Delimiter of a CSV or TSV file, if it is given.
        bad_rows: What is done with bad rows.
        texts: Columns of the texts. Default: text and text_pair.

    Raises:
        TaskError: If both `task` and `tasks` are given.
        DataError: If the file is missing or has an unknown type, or, during the iteration, a row is invalid.
    """
    if task is not None and tasks is not None:
        raise TaskError("task and tasks: expected one of them, found both; remove one")
    if str(input_file) != "-":
        return with_columns(iterate_file(input_file, delimiter, bad_rows), texts)
    if delimiter is not None:
        raise DataError("standard input is read as JSON-lines, which has no delimiter; remove the delimiter")
    return with_columns(iterate_standard_input(bad_rows), texts)


def read_rows(
    rows: Iterable[Row], known: Sequence[Task], task: str | None, bad_rows: BadRows
) -> Iterator[tuple[Row, Example]]:
    """Return an iterator over rows and what is to be predicted for them, without bad rows.

    Args:
        rows: Rows of the input.
        known: Tasks of the model.
        task: Name of the task of all rows, if there is one.
        bad_rows: What is done with bad rows.

    Raises:
        DataError: During the iteration, if a row has no valid text, unless it is skipped.
        TaskError: If a task is unknown.
    """
    read = input_reader(known, task)

    def readable() -> Iterator[tuple[Row, Example]]:
        for number, row in enumerate(rows, start=1):
            try:
                example = read(row, number)
            except (DataError, TaskError) as error:
                bad_rows.add(error)
                continue
            yield row, example

    return readable()


def write_records(output: Path, records: Iterable[dict[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write records to a file, which appears when it is complete.

    Args:
        output: JSON-lines or CSV file, depending on the ending of its name.
        records: Values of the columns by name.
        columns: Columns of a CSV file that precede the others of the first record. Default: those of predictions.

    Raises:
        DataError: If a record has a column that the first one does not have, and the file is a CSV file.
        OutputError: If the file cannot be written.
    """
    with open_atomically(output) as file:
        if output.suffix == ".csv":
            _write_csv(file, records, CSV_COLUMNS if columns is None else columns)
        else:
            _write_jsonl(file, records)


def _records(
    predictor: Predictor,
    rows: Iterable[tuple[Row, Example]],
    name: str,
    tasks: Sequence[str] | Literal["*"] | None,
    progress: bool,
    bad_rows: BadRows,
) -> Iterator[dict[str, Any]]:
    waiting: deque[tuple[Example, dict[str, Any]]] = deque()

    def remembered() -> Iterator[Example]:
        for row, example in rows:
            waiting.append((example, other_columns(row)))
            yield example

    examples = remembered()
    answers: Iterable[Sequence[Prediction]]
    if tasks is None:
        answers = ([prediction] for prediction in predictor(examples, progress=progress))
    else:
        answers = predictor.predict_tasks(examples, tasks, progress)
    empty = True
    for predictions in answers:
        empty = False
        example, other = waiting.popleft()
        is_routed = tasks is None and example.task_id is None
        yield from ({**_record(example, prediction, is_routed), **other} for prediction in predictions)
    if empty:
        raise DataError(f"{name}: expected at least one row, found none{bad_rows.note()}")


def other_columns(row: Row) -> dict[str, Any]:
    """Return the values of the columns of a row that are copied to the output.

    Args:
        row: Row of the input.

    Raises:
        DataError: If a column has the name of a column of the output.
    """
    for name in CSV_COLUMNS:
        if name in row.values and name not in INPUT_COLUMNS:
            raise DataError(f"{row.place}: the column '{name}' is also a column of the output; rename it")
    return {name: value for name, value in row.values.items() if name not in INPUT_COLUMNS}


def _record(example: Example, prediction: Prediction, is_routed: bool) -> dict[str, Any]:
    routing = prediction.routing
    record: dict[str, Any] = {"text": example.text}
    if example.text_pair is not None:
        record["text_pair"] = example.text_pair
    record["task"] = prediction.task
    record["routed"] = is_routed
    record["answer"] = prediction.answer
    if prediction.probabilities is not None:
        record["probabilities"] = {label: round(p, 6) for label, p in prediction.probabilities.items()}
    if prediction.text is not None:
        record["output"] = prediction.text
    if routing is not None:
        record["similarity"] = round(routing.similarity, 6)
        record["margin"] = round(routing.margin, 6) if len(routing.candidates) > 1 else None
        record["candidates"] = {candidate.task: round(candidate.similarity, 6) for candidate in routing.candidates}
    return record


def _write_jsonl(file: TextIO, records: Iterable[dict[str, Any]]) -> None:
    for record in records:
        file.write(as_json(record) + "\n")


CSV_COLUMNS = (
    "text", "text_pair", "task", "routed", "answer", "probabilities", "output", "similarity", "margin", "candidates"
)  # fmt: skip


def _write_csv(file: TextIO, records: Iterable[dict[str, Any]], columns: Sequence[str]) -> None:
    writer = None
    for number, record in enumerate(records, start=1):
        if writer is None:
            names = [*columns, *(name for name in record if name not in columns)]
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
        if unknown := [name for name in record if name not in names]:
            raise DataError(
                f"row {number}: the column '{unknown[0]}' is not in the first row, so that the CSV file does not have "
                "it; choose an output ending in .jsonl"
            )
        writer.writerow({key: as_cell(value) for key, value in record.items()})


def as_cell(value: Any) -> Any:
    """Return a value as it is given to the writer of CSV: lists and mappings become JSON, and several labels one text.

    Args:
        value: Value of a column.
    """
    if isinstance(value, tuple):
        return LABEL_SEPARATOR.join(value)
    return as_json(value) if isinstance(value, (dict, list)) else value


def as_json(value: Any, ensure_ascii: bool = False) -> str:
    """Return a value as JSON. Numbers that JSON cannot represent become null, and values of other types strings.

    Args:
        value: Value of a column, or all values of a row.
        ensure_ascii: Whether other characters are escaped. Default: False.
    """
    return json.dumps(_finite(value), ensure_ascii=ensure_ascii, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    """Return a value in which numbers that JSON cannot represent are None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
