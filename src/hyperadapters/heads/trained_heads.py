"""Fitting the heads of trained tasks to fixed features of their training rows.

- `fit_feature_head` fits the head of one task, with a penalty that is chosen by cross-validation.
- `fit_related_heads` fits the heads of all tasks together, so that tasks with the same labels learn from each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyperadapters.config import Task
from hyperadapters.errors import DataError
from hyperadapters.heads.regression import (
    DEFAULT_PENALTY,
    FOLDS,
    MANY_ROWS,
    Array,
    TaskRows,
    head_losses,
    label_tensor,
    label_weights,
    left_out_rows,
    log_odds,
    logistic_regression,
    numpy_head,
    penalized_logistic_head,
    ridge_head,
    ridge_regression,
    scaled_weights,
)
from hyperadapters.heads.task_heads import Head

POOLED_PENALTY = 1.0
"""L2 penalty of the weights that `fit_related_heads` fits to the rows of all related tasks."""
DISTANCE_PENALTY = 3.0
"""L2 penalty in `fit_related_heads` on the distance of the weights of a task from those of all related tasks. Their
rows outnumber those of the task, so it is larger than `DEFAULT_PENALTY`."""
PENALTY_FACTORS = (100.0, 10.0, 1.0, 0.1)
"""Candidates for the factor of the penalties in `fit_related_heads`, chosen by the losses of left-out rows. Of several
equally good ones the largest is chosen."""


def fit_feature_head(
    task: Task, inputs: Array, targets: Sequence[Any], target_mean: float = 0.0, target_std: float = 1.0
) -> Head:
    """Fit the head of a task to the features of its training rows.

    A classification task gets a logistic regression (see `logistic_regression`), and a multi-label task gets one for
    each label. A label that all rows or none have gets a weight of zero. A regression task gets a ridge regression on
    its standardised targets; with a single row it gets a weight and a bias of zero, so that it predicts the mean of the
    targets.

    Args:
        task: Task whose kind and labels determine the form of the head.
        inputs: Features of the rows, of shape [N, F].
        targets: Target of each row, of length N; see `data.examples.Example`.
        target_mean: Mean of the targets of a regression task, in their units.
        target_std: Standard deviation of the targets of a regression task, in their units.

    Returns:
        A head with a weight of shape [C, F] and a bias of shape [C], in float32 on the CPU.

    Raises:
        DataError: If a label of a classification task has no row.
    """
    if task.kind == "regression":
        if len(targets) < 2:
            return numpy_head(np.zeros((1, inputs.shape[1])), np.zeros(1), target_mean, target_std)
        ridge = ridge_regression(inputs, (np.array(targets) - target_mean) / target_std)
        return numpy_head(ridge.coef_[None], np.array([ridge.intercept_]), target_mean, target_std)
    if task.is_multi_label:
        columns = label_tensor(task, targets).int().T.tolist()
        outputs = [_label_output(inputs, column) for column in columns]
        return numpy_head(np.stack([weight for weight, _ in outputs]), np.array([bias for _, bias in outputs]))
    labels = [int(target) for target in targets]
    _check_labels(task, labels)
    found = logistic_regression(inputs, labels)
    weight, bias = found.coef_, found.intercept_
    if len(weight) == 1:  # scikit-learn has one output for two labels
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return numpy_head(weight, bias)


def _label_output(inputs: Array, labels: Sequence[int]) -> tuple[Array, float]:
    """Fit a logistic regression to labels 0 and 1; return its weight [F] and its bias."""
    if len(set(labels)) == 1:
        return np.zeros(inputs.shape[1]), log_odds(labels)
    found = logistic_regression(inputs, labels)
    return found.coef_[0], float(found.intercept_[0])


def _check_labels(task: Task, targets: Sequence[Any]) -> None:
    """Raise a DataError if a label of a classification task has no row."""
    if task.kind != "classification":
        return
    present = set(targets)
    if missing := [label for index, label in enumerate(task.labels) if index not in present]:
        raise DataError(
            f"task '{task.name}': expected a training example of each label, found none of {', '.join(missing)}; "
            "add at least one of each"
        )


def fit_related_heads(data: Sequence[TaskRows], frozen: bool = False) -> list[Head]:
    r"""Fit the heads of several tasks, where tasks with the same labels learn from each other.

    A classification task gets a logistic regression: with N rows, the weight W and the bias b minimise

    .. math::
        -\sum_{i=1}^N c_i \log p(y_i \mid W x_i + b) + \frac{\lambda}{2} \lVert W - W_0 \rVert^2 .

    Tasks are related if they are of the same kind and have the same set of label names, in any order, and the same kind
    of input (single texts or pairs). For them, :math:`W_0` is the weight of one logistic regression that is fitted to
    the rows of all of them with the penalty `POOLED_PENALTY` on its own norm, and :math:`\lambda` is
    `DISTANCE_PENALTY`. For a task without relatives, :math:`W_0` is zero and :math:`\lambda` is `DEFAULT_PENALTY`. The
    penalties are fixed if the inputs depend on adapters that were trained on the same rows: left out of the regression
    alone, such rows are still predicted too well, so a penalty that is chosen on them is too small. For inputs of the
    frozen backbone, all penalties of related tasks are multiplied by one of `PENALTY_FACTORS`, which is chosen by
    cross-validation, unless a task has more than `MANY_ROWS` rows. Where the inputs tell nothing about the targets, the
    most frequent label is then predicted.

    If the first metric of a task is one of `BALANCED_METRICS`, the factors :math:`c_i` give each label the same total
    weight; otherwise they are 1. The pooled regression does so if that is the case for any of its tasks.

    A multi-label task gets an independent logistic regression for each label: in the sum, the cross-entropy of a row
    gives way to the sum of the binary cross-entropies of its labels. The biases have the penalty `DEFAULT_PENALTY`, so
    that a label which all rows or none have is predicted with a finite logit.

    A regression task gets a ridge regression on its standardised targets with the penalty `DEFAULT_PENALTY`. If all
    targets are equal, it predicts them.

    All of this holds for inputs that are multiplied by the scales of the rows, if there are any; see `TaskRows`.

    Args:
        data: Rows of each task. All inputs have the same size F, and related tasks have the same scales.
        frozen: Whether the inputs are those of the frozen backbone. Default: False.

    Returns:
        The head of each task, with a weight of shape [C, F] and a bias of shape [C].

    Raises:
        DataError: If a label of a classification task has no row.
    """
    for rows in data:
        _check_labels(rows.task, rows.targets)
    heads: dict[int, Head] = {}
    for places in related_tasks([rows.task for rows in data]):
        group = [data[place] for place in places]
        factor = _chosen_factor(group) if frozen else 1.0
        heads.update(zip(places, _fit_group(group, factor), strict=True))
    return [heads[place] for place in range(len(data))]


def _fit_group(group: Sequence[TaskRows], factor: float) -> list[Head]:
    """Fit the heads of related tasks, or that of a task without relatives, with penalties times a factor."""
    related = _pooled_weights(group, factor) if len(group) > 1 else None
    return [fit_head(rows, related, factor) for rows in group]


def _chosen_factor(group: Sequence[TaskRows]) -> float:
    """Choose one of `PENALTY_FACTORS` for related tasks by the losses of left-out rows."""
    if any(len(rows.targets) > MANY_ROWS for rows in group):
        return 1.0
    losses = dict.fromkeys(PENALTY_FACTORS, 0.0)
    for folds in zip(*(left_out_rows(rows, FOLDS) for rows in group), strict=True):
        kept = [rows.subset(indices) for rows, (indices, _) in zip(group, folds, strict=True)]
        left_out = [rows.subset(indices) for rows, (_, indices) in zip(group, folds, strict=True)]
        for factor in losses:
            heads = _fit_group(kept, factor)
            losses[factor] += sum(map(_weighted_loss, heads, left_out))
    return min(losses, key=losses.__getitem__) if any(losses.values()) else 1.0


def _weighted_loss(head: Head, rows: TaskRows) -> float:
    """Sum of the losses of rows, with the weights of their labels."""
    if not rows.targets:
        return 0.0
    losses, weights = head_losses(head, rows), None
    if rows.task.labels:
        weights = label_weights(rows.labels, [rows.task])
    return float((losses if weights is None else losses * weights[rows.labels]).sum())


def related_tasks(tasks: Sequence[Task]) -> list[list[int]]:
    """Group the tasks that learn from each other as described for `fit_related_heads`.

    Args:
        tasks: Tasks of a model.

    Returns:
        Groups of indices. A task without relatives is a group of its own.
    """
    groups: dict[object, list[int]] = {}
    for place, task in enumerate(tasks):
        key = (task.kind, task.is_pair, frozenset(task.labels)) if task.labels else place
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def fit_head(rows: TaskRows, related: Mapping[str, Tensor] | None = None, factor: float = 1.0) -> Head:
    """Fit the head of one task as described for `fit_related_heads`.

    Args:
        rows: Rows of the task; at least one of each label of a classification task.
        related: Weight of each label in related tasks, of shape [F], by the name of the label. It is not used for a
            regression task. Default: there are no related tasks.
        factor: Factor of the penalty of the weight. Default: 1.

    Returns:
        A head with a weight of shape [C, F] and a bias of shape [C].
    """
    if rows.scales is not None:
        known = None if related is None else {name: weight / rows.scales for name, weight in related.items()}
        return scaled_weights(fit_head(rows.scaled(), known, factor), rows.scales)
    task, inputs = rows.task, rows.inputs
    if task.kind == "regression":
        return ridge_head(inputs, rows.targets, factor * DEFAULT_PENALTY)
    prior = inputs.new_zeros(len(task.labels), inputs.shape[1])
    if related is not None:
        prior = torch.stack([related[label] for label in task.labels])
    penalty = DEFAULT_PENALTY if related is None else DISTANCE_PENALTY
    start, labels = Head(prior, prior.new_zeros(len(prior))), rows.labels
    return penalized_logistic_head(inputs, labels, start, factor * penalty, label_weights(labels, [task]))


def _pooled_weights(group: Sequence[TaskRows], factor: float) -> dict[str, Tensor]:
    """Fit one logistic regression to the rows of related tasks; return the weight [F] of each label by its name."""
    if (scales := group[0].scales) is not None:
        scaled = _pooled_weights([rows.scaled() for rows in group], factor)
        return {name: weight * scales for name, weight in scaled.items()}
    tasks, names = [rows.task for rows in group], group[0].task.labels
    inputs = torch.cat([rows.inputs for rows in group])
    order = [torch.tensor([names.index(name) for name in task.labels], device=inputs.device) for task in tasks]
    labels = torch.cat([_reordered(rows.labels, indices) for indices, rows in zip(order, group, strict=True)])
    start = Head(inputs.new_zeros(len(names), inputs.shape[1]), inputs.new_zeros(len(names)))
    head = penalized_logistic_head(inputs, labels, start, factor * POOLED_PENALTY, label_weights(labels, tasks))
    return dict(zip(names, head.weight, strict=True))


def _reordered(labels: Tensor, indices: Tensor) -> Tensor:
    """Return labels (see `label_tensor`) for another order of the labels, in which they have the given indices [C]."""
    return indices[labels] if labels.ndim == 1 else labels[:, indices.argsort()]
