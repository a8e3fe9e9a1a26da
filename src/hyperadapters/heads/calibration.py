r"""Calibration of the probabilities of heads, and selective prediction.

A head is calibrated if, of all answers to which it gives the probability p, the share p is right. Regularised heads are
too cautious where they have few rows, and heads on adapted features are too confident, because the adapters have seen
the labels of the training rows. Dividing the logits by one number for each task, the temperature, corrects both and
changes no answer (Guo et al. 2017). It is fitted to rows that the head was not fitted to. A multi-label task has one
temperature for all of its labels, each of which is a question of its own with the answers yes and no.

Selective prediction answers only the inputs whose most probable label exceeds a certain probability, the confidence.
Left-out rows bound the share of wrong answers above each of several confidences (Geifman and El-Yaniv 2017).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from hyperadapters.config import Task
from hyperadapters.heads.task_heads import ERROR_LEVELS, target_losses

Array = np.ndarray[Any, Any]

BINS = 15
"""Number of bins of equal width in `calibration_error` and `reliability`."""
RISK_POINTS = 50
"""Maximum number of points in `risk_coverage`."""
LOG_TEMPERATURES = (math.log(1 / 16), math.log(64))
"""Smallest and largest logarithm of a temperature."""
PRIOR_STRENGTH = 2.0
"""Strength with which the logarithm of a task's temperature is regularised towards the mean of all tasks: half of it
times the squared distance is the penalty, in nats. A task with few left-out rows gets nearly the mean."""
NEW_TEMPERATURE = 2.0
"""Temperature towards which that of a task is regularised if no other task is known."""
FAILURE_RATE = 0.1
"""Probability with which the bounds of `error_bounds` may be too low."""
ROUNDS = 5
"""Number of times that the temperatures and their mean are computed in turn."""


def calibration_error(probabilities: Array, labels: Array) -> float:
    """Compute the expected calibration error of the most probable labels, with bins of equal width.

    This is the mean absolute difference between the probability of the most probable label and the share of rows that
    it is right for, over bins of this probability, weighted by their numbers of rows.

    Args:
        probabilities: Probabilities of shape [N, C], with N at least 1.
        labels: Label indices of shape [N].

    Returns:
        The error, from 0 to 1. With few rows it is above 0 for calibrated probabilities, too.
    """
    _, confidence, right = reliability(probabilities, labels).T
    return float(np.abs(confidence - right).sum() / len(labels))


def reliability(probabilities: Array, labels: Array) -> Array:
    """Sum up the rows in bins of equal width of the probability of the most probable label, for a reliability diagram.

    Args:
        probabilities: Probabilities of shape [N, C], with N at least 1.
        labels: Label indices of shape [N].

    Returns:
        For each of the `BINS` bins the number of rows, the sum of these probabilities, and the number of rows for which
        the label is right, of shape [`BINS`, 3].
    """
    confidence, is_right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    weights = (np.ones(len(labels)), confidence, is_right)
    return np.stack([np.bincount(bins, of_rows, minlength=BINS) for of_rows in weights], axis=1)


def risk_coverage(confidences: Array, are_right: Array) -> tuple[Array, Array]:
    """Compute the share of wrong answers among the most confident rows, for several shares of rows.

    Rows of the same confidence are answered together.

    Args:
        confidences: Probability of the most probable label of each row, of shape [N], with N at least 1.
        are_right: Whether this label is right, of shape [N].

    Returns:
        Shares of answered rows in ascending order, at most `RISK_POINTS` of them evenly chosen with the last one 1, and
        the shares of wrong answers among them.
    """
    order = np.argsort(-confidences, kind="stable")
    last = np.append(np.flatnonzero(np.diff(confidences[order])), len(order) - 1)  # of the rows of a confidence
    last = last[np.unique(np.linspace(0, len(last) - 1, RISK_POINTS).round().astype(int))]
    wrong = np.cumsum(~are_right[order])[last]
    return (last + 1) / len(order), wrong / (last + 1)


def brier_score(probabilities: Array, labels: Array) -> float:
    """Compute the Brier score: the mean squared distance of the probabilities from the one-hot labels.

    Args:
        probabilities: Probabilities of shape [N, C], with N at least 1.
        labels: Label indices of shape [N].

    Returns:
        The score, from 0 to 2.
    """
    targets = np.eye(probabilities.shape[1])[labels]
    return float(np.square(probabilities - targets).sum(axis=1).mean())


def with_temperature(probabilities: Array, temperature: float) -> Array:
    """Divide the logits of probabilities by a temperature.

    Args:
        probabilities: Probabilities of shape [N, C].
        temperature: The temperature; the inverse of the one of a head undoes its effect.

    Returns:
        Probabilities of shape [N, C], in float64.
    """
    logits = np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float64).tiny)) / temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


class LabelledLogits(NamedTuple):
    """Logits of rows of one task that its head was not fitted to.

    Attributes:
        logits: Logits of shape [N, C], before the division by a temperature.
        labels: Label indices of shape [N], or for a multi-label task rows of zeros and ones [N, C] in float32.
    """

    logits: Tensor
    labels: Tensor


def no_rows(task: Task) -> LabelledLogits:
    """Return the logits and labels of no row.

    Args:
        task: Task of the head.
    """
    logits = torch.empty(0, len(task.labels))
    return LabelledLogits(logits, logits if task.is_multi_label else torch.empty(0, dtype=torch.long))


def fit_temperatures(rows: Sequence[LabelledLogits]) -> list[float]:
    r"""Fit the temperatures of several tasks, which are regularised towards their mean.

    The logarithms :math:`b_t` of the temperatures and their mean c minimise

    .. math::
        \sum_t \Bigl( L_t(b_t) + \frac{\lambda}{2} (b_t - c)^2 \Bigr),

    where :math:`L_t` is the sum of the cross-entropies of the rows of task t (the binary ones of all labels of a
    multi-label task), and :math:`\lambda` is `PRIOR_STRENGTH`.
    The two are minimised in turn, `ROUNDS` times from :math:`c` = log `NEW_TEMPERATURE`.

    Args:
        rows: Left-out rows of each task; a task may have none.

    Returns:
        The temperature of each task. A task without rows has the mean of the others, and it is 1 if there are no rows
        at all.
    """
    known = [of_task for of_task in rows if len(of_task.labels)]
    if not known:
        return [1.0] * len(rows)
    mean = math.log(NEW_TEMPERATURE)
    for _ in range(ROUNDS):
        mean = sum(_log_temperature(of_task, mean) for of_task in known) / len(known)
    return [math.exp(_log_temperature(of_task, mean)) for of_task in rows]


def fit_temperature(rows: LabelledLogits, others: Sequence[float]) -> float:
    """Fit the temperature of one task, which is regularised towards the mean of others.

    Args:
        rows: Left-out rows of the task; there may be none.
        others: Temperatures of other tasks. If there are none, `NEW_TEMPERATURE` takes their place.

    Returns:
        The temperature.
    """
    known = others or [NEW_TEMPERATURE]
    return math.exp(_log_temperature(rows, sum(map(math.log, known)) / len(known)))


def _log_temperature(rows: LabelledLogits, mean: float) -> float:
    """Minimise the loss of the rows plus the penalty on the distance from the mean logarithm."""
    from scipy.optimize import minimize_scalar  # takes half a second, which predictions do not need

    if not len(rows.labels):
        return mean
    logits = rows.logits.double()

    def cost(value: float) -> float:
        loss = float(target_losses(logits / math.exp(value), rows.labels, reduction="sum"))
        return loss + PRIOR_STRENGTH / 2 * (value - mean) ** 2

    return float(minimize_scalar(cost, bounds=LOG_TEMPERATURES, method="bounded").x)


def error_bounds(confidences: Array, are_right: Array) -> Tensor:
    """Bound the share of wrong answers among those above each of several confidences.

    The J confidences are those that the most confident 1/J, 2/J, ... of the rows exceed. Given such a confidence, the
    rows above it are independent draws of the inputs that exceed it, so the upper limit of Clopper and Pearson holds
    for their error. All J limits hold together with a probability of at least 1 - `FAILURE_RATE` over the draw of the
    rows, if these are exchangeable with the inputs that are answered later.

    Args:
        confidences: Probability of the most probable label of each row, of shape [N], with N at least 1.
        are_right: Whether this label is right, of shape [N].

    Returns:
        The J = `ERROR_LEVELS` confidences in descending order, and the upper limit of the error of answers that exceed
        each of them, of shape [2, J] in float32. The limit is 1 if no row exceeds a confidence.
    """
    confidences = confidences.astype(np.float32)  # as predictions have them
    ordered = np.sort(confidences)[::-1]
    found = torch.ones(2, ERROR_LEVELS)
    for level in range(ERROR_LEVELS):
        count = len(ordered) * (level + 1) // ERROR_LEVELS
        limit = ordered[count] if count < len(ordered) else np.float32(0)  # every confidence exceeds 0
        answered = confidences > limit
        wrong, right = int((answered & ~are_right).sum()), int((answered & are_right).sum())
        found[0, level] = float(limit)
        if right:
            found[1, level] = float(betaincinv(wrong + 1, right, 1 - FAILURE_RATE / ERROR_LEVELS))
    return found


def confidence_for(bounds: Tensor, max_error: float) -> float:
    """Return the lowest confidence above which the share of wrong answers is bounded by a given one.

    Args:
        bounds: Confidences and limits of a task [2, J], as returned by `error_bounds`.
        max_error: Maximum share of wrong answers.

    Returns:
        The confidence; infinity if there is none.
    """
    confidences, limits = bounds.tolist()
    return min(
        (value for value, limit in zip(confidences, limits, strict=True) if limit <= max_error), default=math.inf
    )
