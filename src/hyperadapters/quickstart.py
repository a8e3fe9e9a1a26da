"""The quickstart: from data files to a trained model, with guesses that are written down as a recipe."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hyperadapters.config import Kind, Recipe, TaskEntry, parse
from hyperadapters.data.schema import Schema
from hyperadapters.data.sources import iterate_file
from hyperadapters.data.task_files import TaskFiles, check_different_names, find_tasks, infer_schemas, make_entry
from hyperadapters.errors import DataError, RecipeError
from hyperadapters.training.probes import majority
from hyperadapters.training.run import Run
from hyperadapters.utils.texts import printable

HELD_OUT = {"validation": 0.1, "test": 0.2}
"""Fractions of the training rows that become the splits that the data lack."""
MIN_ROWS = 20
"""Number of training rows from which on a task can be split and trained."""
BATCH_SIZE = 32
EPOCHS = 10
MIN_STEPS, MAX_STEPS = 400, 2000
"""Limits of the number of training steps, between which it is that of `EPOCHS` epochs."""
EVALUATIONS = 4


@dataclass(frozen=True)
class QuickstartPlan:
    """What a quickstart has guessed.

    Attributes:
        recipe: Recipe of the training.
        text: The recipe as YAML, with comments on what was guessed and paths relative to the output folder.
    """

    recipe: Recipe
    text: str


def plan_quickstart(
    paths: Sequence[Path],
    output: Path,
    backbone: str,
    texts: Sequence[str] = (),
    label: str | None = None,
    kind: Kind | None = None,
    delimiter: str | None = None,
) -> QuickstartPlan:
    """Guess the recipe of data files.

    Args:
        paths: Data files, each of which is a task, or folders (see `data.task_files.find_tasks`).
        output: Folder of the run, to which the paths in the recipe are relative.
        backbone: Name of the backbone.
        texts: Columns of the texts. Default: they are guessed.
        label: Column of the label. Default: it is guessed.
        kind: Kind of the tasks. Default: it is guessed.
        delimiter: Delimiter of CSV and TSV files. Default: a comma and a tab.

    Returns:
        The recipe and its text.

    Raises:
        DataError: If a file cannot be read or has too few rows, a column cannot be guessed, or two files have the same
            name.
        RecipeError: If a name cannot be that of a task.
    """
    found = [(name, files) for path in paths for name, files in find_tasks(path).items()]
    check_different_names(name for name, _ in found)
    tasks = dict(found)
    schemas = infer_schemas(tasks, texts, label, kind, delimiter=delimiter)
    sizes = {name: sum(1 for _ in iterate_file(files["train"], delimiter)) for name, files in tasks.items()}
    for name, size in sizes.items():
        if size < MIN_ROWS:
            raise DataError(
                f"{tasks[name]['train']}: expected at least {MIN_ROWS} rows to train on, found {size}; label "
                "more, or add the task to a model of other tasks with `hyperadapters add-task`"
            )
    entries = [_entry(name, files, schemas[name], delimiter) for name, files in tasks.items()]
    settings = _settings(backbone, sum(sizes.values()))
    values = {**settings, "tasks": [entry.model_dump(by_alias=True, exclude_unset=True) for entry in entries]}
    return QuickstartPlan(parse(Recipe, values, RecipeError), _recipe_text(settings, entries, schemas, paths, output))


def _entry(name: str, files: TaskFiles, schema: Schema, delimiter: str | None) -> TaskEntry:
    held_out = {split: {"from": "train", "size": size} for split, size in HELD_OUT.items() if split not in files}
    source = {"held_out": held_out} if delimiter is None else {"held_out": held_out, "delimiter": delimiter}
    return make_entry(name, {split: path.absolute() for split, path in files.items()}, schema, **source)


def _settings(backbone: str, rows: int) -> dict[str, Any]:
    steps = min(max(EPOCHS * rows // BATCH_SIZE, MIN_STEPS), MAX_STEPS)
    return {
        "backbone": backbone,
        "seed": 0,
        "training": {"max_steps": steps, "batch_size": BATCH_SIZE, "eval_steps": steps // EVALUATIONS},
    }


def _recipe_text(
    settings: Mapping[str, Any],
    entries: Sequence[TaskEntry],
    schemas: Mapping[str, Schema],
    paths: Sequence[Path],
    output: Path,
) -> str:
    names = " ".join(printable(shlex.quote(str(path))) for path in paths)
    lines = [
        f"# Guessed by hyperadapters quickstart from {names}",
        "# Correct here what is wrong. To train with it, or to get the same result again:",
        f"# hyperadapters train {printable(shlex.quote(str(output / 'recipe.yaml')))} --output NEW_FOLDER",
        yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).rstrip(),
        "tasks:",
    ]
    for entry in entries:
        schema = schemas[entry.name]
        lines += [
            f"  # {printable(entry.name)}",
            f"  # Text: {_columns(schema.texts)}; {printable(schema.reasons['texts'])}.",
            f"  # Label: {_columns([schema.label])}; {printable(schema.reasons['label'])}.",
            f"  # Kind: {schema.kind}; {printable(schema.reasons['kind'])}.",
        ]
        if entry.source.held_out:
            lines.append(f"  # The data have no {' and no '.join(entry.source.held_out)} rows; these are held out.")
        text = yaml.safe_dump([_task_values(entry, output)], sort_keys=False, allow_unicode=True)
        # Only line feeds end a line of YAML here; `splitlines` would also break at U+2028 in a name.
        lines += [f"  {line}" for line in text.rstrip("\n").split("\n")]
    return "\n".join(lines) + "\n"


def _columns(names: Sequence[str]) -> str:
    return " and ".join(f"'{printable(name)}'" for name in names)


def _task_values(entry: TaskEntry, output: Path) -> dict[str, Any]:
    """Return the values of a task for a recipe in the output folder, without those that are not needed."""
    values: dict[str, Any] = entry.model_dump(mode="json", by_alias=True, include={"name", "kind", "fields", "source"})
    source = entry.source.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    source["path"] = {split: _relative(path, output) for split, path in source["path"].items()}
    return {**values, "source": source}


def _relative(path: str, folder: Path) -> str:
    try:
        return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    except ValueError:  # on another drive of Windows
        return path


def print_results(run: Run, recipe: Recipe, output: Path, console: Console) -> None:
    """Print the test scores beside those of the majority class, and what can be done with the model.

    Args:
        run: The finished run.
        recipe: Its recipe.
        output: Its folder.
        console: Console to print to.
    """
    table = Table("task", "metric")
    for title in ("majority class", "test"):
        table.add_column(title, justify="right")
    for data in run.tasks:
        metric, task = data.task.main_metric, data.task
        baseline = "" if task.kind == "text-to-text" else f"{majority(data)[metric]:.4f}"
        score = run.metrics["tasks"][task.name]["test"][metric]
        table.add_row(escape(printable(task.name)), metric, baseline, f"{score:.4f}")
    console.print(table)
    folder = printable(shlex.quote(str(output)))
    first = recipe.tasks[0]
    columns = tuple(first.source.columns.get(field, field) for field in first.fields)
    texts = (
        "".join(f" --text {printable(shlex.quote(column))}" for column in columns) if columns != first.fields else ""
    )
    lines = [
        f"The recipe, the checkpoint and metrics.json are in {output}/. To go on:",
        f"  hyperadapters predict {folder} --input new.csv{texts} --output answers.csv",
        f"  hyperadapters serve {folder}",
        f"  hyperadapters check {printable(shlex.quote(str(output / 'recipe.yaml')))}",
        f"  hyperadapters train {printable(shlex.quote(str(output / 'recipe.yaml')))} --output NEW_FOLDER",
    ]
    if len(run.tasks) == 1:
        lines.append(
            "The model has a single task and answers every text. To decline others, train it together with other "
            "tasks, or calibrate it with foreign texts."
        )
    for line in lines:
        console.print(escape(line), soft_wrap=True, highlight=False)
