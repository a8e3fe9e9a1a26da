"""The objective of a model: the task loss, and the contrastive losses of the methods and settings that have them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from hyperadapters.core import (
    Losses,
    Reduction,
    instance_contrastive_loss,
    prototype_contrastive_loss,
    sequence_loss,
    total_loss,
)

if TYPE_CHECKING:
    from hyperadapters.model.model import HyperAdapterModel


def objective(
    model: HyperAdapterModel,
    logits: Tensor,
    instances: Tensor | None,
    task_ids: Tensor,
    labels: Tensor,
    label_smoothing: float,
    reduction: Reduction,
) -> Losses:
    """The objective of a batch and its terms; a term that the model does not have is 0.

    Args:
        model: its settings, heads and prototypes are used.
        logits: of the backbone [B, S, V] or of the heads [B, C].
        instances: instance vectors [B, p]; None for a method without a retriever.
        task_ids: [B].
        labels, label_smoothing, reduction: as in `HyperAdapterModel.forward`.
    """
    config = model.adapter_config
    task = _task_loss(model, logits, task_ids, labels, label_smoothing, reduction)
    instance = prototype = task.new_zeros(())
    if config.method == "pha":
        assert instances is not None
        if config.contrast in ("both", "instance"):
            instance = instance_contrastive_loss(instances, task_ids, config.temperature)
        if config.contrast in ("both", "prototype"):
            prototype = prototype_contrastive_loss(
                instances,
                model.prototypes.weight,
                task_ids,
                config.temperature,
                positive_in_denominator=config.preset != "official",
            )
    return total_loss(task, instance, prototype, config.contrastive_weight)


def _task_loss(
    model: HyperAdapterModel,
    logits: Tensor,
    task_ids: Tensor,
    labels: Tensor,
    label_smoothing: float,
    reduction: Reduction,
) -> Tensor:
    if model.heads is not None:
        return model.heads.loss(logits, labels, task_ids, label_smoothing, reduction)
    return text_loss(model, logits, labels, label_smoothing, reduction)


def text_loss(
    model: HyperAdapterModel,
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """The task loss of a text-to-text backbone, see `core.sequence_loss`."""
    if model.kind == "decoder":  # the logits at a token are those of the next one
        logits, labels = logits[:, :-1], labels[:, 1:]
    official = model.adapter_config.preset == "official"
    ignored = (-100, model.backbone.config.pad_token_id) if official else (-100,)  # type: ignore[union-attr]
    return sequence_loss(logits, labels, label_smoothing, reduction, ignored, count_ignored=official)  # type: ignore[arg-type]
