"""Detection of heads that should read frozen features but have not been fitted to them yet, with a warning.

Training adapts wide heads (see `TaskHeads`) to the adapted hidden states only. Their weights for frozen features are
zero until the heads are fitted, which is the last step of training. A model without this step works, but its
predictions are worse.
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
    """Warning that heads which should read frozen features have not been fitted to them."""


@torch.no_grad()
def unfitted_tasks(heads: TaskHeads, tasks: Sequence[Task]) -> list[str]:
    """Return the names of the tasks whose heads should read frozen features but have not been fitted to them.

    A head is not necessarily unfitted if its weights for the features are zero, because a fit may find that the
    features are not informative for a task. Fitted weights are therefore recognised by being rounded to float16, which
    initial and trained weights are not.

    Args:
        heads: Heads of a model.
        tasks: Tasks of the model.

    Returns:
        Names in the order of the tasks.
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
            f"the heads of {', '.join(names)} should read features of the frozen backbone but have not been fitted to "
            "them, so they read the adapted hidden states only; call model.fit_heads(train_data, eval_data) after "
            "training, or train with hyperadapters.Trainer, which calls it",
            UnfittedHeadsWarning,
            stacklevel=_levels_of_library(),
        )


def _levels_of_library() -> int:
    """Return the `stacklevel` with which a warning refers to the code that called this library."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "hyperadapters":
        frame, level = frame.f_back, level + 1
    return level


@contextmanager
def expecting_unfitted_heads(heads: TaskHeads | None) -> Iterator[None]:
    """Return a context in which no warning of unfitted heads is issued, because they will be fitted after training.

    Args:
        heads: Heads of a model; None for text-to-text backbones.
    """
    if heads is None:
        yield
        return
    before, heads.warns_if_unfitted = heads.warns_if_unfitted, False
    try:
        yield
    finally:
        heads.warns_if_unfitted = before
