"""Thresholds of the labels of multi-label tasks, fitted to rows that the head was not fitted to.

A label is an answer if its probability exceeds its threshold. With calibrated probabilities, one half gives the fewest
wrong labels, but labels of which few rows are known are then hardly ever found. The thresholds here are those with the
highest F1. They are stored beside the head and not in its bias, so that the probabilities stay calibrated.

The best threshold of a few rows is an estimate with a large variance, so each estimate is pulled towards a simpler one:
the common threshold of all labels towards one half, and that of each label towards the common one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyperadapters.config import Task
from hyperadapters.heads.task_heads import DEFAULT_THRESHOLD

Array = np.ndarray[Any, Any]

PRIOR_ROWS = 5.0
"""Weight of the simpler estimate, as a number of rows that have the label."""


def fit_thresholds(task: Task, probabilities: Tensor, labels: Tensor) -> Tensor:
    r"""Fit the thresholds of the labels of one task.

    Let :math:`t^*` be the threshold with the highest micro F1 of all labels, :math:`t_l^*` the one with the highest F1
    of label l, n the number of labels of all rows, :math:`n_l` the number of rows with label l, and :math:`\lambda`
    `PRIOR_ROWS`. With the common threshold t, the threshold of label l is

    .. math::
        \frac{n_l t_l^* + \lambda t}{n_l + \lambda}
        \quad \text{where} \quad t = \frac{n t^* + \lambda / 2}{n + \lambda} .

    A label without rows has the common threshold, which is one half if no row has a label. If the first metric of the
    task is the subset accuracy, all thresholds are one half, because those with the best F1 make it worse.

    Args:
        task: A multi-label task.
        probabilities: Probabilities of N rows that the head was not fitted to, of shape [N, C]; N may be 0.
        labels: Zeros and ones of shape [N, C].

    Returns:
        The thresholds, of shape [C] in float32.
    """
    if task.main_metric == "subset_accuracy":
        return torch.full((len(task.labels),), DEFAULT_THRESHOLD, device=labels.device)
    values, is_target = probabilities.double().cpu().numpy(), labels.bool().cpu().numpy()
    common = _shrunk(values.ravel(), is_target.ravel(), DEFAULT_THRESHOLD)
    found = [_shrunk(of_label, is_own, common) for of_label, is_own in zip(values.T, is_target.T, strict=True)]
    return torch.tensor(found, dtype=torch.float32, device=labels.device)


def _shrunk(values: Array, is_target: Array, simpler: float) -> float:
    """Return the best threshold of probabilities [M], pulled towards a simpler estimate."""
    count = int(is_target.sum())
    return (count * _best_threshold(values, is_target) + PRIOR_ROWS * simpler) / (count + PRIOR_ROWS)


def _best_threshold(values: Array, is_target: Array) -> float:
    """Return the threshold with the highest F1 of the decisions that exceed it; the one nearest to 0.5 of equal ones.

    Args:
        values: Probabilities of shape [M].
        is_target: Whether each decision should be positive, of shape [M].

    Returns:
        The middle between two neighbouring probabilities, or between the lowest one and 0. It is 0.5 if no decision
        should be positive.
    """
    if not is_target.any():
        return DEFAULT_THRESHOLD
    order = np.argsort(-values, kind="stable")
    ordered = values[order]
    following = np.append(ordered[1:], 0.0)
    limits = (ordered + following) / 2  # below each probability in turn
    scores = 2 * np.cumsum(is_target[order]) / (np.arange(1, len(ordered) + 1) + is_target.sum())
    scores[ordered == following] = 0.0  # no threshold is between equal probabilities
    best = np.flatnonzero(scores == scores.max())
    return float(limits[best[np.abs(limits[best] - DEFAULT_THRESHOLD).argmin()]])
