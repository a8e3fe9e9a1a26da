"""Predicting from a file to a file, a chunk at a time."""

from __future__ import annotations

import csv
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from hyperadapters.data.examples import Example
from hyperadapters.data.sources import iterate_file
from hyperadapters.errors import DataError
from hyperadapters.files import check_target, open_atomically
from hyperadapters.inference.inputs import read_inputs
from hyperadapters.inference.predictor import Prediction, Predictor

OUTPUT_ENDINGS = (".jsonl", ".csv")


def predict_file(
    predictor: Predictor, input_file: Path, task: str | None, output: Path | None, progress: bool = False
) -> None:
    """Answer the rows of a file; see the command `predict`.

    Args:
        predictor: answers.
        input_file: JSON-lines, CSV, TSV or Parquet, with the columns text, and where needed text_pair and task.
        task: of all rows, or None.
        output: JSON-lines or CSV, which is there when all rows are answered; None prints JSON-lines as they come.
        progress: whether to show a bar.

    Raises:
        HyperAdaptersError: the file, a row or a task name is wrong; the output file is what it was then.
    """
    if output is None:
        _write_jsonl(sys.stdout, _records(predictor, input_file, task, progress))
        return
    check_target(output, OUTPUT_ENDINGS)
    write = _write_csv if output.suffix == ".csv" else _write_jsonl
    with open_atomically(output) as file:
        write(file, _records(predictor, input_file, task, progress))


def _records(predictor: Predictor, path: Path, task: str | None, progress: bool) -> Iterator[dict[str, Any]]:
    waiting: deque[Example] = deque()

    def remember(examples: Iterable[Example]) -> Iterator[Example]:
        for example in examples:
            waiting.append(example)
            yield example

    examples = read_inputs(iterate_file(path), predictor.model.tasks, task)
    empty = True
    for prediction in predictor(remember(examples), progress=progress):
        empty = False
        yield _record(waiting.popleft(), prediction)
    if empty:
        raise DataError(f"{path}: no rows; expected at least one")


def _record(example: Example, prediction: Prediction) -> dict[str, Any]:
    routing = prediction.routing
    record: dict[str, Any] = {"text": example.text}
    if example.text_pair is not None:
        record["text_pair"] = example.text_pair
    record["task"] = prediction.task
    record["routed"] = example.task_id is None
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
        file.write(_as_json(record) + "\n")


CSV_COLUMNS = (
    "text", "text_pair", "task", "routed", "answer", "probabilities", "output", "similarity", "margin", "candidates"
)  # fmt: skip


def _write_csv(file: TextIO, records: Iterable[dict[str, Any]]) -> None:
    writer = csv.DictWriter(file, CSV_COLUMNS, restval="")
    writer.writeheader()
    for record in records:
        writer.writerow({key: _as_json(value) if isinstance(value, dict) else value for key, value in record.items()})


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
