"""The twelve tasks of the benchmark at a training size."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from hyperadapters.config import Recipe, Source, Split, load_recipe
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.data.loading import load_tasks

Size = int | Literal["all"]

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "local-glue.yaml"
MAX_LENGTH = 96


def read_size(text: str) -> Size:
    """A training size as the command line has it: a number, or "all"."""
    return "all" if text == "all" else int(text)


def recipe_of(folder: Path, n: Size) -> Recipe:
    """The recipe of the twelve tasks, with the data of a folder and so many training and validation rows a task."""
    rows = "null" if n == "all" else n
    overrides = [f"data.n_train={rows}", f"data.n_validation={rows}", f"data.max_length={MAX_LENGTH}"]
    recipe = load_recipe(RECIPE, overrides)
    entries = (
        entry.model_copy(update={"source": Source(path=str(folder / entry.name / "{split}.jsonl"))})
        for entry in recipe.tasks
    )
    return recipe.model_copy(update={"tasks": tuple(entries)})


@lru_cache(maxsize=8)
def load(folder: Path, n: Size, seed: int) -> tuple[TaskData, ...]:
    """The tasks with n rows each (two of each label at least), drawn by the seed, and all rows of the test files.

    Raises:
        DataError: a file is missing or a row is wrong.
    """
    recipe = recipe_of(folder, n)
    return tuple(load_tasks(recipe.tasks, recipe.data, seed))


def rows_of(tasks: tuple[TaskData, ...], split: Split) -> list[Example]:
    """The examples of all tasks in a split, task after task."""
    return [example for data in tasks for example in data.splits[split]]


def alone(data: TaskData) -> TaskData:
    """A task as the only one of a model, with the task id 0."""
    splits = {split: [replace(example, task_id=0) for example in rows] for split, rows in data.splits.items()}
    return TaskData(data.task, splits)
