"""Scores of a task, by scikit-learn and scipy."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics as sk

from hyperadapters.config import Task
from hyperadapters.errors import DataError

NO_ANSWER = -1


def score(task: Task, targets: Sequence[Any], answers: Sequence[Any]) -> dict[str, float]:
    """All metrics of a task, each as a fraction or a correlation.

    As in scikit-learn, "macro_f1" is the mean over the labels that occur among the targets or the answers, and "f1" is
    0 where its label occurs in neither. A correlation with constant numbers is 0.

    Args:
        task: Names the metrics.
        targets: Label indices, numbers or texts; at least one.
        answers: The same; None or NaN where there is none. It counts as wrong (labels, texts), or as the mean of the
            other answers (numbers), which says nothing about the target.

    Raises:
        DataError: If there are no targets.
    """
    if not len(targets):
        raise DataError(f"task '{task.name}': no rows to score; expected at least one")
    if task.kind == "text-to-text":
        hits = [str(target).strip() == answer for target, answer in zip(targets, answers, strict=True)]
        return {"exact_match": float(np.mean(hits))}
    if task.kind == "regression":
        return {name: _correlation(name, targets, answers) for name in task.metrics}
    guesses = [NO_ANSWER if answer is None or np.isnan(answer) else answer for answer in answers]
    return {name: _classification(name, task, targets, guesses) for name in task.metrics}


def _classification(name: str, task: Task, targets: Sequence[int], guesses: Sequence[int]) -> float:
    if name == "accuracy":
        return float(sk.accuracy_score(targets, guesses))
    if name == "matthews_correlation":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "A single label was found", UserWarning)
            return float(sk.matthews_corrcoef(targets, guesses))
    labels = [len(task.labels) - 1] if name == "f1" else sorted({*targets, *guesses} - {NO_ANSWER})
    return float(sk.f1_score(targets, guesses, labels=labels, average="macro", zero_division=0.0))


def _correlation(name: str, targets: Sequence[float], answers: Sequence[float | None]) -> float:
    found = [answer for answer in answers if answer is not None and np.isfinite(answer)]
    filler = float(np.mean(found)) if found else 0.0
    guesses = [answer if answer is not None and np.isfinite(answer) else filler for answer in answers]
    if _is_constant(guesses) or _is_constant(targets):
        return 0.0  # a constant correlates with nothing
    correlate = stats.pearsonr if name == "pearson" else stats.spearmanr
    return float(correlate(targets, guesses).statistic)


def _is_constant(values: Sequence[float]) -> bool:
    return bool(np.ptp(values) <= 1e-9 * np.max(np.abs(values)))
