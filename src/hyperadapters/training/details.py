"""What a training run keeps for its report, computed from its evaluations and its log."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from hyperadapters._version import __version__
from hyperadapters.checkpoints.details_file import (
    BACKBONE,
    FORMAT,
    Bin,
    Curve,
    DeclineRate,
    ErrorLimit,
    Point,
    RunDetails,
    TaskDetails,
)
from hyperadapters.config import Split, Task
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.data.targets import label_indices
from hyperadapters.heads.calibration import confidence_for, reliability, risk_coverage, with_temperature
from hyperadapters.inference.conformal import conformal_threshold
from hyperadapters.inference.predictor import Prediction
from hyperadapters.inference.routing import ROUNDING
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.evaluation import Evaluation, probabilities_of
from hyperadapters.training.probes import majority

Array = np.ndarray[Any, Any]

MAX_PROTOTYPES = 500
"""Number of prototypes that are kept."""
MAX_CHARACTERS = 200
"""Number of characters of a text that are kept."""
DECIMALS = 4
"""Number of decimals of vectors that are kept."""
ERROR_LIMITS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
DECLINE_RATES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
LOSSES = {"loss": "total", "loss_task": "task", "loss_instance": "instance", "loss_prototype": "prototype"}
"""Names of the terms of the objective in the log and in the details."""


def details_of(
    model: HyperAdapterModel,
    tasks: Sequence[TaskData],
    evaluations: Mapping[Split, Evaluation],
    log: Sequence[Mapping[str, Any]],
    best_step: int | None,
    seconds: Mapping[str, float],
    max_texts: int,
) -> RunDetails:
    """Collect the details of a run.

    Args:
        model: Trained model.
        tasks: All tasks of the model in their order, with their examples.
        evaluations: Evaluations by split. The last one is described, usually test.
        log: Log of the Trainer, an entry for each step at which something was logged.
        best_step: Step of the state that is kept; None if it is the last one.
        seconds: Duration of each part of the run.
        max_texts: Maximum number of rows whose texts and instance vectors are kept.

    Returns:
        The details.
    """
    split = list(evaluations)[-1] if evaluations else None
    rows = [row for data in tasks for row in data.splits.get(split, [])] if split else []
    predictions = evaluations[split].predictions if split else []
    routed = Routed(tasks, rows, predictions)
    calibrating = Routed(tasks, [], [])
    if split == "test" and "validation" in evaluations:
        left_out = [row for data in tasks for row in data.splits.get("validation", [])]
        calibrating = Routed(tasks, left_out, evaluations["validation"].predictions)
    names = {data.task.name: f"eval_{data.task.name}_{data.task.main_metric}" for data in tasks}
    return RunDetails(
        format=FORMAT,
        versions={
            "hyperadapters": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        device=str(model.device),
        split=split,
        seconds={name: round(max(0.0, value), 2) for name, value in seconds.items()},
        parameters=parameters_of(model),
        losses={title: found for name, title in LOSSES.items() if (found := logged(log, name)).x},
        validation_mean=logged(log, "eval_mean"),
        validation={name: found for name, key in names.items() if (found := logged(log, key)).x},
        best_step=best_step,
        tasks=tuple(
            _of_task(model, task_id, data, rows, predictions, routed, calibrating) for task_id, data in enumerate(tasks)
        ),
        prototypes=_unit_vectors(prototypes_of(model)),
        confusion=tuple(sorted((own, near, count) for (own, near), count in routed.confusion.items())),
        points=points_of(model.tasks, rows, predictions, routed.nearest, max_texts),
    )


def logged(log: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """Return the finite values of one name in the log of a Trainer, by step.

    Args:
        log: Entries of the log.
        name: Name of the values.
    """
    found = {entry["step"]: float(entry[name]) for entry in log if name in entry and np.isfinite(entry[name])}
    return Curve(x=tuple(map(float, found)), y=tuple(found.values()))


def parameters_of(model: HyperAdapterModel) -> dict[str, int]:
    """Return the number of parameters of each part of a model: of its backbone, and of the parts that are trained.

    Args:
        model: The model.
    """
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        names = name.split(".")
        part = BACKBONE if names[0] == "backbone" else names[names[0] == "method"].replace("_", " ")
        found[part] += parameter.numel()
    return dict(found)


def prototypes_of(model: HyperAdapterModel) -> Array:
    """Return the prototypes of the first tasks of a model [T, p]; an empty array if its method cannot route.

    Args:
        model: The model.
    """
    if not model.method.can_route:
        return np.empty((0, 1))
    return model.pha.prototypes.weight[:MAX_PROTOTYPES].detach().float().cpu().numpy()


class Routed:
    """Where rows are routed.

    Attributes:
        nearest: Index of the most similar task of each row; None if the method cannot route.
        similarity: Similarity of each row to this task.
        confusion: Number of rows by the indices of their own and of the most similar task.
    """

    def __init__(self, tasks: Sequence[TaskData], rows: Sequence[Example], predictions: Sequence[Prediction]) -> None:
        """Read the routing of predictions.

        Args:
            tasks: All tasks in the order of the model.
            rows: Rows that are predicted.
            predictions: Their predictions.
        """
        ids = {data.task.name: task_id for task_id, data in enumerate(tasks)}
        results = [prediction.routing for prediction in predictions]
        self.nearest = [None if result is None else ids[result.candidates[0].task] for result in results]
        self.similarity = [None if result is None else result.similarity for result in results]
        self.confusion = Counter(
            (row.task_id, near)
            for row, near in zip(rows, self.nearest, strict=True)
            if row.task_id is not None and near is not None
        )

    def similarities(self, task_id: int) -> torch.Tensor:
        """Return the similarities of those rows that are most similar to a task.

        Args:
            task_id: Index of the task.
        """
        pairs = zip(self.nearest, self.similarity, strict=True)
        return torch.tensor([value for near, value in pairs if near == task_id and value is not None])


def _of_task(
    model: HyperAdapterModel,
    task_id: int,
    data: TaskData,
    rows: Sequence[Example],
    predictions: Sequence[Prediction],
    routed: Routed,
    calibrating: Routed,
) -> TaskDetails:
    task = data.task
    places = [place for place, row in enumerate(rows) if row.task_id == task_id]
    results = [result for place in places if (result := predictions[place].routing) is not None]
    found: dict[str, Any] = {
        "name": task.name,
        "metric": task.main_metric,
        "rows": {split: len(of_split) for split, of_split in data.splits.items()},
        "majority": majority(data)[task.main_metric] if data.splits.get("test") else None,
        "declined": sum(not result.accepted for result in results) / len(results) if results else None,
        "decline_rates": decline_rates(calibrating.similarities(task_id), routed.similarities(task_id)),
    }
    if places and model.heads is not None and task.kind == "classification":
        probabilities = probabilities_of(task, [predictions[place] for place in places])
        labels = np.array([rows[place].target for place in places], dtype=int)
        temperature, bounds = float(model.heads.temperature[task_id]), model.heads.error_bounds[task_id]
        found |= _calibration(probabilities, labels, temperature, bounds)
    return TaskDetails(**found)


def _calibration(probabilities: Array, labels: Array, temperature: float, bounds: torch.Tensor) -> dict[str, Any]:
    before = with_temperature(probabilities, 1 / temperature)
    confidence, is_right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    coverage, risk = risk_coverage(confidence, is_right)
    limits = []
    for max_error in ERROR_LIMITS:
        answered = confidence > confidence_for(bounds, max_error)
        wrong = float((~is_right[answered]).mean()) if answered.any() else None
        limits.append(ErrorLimit(max_error=max_error, answered=float(answered.mean()), wrong=wrong))
    return {
        "reliability": _bins(probabilities, labels),
        "reliability_before": _bins(before, labels),
        "risk": Curve(x=tuple(coverage.tolist()), y=tuple(risk.tolist())),
        "error_limits": tuple(limits),
    }


def _bins(probabilities: Array, labels: Array) -> tuple[Bin, ...]:
    return tuple(
        Bin(rows=int(rows), confidence=min(1.0, confidence / rows), accuracy=right / rows)
        for rows, confidence, right in reliability(probabilities, labels).tolist()
        if rows
    )


def decline_rates(calibrating: torch.Tensor, evaluated: torch.Tensor) -> tuple[DeclineRate, ...]:
    """Compare the shares of declined rows with the bounds of conformal thresholds, for inputs most similar to one task.

    Args:
        calibrating: Similarities of validation rows to the task.
        evaluated: Similarities of rows of another split.

    Returns:
        Bound and share for each of `DECLINE_RATES`; empty if there are no rows in a split.
    """
    if not len(calibrating) or not len(evaluated):
        return ()
    found = []
    for rate in DECLINE_RATES:
        threshold, bound = conformal_threshold(calibrating, rate)
        declined = float((evaluated < threshold - ROUNDING).double().mean())
        found.append(DeclineRate(rate=rate, bound=bound, declined=declined, rows=len(evaluated)))
    return tuple(found)


def points_of(
    tasks: Sequence[Task],
    rows: Sequence[Example],
    predictions: Sequence[Prediction],
    nearest: Sequence[int | None],
    max_texts: int,
) -> tuple[Point, ...]:
    """Choose evenly spaced rows, about as many of each task, for the map.

    Args:
        tasks: Tasks of the model.
        rows: Evaluated rows.
        predictions: Their predictions.
        nearest: Indices of their most similar tasks.
        max_texts: Maximum number of points.

    Returns:
        Points of the chosen rows, ordered by task; none if the predictions have no instance vectors.
    """
    of_task: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        if row.task_id is not None and predictions[place].instance is not None:
            of_task.setdefault(row.task_id, []).append(place)
    share = max(1, max_texts // max(1, len(of_task)))
    chosen = [
        places[index]
        for places in of_task.values()
        for index in np.linspace(0, len(places) - 1, min(share, len(places))).astype(int)
    ][:max_texts]
    vectors = _unit_vectors(np.array([predictions[place].instance for place in chosen]))
    return tuple(
        Point(
            task=task_id,
            nearest=nearest[place],
            vector=vector,
            text=_shortened(" / ".join(text for text in (rows[place].text, rows[place].text_pair) if text is not None)),
            target=_named(tasks[task_id], rows[place].target),
            answer=_named(tasks[task_id], predictions[place].target),
        )
        for place, vector in zip(chosen, vectors, strict=True)
        if (task_id := rows[place].task_id) is not None
    )


def _unit_vectors(vectors: Array) -> tuple[tuple[float, ...], ...]:
    if not len(vectors):
        return ()
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.round(vectors.astype(np.float64) / np.maximum(lengths, 1e-12), DECIMALS)
    return tuple(map(tuple, unit.tolist()))


def _named(task: Task, target: Any) -> str | None:
    """Return a target as a text; None for none."""
    if target is None:
        return None
    if indices := label_indices(task, target):
        return _shortened(", ".join(task.labels[index] for index in indices))
    return _shortened("no label" if task.is_multi_label else f"{target:.6g}" if task.kind == "regression" else target)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"
