"""The objective of a batch: the task loss plus the auxiliary losses of the method."""

from __future__ import annotations

from torch import Tensor

from hyperadapters.core import ONE_PROCESS, Losses, Processes, Reduction, TaskLoss, sequence_loss, total_loss
from hyperadapters.methods.base import Method


def objective(
    method: Method, task_loss: Tensor, instances: Tensor | None, task_ids: Tensor, processes: Processes = ONE_PROCESS
) -> Losses:
    """Add the auxiliary losses of a method to the task loss.

    Args:
        method: Method of the model.
        task_loss: Task loss, a scalar.
        instances: Instance vectors [B, p]; None for a method without a retriever.
        task_ids: Id of the task of each row [B].
        processes: Processes that share the batch. Default: this one only.

    Returns:
        The total and its terms. A term that the method does not have is zero.
    """
    instance, prototype = method.auxiliary_losses(instances, task_ids, processes)
    return total_loss(task_loss, instance, prototype, method.config.contrastive_weight)


def text_loss(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    *,
    predicts_next: bool = False,
    padding_id: int | None = None,
    processes: Processes = ONE_PROCESS,
) -> TaskLoss:
    """Compute the task loss of a text-to-text backbone; see `core.sequence_loss`.

    Args:
        logits: Logits [B, S, V].
        labels: Token ids [B, S], -100 for tokens without a target.
        label_smoothing: Share of the target distribution that is uniform. Default: 0.
        reduction: "mean" (default) or "sum" over target tokens.
        predicts_next: Whether the logits of a token are predictions of the following token, as in decoders. Default:
            False.
        padding_id: Id of the padding token for preset "official", which also ignores this id in the labels and divides
            by the number of all tokens. Default: None, for other presets.
        processes: Processes that share the batch. Default: this one only.
    """
    if predicts_next:
        logits, labels = logits[:, :-1], labels[:, 1:]
    is_official = padding_id is not None
    ignored = (-100,) if padding_id is None else (-100, padding_id)
    loss = sequence_loss(logits, labels, label_smoothing, reduction, ignored, count_ignored=is_official)
    if reduction == "sum":
        return loss._replace(value=processes.sum(loss.value))
    if is_official:  # one process would pad all rows to the same length
        rows, width = labels.shape
        longest = processes.maximum(width, labels.device)
        return loss._replace(value=processes.mean(loss.value * (width / longest), rows * longest))
    return loss._replace(value=processes.mean(loss.value, (labels != -100).sum()))
