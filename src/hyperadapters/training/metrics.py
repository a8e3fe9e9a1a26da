"""Metrics of a task, computed with scikit-learn and SciPy."""

from __future__ import annotations

import string
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics as sk

from hyperadapters.config import Task
from hyperadapters.data.targets import multi_hot
from hyperadapters.errors import DataError
from hyperadapters.utils.optional import require

NO_ANSWER = -1


def score(task: Task, targets: Sequence[Any], answers: Sequence[Any]) -> dict[str, float]:
    """Compute the metrics of a task.

    As in scikit-learn, "balanced_accuracy" is the mean recall over the labels that occur in the targets, "macro_f1" is
    the mean over the labels that occur in the targets or in the answers, and "f1" is 0 if its label occurs in neither,
    as "micro_f1" is if no label occurs at all. A correlation with constant numbers is 0.

    Args:
        task: Task that determines the metrics.
        targets: At least one target in the form of `data.examples.Example`.
        answers: Predicted targets in the same order. A missing answer is None or NaN. It counts as wrong, or, for
            numbers, as the mean of the other answers.

    Returns:
        Values by metric, each a fraction from 0 to 1 or a correlation.

    Raises:
        DataError: If there are no targets.
    """
    if not len(targets):
        raise DataError(f"task '{task.name}': expected at least one row to score, found none")
    if task.kind == "text-to-text":
        texts = list(zip(targets, answers, strict=True))
        return {name: float(np.mean([_similarity(name, *pair) for pair in texts])) for name in task.metrics}
    if task.kind == "regression":
        return {name: _correlation(name, targets, answers) for name in task.metrics}
    if task.is_multi_label:
        return {name: _multi_label(name, task, targets, answers) for name in task.metrics}
    guesses = [NO_ANSWER if answer is None or np.isnan(answer) else answer for answer in answers]
    return {name: _classification(name, task, targets, guesses) for name in task.metrics}


def check_packages(tasks: Iterable[Task]) -> None:
    """Check that the packages that compute the metrics of tasks are installed.

    Args:
        tasks: The tasks.

    Raises:
        MissingPackageError: If one is not installed.
    """
    if any(metric.startswith("rouge_") for task in tasks for metric in task.metrics):
        require("rouge_score.rouge_scorer")


def _similarity(name: str, target: str, answer: str | None) -> float:
    """Return how similar a text is to the target, from 0 to 1."""
    if answer is None:
        return 0.0
    if name == "exact_match":
        return float(target.strip() == answer)
    if name == "token_f1":
        return _token_f1(_words(answer), _words(target))
    scorer = _rouge_scorer({"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}[name])
    [found] = scorer.score(target, answer).values()
    return float(found.fmeasure)


@cache
def _rouge_scorer(name: str) -> Any:
    return require("rouge_score.rouge_scorer").RougeScorer([name], use_stemmer=True)


def _words(text: str) -> list[str]:
    """Return the words of a text as SQuAD compares them: in lower case, without punctuation and articles."""
    plain = "".join(char for char in text.lower() if char not in string.punctuation)
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def _token_f1(answer: list[str], target: list[str]) -> float:
    if not answer or not target:
        return float(answer == target)
    common = (Counter(answer) & Counter(target)).total()
    return 2 * common / (len(answer) + len(target))


def _classification(name: str, task: Task, targets: Sequence[int], guesses: Sequence[int]) -> float:
    if name == "accuracy":
        return float(sk.accuracy_score(targets, guesses))
    if name == "matthews_correlation":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "A single label was found", UserWarning)
            return float(sk.matthews_corrcoef(targets, guesses))
    if name == "balanced_accuracy":
        return float(sk.recall_score(targets, guesses, labels=sorted(set(targets)), average="macro", zero_division=0.0))
    labels = [len(task.labels) - 1] if name == "f1" else sorted({*targets, *guesses} - {NO_ANSWER})
    return float(sk.f1_score(targets, guesses, labels=labels, average="macro", zero_division=0.0))


def _multi_label(
    name: str, task: Task, targets: Sequence[tuple[int, ...]], answers: Sequence[tuple[int, ...] | None]
) -> float:
    if name == "subset_accuracy":
        return float(np.mean([target == answer for target, answer in zip(targets, answers, strict=True)]))
    size = len(task.labels) + 1  # scikit-learn would read a matrix with one column as two classes
    wanted, found = (np.array([multi_hot(row or (), size) for row in rows]) for rows in (targets, answers))
    if name == "micro_f1":
        return float(sk.f1_score(wanted, found, average="micro", zero_division=0.0))
    occurs = np.flatnonzero((wanted + found).any(axis=0))
    if not len(occurs):
        return 0.0
    return float(sk.f1_score(wanted, found, labels=occurs, average="macro", zero_division=0.0))


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
