"""Fitting linear heads to fixed features.

Every linear layer that is fitted in closed form or by a convex optimizer, rather than trained together with the
adapters, is fitted in this module:

- `fit_feature_head` fits the head of a trained task to the features of all its training rows.
- `fit_related_heads` fits the heads of all trained tasks together, so that tasks with the same labels learn from each
  other.
- `make_head` fits the head of a new task to the features of a few examples.
- `fit_new_head` does the same with fixed penalties, which is faster, and can learn from tasks with the same labels.
- `few_shot_probe` and `standardized_regression` are the baselines that the library is compared with.

Most of them choose the strength of their L2 penalty from `RIDGE_STRENGTHS` or `LOGISTIC_PENALTIES`. There are two
exceptions: the inputs of `standardized_regression` have another scale, and `fit_related_heads` and `fit_new_head` have
fixed penalties for inputs that depend on trained adapters.
"""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.model_selection import GridSearchCV, StratifiedKFold, StratifiedShuffleSplit
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from torch import Tensor

from hyperadapters.config import Task
from hyperadapters.data.targets import Target, multi_hot
from hyperadapters.errors import DataError
from hyperadapters.heads.task_heads import Head, target_losses, target_scale

Array = np.ndarray[Any, Any]

RIDGE_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""Candidates for the L2 penalty of a ridge regression, chosen by the leave-one-out error of the rows."""
LOGISTIC_PENALTIES = (0.01, 0.1, 1.0, 10.0)
"""Candidates for the L2 penalty of a logistic regression, that is for 1 / C of scikit-learn, chosen by the log loss of
left-out rows."""
DEFAULT_PENALTY = 0.1
"""Penalty of `logistic_regression` where it cannot be chosen by cross-validation or where that would take too long."""
DEFAULT_MEAN_PENALTY = 1.0
"""The only penalty that `make_head` tries for very large tasks. It is larger than `DEFAULT_PENALTY` because it pulls
the weight towards the class means, which are a good solution already, and not towards zero."""
BALANCED_METRICS = ("macro_f1", "balanced_accuracy")
"""Metrics in which all labels have the same weight."""
POOLED_PENALTY = 1.0
"""L2 penalty of the weights that `fit_related_heads` fits to the rows of all related tasks."""
DISTANCE_PENALTY = 3.0
"""L2 penalty in `fit_related_heads` on the distance of the weights of a task from those of all related tasks. Their
rows outnumber those of the task, so it is larger than `DEFAULT_PENALTY`."""
RELATED_PENALTY = 0.3
"""L2 penalty of the own weights and biases in `fit_new_head` if there are related tasks. It is larger than
`DEFAULT_PENALTY`, because the logits of related tasks are often right already."""
RELATED_SCALE = 0.5
"""Factor on the logits of related tasks towards which `fit_new_head` regularises the fitted factor. It is below 1
because a head is less certain of the inputs of another task than of those that it was fitted to."""
RELATED_SCALE_PENALTY = 4.0
"""L2 penalty of that factor's distance from `RELATED_SCALE`."""
PAIR_SCALES = (1.0, 3.0, 10.0)
"""Factors on the inputs u + v, |u - v| and u . v of a pair (see `backbones.text_features`) in `fit_related_heads` and
`fit_new_head`. u and v are directions, so the elements of |u - v| are small, and u . v is a single number: with equal
factors, the penalty keeps the weights of what tells most about a pair small."""
TEMPERATURES = tuple(2.0 ** (power / 2) for power in range(-4, 11))
"""Divisors of the logits with which heads are compared."""
MEAN_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Candidates for the factor on the logits of `mean_head`."""
STANDARDIZED_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 1e1)
"""Candidates for C = 1 / penalty of `standardized_regression`. They are smaller than those of `LOGISTIC_PENALTIES`
because the squared norm of a standardised input is about d, and that of the inputs of a head is about 1 or 2."""

FOLDS = 4
"""Maximum number of folds in the cross-validation of `logistic_regression`."""
FEW_SHOT_FOLDS = 3
"""Maximum number of folds in the cross-validation of `make_head`."""
MANY_ROWS = 1000
"""Number of rows above which `logistic_regression` evaluates each penalty on one split instead of all folds, and
`fit_related_heads` does not choose the penalty, which would take long and matters less."""
MANY_LOGITS = 5_000_000
"""Number of rows times labels above which `logistic_regression` uses `DEFAULT_PENALTY`."""
FEW_SHOT_MANY_LOGITS = 2_000_000
"""Number of rows times labels above which `make_head` evaluates `DEFAULT_MEAN_PENALTY` only, on one fold, so that a
task with thousands of labels is fitted within seconds. It is lower than `MANY_LOGITS` because adding a task fits such a
head for each of several folds, with and without the heads of other tasks."""
MIN_VARIANCE = 1e-6
"""Variance, in squared units of the inputs, below which rows are treated as identical."""


class TaskRows(NamedTuple):
    """Rows that the head of a task is fitted to.

    Attributes:
        task: A task other than text-to-text.
        inputs: Inputs of the head, of shape [N, F], in float32.
        targets: Target of each row, of length N; see `data.examples.Example`.
        weights: Factor of the loss of each row [N] in `fit_new_head`. Default: 1.
        scales: Factor on each input [F] with which a head is fitted; the weights of the head are multiplied by it
            afterwards, so that the head reads the inputs as they are. The penalty on the weight of an input is thereby
            divided by the square of its factor. Default: 1.
    """

    task: Task
    inputs: Tensor
    targets: Sequence[Any]
    weights: Tensor | None = None
    scales: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """Labels of the rows of a classification or multi-label task, as returned by `label_tensor`."""
        return label_tensor(self.task, self.targets).to(self.inputs.device)

    def subset(self, indices: Sequence[int]) -> TaskRows:
        """Return some of the rows.

        Args:
            indices: Indices of the rows.
        """
        weights = None if self.weights is None else self.weights[list(indices)]
        targets = [self.targets[index] for index in indices]
        return self._replace(inputs=self.inputs[list(indices)], targets=targets, weights=weights)

    def scaled(self) -> TaskRows:
        """Return the rows with inputs that are multiplied by the scales, which are 1 for the result."""
        return self if self.scales is None else self._replace(inputs=self.inputs * self.scales, scales=None)


def pair_scales(task: Task, inputs: Tensor) -> Tensor | None:
    """Return the scales of inputs for `TaskRows`.

    Args:
        task: Task of the rows.
        inputs: Features of texts [N, F]; see `backbones.text_features`.

    Returns:
        `PAIR_SCALES` of each input [F], or None for a task of single texts.
    """
    if not task.is_pair:
        return None
    size = (inputs.shape[1] - 1) // 2
    return inputs.new_tensor(PAIR_SCALES).repeat_interleave(torch.tensor([size, size, 1], device=inputs.device))


def label_tensor(task: Task, targets: Sequence[Any]) -> Tensor:
    """Return the labels of rows as `heads.task_heads.target_losses` reads them.

    Args:
        task: A classification or multi-label task.
        targets: Target of each of N rows; see `data.examples.Example`.

    Returns:
        Label indices of shape [N], or for a multi-label task rows of zeros and ones [N, C] in float32.
    """
    if task.is_multi_label:
        size = len(task.labels)
        return torch.tensor([multi_hot(target, size) for target in targets], dtype=torch.float32).reshape(-1, size)
    return torch.tensor([int(target) for target in targets], dtype=torch.long)


class _Candidate(NamedTuple):
    """A head, and the negative log-likelihood in nats of rows that were left out of its fit (None if none were)."""

    head: Head
    cost: float | None = None


# Heads of trained tasks


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
            return _numpy_head(np.zeros((1, inputs.shape[1])), np.zeros(1), target_mean, target_std)
        ridge = _ridge(inputs, (np.array(targets) - target_mean) / target_std)
        return _numpy_head(ridge.coef_[None], np.array([ridge.intercept_]), target_mean, target_std)
    if task.is_multi_label:
        columns = label_tensor(task, targets).int().T.tolist()
        outputs = [_label_output(inputs, column) for column in columns]
        return _numpy_head(np.stack([weight for weight, _ in outputs]), np.array([bias for _, bias in outputs]))
    labels = [int(target) for target in targets]
    _check_labels(task, labels)
    found = logistic_regression(inputs, labels)
    weight, bias = found.coef_, found.intercept_
    if len(weight) == 1:  # scikit-learn has one output for two labels
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return _numpy_head(weight, bias)


def _label_output(inputs: Array, labels: Sequence[int]) -> tuple[Array, float]:
    """Fit a logistic regression to labels 0 and 1; return its weight [F] and its bias."""
    if len(set(labels)) == 1:
        return np.zeros(inputs.shape[1]), _log_odds(labels)
    found = logistic_regression(inputs, labels)
    return found.coef_[0], float(found.intercept_[0])


def _log_odds(labels: Sequence[int]) -> float:
    """Return the logarithm of the odds of a label among labels 0 and 1, with half a row added to each of them."""
    count = sum(labels)
    return math.log((count + 0.5) / (len(labels) - count + 0.5))


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
    frozen backbone, a task without relatives and with at most `MANY_ROWS` rows gets the head of `fit_feature_head`,
    whose penalty is chosen by cross-validation, unless its first metric is one of `BALANCED_METRICS`. Where the inputs
    tell nothing about the targets, it thereby answers with the most frequent label.

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
    for group in related_tasks([rows.task for rows in data]):
        first = data[group[0]]
        if len(group) > 1:
            pooled = _pooled_weights([data[place] for place in group])
            heads.update({place: fit_head(data[place], pooled) for place in group})
        elif frozen and len(first.targets) <= MANY_ROWS and first.task.main_metric not in BALANCED_METRICS:
            heads[group[0]] = _cross_validated_head(first)
        else:
            heads[group[0]] = fit_head(first)
    return [heads[place] for place in range(len(data))]


def _cross_validated_head(rows: TaskRows) -> Head:
    """Fit the head of a task without relatives to frozen features."""
    scale = target_scale(rows.targets) if rows.task.kind == "regression" else ()
    head = fit_feature_head(rows.task, rows.scaled().inputs.cpu().numpy(), rows.targets, *scale)
    head = head._replace(weight=head.weight.to(rows.inputs.device), bias=head.bias.to(rows.inputs.device))
    return head if rows.scales is None else _times(head, rows.scales)


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


def fit_head(rows: TaskRows, related: Mapping[str, Tensor] | None = None) -> Head:
    """Fit the head of one task as described for `fit_related_heads`.

    Args:
        rows: Rows of the task; at least one of each label of a classification task.
        related: Weight of each label in related tasks, of shape [F], by the name of the label. It is not used for a
            regression task. Default: there are no related tasks.

    Returns:
        A head with a weight of shape [C, F] and a bias of shape [C].
    """
    if rows.scales is not None:
        known = None if related is None else {name: weight / rows.scales for name, weight in related.items()}
        return _times(fit_head(rows.scaled(), known), rows.scales)
    task, inputs = rows.task, rows.inputs
    if task.kind == "regression":
        return _fixed_ridge_head(inputs, rows.targets)
    prior = inputs.new_zeros(len(task.labels), inputs.shape[1])
    if related is not None:
        prior = torch.stack([related[label] for label in task.labels])
    penalty = DEFAULT_PENALTY if related is None else DISTANCE_PENALTY
    start, labels = Head(prior, prior.new_zeros(len(prior))), rows.labels
    return _logistic_head(inputs, labels, start, penalty, _label_weights(labels, [task]))


def _times(head: Head, scales: Tensor) -> Head:
    """Return the head of inputs for a head that was fitted to the inputs multiplied by scales [F]."""
    return head._replace(weight=head.weight * scales)


def _pooled_weights(group: Sequence[TaskRows]) -> dict[str, Tensor]:
    """Fit one logistic regression to the rows of related tasks; return the weight [F] of each label by its name."""
    if (scales := group[0].scales) is not None:
        return {name: weight * scales for name, weight in _pooled_weights([rows.scaled() for rows in group]).items()}
    tasks, names = [rows.task for rows in group], group[0].task.labels
    inputs = torch.cat([rows.inputs for rows in group])
    order = [torch.tensor([names.index(name) for name in task.labels], device=inputs.device) for task in tasks]
    labels = torch.cat([_reordered(rows.labels, indices) for indices, rows in zip(order, group, strict=True)])
    start = Head(inputs.new_zeros(len(names), inputs.shape[1]), inputs.new_zeros(len(names)))
    head = _logistic_head(inputs, labels, start, POOLED_PENALTY, _label_weights(labels, tasks))
    return dict(zip(names, head.weight, strict=True))


def _reordered(labels: Tensor, indices: Tensor) -> Tensor:
    """Return labels (see `label_tensor`) for another order of the labels, in which they have the given indices [C]."""
    return indices[labels] if labels.ndim == 1 else labels[:, indices.argsort()]


def _label_weights(labels: Tensor, tasks: Sequence[Task], factors: Tensor | None = None) -> Tensor | None:
    """Weights of the labels [C] with equal totals over rows [N], or None if no task has a balanced first metric.

    The mean weight of a row is 1, where rows count with their factors [N], if these are given. Multi-label tasks have
    thresholds for each label instead.
    """
    if labels.ndim == 2 or not any(task.main_metric in BALANCED_METRICS for task in tasks):
        return None
    counts = torch.bincount(labels, factors, minlength=len(tasks[0].labels))
    return counts.sum() / (len(counts) * counts.clamp(min=1e-6))  # rows may all have the factor 0


def _fixed_ridge_head(inputs: Tensor, targets: Sequence[float]) -> Head:
    """Fit a ridge regression with the penalty `DEFAULT_PENALTY` to standardised targets."""
    mean, std = target_scale(targets)
    standardized = (np.array(targets) - mean) / std
    found = Ridge(DEFAULT_PENALTY).fit(inputs.cpu().numpy(), standardized)
    head = _numpy_head(found.coef_[None], np.array([found.intercept_]), mean, std)
    return head._replace(weight=head.weight.to(inputs.device), bias=head.bias.to(inputs.device))


def _numpy_head(weight: Array, bias: Array, target_mean: float = 0.0, target_std: float = 1.0) -> Head:
    return Head(
        torch.tensor(weight, dtype=torch.float32), torch.tensor(bias, dtype=torch.float32), target_mean, target_std
    )


def logistic_regression(inputs: Array, labels: Sequence[int]) -> LogisticRegression:
    """Fit a logistic regression whose L2 penalty is chosen by cross-validation.

    The penalty is the one of `LOGISTIC_PENALTIES` with the lowest log loss in stratified cross-validation, with
    `FOLDS` folds or as many as the rarest label has rows. With more than `MANY_ROWS` rows, one split that leaves a
    quarter of the rows out takes the place of the folds. The penalty is `DEFAULT_PENALTY` if a label has only one row,
    or if the number of rows times labels is above `MANY_LOGITS`.

    Args:
        inputs: Features of the rows, of shape [N, F].
        labels: Label index of each row, of length N.

    Returns:
        The fitted scikit-learn estimator. Its outputs are the labels that occur, in ascending order.

    Raises:
        ValueError: If all rows have the same label.
    """
    counts = Counter(labels)
    folds = min(FOLDS, min(counts.values()))
    plain = LogisticRegression(C=1 / DEFAULT_PENALTY, max_iter=2000)
    with _expected_warnings():
        if folds < 2 or len(labels) * len(counts) > MANY_LOGITS:
            return plain.fit(inputs, labels)
        cv: Any = StratifiedKFold(folds, shuffle=True, random_state=0)
        if len(labels) > MANY_ROWS:
            cv = [_one_split(np.asarray(labels), folds)]
        # In descending order, so that the largest of several equally good penalties is chosen.
        strengths = [1 / penalty for penalty in reversed(LOGISTIC_PENALTIES)]
        search = GridSearchCV(plain, {"C": strengths}, scoring="neg_log_loss", cv=cv)
        found: LogisticRegression = search.fit(inputs, labels).best_estimator_
    return found


def _one_split(labels: Array, folds: int) -> tuple[Array, Array]:
    """Split rows into a training and a validation part that both have all labels.

    The validation part is a quarter of the rows. If a quarter lacks a label, because there are many labels or a rare
    one, it is the first of the folds, each of which has a row of each label.

    Args:
        labels: Label index of each row, of shape [N].
        folds: Number of folds; no label has fewer rows.

    Returns:
        The row indices of the training part and of the validation part.
    """
    num_labels = len(np.unique(labels))
    if len(labels) >= 4 * num_labels:
        quarter = StratifiedShuffleSplit(1, test_size=0.25, random_state=0)
        kept, left_out = next(quarter.split(labels, labels))
        if len(np.unique(labels[kept])) == len(np.unique(labels[left_out])) == num_labels:
            return kept, left_out
    kept, left_out = next(StratifiedKFold(folds, shuffle=True, random_state=0).split(labels, labels))
    return kept, left_out


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Ignore scikit-learn's warnings about slow convergence and about many labels with few rows each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def _ridge(inputs: Array, targets: Array) -> RidgeCV:
    """Fit a ridge regression whose penalty has the lowest leave-one-out error."""
    return RidgeCV(RIDGE_STRENGTHS).fit(inputs, targets)


# Heads of new tasks


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
        known = None if related is None else _times(related, 1 / rows.scales)
        return _times(fit_new_head(rows.scaled(), known), rows.scales)
    if rows.task.kind == "regression":
        return _fixed_ridge_head(rows.inputs, rows.targets)
    if related is None:
        return _new_logistic_head(rows, None, DEFAULT_PENALTY)[0]
    head, scale = _new_logistic_head(rows, related, RELATED_PENALTY)
    # The cost is convex: if the best factor is negative, the best one that is not negative is zero.
    return head if scale >= 0 else _new_logistic_head(rows, None, RELATED_PENALTY)[0]


def _new_logistic_head(rows: TaskRows, related: Head | None, penalty: float) -> tuple[Head, float]:
    """Minimise the cost of `fit_new_head`, where the factor may be negative; return the head and the factor."""
    inputs, labels, num_labels = rows.inputs, rows.labels, len(rows.task.labels)
    if related is None:  # The factor is multiplied by zero and stays at its start.
        related = Head(inputs.new_zeros(num_labels, inputs.shape[1]), inputs.new_zeros(num_labels))
    known, factors = F.linear(inputs, related.weight, related.bias), _row_factors(rows)
    weight = inputs.new_zeros(num_labels, inputs.shape[1]).requires_grad_()
    bias = inputs.new_zeros(num_labels).requires_grad_()
    scale = inputs.new_full((), RELATED_SCALE).requires_grad_()

    def cost() -> Tensor:
        logits = F.linear(inputs, weight, bias) + scale * known
        loss = (factors * target_losses(logits, labels)).sum()
        distance = RELATED_SCALE_PENALTY * (scale - RELATED_SCALE).square()
        return loss + penalty / 2 * (weight.square().sum() + bias.square().sum()) + distance / 2

    minimize(cost, [weight, bias, scale])
    factor = scale.detach()
    return Head(weight.detach() + factor * related.weight, bias.detach() + factor * related.bias), float(factor)


def _row_factors(rows: TaskRows) -> Tensor:
    """Factors of the losses of rows [N]: their weights, and those of their labels if labels are to weigh the same."""
    factors = rows.inputs.new_ones(len(rows.inputs)) if rows.weights is None else rows.weights.to(rows.inputs)
    of_labels = _label_weights(rows.labels, [rows.task], factors)
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
    groups: dict[float, list[int]] = {}
    for row, target in enumerate(rows.targets):
        groups.setdefault(target if rows.task.kind == "classification" else 0.0, []).append(row)
    generator = random.Random(seed)
    examples = [[row for row in group if row < num_examples] for group in groups.values() if len(group) > 1]
    shuffled = [generator.sample(group, len(group)) for group in examples]
    found = []
    for fold in range(FEW_SHOT_FOLDS):
        left_out = sorted(row for group in shuffled for row in group[fold::FEW_SHOT_FOLDS])
        if left_out:
            kept = sorted(set(range(len(rows.targets))) - set(left_out))
            found.append((fit_new_head(rows.subset(kept), related), rows.subset(left_out)))
    return found


def head_losses(head: Head, rows: TaskRows, temperature: float = 1.0) -> Tensor:
    """Compute the negative log-likelihood of each row, or its squared error in the units of the targets.

    Args:
        head: Head of the task.
        rows: N rows of the task.
        temperature: Divisor of the logits. Default: 1.

    Returns:
        Losses [N].
    """
    values = F.linear(rows.inputs, head.weight, head.bias)
    if rows.task.labels:
        return target_losses(values / temperature, rows.labels)
    targets = torch.tensor(rows.targets, device=values.device)
    return (values[:, 0] * head.target_std + head.target_mean - targets).square()


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
            trained = head if penalty is None else _logistic_head(chosen[kept], labels[kept], head, penalty)
            logits = F.linear(chosen[left_out], trained.weight, trained.bias)
            losses[penalty] += float(target_losses(logits, labels[left_out], reduction="sum"))
    losses = {penalty: loss for penalty, loss in losses.items() if math.isfinite(loss)} or {None: math.inf}
    best = min(losses, key=losses.__getitem__)
    head = start if best is None else _logistic_head(chosen, labels, start, best)
    return _Candidate(head, losses[best])


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
        bias[label] = _log_odds(column.tolist())
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


def _logistic_head(
    inputs: Tensor, labels: Tensor, start: Head, penalty: float, label_weights: Tensor | None = None
) -> Head:
    """Minimise the summed cross-entropy plus penalty / 2 times the squared distance of the weight from the start's.

    The cross-entropy of a row is multiplied by the weight of its label, if weights [C] are given. With label sets
    [N, C], the distance of the bias from the start's has the penalty `DEFAULT_PENALTY`.
    """
    weight, bias = start.weight.clone().requires_grad_(), start.bias.clone().requires_grad_()
    label_weights = None if label_weights is None else label_weights.to(inputs)

    def cost() -> Tensor:
        loss = target_losses(F.linear(inputs, weight, bias), labels, label_weights, "sum")
        if labels.ndim == 2:
            loss = loss + DEFAULT_PENALTY / 2 * (bias - start.bias).square().sum()
        return loss + penalty / 2 * (weight - start.weight).square().sum()

    minimize(cost, [weight, bias])
    return start._replace(weight=weight.detach(), bias=bias.detach())


def _ridge_head(inputs: Tensor, targets: Tensor) -> _Candidate:
    """Fit a ridge regression to standardised targets."""
    mean, std = target_scale(targets.tolist())
    if len(targets) < 2:
        return _Candidate(Head(inputs.new_zeros(1, inputs.shape[1]), inputs.new_zeros(1), mean, std))
    middle = inputs.mean(dim=0)
    found = _ridge((inputs - middle).cpu().numpy(), ((targets - mean) / std).numpy())
    weight = torch.as_tensor(found.coef_, dtype=torch.float32, device=inputs.device)[None]
    bias = torch.as_tensor([found.intercept_], dtype=torch.float32, device=inputs.device) - weight @ middle
    # For normally distributed errors. The score is minus the mean squared leave-one-out error.
    cost = len(targets) / 2 * math.log(max(-found.best_score_, MIN_VARIANCE))
    return _Candidate(Head(weight, bias, mean, std), cost)


def minimize(cost: Callable[[], Tensor], parameters: Sequence[Tensor]) -> None:
    """Minimise a convex differentiable cost with L-BFGS, also inside `torch.no_grad`.

    Args:
        cost: Function that computes the cost, a scalar, from the present values of the parameters.
        parameters: Leaf tensors that require gradients; they are changed in place.
    """
    optimizer = torch.optim.LBFGS(list(parameters), max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cost()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)


# Baselines


def few_shot_probe(features: Array, labels: Sequence[int], inputs: Array) -> list[int]:
    """Fit a logistic regression to a few examples and predict the labels of other inputs.

    All features are scaled to unit norm first. `logistic_regression` says how the penalty is chosen. If all examples
    have the same label, that label is predicted for each input.

    Args:
        features: Features of the examples, of shape [N, F].
        labels: Label index of each example, of length N.
        inputs: Features of the inputs to classify, of shape [M, F].

    Returns:
        The predicted label index of each input, of length M.
    """
    if len(set(labels)) == 1:
        return [labels[0]] * len(inputs)
    answers: list[int] = logistic_regression(normalize(features), labels).predict(normalize(inputs)).tolist()
    return answers


def standardized_regression(features: Array, targets: Array, strength: float, is_regression: bool) -> Pipeline:
    """Fit a logistic or ridge regression to features with zero mean and unit variance.

    Args:
        features: Features of the training rows, of shape [N, F]; they are standardised here.
        targets: Label index or number of each row, of shape [N], or label sets as rows of zeros and ones [N, C].
        strength: Inverse of the L2 penalty, C of scikit-learn.
        is_regression: Whether the targets are numbers. Otherwise they are labels; if all rows have the same label, or
            all rows or none have a label of the sets, that is what the pipeline predicts.

    Returns:
        The fitted scikit-learn pipeline of scaler and regression, in this order.
    """
    if is_regression:
        regressor: Any = Ridge(1.0 / strength)
    elif targets.ndim == 2:
        regressor = OneVsRestClassifier(LogisticRegression(C=strength, max_iter=2000))
    elif len(np.unique(targets)) == 1:
        regressor = DummyClassifier()
    else:
        regressor = LogisticRegression(C=strength, max_iter=2000)
    with _expected_warnings():
        return make_pipeline(StandardScaler(), regressor).fit(features, targets)
