"""Predicting from a file to a file."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyperadapters.config import RECIPE_FILE, DataConfig, Task, load_recipe
from hyperadapters.data.collate import Collator
from hyperadapters.data.examples import Example, read_fields
from hyperadapters.data.sources import Row, read_file
from hyperadapters.errors import DataError, TaskError, unknown_name
from hyperadapters.files import check_target, write_atomically
from hyperadapters.inference.predictor import Prediction, answer_name, best_device, predict
from hyperadapters.model import HyperAdapterModel

_ANY_TASK = Task(name="any", kind="text-to-text")
_ANY_PAIR_TASK = Task(name="any", kind="text-to-text", fields=("text", "text_pair"))


def predict_file(folder: Path, input_file: Path, task: str | None, output: Path | None, batch_size: int) -> None:
    """Answer the rows of a file; see the command `predict`.

    Args:
        folder: of a checkpoint; the lengths come from the recipe beside it, if there is one.
        input_file: with the columns text, and where needed text_pair and task.
        task: of all rows, or None.
        output: JSON-lines or CSV, written whole at the end; None prints JSON-lines.
        batch_size: rows of a batch.

    Raises:
        HyperAdaptersError: the checkpoint, the file, a row or a task name is wrong; nothing has been written then.
    """
    if output is not None:
        check_target(output, (".jsonl", ".csv"))
    model = HyperAdapterModel.from_pretrained(folder).to(best_device())
    examples = [_example(row, model.tasks, task) for row in read_file(input_file)]
    if not examples:
        raise DataError(f"{input_file}: no rows; expected at least one")
    recipe = folder / RECIPE_FILE
    data = load_recipe(recipe).data if recipe.is_file() else DataConfig()
    longest = min(data.max_length, model.max_length or data.max_length)
    collator = Collator(model.tokenizer, model.tasks, model.text_to_text, longest, data.max_target_length)
    predictions = predict(model, examples, collator, batch_size)
    records = [_record(e, p, model.tasks) for e, p in zip(examples, predictions, strict=True)]
    if output is None:
        sys.stdout.write(_as_jsonl(records))
        return
    text = _as_csv(records) if output.suffix == ".csv" else _as_jsonl(records)
    write_atomically(output, text.encode())


def _example(row: Row, tasks: Sequence[Task], task_name: str | None) -> Example:
    name = row.values.get("task") or None if task_name is None else task_name
    if name is None:
        shape = _ANY_PAIR_TASK if row.values.get("text_pair") else _ANY_TASK
        return Example(None, *read_fields(row, shape))
    names = [task.name for task in tasks]
    if name not in names:
        where = "" if task_name is not None else f"{row.place}: "
        raise TaskError(where + unknown_name("task", str(name), names))
    task_id = names.index(name)
    return Example(task_id, *read_fields(row, tasks[task_id]))


def _record(example: Example, prediction: Prediction, tasks: Sequence[Task]) -> dict[str, Any]:
    task = tasks[prediction.task_id]
    record: dict[str, Any] = {"text": example.text}
    if example.text_pair is not None:
        record["text_pair"] = example.text_pair
    record["task"] = task.name
    record["routed"] = example.task_id is None
    record["answer"] = answer_name(task, prediction.answer)
    if prediction.probabilities is not None:
        likely = {label: round(p, 6) for label, p in zip(task.labels, prediction.probabilities, strict=True)}
        record["probabilities"] = likely
    if prediction.text is not None:
        record["output"] = prediction.text
    return record


def _as_jsonl(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _as_csv(records: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for record in records for column in record))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for record in records:
        likely = record.get("probabilities")
        cells = {**record, "probabilities": json.dumps(likely)} if likely is not None else record
        writer.writerow(cells)
    return text.getvalue()
