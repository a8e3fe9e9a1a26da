"""Outputs of a forward pass and of generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from transformers.utils import ModelOutput

from hyperadapters.core import Losses, TaskLoss


@dataclass
class HyperAdapterOutput(ModelOutput):
    """Result of `HyperAdapterModel.forward`.

    Attributes:
        loss: Total loss, a scalar; None without labels.
        losses: Total loss and its terms; None without labels.
        task_loss: Task loss with its sums for each row; None without labels.
        logits: Logits [B, S, V] of text-to-text backbones, or [B, C] of task heads (see `TaskHeads.forward`).
        instances: Instance vectors [B, p]; None for a method without a retriever.
        similarity: Similarity to each task [B, T], by which inputs are routed; None for a method that cannot route.
        task_ids: Ids of the tasks that were used [B]: the given tasks, or the most similar ones.
        encoder_hidden_states: Outputs of the embeddings and of each encoder layer, each [B, S, d], if requested. With
            the setting `head_inputs` "adapted_texts", they are those of `HyperAdapterModel.sequences`.
        decoder_hidden_states: Outputs of the embeddings and of each decoder layer, each [B, S, d], if requested.
    """

    loss: Tensor | None = None
    losses: Losses | None = None
    task_loss: TaskLoss | None = None
    logits: Tensor | None = None
    instances: Tensor | None = None
    similarity: Tensor | None = None
    task_ids: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None


class Generated(NamedTuple):
    """Result of `HyperAdapterModel.generate_with_tasks`.

    Attributes:
        tokens: Result of transformers' `generate`.
        task_ids: Ids of the tasks that were used [B].
        instances: Instance vectors [B, p]; None for a method without a retriever.
        similarity: Similarity to each task [B, T]; None for a method that cannot route.
    """

    tokens: Any
    task_ids: Tensor
    instances: Tensor | None
    similarity: Tensor | None
