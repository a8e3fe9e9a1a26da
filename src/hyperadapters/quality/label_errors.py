"""Labels that are probably wrong, found by confident learning (Northcutt, Jiang and Chuang, JAIR 2021).

A logistic regression on frozen features predicts each row in cross-validation. A row is suspected if another label is
predicted for it with at least the confidence that rows of that label have on average, and is at least `MIN_RATIO` times
as probable as the row's own label. The ratio is an addition to the paper's rule: without it, half of the suspected rows
and more are only difficult.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from hyperadapters.quality.features import TextEncoder
from hyperadapters.quality.findings import MAX_EXAMPLES, CheckedRow, Finding, RowExample
from hyperadapters.quality.rows import CheckedTask
from hyperadapters.utils.blas import one_blas_thread
from hyperadapters.utils.texts import counted, printable

FOLDS = 5
MIN_RATIO = 5.0
"""How many times as probable as the given label another one must be."""
MIN_SKILL = 0.4
"""Part of the errors of the majority class that the predictions must avoid; worse ones accuse too many rows."""
MIN_ROWS = 50
"""Number of rows below which nothing is predicted."""

Array = np.ndarray[Any, Any]


def suspected_labels(probabilities: Array, labels: Array) -> tuple[Array, Array]:
    """Find the rows whose label is probably wrong.

    Args:
        probabilities: Predicted probability of each label for each row [N, K], of models that were not fitted to it.
        labels: Index of the given label of each row [N]. Each of the K labels occurs.

    Returns:
        Indices of the suspected rows, the most suspicious first, and the index of the label that each probably has.
    """
    rows = np.arange(len(labels))
    thresholds = np.array([probabilities[labels == label, label].mean() for label in range(probabilities.shape[1])])
    confident = np.where(probabilities >= thresholds, probabilities, 0.0)
    confident[rows, labels] = 0.0
    best = confident.argmax(axis=1)
    given, other = probabilities[rows, labels], confident[rows, best]
    suspected = np.flatnonzero((other > 0) & (other >= MIN_RATIO * given))
    order = np.argsort(given[suspected] - other[suspected], kind="stable")
    return suspected[order], best[suspected[order]]


def predicted_probabilities(features: Array, labels: Array, seed: int) -> Array:
    """Predict the labels of rows in cross-validation.

    Args:
        features: Features [N, d].
        labels: Index of the label of each row [N]; each label has at least `FOLDS` rows.
        seed: Seed of the folds.

    Returns:
        Probabilities [N, K].
    """
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    model = LogisticRegression(max_iter=1000)
    with one_blas_thread():
        found: Array = cross_val_predict(model, features, labels, cv=folds, method="predict_proba")
    return found


def sample_sizes(sizes: Sequence[int], max_rows: int) -> list[int]:
    """Divide a maximum number of rows among tasks in proportion to their rows.

    Args:
        sizes: Number of rows of each task.
        max_rows: Maximum number of rows of all tasks together.

    Returns:
        Number of rows of each task.
    """
    total = sum(sizes)
    return list(sizes) if total <= max_rows else [size * max_rows // total for size in sizes]


def check_label_errors(
    data: CheckedTask, encoder: TextEncoder, num_rows: int, seed: int
) -> tuple[list[Finding], list[str]]:
    """Find rows of a classification task whose label is probably wrong.

    Args:
        data: The task with its rows.
        encoder: Computes the features of inputs.
        num_rows: Number of rows to examine, which are drawn at random if there are more.
        seed: Seed of the sample and of the folds.

    Returns:
        A finding if there are such rows, and notes on what was not examined.
    """
    name = printable(data.task.name)
    counts = Counter(row.target for row in data.rows)
    rows = [row for row in data.rows if counts[row.target] >= FOLDS]
    if len(rows) > num_rows:
        sample = sorted(random.Random(f"{seed}/{data.task.name}/labels").sample(range(len(rows)), num_rows))
        rows = _frequent([rows[place] for place in sample])
    names = sorted({str(row.target) for row in rows})
    if len(names) < 2 or len(rows) < MIN_ROWS:
        return [], [
            f"{name}: label errors were not searched, which needs at least {MIN_ROWS} rows of labels with {FOLDS} "
            f"rows or more, found {len(rows)}."
        ]
    labels = np.array([names.index(str(row.target)) for row in rows])
    probabilities = predicted_probabilities(encoder.features([row.texts for row in rows]), labels, seed)
    accuracy = float((probabilities.argmax(axis=1) == labels).mean())
    majority = float(np.bincount(labels).max() / len(labels))
    if accuracy - majority < MIN_SKILL * (1 - majority):
        return [], [
            f"{name}: label errors were not searched, because the frozen encoder predicts the labels too badly "
            f"(accuracy {accuracy:.2f} in cross-validation, majority class {majority:.2f})."
        ]
    notes = []
    if len(rows) < len(data.rows):
        notes.append(f"{name}: label errors were searched in {len(rows):,} of {len(data.rows):,} rows.")
    suspected, likely = suspected_labels(probabilities, labels)
    if not len(suspected):
        return [], notes
    return [_finding(data.task.name, rows, names, suspected, likely, probabilities, accuracy)], notes


def _frequent(rows: Sequence[CheckedRow]) -> list[CheckedRow]:
    """Return the rows whose labels have at least one row for each fold."""
    counts = Counter(row.target for row in rows)
    return [row for row in rows if counts[row.target] >= FOLDS]


def _finding(
    task: str,
    rows: Sequence[CheckedRow],
    names: Sequence[str],
    suspected: Array,
    likely: Array,
    probabilities: Array,
    accuracy: float,
) -> Finding:
    examples = [
        RowExample.of(
            rows[row],
            f"label {printable(str(rows[row].target))}, rather {printable(names[other])} "
            f"({probabilities[row, other]:.2f})",
        )
        for row, other in zip(suspected[:MAX_EXAMPLES], likely[:MAX_EXAMPLES], strict=True)
    ]
    return Finding(
        "label_errors",
        "warning",
        task,
        len(suspected),
        f"{counted(len(suspected), 'row')} ({len(suspected) / len(rows):.1%}) with a label that is probably wrong: "
        f"another one is at least {MIN_RATIO:.0f} times as probable (accuracy {accuracy:.2f} in cross-validation).",
        "Read them, the first ones first, and correct those that are wrong; some are right and only difficult.",
        tuple(examples),
    )
