"""Calibration of a trained model on left-out rows: probabilities, bounds on errors, and thresholds of routing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hyperadapters.config import Task
from hyperadapters.data.examples import Example
from hyperadapters.data.memory import read_examples
from hyperadapters.errors import DataError, NotFiniteError, check_int
from hyperadapters.heads.calibration import (
    LabelledLogits,
    error_bounds,
    fit_temperatures,
    with_temperature,
)
from hyperadapters.heads.regression import label_tensor
from hyperadapters.heads.task_heads import DEFAULT_THRESHOLD, ERROR_LEVELS
from hyperadapters.heads.thresholds import fit_thresholds
from hyperadapters.inference.conformal import rejecting_threshold
from hyperadapters.inference.finite import likely_cause
from hyperadapters.inference.inputs import read_inputs
from hyperadapters.inference.predictor import Predictor
from hyperadapters.inference.routing import ROUNDING, conformal_thresholds, similarities
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.evaluation import predict_together, probabilities_of
from hyperadapters.training.prefix_cache import FrozenPrefix

Array = np.ndarray[Any, Any]

MAX_LOGIT = 16.0
"""Absolute logit of a probability next to 0 or 1 in float32."""


@dataclass(frozen=True)
class TaskCalibration:
    """How one task was calibrated.

    Attributes:
        rows: Number of rows of the task.
        threshold: Similarity below which an input routed to the task is declined; None if the method cannot route.
        decline_bound: Bound on the share of inputs most similar to the task that are declined, if these are
            exchangeable with the rows; None if no row is most similar to the task, whose threshold then stays the same,
            or if `false_accept_rate` raised the threshold.
        temperature: Divisor of the logits; None if no row of the task has a label.
    """

    rows: int
    threshold: float | None
    decline_bound: float | None
    temperature: float | None


@dataclass(frozen=True)
class CalibrationReport:
    """Result of `calibrate_model`.

    Attributes:
        tasks: Calibration of each task by its name.
        declined: Share of the rows that the new thresholds decline; None if the method cannot route.
        foreign_accepted: Share of the foreign inputs that the new thresholds accept; None if there are none.
    """

    tasks: dict[str, TaskCalibration]
    declined: float | None
    foreign_accepted: float | None


def calibrate_model(
    model: HyperAdapterModel,
    data: Mapping[str, Any],
    foreign: Iterable[Any] | None = None,
    false_decline_rate: float = 0.05,
    false_accept_rate: float | None = None,
    batch_size: int = 64,
) -> CalibrationReport:
    """Calibrate a trained model on rows that it was not trained on, without training.

    The thresholds of routing become conformal thresholds of the rows (see `inference.conformal`). Temperatures, error
    bounds and the thresholds of multi-label tasks are those of the rows that have labels. Tasks without rows keep
    theirs. (If such a task has no threshold of routing yet, it gets that of the rows which are most similar to it.)

    If foreign inputs and `false_accept_rate` are given, the thresholds of all tasks are then raised by the same number,
    so that at most this share of exchangeable foreign inputs is accepted; more inputs of known tasks may then be
    declined than `false_decline_rate`. If an error is raised, the model has not changed.

    Args:
        model: Trained model, which is changed in place.
        data: Rows of some or all tasks by the names of the tasks, in the forms that `Trainer` reads. The rows of a task
            may have no labels.
        foreign: Inputs of no known task, in any form that `inference.inputs.read_inputs` reads. Default: none.
        false_decline_rate: Maximum share of the inputs of known tasks that are declined, in [0, 1). Default: 0.05.
        false_accept_rate: Maximum share of foreign inputs that are accepted, in [0, 1). Default: no limit.
        batch_size: Number of rows in a batch. Default: 64.

    Returns:
        The thresholds, the bounds that hold for them, and the temperatures.

    Raises:
        DataError: If a row or a rate is invalid, there are no rows, only one of `foreign` and `false_accept_rate` is
            given, no row contains words, or there are fewer than 1 / `false_accept_rate` - 1 foreign inputs.
        TaskError: If a task is unknown, or foreign inputs are given and the method of the model cannot route.
        NotFiniteError: If the model computes values that are not finite numbers.
    """
    check_int("batch_size", batch_size, 1)
    _check_rate("false_decline_rate", false_decline_rate)
    if (foreign is None) != (false_accept_rate is None):
        raise DataError("foreign and false_accept_rate: expected both or neither; give the other one, too")
    examples = read_examples(model.tasks, data, "data", needs_labels=False)
    if not examples:
        raise DataError("data: expected at least one row, found none")
    routing = None
    if model.method.can_route or foreign is not None:
        model.method.check_can_route()
        outside = None if foreign is None else list(read_inputs(foreign, model.tasks, None))
        routing = _Routing.of(model, examples, outside, false_decline_rate, false_accept_rate, batch_size)
    heads: dict[int, _HeadCalibration] = {}
    if model.heads is not None:
        heads = _calibrated_heads(model, [row for row in examples if row.target is not None], batch_size)
    with model.lock:
        if routing is not None:
            model.task_table.set_thresholds(routing.thresholds)
        if heads:
            _set_heads(model, heads)
    counts = [sum(row.task_id == task_id for row in examples) for task_id in range(len(model.tasks))]
    tasks = {
        task.name: TaskCalibration(
            counts[task_id],
            None if routing is None else float(routing.thresholds[task_id]),
            None if routing is None else routing.bounds.get(task_id),
            heads[task_id].temperature if task_id in heads else None,
        )
        for task_id, task in enumerate(model.tasks)
    }
    if routing is None:
        return CalibrationReport(tasks, None, None)
    return CalibrationReport(tasks, routing.declined, routing.foreign_accepted)


def calibrate_heads(
    model: HyperAdapterModel,
    examples: Sequence[Example],
    batch_size: int = 64,
    prefix: FrozenPrefix | None = None,
) -> None:
    """Fit the temperatures of the heads of all tasks with labels, bound their errors, and fit thresholds of labels.

    The errors are those of classification tasks, and the thresholds those of multi-label tasks. Processes that train
    together divide the examples among them, and all of them must call this function.

    Args:
        model: Trained model with heads, which is changed in place.
        examples: Examples with task ids and targets that the heads were not fitted to. A task without any gets the mean
            temperature of the others of its kind; without any of this kind, all their temperatures stay the same.
        batch_size: Number of examples in a batch. Default: 64.
        prefix: States of frozen layers of the examples. Default: they are computed.

    Raises:
        NotFiniteError: If an output of the model for an example is not finite.
    """
    found = _calibrated_heads(model, examples, batch_size, prefix)
    for kind in {model.tasks[task_id].kind for task_id in found}:
        of_kind = [task_id for task_id, task in enumerate(model.tasks) if task.kind == kind]
        known = [math.log(found[task_id].temperature) for task_id in of_kind if task_id in found]
        mean = math.exp(sum(known) / len(known))
        for task_id in of_kind:
            found.setdefault(task_id, _HeadCalibration(mean))
    if found:
        _set_heads(model, found)


class _HeadCalibration(NamedTuple):
    """What is known of the probabilities of a head; None stands for nothing. See `heads.task_heads.Head`."""

    temperature: float
    error_bounds: Tensor | None = None
    thresholds: Tensor | None = None


def _set_heads(model: HyperAdapterModel, found: Mapping[int, _HeadCalibration]) -> None:
    """Set the calibration of some tasks by their ids."""
    assert model.heads is not None
    temperatures, bounds = model.heads.temperature.clone(), model.heads.error_bounds.clone()
    thresholds = model.heads.thresholds.clone()
    for task_id, of_task in found.items():
        temperatures[task_id] = of_task.temperature
        bounds[task_id] = torch.ones(2, ERROR_LEVELS) if of_task.error_bounds is None else of_task.error_bounds
        own = model.heads.outputs_of(task_id)
        thresholds[own] = DEFAULT_THRESHOLD if of_task.thresholds is None else of_task.thresholds.to(thresholds)
    model.task_table.set_calibration(temperatures, bounds, thresholds)


def _calibrated_heads(
    model: HyperAdapterModel, examples: Sequence[Example], batch_size: int, prefix: FrozenPrefix | None = None
) -> dict[int, _HeadCalibration]:
    """Return the calibration of each task that has labels and examples, by its id."""
    assert model.heads is not None
    predictions = predict_together(Predictor(model, batch_size), examples, prefix) if examples else []
    rows_of: dict[int, list[int]] = {}
    for row, example in enumerate(examples):
        if example.task_id is not None and model.tasks[example.task_id].is_labelled:
            rows_of.setdefault(example.task_id, []).append(row)
    logits = {}
    for task_id, places in rows_of.items():
        task, temperature = model.tasks[task_id], float(model.heads.temperature[task_id])
        probabilities = probabilities_of(task, [predictions[row] for row in places])
        labels = label_tensor(task, [examples[row].target for row in places])
        logits[task_id] = LabelledLogits(_logits_before(task, probabilities, temperature), labels)
    found = {}
    for kind in {model.tasks[task_id].kind for task_id in logits}:
        of_kind = {task_id: rows for task_id, rows in logits.items() if model.tasks[task_id].kind == kind}
        for (task_id, rows), temperature in zip(of_kind.items(), fit_temperatures([*of_kind.values()]), strict=True):
            found[task_id] = _calibrated(model.tasks[task_id], rows, temperature)
    return found


def _logits_before(task: Task, probabilities: Array, temperature: float) -> Tensor:
    """Return the logits of probabilities, up to a constant for each row, before the division by a temperature."""
    if task.is_multi_label:
        return torch.from_numpy(probabilities).logit().clamp(-MAX_LOGIT, MAX_LOGIT) * temperature
    before = with_temperature(probabilities, 1 / temperature)
    return torch.from_numpy(np.log(before.clip(min=np.finfo(float).tiny)))


def _calibrated(task: Task, rows: LabelledLogits, temperature: float) -> _HeadCalibration:
    """Return the calibration of one task with the given temperature."""
    logits = rows.logits / temperature
    if task.is_multi_label:
        return _HeadCalibration(temperature, thresholds=fit_thresholds(task, logits.sigmoid(), rows.labels))
    likely, answers = logits.softmax(dim=1).max(dim=1)
    return _HeadCalibration(temperature, error_bounds(likely.numpy(), (answers == rows.labels).numpy()))


@dataclass(frozen=True)
class _Routing:
    """New thresholds [T], the bounds that hold for some tasks by their ids, and what they do with the given rows."""

    thresholds: Tensor
    bounds: dict[int, float]
    declined: float
    foreign_accepted: float | None

    @classmethod
    def of(
        cls,
        model: HyperAdapterModel,
        examples: Sequence[Example],
        foreign: Sequence[Example] | None,
        false_decline_rate: float,
        false_accept_rate: float | None,
        batch_size: int,
    ) -> _Routing:
        """Compute the thresholds."""
        known = _readable_similarities(model, examples, batch_size)
        if not len(known):
            raise DataError("data: expected rows that contain words, found none")
        thresholds, bounds = model.pha.thresholds.clone(), dict[int, float]()
        given = {example.task_id for example in examples}
        for task_id, (threshold, bound) in enumerate(conformal_thresholds(known, false_decline_rate)):
            # What is most similar to a task without rows belongs to another task, and says little about its inputs.
            is_new = task_id in given or not math.isfinite(float(thresholds[task_id]))
            if is_new and math.isfinite(threshold):
                thresholds[task_id], bounds[task_id] = threshold - ROUNDING, bound
        accepted = None
        if foreign is not None and false_accept_rate is not None:
            outside = _readable_similarities(model, foreign, batch_size)
            shift = _shift(_excesses(outside, thresholds), false_accept_rate)
            if shift > 0:
                thresholds, bounds = thresholds + shift, {}
            accepted = float((_excesses(outside, thresholds) >= 0).float().mean())
        declined = float((_excesses(known, thresholds) < 0).float().mean())
        return cls(thresholds, bounds, declined, accepted)


def _shift(excesses: Tensor, rate: float) -> float:
    """Return by how much thresholds are raised, so that at most a share of foreign inputs is accepted."""
    _check_rate("false_accept_rate", rate)
    threshold = rejecting_threshold(excesses, rate) if len(excesses) else math.inf
    if not math.isfinite(threshold):
        needed = "any number of them cannot show it" if not rate else f"{math.ceil(1 / rate - 1 - 1e-9)} or more"
        raise DataError(
            f"foreign: {len(excesses)} inputs with words cannot show that at most {rate:.3g} of such inputs are "
            f"accepted; give {needed}, or raise false_accept_rate"
        )
    return threshold + 2 * ROUNDING if threshold >= 0 else 0.0


def _excesses(similarity: Tensor, thresholds: Tensor) -> Tensor:
    """Return by how much inputs exceed the threshold of their most similar task [N]."""
    values, nearest = similarity.max(dim=1)
    return values - thresholds[nearest]


def _readable_similarities(model: HyperAdapterModel, examples: Sequence[Example], batch_size: int) -> Tensor:
    """Return the similarities [N, T] of those examples that contain words; the others are declined anyway."""
    if not examples:
        return model.pha.thresholds.new_empty(0, len(model.tasks))
    similarity, readable = similarities(model, examples, batch_size)
    similarity = similarity[readable]
    if not similarity.max(dim=1).values.isfinite().all():
        raise NotFiniteError(f"the similarities of inputs to the tasks are not finite; {likely_cause(model)}")
    return similarity


def _check_rate(name: str, rate: Any) -> None:
    if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 <= rate < 1:
        raise DataError(f"{name}: expected a number in [0, 1), found {rate!r}")
