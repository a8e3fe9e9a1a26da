"""Heads that are to read frozen features and have not been fitted to them yet, and a warning of them.

Training adapts wide heads (see `TaskHeads`) to the adapted hidden states alone; their weights for frozen features are
zero until they are fitted, which is the last step of training. Whoever forgets it has a model that works, but worse.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from hyperadapters.config import Task
from hyperadapters.heads.task_heads import TaskHeads


class UnfittedHeadsWarning(UserWarning):
    """Heads that are to read frozen features have not been fitted to them."""


@torch.no_grad()
def unfitted_tasks(heads: TaskHeads, tasks: Sequence[Task]) -> list[str]:
    """Return the names of the tasks whose heads are to read frozen features and have not been fitted to them.

    Weights of zero for the features are not enough to tell, since a fit may find that they say nothing about a task.
    What a fit makes is rounded to float16, whereas initial and trained weights are not.
    """
    wide = heads.wide_weight
    reads_features = wide[:, : heads.features_size].any(dim=1)
    if bool(reads_features.all()):
        return []
    is_rounded = (wide.half().float() == wide).all(dim=1)
    found, num_plain = (reads_features | is_rounded).tolist(), len(heads.weight)
    places = zip(heads.starts.tolist(), heads.sizes, tasks, strict=True)
    return [
        task.name
        for start, size, task in places
        if start >= num_plain and not any(found[start - num_plain : start - num_plain + size])
    ]


def warn_of_unfitted_heads(heads: TaskHeads | None, tasks: Sequence[Task]) -> None:
    """Issue an `UnfittedHeadsWarning` that names the tasks whose heads are not fitted, once for a model.

    Args:
        heads: Heads of a model; None for text-to-text backbones.
        tasks: Tasks of the model.
    """
    if heads is None or not heads.warns_if_unfitted:
        return
    if names := unfitted_tasks(heads, tasks):
        heads.warns_if_unfitted = False
        warnings.warn(
            f"the heads of {', '.join(names)} are to read features of the frozen backbone and have not been fitted to "
            "them, so they read the adapted hidden states alone; call model.fit_heads(train_data, eval_data) after "
            "training, or train with hyperadapters.Trainer, which does it",
            UnfittedHeadsWarning,
            stacklevel=_levels_of_library(),
        )


def _levels_of_library() -> int:
    """The `stacklevel` by which a warning is about the code that called this library."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "hyperadapters":
        frame, level = frame.f_back, level + 1
    return level


@contextmanager
def expecting_unfitted_heads(heads: TaskHeads | None) -> Iterator[None]:
    """Return a context in which nobody is warned, because the heads are being trained and will be fitted."""
    if heads is None:
        yield
        return
    before, heads.warns_if_unfitted = heads.warns_if_unfitted, False
    try:
        yield
    finally:
        heads.warns_if_unfitted = before
