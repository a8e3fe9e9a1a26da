"""Loading the tasks of a recipe as checked examples, with held-out splits and nested subsets."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np

from hyperadapters.config import DataConfig, Split, Task, TaskEntry, parse
from hyperadapters.data.bad_rows import BadRows
from hyperadapters.data.examples import (
    EXAMPLES,
    Example,
    TaskData,
    infer_labels,
    label_names_of,
    read_fields,
    read_label,
    read_target,
    warn_of_spellings,
)
from hyperadapters.data.sources import Row, read_splits
from hyperadapters.data.stored_rows import collect, take
from hyperadapters.data.targets import label_indices
from hyperadapters.errors import DataError

MIN_ROWS_PER_LABEL = 2
logger = logging.getLogger(__name__)


def load_tasks(entries: Sequence[TaskEntry], data: DataConfig, seed: int) -> list[TaskData]:
    """Load and check all tasks of a recipe.

    Args:
        entries: Tasks of the recipe. The index of a task is the `task_id` of its examples.
        data: Settings of subsets.
        seed: Seed of held-out splits and subsets.

    Returns:
        The tasks with their examples.

    Raises:
        DataError: If a file or a row is invalid, or a label never occurs in the training rows.
    """
    return [load_task(entry, task_id, data, seed) for task_id, entry in enumerate(entries)]


def load_task(entry: TaskEntry, task_id: int, data: DataConfig, seed: int) -> TaskData:
    """Load and check one task: infer its labels, hold out its splits and select its subset.

    Args:
        entry: Task of the recipe.
        task_id: Index of the task in the model.
        data: Settings of subsets.
        seed: Seed of held-out splits and subsets.

    Returns:
        The task with its examples.

    Raises:
        DataError: If a file or a row is invalid, or a label never occurs in the training rows.
    """
    bad_rows = BadRows(data.on_bad_row)
    rows = read_rows(entry, bad_rows, seed)
    bad_rows.report(f"task '{entry.name}'")
    task = _with_labels(entry, rows["train"])
    splits = {
        split: collect((_example(row, task, task_id) for row in found), EXAMPLES) for split, found in rows.items()
    }
    check_labels_seen(task, splits["train"])
    warn_of_spellings(task, chain.from_iterable(rows.values()))
    splits["train"] = subset(splits["train"], task, data, seed)
    if "validation" in splits and data.n_validation is not None:
        order = nested_order(splits["validation"], task, seed)
        splits["validation"] = take(splits["validation"], order[: data.n_validation])
    warn_of_missing_labels(task, splits)
    return TaskData(task, splits, bad_rows.count)


def read_rows(entry: TaskEntry, bad_rows: BadRows, seed: int) -> dict[Split, Sequence[Row]]:
    """Read the rows of a task and hold out its splits, without a subset.

    Args:
        entry: Task of the recipe.
        bad_rows: What is done with rows that cannot be read.
        seed: Seed of held-out splits.

    Returns:
        The rows of each split, of which there is at least "train".

    Raises:
        DataError: If a file or a row is invalid, a split cannot be held out, or there are no training rows.
    """
    rows = _readable_rows(entry, bad_rows)
    for split, held_out in entry.source.held_out.items():
        origin = held_out.from_split
        if split in rows:
            raise DataError(f"task '{entry.name}': {split} is in the source and also in held_out; remove one of them")
        if origin not in rows:
            raise DataError(f"task '{entry.name}': {split} is to be held out from {origin}, which has no rows")
        rows[origin], rows[split] = _hold_out(rows[origin], entry, split, seed)
        if not rows[origin] or not rows[split]:
            raise DataError(
                f"task '{entry.name}': with {held_out.size} rows of {origin} held out for {split}, one of them is empty"
            )
    if "train" not in rows:
        raise DataError(f"task '{entry.name}': found no training rows; its source must have a train split")
    return rows


def _readable_rows(entry: TaskEntry, bad_rows: BadRows) -> dict[Split, Sequence[Row]]:
    """Return the rows of all splits, without those that are skipped."""
    found = read_splits(entry.source, bad_rows)
    if not bad_rows.skips:
        return found
    kept: dict[Split, Sequence[Row]] = {}
    for split, rows in found.items():
        kept[split] = take(rows, [index for index, row in enumerate(rows) if _is_readable(row, entry.task, bad_rows)])
        if not kept[split]:
            raise DataError(f"task '{entry.name}': none of its {split} rows can be read; the first: {bad_rows.first}")
    return kept


def _is_readable(row: Row, task: Task, bad_rows: BadRows) -> bool:
    """Return whether a row has valid texts and a valid target, and count it as a bad row otherwise."""
    try:
        read_fields(row, task)
        if task.is_labelled and not task.labels:
            label_names_of(row, task)
        else:
            read_target(row, task)
    except DataError as error:
        bad_rows.add(error)
        return False
    return True


def subset(examples: Sequence[Example], task: Task, data: DataConfig, seed: int) -> Sequence[Example]:
    """Return the training subset that the settings describe, in random order.

    Args:
        examples: Training examples of the task.
        task: Task of the examples.
        data: Settings, of which `n_train`, `fraction` and `k_per_label` are used.
        seed: Seed of the order.
    """
    order = nested_order(examples, task, seed)
    if data.k_per_label is not None:
        count = data.k_per_label
        order = _first_of_each(order, _labels_of(examples, task), count) if task.labels else order[:count]
    elif data.n_train is not None or data.fraction is not None:
        size = data.n_train or max(1, math.ceil(round(len(examples) * (data.fraction or 1.0), 6)))
        least = len(_first_of_each(order, _labels_of(examples, task), MIN_ROWS_PER_LABEL)) if task.labels else 0
        order = order[: max(size, least)]
    return take(examples, order)


def _labels_of(examples: Sequence[Example], task: Task) -> list[tuple[object, ...]]:
    return [label_indices(task, example.target) for example in examples]


def nested_order(examples: Sequence[Example], task: Task, seed: int) -> list[int]:
    """Return a random order in which every prefix is a stratified subset.

    The first rows are two of each label. After these the labels of a classification task occur in proportion to their
    numbers of rows, and the rows of a multi-label task are in random order.

    Args:
        examples: Examples of the task.
        task: Task of the examples.
        seed: Seed of the order.

    Returns:
        Indices of the examples.
    """
    shuffled = list(range(len(examples)))
    random.Random(f"{seed}/{task.name}").shuffle(shuffled)
    if not task.labels:
        return shuffled
    if task.is_multi_label:
        first = _first_of_each(shuffled, _labels_of(examples, task), MIN_ROWS_PER_LABEL)
        taken = set(first)
        return [*first, *(index for index in shuffled if index not in taken)]
    labels = [example.target for example in examples]
    counts, seen = Counter(labels), Counter[object]()
    is_later, place = np.empty(len(shuffled), bool), np.empty(len(shuffled))
    for position, index in enumerate(shuffled):
        label = labels[index]
        is_later[position] = seen[label] >= MIN_ROWS_PER_LABEL
        place[position] = (seen[label] + 0.5) / counts[label]
        seen[label] += 1
    return [shuffled[position] for position in np.lexsort((place, is_later))]


def _first_of_each(order: Sequence[int], labels: Sequence[tuple[object, ...]], count: int) -> list[int]:
    """Return the rows that have a label of which fewer than `count` rows precede; no label counts as a label, too."""
    seen: dict[object, int] = defaultdict(int)
    kept = []
    for index in order:
        own = labels[index] or (None,)
        if any(seen[label] < count for label in own):
            kept.append(index)
            for label in own:
                seen[label] += 1
    return kept


def _hold_out(
    rows: Sequence[Row], entry: TaskEntry, split: Literal["validation", "test"], seed: int
) -> tuple[Sequence[Row], Sequence[Row]]:
    """Return the remaining rows, and those held out for a split, at random.

    The labels of a classification task occur in proportion. At least one training row of each label remains.
    """
    held_out = entry.source.held_out[split]
    count = math.ceil(round(held_out.size * len(rows), 6)) if held_out.size < 1 else int(held_out.size)
    order = list(range(len(rows)))
    random.Random(f"{seed}/{entry.name}/{split}").shuffle(order)
    if entry.kind == "classification" and count < len(rows):
        order = _in_proportion(order, [read_label(row) for row in rows], keep_one=held_out.from_split == "train")
    elif entry.is_multi_label and held_out.from_split == "train":
        kept = set(_first_of_each(order, [label_names_of(row, entry) for row in rows], 1))
        order = [index for index in order if index not in kept]
    taken = set(order[:count])
    if len(taken) < min(count, len(rows)):
        logger.warning(
            f"task '{entry.name}': only {len(taken)} rows of {held_out.from_split} were held out for {split}, not "
            f"{count}, so that one row of each label remains in the training rows"
        )
    rest = [index for index in range(len(rows)) if index not in taken]
    return take(rows, rest), take(rows, sorted(taken))


def _in_proportion(order: list[int], labels: list[str], keep_one: bool) -> list[int]:
    """Sort rows so that labels occur in proportion in every prefix; `keep_one` omits one row of each label."""
    counts, seen = Counter(labels), Counter[str]()
    place: dict[int, float] = {}
    for index in order:
        label = labels[index]
        seen[label] += 1
        if seen[label] < counts[label] or not keep_one:
            place[index] = (seen[label] - 0.5) / counts[label]
    return sorted(place, key=place.__getitem__)


def warn_of_missing_labels(task: Task, splits: Mapping[Any, Sequence[Example]]) -> None:
    """Log a warning for each split in which labels of a classification or multi-label task do not occur.

    Args:
        task: Task of the examples.
        splits: Examples by the name of their split.
    """
    for split, examples in splits.items():
        seen = {label for example in examples for label in label_indices(task, example.target)}
        missing = [label for index, label in enumerate(task.labels) if index not in seen]
        if missing:
            logger.warning(f"task '{task.name}': there are no {split} rows with label {', '.join(missing)}")


def _with_labels(entry: TaskEntry, train: Sequence[Row]) -> Task:
    task = entry.task
    if not task.is_labelled or task.labels:
        return task
    labels, least = infer_labels(train, task), "one label" if task.is_multi_label else "two labels"
    if len(labels) < 1 + (not task.is_multi_label):
        raise DataError(f"task '{task.name}': expected at least {least} in the training rows, found {list(labels)}")
    return parse(Task, {**task.model_dump(), "labels": labels}, DataError, f"task '{task.name}'")


def _example(row: Row, task: Task, task_id: int) -> Example:
    text, text_pair = read_fields(row, task)
    return Example(task_id, text, text_pair, read_target(row, task))


def check_labels_seen(task: Task, train: Sequence[Example]) -> None:
    """Check that each label of a classification or multi-label task occurs in its training examples.

    Args:
        task: Task of the examples.
        train: Training examples.

    Raises:
        DataError: If a label does not occur.
    """
    seen = {label for example in train for label in label_indices(task, example.target)}
    unseen = [label for index, label in enumerate(task.labels) if index not in seen]
    if unseen:
        raise DataError(
            f"task '{task.name}': label(s) {', '.join(unseen)} never occur in the training rows; "
            "add rows for them or remove them from labels"
        )
