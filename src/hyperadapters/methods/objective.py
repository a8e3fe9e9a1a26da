"""The objective of a batch: the task loss, and the auxiliary losses of the method."""

from __future__ import annotations

from torch import Tensor

from hyperadapters.core import Losses, Reduction, sequence_loss, total_loss
from hyperadapters.methods.base import Method


def objective(method: Method, task_loss: Tensor, instances: Tensor | None, task_ids: Tensor) -> Losses:
    """Add the auxiliary losses of a method to the task loss.

    Args:
        method: The method of the model.
        task_loss: Scalar.
        instances: Instance vectors [B, p]; None for a method without a retriever.
        task_ids: Task of each row [B].

    Returns:
        The total and its terms; a term that the method does not have is 0.
    """
    instance, prototype = method.auxiliary_losses(instances, task_ids)
    return total_loss(task_loss, instance, prototype, method.config.contrastive_weight)


def text_loss(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    *,
    predicts_next: bool = False,
    padding_id: int | None = None,
) -> Tensor:
    """Compute the task loss of a backbone that writes its answers; see `core.sequence_loss`.

    Args:
        logits: [B, S, V].
        labels: Token ids [B, S], -100 where there is no target.
        label_smoothing: Share of the target distribution that is uniform.
        reduction: "mean" or "sum" over target tokens.
        predicts_next: Whether the logits at a token are those of the token after it, as in decoders.
        padding_id: Id of the padding token for preset "official", which ignores that id in the labels too and divides
            by all tokens; None for other presets.
    """
    if predicts_next:
        logits, labels = logits[:, :-1], labels[:, 1:]
    is_official = padding_id is not None
    ignored = (-100,) if padding_id is None else (-100, padding_id)
    return sequence_loss(logits, labels, label_smoothing, reduction, ignored, count_ignored=is_official)
