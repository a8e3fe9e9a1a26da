"""The suites of tasks of the benchmark, each at a training size.

`main` has twelve tasks that are hardly related, `fdu`, `hwu64` and `tweeteval` have related ones, and `all` has the
tasks of these four suites in one model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from hyperadapters.config import DataConfig, Source, Split, TaskEntry, load_recipe
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.data.loading import load_tasks

Size = int | Literal["all"]
Suite = Literal["main", "fdu", "hwu64", "tweeteval", "all"]

FAMILIES: tuple[Suite, ...] = ("fdu", "hwu64", "tweeteval")
PARTS: tuple[Suite, ...] = ("main", *FAMILIES)
"""The suites that `all` consists of."""
SUITES: tuple[Suite, ...] = (*PARTS, "all")
MAX_LENGTHS: dict[Suite, int] = {"main": 96, "fdu": 48, "hwu64": 48, "tweeteval": 48, "all": 64}
"""Maximum number of tokens of an input. Reading the test files of `all` at 64 tokens costs a seventh more than at 48,
and most pairs of `main` are longer than 48 tokens; 96 would cost a third more."""

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "local-glue.yaml"


def read_size(text: str) -> Size:
    """A training size as the command line has it: a number, or "all"."""
    return "all" if text == "all" else int(text)


def entries_of(folder: Path, suite: Suite) -> tuple[TaskEntry, ...]:
    """The tasks of a suite other than `all`, with the files of a folder."""
    if suite == "main":
        entries = load_recipe(RECIPE).tasks
        return tuple(entry.model_copy(update={"source": _files(folder / entry.name)}) for entry in entries)
    described = json.loads((folder / "families" / "tasks.json").read_text())["tasks"]
    return tuple(
        TaskEntry(
            name=task["name"],
            labels=task["labels"],
            metrics=task["metric"],
            source=_files(folder / "families" / suite / task["name"]),
        )
        for task in described
        if task["suite"] == suite
    )


def _files(folder: Path) -> Source:
    return Source(path=str(folder / "{split}.jsonl"))


@lru_cache(maxsize=2 * len(SUITES))
def load(folder: Path, suite: Suite, n: Size, seed: int) -> tuple[TaskData, ...]:
    """The tasks of a suite with n rows each, drawn by the seed, and all rows of the test files.

    A task has at least two training rows of each label and at most n validation rows. In `all`, a task has the rows
    that it has in its own suite.

    Raises:
        DataError: a file is missing or a row is wrong.
    """
    if suite == "all":
        return joined({part: load(folder, part, n, seed) for part in PARTS})
    rows = None if n == "all" else n
    return tuple(load_tasks(entries_of(folder, suite), DataConfig(n_train=rows, n_validation=rows), seed))


def load_for_development(folder: Path, suite: Suite, n: Size, seed: int) -> tuple[TaskData, ...]:
    """The same, with rows of the training and validation files that are not drawn in the place of the test rows.

    Raises:
        ValueError: a task has no rows but those that are drawn.
    """
    every = load(folder, suite, "all", seed)
    return tuple(_without_test(*pair) for pair in zip(load(folder, suite, n, seed), every, strict=True))


DEVELOPMENT_ROWS = 200
"""Of a task, at most."""


def _without_test(drawn: TaskData, every: TaskData) -> TaskData:
    splits: tuple[Split, ...] = ("validation", "train")
    seen = {example for split in splits for example in drawn.splits[split]}
    left = [example for split in splits for example in every.splits[split] if example not in seen]
    if not left:
        raise ValueError(
            f"task '{drawn.task.name}': expected rows besides the {len(seen)} that are drawn, found none; "
            "choose a smaller size"
        )
    return TaskData(drawn.task, {**drawn.splits, "test": left[:DEVELOPMENT_ROWS]})


def joined(suites: Mapping[Suite, tuple[TaskData, ...]]) -> tuple[TaskData, ...]:
    """The tasks of several suites as those of one model.

    The names of tasks of a family begin with that of the family, since `music` is a task of two of them.
    """
    found: list[TaskData] = []
    for suite, tasks in suites.items():
        for data in tasks:
            name = data.task.name if suite == "main" else f"{suite}_{data.task.name}"
            task = data.task.model_copy(update={"name": name})
            found.append(numbered(TaskData(task, data.splits), len(found)))
    return tuple(found)


def rows_of(tasks: tuple[TaskData, ...], split: Split) -> list[Example]:
    """The examples of all tasks in a split, task after task."""
    return [example for data in tasks for example in data.splits[split]]


def alone(data: TaskData) -> TaskData:
    """A task as the only one of a model."""
    return numbered(data, 0)


def numbered(data: TaskData, task_id: int) -> TaskData:
    """A task whose examples have a task id."""
    splits = {split: [replace(example, task_id=task_id) for example in rows] for split, rows in data.splits.items()}
    return TaskData(data.task, splits)
