"""Regressions on fixed features, from which heads and baselines are made.

The heads of trained tasks are fitted in `trained_heads`, and those of new tasks in `new_heads`. Both use the functions
of this module, as do the baselines that the library is compared with: `few_shot_probe` and `standardized_regression`.
Penalties are chosen from `RIDGE_STRENGTHS` and `LOGISTIC_PENALTIES`, except in `standardized_regression`, whose inputs
have another scale.
"""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize as scipy_minimize
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.model_selection import GridSearchCV, StratifiedKFold, StratifiedShuffleSplit
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from torch import Tensor

from hyperadapters.config import Task
from hyperadapters.data.targets import multi_hot
from hyperadapters.heads.task_heads import Head, target_losses, target_scale
from hyperadapters.utils.blas import one_blas_thread

Array = np.ndarray[Any, Any]
Products = Callable[..., list[Tensor]]
"""Multiplies the second derivatives of a cost by a direction, which is one tensor for each of its arguments."""
RIDGE_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""Candidates for the L2 penalty of a ridge regression, chosen by the leave-one-out error of the rows."""
LOGISTIC_PENALTIES = (0.01, 0.1, 1.0, 10.0)
"""Candidates for the L2 penalty of a logistic regression, that is for 1 / C of scikit-learn, chosen by the log loss of
left-out rows."""
DEFAULT_PENALTY = 0.1
"""Penalty of `logistic_regression` where it cannot be chosen by cross-validation or where that would take too long."""
BALANCED_METRICS = ("macro_f1", "balanced_accuracy")
"""Metrics in which all labels have the same weight."""
PAIR_SCALES = (0.3, 1.0, 10.0)
"""Factors on the inputs u + v, |u - v| and u . v of a pair (see `backbones.text_features`) in `fit_related_heads` and
`fit_new_head`. u and v are directions, so the elements of |u - v| are small, and u . v is a single number: with equal
factors, the penalty would keep the weights of what tells most about a pair small, while those of u + v fit the noise of
few rows."""
TEMPERATURES = tuple(2.0 ** (power / 2) for power in range(-4, 11))
"""Divisors of the logits with which heads are compared."""
STANDARDIZED_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 1e1)
"""Candidates for C = 1 / penalty of `standardized_regression`. They are smaller than those of `LOGISTIC_PENALTIES`
because the squared norm of a standardised input is about d, and that of the inputs of a head is about 1 or 2."""
MAX_GRADIENT = 1e-6
"""Euclidean norm of the gradient up to which `minimize` takes a cost for minimised."""
SOLVERS: tuple[tuple[str, dict[str, float]], ...] = (
    ("Newton-CG", {"xtol": 1e-13, "maxiter": 1000}),
    ("trust-ncg", {"gtol": MAX_GRADIENT, "maxiter": 1000}),
)
"""Methods of SciPy and their options, each of which begins where the last one has ended. The first one goes on until
the cost does not fall any more: its steps are inexact, and if the inputs have different scales, a small one does not
mean that the end is near. Where its line search fails at the start, as with saturated probabilities, the second one
does the work, and otherwise it has nothing to do."""
BLOCK_ROWS = 16384
"""Number of rows of whose inputs `penalized_logistic_head` holds a copy in float64 at a time."""
FOLDS = 4
"""Maximum number of folds in the cross-validation of `logistic_regression`."""
MANY_ROWS = 1000
"""Number of rows above which `logistic_regression` evaluates each penalty on one split instead of all folds, and
`fit_related_heads` does not choose its penalties, which would take long and matters less."""
MANY_LOGITS = 5_000_000
"""Number of rows times labels above which `logistic_regression` uses `DEFAULT_PENALTY`."""


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


def label_weights(labels: Tensor, tasks: Sequence[Task], factors: Tensor | None = None) -> Tensor | None:
    """Compute weights of labels with which each label has the same total weight.

    Args:
        labels: Labels of N rows, as returned by `label_tensor`.
        tasks: Tasks of the rows, which have the same labels.
        factors: Factor with which each row counts [N]. Default: 1.

    Returns:
        Weights [C], with which the mean weight of a row is 1. None if no task has one of `BALANCED_METRICS` as its
        first metric, and for multi-label tasks, which have a threshold for each label instead.
    """
    if labels.ndim == 2 or not any(task.main_metric in BALANCED_METRICS for task in tasks):
        return None
    counts = torch.bincount(labels, factors, minlength=len(tasks[0].labels))
    return counts.sum() / (len(counts) * counts.clamp(min=1e-6))  # rows may all have the factor 0


def log_odds(labels: Sequence[int]) -> float:
    """Return the logarithm of the odds of label 1, with half a row added to both labels.

    Args:
        labels: Labels 0 and 1 of the rows.
    """
    count = sum(labels)
    return math.log((count + 0.5) / (len(labels) - count + 0.5))


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


def numpy_head(weight: Array, bias: Array, target_mean: float = 0.0, target_std: float = 1.0) -> Head:
    """Return a head in float32 on the CPU.

    Args:
        weight: Weight of shape [C, F].
        bias: Bias of shape [C].
        target_mean: Mean of the targets of a regression task, in their units.
        target_std: Standard deviation of the targets of a regression task, in their units.
    """
    return Head(
        torch.tensor(weight, dtype=torch.float32), torch.tensor(bias, dtype=torch.float32), target_mean, target_std
    )


def scaled_weights(head: Head, scales: Tensor) -> Head:
    """Return a head that reads inputs as the given head reads inputs that are multiplied by scales.

    Args:
        head: Head with a weight of shape [C, F].
        scales: Scales [F]; see `TaskRows`.
    """
    return head._replace(weight=head.weight * scales)


def ridge_head(inputs: Tensor, targets: Sequence[float], penalty: float) -> Head:
    """Fit a ridge regression to standardised targets.

    Args:
        inputs: Inputs of shape [N, F].
        targets: Target of each row, of length N.
        penalty: L2 penalty.

    Returns:
        A head with a weight of shape [1, F] and a bias of shape [1] on the device of the inputs.
    """
    mean, std = target_scale(targets)
    standardized = (np.array(targets) - mean) / std
    with one_blas_thread():
        found = Ridge(penalty).fit(inputs.cpu().numpy(), standardized)
    head = numpy_head(found.coef_[None], np.array([found.intercept_]), mean, std)
    return head._replace(weight=head.weight.to(inputs.device), bias=head.bias.to(inputs.device))


def penalized_logistic_head(
    inputs: Tensor, labels: Tensor, start: Head, penalty: float, of_labels: Tensor | None = None
) -> Head:
    """Fit a logistic regression with an L2 penalty on the distance of its weight from another one.

    The sum of the cross-entropies of the rows plus penalty / 2 times the squared distance is minimised. For a
    multi-label task, the distance of the bias has the penalty `DEFAULT_PENALTY`.

    Args:
        inputs: Inputs of shape [N, F].
        labels: Labels of the rows, as returned by `label_tensor`.
        start: Head from which the distance is measured, and from which the fit starts.
        penalty: L2 penalty.
        of_labels: Factor of the cross-entropy of the rows of each label [C]. Default: 1.

    Returns:
        A head with a weight of shape [C, F] and a bias of shape [C].
    """
    coordinates, basis = row_space(inputs)
    if len(coordinates) <= BLOCK_ROWS:
        coordinates = coordinates.double()
    start_bias = start.bias.cpu().double()
    factors = inputs.new_ones(len(inputs)) if of_labels is None else of_labels.to(inputs)[labels]
    of_rows = coordinates, F.linear(inputs, start.weight).cpu(), labels.cpu(), factors.cpu()
    blocks = list(zip(*(tensor.split(BLOCK_ROWS) for tensor in of_rows), strict=True))
    bias_penalty = DEFAULT_PENALTY if labels.ndim == 2 else 0.0

    def of_values(of_logits: Iterable[Tensor], distance: Tensor, bias: Tensor) -> list[Tensor]:
        of_distance, of_bias = penalty * distance, bias_penalty * bias
        for (block, *_), of_block in zip(blocks, of_logits, strict=True):
            of_distance, of_bias = of_distance + of_block.T @ block.double(), of_bias + of_block.sum(dim=0)
        return [of_distance, of_bias]

    def cost(distance: Tensor, bias: Tensor) -> tuple[Tensor, list[Tensor], Products]:
        costs = [
            label_cost(start_logits + F.linear(block.double(), distance, bias), block_labels, block_factors)
            for block, start_logits, block_labels, block_factors in blocks
        ]
        bias_distance = bias - start_bias
        loss = penalty / 2 * distance.square().sum() + bias_penalty / 2 * bias_distance.square().sum()
        loss = loss + torch.stack([of_block.loss for of_block in costs]).sum()

        def products(distance_change: Tensor, bias_change: Tensor) -> list[Tensor]:
            of_logits = (
                of_block.products(F.linear(block.double(), distance_change, bias_change))
                for (block, *_), of_block in zip(blocks, costs, strict=True)
            )
            return of_values(of_logits, distance_change, bias_change)

        return loss, of_values((of_block.of_logits for of_block in costs), distance, bias_distance), products

    distance, bias = minimize(cost, [start.weight.new_zeros(len(start.bias), len(basis)), start.bias])
    return start._replace(weight=start.weight + distance @ basis, bias=bias)


def left_out_rows(
    rows: TaskRows, folds: int, num_examples: int | None = None, seed: int = 0
) -> Iterator[tuple[list[int], list[int]]]:
    """Divide rows into those that a head is fitted to and those that are left out of the fit.

    The examples of each label of a classification task, or all examples of another task, are left out in equal parts.
    The only row of a label is never left out.

    Args:
        rows: Rows of the task, of which the first are examples. The others, such as names of labels, are never left
            out.
        folds: Number of parts.
        num_examples: Number of examples. Default: all rows are examples.
        seed: Seed of the division, which is the same one whenever seed and targets are the same.

    Returns:
        Iterator over the parts, each with the ascending indices of the kept rows and of the left-out rows, of which
        there may be none.
    """
    groups: dict[float, list[int]] = {}
    for row, target in enumerate(rows.targets):
        groups.setdefault(target if rows.task.kind == "classification" else 0.0, []).append(row)
    generator = random.Random(seed)
    limit = len(rows.targets) if num_examples is None else num_examples
    examples = [[row for row in group if row < limit] for group in groups.values() if len(group) > 1]
    shuffled = [generator.sample(group, len(group)) for group in examples]
    for fold in range(folds):
        left_out = {row for group in shuffled for row in group[fold::folds]}
        yield [row for row in range(len(rows.targets)) if row not in left_out], sorted(left_out)


def row_space(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates of rows in an orthonormal basis, which has as many vectors as there are rows at most.

    The weight of a regression with an L2 penalty is a combination of the rows, so it can be fitted to the coordinates,
    which are much shorter than few rows of many elements.

    Args:
        inputs: Inputs of shape [N, F].

    Returns:
        Coordinates [N, R] on the CPU, in float64 if R < F, and the basis [R, F] in the type and on the device of the
        inputs. R is the smaller one of N and F.
    """
    rows = inputs.cpu()
    if rows.shape[0] >= rows.shape[1]:
        return rows, torch.eye(rows.shape[1]).to(inputs)
    basis, coordinates = torch.linalg.qr(rows.double().T)
    return coordinates.T, basis.T.to(inputs)


