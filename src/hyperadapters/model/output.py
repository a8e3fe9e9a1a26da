"""What goes into a forward and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hyperadapters.config import Method
from hyperadapters.core import Losses
from hyperadapters.errors import TaskError

Route = Literal["nearest", "soft"]
ROUTES = ("nearest", "soft")


@dataclass
class HyperAdapterOutput(ModelOutput):
    """Result of a forward.

    Attributes:
        loss: the total, if labels were given.
        losses: the total and its terms, if labels were given.
        logits: [B, S, V] for text-to-text backbones, [B, C] for heads (see `TaskHeads.forward`).
        instances: instance vectors [B, p]; None for a method without a retriever.
        task_ids: the tasks used [B]: those given, or the most similar ones.
        encoder_hidden_states, decoder_hidden_states: the embedding and each layer's output [B, S, d], if asked for.
    """

    loss: Tensor | None = None
    losses: Losses | None = None
    logits: Tensor | None = None
    instances: Tensor | None = None
    task_ids: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None


class Generated(NamedTuple):
    """Result of a generation.

    Attributes:
        tokens: what transformers' `generate` returns.
        task_ids: the tasks used [B].
        instances: instance vectors [B, p]; None for a method without a retriever.
    """

    tokens: Any
    task_ids: Tensor
    instances: Tensor | None


def check_can_route(method: Method) -> None:
    """Raise TaskError unless a method finds the task of an input."""
    if method != "pha":
        raise TaskError(f"method '{method}' cannot route: give each input its task")


def check_labels(labels: Tensor, rows: int, text_to_text: bool) -> None:
    """Raise TaskError unless labels are [B] for heads, or token ids [B, T] for text-to-text backbones."""
    expected = f"token ids of shape ({rows}, T), T at least 1" if text_to_text else f"a tensor of shape ({rows},)"
    found = f"shape {tuple(labels.shape)}, {labels.dtype}" if isinstance(labels, Tensor) else repr(labels)
    fits = isinstance(labels, Tensor) and labels.shape[:1] == (rows,) and labels.ndim == (2 if text_to_text else 1)
    if not fits or 0 in labels.shape or labels.dtype == torch.bool or (text_to_text and labels.is_floating_point()):
        raise TaskError(f"labels: expected {expected}, found {found}")


def check_task_ids(task_ids: Tensor | None, rows: int, num_tasks: int, has_labels: bool, method: Method) -> None:
    """Check the task ids [B] of a batch.

    Raises:
        TaskError: they have a wrong shape or type, are out of range, or labels come without them, or the method needs
            them; or there are no rows.
    """
    if rows == 0:
        raise TaskError("expected at least one row in the batch, found none")
    if task_ids is None:
        if has_labels:
            raise TaskError("labels need task_ids: a loss is not computed for tasks that were guessed")
        check_can_route(method)
        return
    if not isinstance(task_ids, Tensor) or task_ids.dtype != torch.long or task_ids.shape != (rows,):
        found = f"{task_ids.dtype} of shape {tuple(task_ids.shape)}" if isinstance(task_ids, Tensor) else repr(task_ids)
        raise TaskError(f"task_ids: expected a LongTensor of shape ({rows},), one task a row; found {found}")
    low, high = int(task_ids.min()), int(task_ids.max())
    if low < 0 or high >= num_tasks:
        raise TaskError(
            f"task_ids: expected 0 to {num_tasks - 1} ({num_tasks} tasks), found {low if low < 0 else high}"
        )
