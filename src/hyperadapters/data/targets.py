"""Conversion between the targets of a task and the texts that a text-to-text backbone generates for them."""

from __future__ import annotations

import math
from collections.abc import Collection

from hyperadapters.config import Task

Target = int | float | str | tuple[int, ...]
"""Index of a label (classification), indices of labels in ascending order (multi-label), number (regression), or text
(text-to-text)."""


def target_text(task: Task, target: Target | None) -> str:
    """Return the text that a text-to-text backbone is trained to generate for a target.

    Args:
        task: Task of the target.
        target: Target of any kind but several labels.
    """
    if task.kind == "classification":
        label = task.labels[int(target)]  # type: ignore[arg-type]
        return (task.verbalizer or {}).get(label, label)
    if task.kind == "regression":
        number = float(target)  # type: ignore[arg-type]
        return str(number if task.step is None else round(round(number / task.step) * task.step, 6))
    return str(target)


def read_answer(task: Task, text: str) -> int | float | str | None:
    """Return the target that corresponds to a generated text, the inverse of `target_text`.

    Args:
        task: Task of the text.
        text: Generated text.

    Returns:
        Index of the label, number, or text, depending on the kind of the task. None if the text is not that of a label
        or not a number.
    """
    text = text.strip()
    if task.kind == "classification":
        words = [target_text(task, index).strip() for index in range(len(task.labels))]
        return words.index(text) if text in words else None
    if task.kind == "regression":
        try:
            number = float(text)
        except ValueError:
            return None
        return number if math.isfinite(number) else None
    return text


def label_indices(task: Task, target: object) -> tuple[int, ...]:
    """Return the indices of the labels that a target consists of.

    Args:
        task: Task of the target.
        target: Index of a label, indices of several labels, or any other target.

    Returns:
        One index for a classification task, any number of indices for a multi-label task, and none for other tasks.
    """
    if task.is_multi_label:
        return tuple(target)  # type: ignore[arg-type]
    return (int(target),) if task.kind == "classification" else ()  # type: ignore[call-overload]


def multi_hot(indices: Collection[int], size: int) -> list[float]:
    """Return a set of labels as a row of zeros and ones.

    Args:
        indices: Indices of the labels.
        size: Length C of the row, which exceeds every index.

    Returns:
        C numbers: 1 for each label of the set and 0 for the others.
    """
    return [1.0 if index in indices else 0.0 for index in range(size)]