class LabelCost(NamedTuple):
    """The sum of the losses of N rows and its derivatives with respect to their logits.

    Attributes:
        loss: Sum of the losses, a scalar.
        of_logits: First derivatives [N, C].
        products: Function that multiplies the second derivatives by a direction of the logits [N, C].
    """

    loss: Tensor
    of_logits: Tensor
    products: Callable[[Tensor], Tensor]


def label_cost(logits: Tensor, labels: Tensor, factors: Tensor | float = 1.0) -> LabelCost:
    """Compute the sum of the losses of `target_losses` and its derivatives.

    Args:
        logits: Logits of shape [N, C].
        labels: Labels of the rows, as returned by `label_tensor`.
        factors: Factor of the loss of each row [N]. Default: 1.

    Returns:
        The sum and its derivatives.
    """
    if labels.ndim == 1:
        expected, probabilities = F.one_hot(labels, logits.shape[1]), logits.softmax(dim=1)
    else:
        expected, probabilities = labels, logits.sigmoid()
    losses = target_losses(logits, labels) * factors
    of_rows = factors[:, None] if isinstance(factors, Tensor) else factors

    def products(direction: Tensor) -> Tensor:
        if labels.ndim == 1:
            centered = direction - (probabilities * direction).sum(dim=1, keepdim=True)
        else:
            centered = (1 - probabilities) * direction
        return probabilities * centered * of_rows

    return LabelCost(losses.sum(), (probabilities - expected) * of_rows, products)


