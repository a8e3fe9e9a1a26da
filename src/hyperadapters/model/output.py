"""The inputs of a forward pass, checked, and its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hyperadapters.core import Losses
from hyperadapters.errors import TaskError


@dataclass
class HyperAdapterOutput(ModelOutput):
    """Result of `HyperAdapterModel.forward`.

    Attributes:
        loss: Total loss, if labels were given.
        losses: The total loss and its terms, if labels were given.
        logits: [B, S, V] for text-to-text backbones, [B, C] for task heads (see `TaskHeads.forward`).
        instances: Instance vectors [B, p]; None for a method without a retriever.
        task_ids: The tasks that were used [B]: the given ones, or the most similar ones.
        encoder_hidden_states: Output of the embeddings and of each encoder layer [B, S, d], if requested.
        decoder_hidden_states: Output of the embeddings and of each decoder layer [B, S, d], if requested.
    """

    loss: Tensor | None = None
    losses: Losses | None = None
    logits: Tensor | None = None
    instances: Tensor | None = None
    task_ids: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None


class Generated(NamedTuple):
    """Result of `HyperAdapterModel.generate_with_tasks`.

    Attributes:
        tokens: The result of transformers' `generate`.
        task_ids: The tasks that were used [B].
        instances: Instance vectors [B, p]; None for a method without a retriever.
    """

    tokens: Any
    task_ids: Tensor
    instances: Tensor | None


def check_labels(labels: Tensor, rows: int, text_to_text: bool) -> None:
    """Check the labels of a batch.

    Args:
        labels: [B] for task heads; token ids [B, T] for text-to-text backbones.
        rows: Number B of rows.
        text_to_text: Whether the backbone writes its answers.

    Raises:
        TaskError: The labels have another shape or type.
    """
    expected = f"token ids of shape ({rows}, T), T at least 1" if text_to_text else f"a tensor of shape ({rows},)"
    found = f"shape {tuple(labels.shape)}, {labels.dtype}" if isinstance(labels, Tensor) else repr(labels)
    fits = isinstance(labels, Tensor) and labels.shape[:1] == (rows,) and labels.ndim == (2 if text_to_text else 1)
    if not fits or 0 in labels.shape or labels.dtype == torch.bool or (text_to_text and labels.is_floating_point()):
        raise TaskError(f"labels: expected {expected}, found {found}")


def check_task_ids(task_ids: Tensor | None, rows: int, num_tasks: int, has_labels: bool) -> None:
    """Check the task ids of a batch.

    Args:
        task_ids: [B], or None.
        rows: Number B of rows.
        num_tasks: Number of tasks of the model.
        has_labels: Whether labels were given.

    Raises:
        TaskError: There are no rows; labels come without task ids; or the task ids have another shape or type, or are
            out of range.
    """
    if rows == 0:
        raise TaskError("expected at least one row in the batch, found none")
    if task_ids is None:
        if has_labels:
            raise TaskError("labels need task_ids: a loss is not computed for tasks that were guessed")
        return
    if not isinstance(task_ids, Tensor) or task_ids.dtype != torch.long or task_ids.shape != (rows,):
        found = f"{task_ids.dtype} of shape {tuple(task_ids.shape)}" if isinstance(task_ids, Tensor) else repr(task_ids)
        raise TaskError(f"task_ids: expected a LongTensor of shape ({rows},), one task a row; found {found}")
    low, high = int(task_ids.min()), int(task_ids.max())
    if low < 0 or high >= num_tasks:
        raise TaskError(
            f"task_ids: expected 0 to {num_tasks - 1} ({num_tasks} tasks), found {low if low < 0 else high}"
        )
