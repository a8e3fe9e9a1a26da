"""Fitting the head of a new task to the features of a few examples.

- `make_head` chooses the penalty by left-out examples, and can learn from the heads of any other tasks.
- `fit_new_head` has fixed penalties, which is faster, and can learn from the heads of tasks with the same labels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadapters.config import Task
from hyperadapters.data.targets import Target
from hyperadapters.heads.regression import (
    DEFAULT_PENALTY,
    LOGISTIC_PENALTIES,
    TEMPERATURES,
    Products,
    TaskRows,
    head_losses,
    label_cost,
    label_tensor,
    label_weights,
    left_out_rows,
    log_odds,
    minimize,
    penalized_logistic_head,
    ridge_head,
    ridge_regression,
    row_space,
    scaled_weights,
)
from hyperadapters.heads.task_heads import Head, target_losses, target_scale

DEFAULT_MEAN_PENALTY = 1.0
"""The only penalty that `make_head` tries for very large tasks. It is larger than `DEFAULT_PENALTY` because it pulls
the weight towards the class means, which are a good solution already, and not towards zero."""
RELATED_PENALTY = 0.3
"""L2 penalty of the own weights and biases in `fit_new_head` if there are related tasks. It is larger than
`DEFAULT_PENALTY`, because the logits of related tasks are often right already."""
RELATED_SCALE = 0.5
"""Factor on the logits of related tasks towards which `fit_new_head` regularises the fitted factor. It is below 1
because a head is less certain of the inputs of another task than of those that it was fitted to."""
RELATED_SCALE_PENALTY = 4.0
"""L2 penalty of that factor's distance from `RELATED_SCALE`."""
MEAN_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Candidates for the factor on the logits of `mean_head`."""
FEW_SHOT_FOLDS = 3
"""Maximum number of folds in the cross-validation of `make_head`."""
FEW_SHOT_MANY_LOGITS = 2_000_000
"""Number of rows times labels above which `make_head` evaluates `DEFAULT_MEAN_PENALTY` only, on one fold, so that a
task with thousands of labels is fitted within seconds. It is lower than `MANY_LOGITS` because adding a task fits such a
head for each of several folds, with and without the heads of other tasks."""
MIN_VARIANCE = 1e-6
"""Variance, in squared units of the inputs, below which rows are treated as identical."""


class _Candidate(NamedTuple):
    """A head, and the negative log-likelihood in nats of rows that were left out of its fit (None if none were)."""

    head: Head
    cost: float | None = None


def make_head(
    task: Task,
    inputs: Tensor | None,
    targets: Sequence[Target | None],
    rows: Sequence[int],
    fitted: bool = True,
    seed: int = 0,
    known: Sequence[Tensor] = (),
) -> Head | None:
    """Fit the head of a new task to a few examples.

    A classification task starts from the class means (see `mean_head`). If `fitted` is True, a logistic regression is
    fitted from there, with an L2 penalty on the distance from the start. Its penalty is the one of
    `LOGISTIC_PENALTIES` with the highest likelihood of left-out rows, unless the start itself is better. With more
    than `FEW_SHOT_MANY_LOGITS` rows times labels, `DEFAULT_MEAN_PENALTY` is the only candidate.

    A multi-label task gets the same for each label, as if it were a task with the two labels "yes" and "no", but with
    one penalty for all of them. The start also contains the share of rows that have the label. A label that all rows or
    none have starts from a weight of zero.

    A regression task gets a ridge regression on its standardised targets, with one of `RIDGE_STRENGTHS`.

    If weights of other tasks' heads are given, a second head is fitted whose inputs also contain the logits of those
    heads, because a few examples rarely suffice to find their directions anew. The result is the mean of both heads,
    weighted by the likelihood of left-out rows under each, so that heads of unrelated tasks have little influence.

    Args:
        task: Task whose kind and labels determine the form of the head.
        inputs: Inputs of the head for all rows, of shape [N, F + d], or None for a model without heads.
        targets: Target of all rows, of length N; see `data.examples.Example`.
        rows: Indices of the rows to fit the head to. Each label of a classification task needs at least one of them.
        fitted: Whether the head of a classification task is fitted further than to the class means.
        seed: Seed of the choice of left-out rows.
        known: Weights of other tasks' heads, each of shape [C', F + d].

    Returns:
        A head with a weight of shape [C, F + d] and a bias of shape [C], or None if `inputs` is None.
    """
    if inputs is None:
        return None
    chosen = inputs[list(rows)].detach().float()
    values = [targets[row] for row in rows]
    head, cost = _make_head(task, chosen, values, fitted, seed)
    directions = _scaled_directions(known, chosen)
    if directions is None or cost is None:
        return head
    informed, informed_cost = _make_head(task, torch.cat([chosen, chosen @ directions.T], dim=1), values, fitted, seed)
    if informed_cost is None or not math.isfinite(informed_cost):
        return head
    input_size, share = chosen.shape[1], float(torch.tensor(cost - informed_cost).sigmoid())
    weight = informed.weight[:, :input_size] + informed.weight[:, input_size:] @ directions
    return head._replace(
        weight=(1 - share) * head.weight + share * weight, bias=(1 - share) * head.bias + share * informed.bias
    )


def _scaled_directions(known: Sequence[Tensor], inputs: Tensor) -> Tensor | None:
    """Rescale weights so that their logits together have the variance of the inputs, in equal parts.

    Args:
        known: Weights of heads, each of shape [C', i].
        inputs: Inputs of shape [N, i].

    Returns:
        The rescaled weights one below the other, or None if the logits of each are constant over the rows.
    """
    varied = [(weight, _variance(inputs @ weight.T)) for weight in known]
    varied = [(weight, variance) for weight, variance in varied if variance > MIN_VARIANCE]
    if not varied:
        return None
    each = _variance(inputs) / len(varied)
    return torch.cat([weight * (each / variance) ** 0.5 for weight, variance in varied])


def _variance(values: Tensor) -> float:
    """Mean squared distance of rows [N, i] from their mean."""
    return float((values - values.mean(dim=0)).square().sum(dim=1).mean())


def _make_head(task: Task, chosen: Tensor, values: Sequence[Target | None], fitted: bool, seed: int) -> _Candidate:
    if task.kind == "regression":
        return _ridge_head(chosen, torch.tensor([float(value) for value in values]))  # type: ignore[arg-type]
    return _logistic_candidate(chosen, label_tensor(task, values).to(chosen.device), len(task.labels), fitted, seed)


def _logistic_candidate(chosen: Tensor, labels: Tensor, num_labels: int, fitted: bool, seed: int) -> _Candidate:
    """Fit a head from the class means; a penalty of None stands for the class means themselves."""
    starting_head = _mean_heads if labels.ndim == 2 else mean_head
    start = starting_head(chosen, labels, num_labels)
    if labels.ndim == 2:
        groups = [list(range(len(labels)))]
    else:
        groups = [(labels == label).nonzero()[:, 0].tolist() for label in range(num_labels)]
    generator = random.Random(seed)
    # The only row of a label is never left out.
    shuffled = [generator.sample(group, len(group)) for group in groups if len(group) > 1]
    if not fitted or not shuffled:
        return _Candidate(start)
    folds = min(FEW_SHOT_FOLDS, *map(len, shuffled))
    is_large = len(labels) * num_labels > FEW_SHOT_MANY_LOGITS
    losses = dict.fromkeys([None, DEFAULT_MEAN_PENALTY] if is_large else [None, *LOGISTIC_PENALTIES], 0.0)
    for fold in range(1 if is_large else folds):
        left_out = sorted(row for group in shuffled for row in group[fold::folds])
        kept = sorted(set(range(len(labels))) - set(left_out))
        head = starting_head(chosen[kept], labels[kept], num_labels)
        for penalty in losses:
            trained = head if penalty is None else penalized_logistic_head(chosen[kept], labels[kept], head, penalty)
            logits = F.linear(chosen[left_out], trained.weight, trained.bias)
            losses[penalty] += float(target_losses(logits, labels[left_out], reduction="sum"))
    losses = {penalty: loss for penalty, loss in losses.items() if math.isfinite(loss)} or {None: math.inf}
    best = min(losses, key=losses.__getitem__)
    head = start if best is None else penalized_logistic_head(chosen, labels, start, best)
    return _Candidate(head, losses[best])


def _ridge_head(inputs: Tensor, targets: Tensor) -> _Candidate:
    """Fit a ridge regression to standardised targets."""
    mean, std = target_scale(targets.tolist())
    if len(targets) < 2:
        return _Candidate(Head(inputs.new_zeros(1, inputs.shape[1]), inputs.new_zeros(1), mean, std))
    middle = inputs.mean(dim=0)
    found = ridge_regression((inputs - middle).cpu().numpy(), ((targets - mean) / std).numpy())
    weight = torch.as_tensor(found.coef_, dtype=torch.float32, device=inputs.device)[None]
    bias = torch.as_tensor([found.intercept_], dtype=torch.float32, device=inputs.device) - weight @ middle
    # For normally distributed errors. The score is minus the mean squared leave-one-out error.
    cost = len(targets) / 2 * math.log(max(-found.best_score_, MIN_VARIANCE))
    return _Candidate(Head(weight, bias, mean, std), cost)


def fit_new_head(rows: TaskRows, related: Head | None = None) -> Head:
    r"""Fit the head of a new task to few examples with fixed penalties.

    A classification task gets a logistic regression whose logits for an input x are

    .. math::
        W x + b + s \, (W_r x + b_r),

    where :math:`W_r` and :math:`b_r` are the mean weight and bias of related tasks. The penalty on W and b is
    `DEFAULT_PENALTY`, or `RELATED_PENALTY` if there are related tasks. The factor s is fitted together with them: it is
    regularised towards `RELATED_SCALE`, and not negative, so that tasks which only seem to be related are ignored.
    Labels weigh the same if the first metric of the task is one of `BALANCED_METRICS`.

    A multi-label task gets the same with the binary cross-entropies of its labels and one factor for all of them.

    The loss of a row is multiplied by its weight. A regression task gets the ridge regression of `fit_related_heads`,
    in which all rows weigh the same.

    Args:
        rows: Rows of the task; at least one of each label of a classification task.
        related: Mean head of related tasks, with its labels in the order of this task. Default: there are none.

    Returns:
        A head with a weight of shape [C, F] and a bias of shape [C].
    """
    if rows.scales is not None:
        known = None if related is None else scaled_weights(related, 1 / rows.scales)
        return scaled_weights(fit_new_head(rows.scaled(), known), rows.scales)
    if rows.task.kind == "regression":
        return ridge_head(rows.inputs, rows.targets, DEFAULT_PENALTY)
    if related is None:
        return _new_logistic_head(rows, None, DEFAULT_PENALTY)[0]
    head, scale = _new_logistic_head(rows, related, RELATED_PENALTY)
    # The cost is convex: if the best factor is negative, the best one that is not negative is zero.
    return head if scale >= 0 else _new_logistic_head(rows, None, RELATED_PENALTY)[0]


def _new_logistic_head(rows: TaskRows, related: Head | None, penalty: float) -> tuple[Head, float]:
    """Minimise the cost of `fit_new_head`, where the factor may be negative; return the head and the factor."""
    num_labels, bias = len(rows.task.labels), rows.inputs.new_zeros(len(rows.task.labels))
    if related is None:  # The factor is multiplied by zero and stays at its start.
        related = Head(rows.inputs.new_zeros(num_labels, rows.inputs.shape[1]), bias)
    known = F.linear(rows.inputs, related.weight, related.bias).cpu().double()
    coordinates, basis = row_space(rows.inputs)
    inputs, labels, factors = coordinates.double(), rows.labels.cpu(), _row_factors(rows).cpu()

    def of_values(of_logits: Tensor, weight: Tensor, bias: Tensor, distance: Tensor) -> list[Tensor]:
        return [
            of_logits.T @ inputs + penalty * weight,
            of_logits.sum(dim=0) + penalty * bias,
            (of_logits * known).sum() + RELATED_SCALE_PENALTY * distance,
        ]

    def cost(weight: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, list[Tensor], Products]:
        of_rows = label_cost(F.linear(inputs, weight, bias) + scale * known, labels, factors)
        distance = scale - RELATED_SCALE
        loss = of_rows.loss + penalty / 2 * (weight.square().sum() + bias.square().sum())
        loss = loss + RELATED_SCALE_PENALTY / 2 * distance.square()

        def products(weight_change: Tensor, bias_change: Tensor, scale_change: Tensor) -> list[Tensor]:
            of_logits = of_rows.products(F.linear(inputs, weight_change, bias_change) + scale_change * known)
            return of_values(of_logits, weight_change, bias_change, scale_change)

        return loss, of_values(of_rows.of_logits, weight, bias, distance), products

    start = rows.inputs.new_zeros(num_labels, len(basis)), bias, rows.inputs.new_full((), RELATED_SCALE)
    weight, bias, scale = minimize(cost, start)
    return Head(weight @ basis + scale * related.weight, bias + scale * related.bias), float(scale)


def _row_factors(rows: TaskRows) -> Tensor:
    """Factors of the losses of rows [N]: their weights, and those of their labels if labels are to weigh the same."""
    factors = rows.inputs.new_ones(len(rows.inputs)) if rows.weights is None else rows.weights.to(rows.inputs)
    of_labels = label_weights(rows.labels, [rows.task], factors)
    return factors if of_labels is None else factors * of_labels[rows.labels]


def left_out_fits(
    rows: TaskRows, num_examples: int, related: Head | None = None, seed: int = 0
) -> list[tuple[Head, TaskRows]]:
    """Fit heads with `fit_new_head` without some of the examples.

    A third of the examples of each label, or of all examples of a task of another kind than classification, is left out
    in turn, or a single one if there are fewer than three. The only row of a label is never left out.

    Args:
        rows: Rows of the task, of which the first are examples. The others, such as names of labels, are never left
            out.
        num_examples: Number of examples.
        related: Mean head of related tasks; see `fit_new_head`.
        seed: Seed of the choice of left-out examples, which are the same ones in the same order whenever seed and
            targets are the same.

    Returns:
        Each head with the examples that were left out of its fit; empty if no example can be left out.
    """
    return [
        (fit_new_head(rows.subset(kept), related), rows.subset(left_out))
        for kept, left_out in left_out_rows(rows, FEW_SHOT_FOLDS, num_examples, seed)
        if left_out
    ]


def left_out_losses(fits: Sequence[tuple[Head, TaskRows]], temperatures: Sequence[float] = TEMPERATURES) -> Tensor:
    """Compute the losses of left-out examples at the best temperature.

    Heads of few examples are too confident or not confident enough, depending on what they are fitted to. Kinds of
    inputs and of fits can only be compared if the temperature is the best one for each.

    Args:
        fits: Result of `left_out_fits`, which is not empty.
        temperatures: Candidates, of which the one with the smallest sum of losses is taken. Temperatures do not change
            the losses of regression tasks. Default: `TEMPERATURES`.

    Returns:
        Losses [N]; see `head_losses`.
    """
    losses = [torch.cat([head_losses(*fit, temperature) for fit in fits]) for temperature in temperatures]
    return min(losses, key=lambda found: float(found.sum()))


def mean_head(inputs: Tensor, labels: Tensor, num_labels: int) -> Head:
    r"""Make a nearest-class-mean classifier with calibrated logits.

    With :math:`\mu_c` the mean of the inputs of label c and :math:`\mu` the mean of all :math:`\mu_c`, the logit of
    label c for an input x is

    .. math::
        s \, (x - \mu)^\top (\mu_c - \mu) - \frac{s}{2} \, \lVert \mu_c - \mu \rVert^2 .

    The differences between these logits are those of :math:`-\frac{s}{2} \lVert x - \mu_c \rVert^2`. The scale s is one
    of `MEAN_SCALES` divided by the variance of the inputs around their class means: the one with the highest
    likelihood of the rows, where each row is left out of the mean of its own label.

    Args:
        inputs: Inputs of shape [N, i].
        labels: Label index of each row, of shape [N]. Each label needs at least one row.
        num_labels: Number C of labels.

    Returns:
        A head with a weight of shape [C, i] and a bias of shape [C].
    """
    means, counts = _label_means(inputs, labels, num_labels)
    spread = (inputs - means[labels]).square().sum() / max(1, len(inputs) - num_labels)
    if spread < MIN_VARIANCE:  # With one row a label, the distance between labels is the only known scale.
        spread = (means - means.mean(dim=0)).square().sum(dim=1).mean()
    base = 1.0 / float(spread.clamp(min=1e-6))
    if int(counts.min()) < 2:
        return _mean_head(means, base)
    without = (means[labels] * counts[labels, None] - inputs) / (counts[labels, None] - 1)
    logits, middle = F.linear(inputs, *_mean_head(means, base)[:2]), means.mean(dim=0)
    # Leaving a row out changes the mean of its label and so the middle, but the middle shifts all logits equally.
    offsets = without - middle
    own = base * (((inputs - middle) * offsets).sum(dim=1) - 0.5 * offsets.square().sum(dim=1))
    logits = logits.scatter(1, labels[:, None], own[:, None])
    likelihoods = {
        scale: float((scale * logits).log_softmax(dim=1).gather(1, labels[:, None]).sum()) for scale in MEAN_SCALES
    }
    return _mean_head(means, base * max(likelihoods, key=likelihoods.__getitem__))


def _mean_heads(inputs: Tensor, sets: Tensor, num_labels: int) -> Head:
    """Make the head of a multi-label task from a `mean_head` for each of the C labels, as `make_head` describes.

    Args:
        inputs: Inputs of shape [N, i].
        sets: Zeros and ones of shape [N, C].
        num_labels: Number C of labels.
    """
    weight, bias = inputs.new_zeros(num_labels, inputs.shape[1]), inputs.new_zeros(num_labels)
    for label, column in enumerate(sets.long().T):
        bias[label] = log_odds(column.tolist())
        if 0 < int(column.sum()) < len(column):
            head = mean_head(inputs, column, 2)
            weight[label] = head.weight[1] - head.weight[0]
            bias[label] += head.bias[1] - head.bias[0]
    return Head(weight, bias)


def _label_means(inputs: Tensor, labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Compute the mean input [C, i] and the number of rows [C] of each label."""
    counts = torch.bincount(labels, minlength=num_labels)
    sums = inputs.new_zeros(num_labels, inputs.shape[1]).index_add_(0, labels, inputs)
    return sums / counts.clamp(min=1)[:, None], counts


def _mean_head(means: Tensor, scale: float) -> Head:
    """Make the head of `mean_head` from the class means [C, i] and the scale s."""
    middle = means.mean(dim=0)
    offsets = means - middle
    weight = scale * offsets
    return Head(weight, -(weight @ middle) - 0.5 * scale * offsets.square().sum(dim=1))
