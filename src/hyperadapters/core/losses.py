"""The objective: contrast between instances, contrast with prototypes, and the task loss they are added to.

Shapes: B rows, T tasks (one prototype each), p numbers in a prototype, V vocabulary, S target positions.
Source of all of them: Zhao, Fu and He, "Prototype-based HyperAdapter for Sample-Efficient Multi-task Tuning"
(EMNLP 2023), section 3. Where the released code differs from the paper it is said below.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hyperadapters.core.prototypes import cosine_similarity

Reduction = Literal["mean", "sum"]


class Losses(NamedTuple):
    """The objective and its terms, each a scalar: `total = task + instance + prototype`.

    `instance` and `prototype` already carry their weight lambda.
    """

    total: Tensor
    task: Tensor
    instance: Tensor
    prototype: Tensor


def instance_contrastive_loss(instances: Tensor, task_ids: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE between instances: rows of the same task attract, all others repel.

    With z the normalised instances, s_ij = z_i . z_j / temperature and P(i) the other rows of row i's task:

        loss_i = - mean over j in P(i) of [ s_ij - log sum over k != i of exp(s_ik) ]

    and the loss is the mean of loss_i over the rows that have a positive. The sum holds negatives and positives
    alike, only the row itself is left out.

    Args:
        instances: instance vectors [B, p], any scale.
        task_ids: task of each row [B], integers.
        temperature: divides the cosine similarities.

    Returns:
        A scalar in float32. It is 0, with zero gradients, when no row has a positive (all tasks different, or B = 1).

    Differs from the released code: that one returns nan when no row has a positive.
    """
    similarity = cosine_similarity(instances, instances) / temperature
    itself = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    positives = (task_ids[:, None] == task_ids[None, :]) & ~itself
    count = positives.sum(dim=1)
    # The row itself is pushed out with a finite number: a batch of one row must not become a sum over nothing.
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
    """InfoNCE between instances and prototypes: each row is drawn to the prototype of its task.

    With z and c the normalised instances and prototypes, s_it = z_i . c_t / temperature and y_i the task of row i:

        loss = mean over i of - [ s_iy - log sum over t of exp(s_it) ]

    where the sum runs over all T prototypes, whether their task is in the batch or not.

    Args:
        instances: instance vectors [B, p], any scale.
        prototypes: one vector a task [T, p], any scale.
        task_ids: index of each row's task in `prototypes` [B], integers.
        temperature: divides the cosine similarities.
        positive_in_denominator: whether the sum contains t = y_i, as InfoNCE has it.

    Returns:
        A scalar in float32. It is 0, with zero gradients, when there is one task only: nothing to tell it from.

    Raises:
        RuntimeError: an index in `task_ids` is out of range (torch's message).

    Differs from the released code: that one leaves the positive out of the sum (`positive_in_denominator=False`
    gives the same numbers; the loss can then be negative) by subtracting it from the full sum, which loses all
    precision for well-separated prototypes and is minus infinity for a single task. Here it is masked instead.
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
) -> Tensor:
    """Label-smoothed cross-entropy over target tokens.

    With lp the log-probabilities, e the smoothing and R the reduction over positions:

        loss = (1 - e) * R(-lp[label]) + (e / V) * R(-sum over V of lp)

    Args:
        logits: scores [B, S, V].
        labels: token ids [B, S]; positions that hold one of `ignored_labels` contribute 0.
        label_smoothing: e, in [0, 1).
        reduction: "mean" or "sum" over positions.
        ignored_labels: label values that mark padding.
        count_ignored: whether the mean counts ignored positions too.

    Returns:
        A scalar in float32; 0 when every position is ignored.

    Raises:
        RuntimeError: a label that is not ignored is out of range (torch's message).

    Differs from the released code: its mean counts the padded positions (`count_ignored=True` gives that), so that
    the loss shrinks with the amount of padding in the batch.
    """
    log_probability = logits.float().log_softmax(dim=-1)
    real = torch.ones_like(labels, dtype=torch.bool)
    for value in ignored_labels:
        real &= labels != value
    nll = -log_probability.gather(-1, labels.masked_fill(~real, 0)[..., None])[..., 0]
    smooth = -log_probability.mean(dim=-1)
    positions = ((1.0 - label_smoothing) * nll + label_smoothing * smooth).masked_fill(~real, 0.0)
    if reduction == "sum":
        return positions.sum()
    count = labels.numel() if count_ignored else real.sum().clamp(min=1)
    return positions.sum() / count


def total_loss(task: Tensor, instance: Tensor, prototype: Tensor, weight: float = 0.1) -> Losses:
    """The objective: `total = task + weight * (instance + prototype)`.

    Args:
        task: task loss, scalar.
        instance: result of `instance_contrastive_loss`, scalar.
        prototype: result of `prototype_contrastive_loss`, scalar.
        weight: lambda, the weight of both contrastive terms.

    Returns:
        The total and its three terms, the contrastive ones multiplied by the weight.
    """
    instance, prototype = weight * instance, weight * prototype
    return Losses(task + (instance + prototype), task, instance, prototype)