def minimize(cost: Callable[..., tuple[Tensor, Sequence[Tensor], Products]], start: Sequence[Tensor]) -> list[Tensor]:
    """Minimise a convex cost with Newton's method, whose steps are found by conjugate gradients.

    It is computed in float64 on the CPU, and until the cost does not fall any more, so that the result does not depend
    on the order of sums. Features of different scales need many steps of a method that knows first derivatives only:
    with the features of pairs of texts, L-BFGS takes several times as many passes over the rows, and ends less close.

    Args:
        cost: Function of tensors with the shapes of `start`, in float64 on the CPU. It returns the cost, a scalar, its
            derivatives with respect to each tensor, and the products of its second derivatives.
        start: Values at which the search starts.

    Returns:
        The values with the lowest cost, with the types and on the devices of `start`. They are those of `start` if the
        derivatives there are not finite.
    """
    sizes = [tensor.numel() for tensor in start]
    products_at: dict[bytes, Products] = {}

    def values(flat: Array) -> list[Tensor]:
        parts = torch.from_numpy(flat).split(sizes)
        return [part.view(tensor.shape) for part, tensor in zip(parts, start, strict=True)]

    def flat_values(tensors: Sequence[Tensor]) -> Array:
        found: Array = torch.cat([tensor.cpu().double().flatten() for tensor in tensors]).numpy()
        return found

    def flat_cost(flat: Array) -> tuple[float, Array]:
        products_at.clear()
        value, gradients, products = cost(*values(flat))
        products_at[flat.tobytes()] = products
        return float(value), flat_values(gradients)

    def flat_products(flat: Array, direction: Array) -> Array:
        if flat.tobytes() not in products_at:
            flat_cost(flat)
        return flat_values(products_at[flat.tobytes()](*values(direction)))

    found = flat_values(start)
    with one_blas_thread():
        if not np.isfinite(flat_cost(found)[1]).all():
            return list(start)
        for method, options in SOLVERS:
            result = scipy_minimize(flat_cost, found, jac=True, hessp=flat_products, method=method, options=options)
            found = result.x
    return [value.to(tensor) for value, tensor in zip(values(found), start, strict=True)]


def ridge_regression(inputs: Array, targets: Array) -> RidgeCV:
    """Fit a ridge regression whose penalty, one of `RIDGE_STRENGTHS`, has the lowest leave-one-out error.

    Args:
        inputs: Inputs of shape [N, F].
        targets: Targets of shape [N].

    Returns:
        The fitted scikit-learn estimator.
    """
    with one_blas_thread():
        return RidgeCV(RIDGE_STRENGTHS).fit(inputs, targets)


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
    with one_blas_thread(), _expected_warnings():
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
    with one_blas_thread(), _expected_warnings():
        return make_pipeline(StandardScaler(), regressor).fit(features, targets)
