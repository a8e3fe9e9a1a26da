"""The training objective: the task loss, a contrastive loss between instances, and one with prototypes.

Shapes: B rows, T tasks with one prototype each, p size of a prototype, V size of the vocabulary, S target positions.
Source of all losses: Zhao, Fu and He, "Prototype-based HyperAdapter for Sample-Efficient Multi-task Tuning"
(EMNLP 2023), section 3. The docstrings name the differences of the released code.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hyperadapters.core.prototypes import cosine_similarity

Reduction = Literal["mean", "sum"]


class TaskLoss(NamedTuple):
    """The task loss of a batch, and what it consists of.

    Attributes:
        value: Task loss, a scalar.
        row_sums: Loss of each row with its head, or sum of the losses of its target tokens [B], without gradients.
        row_counts: Number of losses in each sum [B].
    """

    value: Tensor
    row_sums: Tensor
    row_counts: Tensor


class Losses(NamedTuple):
    """The objective and its terms, which are scalars.

    Attributes:
        total: The sum `task + instance + prototype`.
        task: Task loss.
        instance: Contrastive loss between instances, multiplied by its weight lambda.
        prototype: Contrastive loss with prototypes, multiplied by its weight lambda.
    """

    total: Tensor
    task: Tensor
    instance: Tensor
    prototype: Tensor


def instance_contrastive_loss(instances: Tensor, task_ids: Tensor, temperature: float = 0.1) -> Tensor:
    """Compute the InfoNCE loss between instances: the positives of a row are the other rows of its task.

    With z the normalised instances, s_ij = z_i . z_j / temperature and P(i) the other rows of row i's task:

        loss_i = - mean over j in P(i) of [ s_ij - log sum over k != i of exp(s_ik) ]

    and the loss is the mean of loss_i over the rows that have a positive. The sum contains the positives and the
    negatives, but not the row itself.

    Difference from the released code: it returns NaN if no row has a positive.

    Args:
        instances: Instance vectors [B, p] of any length.
        task_ids: Task of each row [B], as integers.
        temperature: Divisor of the cosine similarities. Default: 0.1.

    Returns:
        Loss, a scalar in float32. It is 0 with zero gradients if no row has a positive, that is if all tasks are
        different or B = 1.
    """
    similarity = cosine_similarity(instances, instances) / temperature
    itself = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    positives = (task_ids[:, None] == task_ids[None, :]) & ~itself
    count = positives.sum(dim=1)
    # The row itself is masked with a finite number, because a batch of one row would have a sum over minus infinity.
    log_denominator = similarity.masked_fill(itself, torch.finfo(torch.float32).min).logsumexp(dim=1, keepdim=True)
    log_probability = (similarity - log_denominator).masked_fill(~positives, 0.0)
    row_loss = -log_probability.sum(dim=1) / count.clamp(min=1)
    return row_loss.sum() / (count > 0).sum().clamp(min=1)


def prototype_contrastive_loss(
    instances: Tensor,
    prototypes: Tensor,
    task_ids: Tensor,
    temperature: float = 0.1,
    positive_in_denominator: bool = True,
) -> Tensor:
    """Compute the InfoNCE loss between instances and prototypes: the positive of a row is the prototype of its task.

    With z and c the normalised instances and prototypes, s_it = z_i . c_t / temperature and y_i the task of row i:

        loss = mean over i of - [ s_iy - log sum over t of exp(s_it) ]

    where the sum runs over all T prototypes, including those of tasks that are not in the batch.

    Difference from the released code: it removes the positive from the sum by subtraction, which loses all precision
    for well-separated prototypes and gives minus infinity for a single task. With `positive_in_denominator=False` this
    function computes the same numbers with a mask. The loss can then be negative.

    Args:
        instances: Instance vectors [B, p] of any length.
        prototypes: Prototypes [T, p] of any length.
        task_ids: Task of each row [B], as indices into `prototypes`.
        temperature: Divisor of the cosine similarities. Default: 0.1.
        positive_in_denominator: If True (default), the sum contains t = y_i, as in InfoNCE.

    Returns:
        Loss, a scalar in float32. It is 0 with zero gradients if there is only one task.

    Raises:
        RuntimeError: If an index in `task_ids` is out of range (raised by PyTorch).
    """
    similarity = cosine_similarity(instances, prototypes) / temperature
    positive = similarity.gather(1, task_ids[:, None])[:, 0]
    if not positive_in_denominator:
        if len(prototypes) == 1:
            return similarity.sum() * 0.0
        similarity = similarity.scatter(1, task_ids[:, None], -torch.inf)
    return (similarity.logsumexp(dim=1) - positive).mean()


def sequence_loss(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    ignored_labels: tuple[int, ...] = (-100,),
    count_ignored: bool = False,
) -> TaskLoss:
    """Compute the cross-entropy of target tokens with label smoothing.

    With lp the log-probabilities, e the label smoothing and R the reduction over positions:

        loss = (1 - e) * R(-lp[label]) + (e / V) * R(-sum over V of lp)

    Difference from the released code: its mean also counts padding, as this function does with `count_ignored=True`,
    so that the loss is smaller for a batch with more padding.

    Args:
        logits: Logits [B, S, V].
        labels: Token ids [B, S].
        label_smoothing: Label smoothing e in [0, 1). Default: 0.
        reduction: Reduction over positions, "mean" (default) or "sum".
        ignored_labels: Labels that mark padding, whose positions contribute 0. Default: -100.
        count_ignored: If True, the mean also counts the ignored positions. Default: False.

    Returns:
        The loss in float32, and its sums for each row. It is 0 if every position is ignored.

    Raises:
        RuntimeError: If a label that is not ignored is out of range (raised by PyTorch).
    """
    log_probability = logits.float().log_softmax(dim=-1)
    real = torch.ones_like(labels, dtype=torch.bool)
    for value in ignored_labels:
        real &= labels != value
    nll = -log_probability.gather(-1, labels.masked_fill(~real, 0)[..., None])[..., 0]
    smooth = -log_probability.mean(dim=-1)
    positions = ((1.0 - label_smoothing) * nll + label_smoothing * smooth).masked_fill(~real, 0.0)
    loss = positions.sum()
    if reduction == "mean":
        loss = loss / (labels.numel() if count_ignored else real.sum().clamp(min=1))
    return TaskLoss(loss, positions.detach().sum(dim=1), real.sum(dim=1))


def total_loss(task: Tensor, instance: Tensor, prototype: Tensor, weight: float = 0.1) -> Losses:
    """Compute the objective, `total = task + weight * (instance + prototype)`.

    Args:
        task: Task loss, a scalar.
        instance: Result of `instance_contrastive_loss`, a scalar.
        prototype: Result of `prototype_contrastive_loss`, a scalar.
        weight: Weight lambda of both contrastive terms. Default: 0.1.

    Returns:
        The total and its three terms, of which the contrastive ones are multiplied by the weight.
    """
    instance, prototype = weight * instance, weight * prototype
    return Losses(task + (instance + prototype), task, instance, prototype)
