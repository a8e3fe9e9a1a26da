"""Conversion between the targets of a task and the texts that a text-to-text backbone generates for them."""

from __future__ import annotations

import math

from hyperadapters.config import Task


def target_text(task: Task, target: int | float | str | None) -> str:
    """Return the text that a text-to-text backbone is trained to generate for a target.

    Args:
        task: Task of the target.
        target: Index of a label, number, or text, depending on the kind of the task.
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
