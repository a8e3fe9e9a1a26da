"""Evaluation of a model on the examples of its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from numbers import Real
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from hyperadapters.backbones.passes import FrozenOutput
from hyperadapters.config import Task
from hyperadapters.data.examples import Example
from hyperadapters.errors import DataError
from hyperadapters.heads.calibration import brier_score, calibration_error, with_temperature
from hyperadapters.inference.inputs import is_index
from hyperadapters.inference.predictor import Prediction, Predictor
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.metrics import score
from hyperadapters.training.prefix_cache import FrozenPrefix
from hyperadapters.training.sharding import is_sharded, num_processes, process_index


@dataclass(frozen=True)
class Calibration:
    """How well the probabilities of a classification task are calibrated on one split.

    Attributes:
        temperature: Divisor of the logits; see `heads.calibration.fit_temperatures`.
        calibration_error: Expected calibration error; see `heads.calibration.calibration_error`.
        brier_score: Brier score; see `heads.calibration.brier_score`.
        calibration_error_before: Expected calibration error of a temperature of 1.
        brier_score_before: Brier score of a temperature of 1.
    """

    temperature: float
    calibration_error: float
    brier_score: float
    calibration_error_before: float
    brier_score_before: float


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on one split.

    Attributes:
        tasks: Metrics of each task by its name. The first metric of a task is its main metric.
        mean: Mean of the main metrics of the tasks.
        routing_accuracy: Share of the examples whose most similar task is their own, whether or not they are declined.
            None if the method cannot route.
        predictions: Predictions in the order of the examples.
        calibration: Calibration of each classification task by its name; empty if the backbone generates text.
    """

    tasks: dict[str, dict[str, float]]
    mean: float
    routing_accuracy: float | None
    predictions: list[Prediction]
    calibration: dict[str, Calibration]


def evaluate(
    model: HyperAdapterModel,
    examples: Sequence[Example],
    batch_size: int = 64,
    prefix: FrozenPrefix | None = None,
) -> Evaluation:
    """Predict the answers to examples with their own tasks, in mixed batches, and score each task that has examples.

    Processes that train together divide the examples among them, and all of them must call this function.

    Args:
        model: Model to evaluate.
        examples: At least one example, each with a task and a target.
        batch_size: Number of examples in a batch. Default: 64.
        prefix: States of frozen layers of these examples, made for this model or another one with the same backbone.
            The frozen layers only run for examples whose states are missing. The logits differ by up to 1e-5 from those
            without a prefix, because rows are padded to other lengths. In float32, they are the same bit for bit
            whether or not the states have been computed before.

    Returns:
        Scores and predictions.

    Raises:
        BackboneError: If the prefix was made for another backbone or other frozen layers.
        DataError: If there are no examples, an example has no task or an invalid target, or the prefix was made for
            another number of examples.
        NotFiniteError: If an output of the model for an example is not finite.
    """
    _check_examples(model, examples)
    if prefix is not None:
        if len(prefix) != len(examples):
            raise DataError(f"expected a prefix of {len(examples)} examples, found one of {len(prefix)}")
        prefix.use(model)
    return score_predictions(model, examples, predict_together(Predictor(model, batch_size), examples, prefix))


def predict_together(
    predictor: Predictor, examples: Sequence[Example], prefix: FrozenPrefix | None = None
) -> list[Prediction]:
    """Predict examples in all processes that train together. Each of them must call this function.

    The processes divide the examples among them. If they divide the weights of the backbone instead, each of them
    predicts all examples, because all must run the layers equally often.

    Args:
        predictor: Predictor of this process, whose model is the same as those of the others.
        examples: All examples.
        prefix: States of frozen layers of all examples. Default: they are computed.

    Returns:
        Predictions of all processes in the order of the examples.
    """
    size = num_processes()
    if size == 1 or is_sharded(predictor.model):
        return list(predictor(examples, frozen=prefix))
    own = range(process_index(), len(examples), size)

    def frozen(places: Sequence[int], batch: Mapping[str, Tensor]) -> FrozenOutput:
        assert prefix is not None
        return prefix([own[place] for place in places], batch)

    parts: list[list[Prediction]] = [[] for _ in range(size)]
    found = predictor([examples[row] for row in own], frozen=None if prefix is None else frozen)
    dist.all_gather_object(parts, list(found))
    return [parts[row % size][row // size] for row in range(len(examples))]


def score_predictions(
    model: HyperAdapterModel, examples: Sequence[Example], predictions: list[Prediction]
) -> Evaluation:
    """Score each task that has examples.

    Args:
        model: Model that made the predictions.
        examples: Examples with tasks and targets.
        predictions: Predictions in the order of the examples.

    Returns:
        Scores and the predictions.
    """
    rows_of: dict[int | None, list[int]] = {}
    for row, example in enumerate(examples):
        rows_of.setdefault(example.task_id, []).append(row)
    scores, calibration, main = {}, {}, []
    for task_id, task in enumerate(model.tasks):
        if rows := rows_of.get(task_id):
            targets = [examples[row].target for row in rows]
            scores[task.name] = score(task, targets, [predictions[row].target for row in rows])
            main.append(scores[task.name][task.main_metric])
            if model.heads is not None and task.kind == "classification":
                found = [predictions[row] for row in rows]
                calibration[task.name] = _calibration(task, targets, found, float(model.heads.temperature[task_id]))
    names = [task.name for task in model.tasks]
    routed = [
        p.routing.candidates[0].task == names[e.task_id]  # type: ignore[index]
        for p, e in zip(predictions, examples, strict=True)
        if p.routing is not None
    ]
    routing_accuracy = sum(routed) / len(routed) if routed else None
    return Evaluation(scores, sum(main) / len(main), routing_accuracy, predictions, calibration)


def _calibration(
    task: Task, targets: Sequence[object], predictions: Sequence[Prediction], temperature: float
) -> Calibration:
    probabilities = probabilities_of(task, predictions)
    labels, before = np.array(targets, dtype=int), with_temperature(probabilities, 1 / temperature)
    return Calibration(
        temperature,
        calibration_error(probabilities, labels),
        brier_score(probabilities, labels),
        calibration_error(before, labels),
        brier_score(before, labels),
    )


def probabilities_of(task: Task, predictions: Sequence[Prediction]) -> np.ndarray[Any, Any]:
    """Return the probabilities of a classification or multi-label task from predictions of a model with heads.

    Args:
        task: The task.
        predictions: N predictions with the task.

    Returns:
        Probabilities of shape [N, C], in the order of the labels.
    """
    rows = [prediction.probabilities or {} for prediction in predictions]
    return np.array([[row[label] for label in task.labels] for row in rows])


def _check_examples(model: HyperAdapterModel, examples: Sequence[Example]) -> None:
    if not isinstance(examples, Sequence) or not all(isinstance(example, Example) for example in examples):
        raise DataError(f"evaluate: expected a list of Example, found {examples!r:.100}")
    if not examples:
        raise DataError("evaluate: expected at least one example, found none")
    for number, example in enumerate(examples, start=1):
        if example.task_id is None or example.target is None:
            missing = "task_id" if example.task_id is None else "target"
            raise DataError(f"evaluate: example {number} has no {missing}, so it cannot be scored; set it")
        if not is_index(example.task_id, len(model.tasks)):
            continue  # The predictor raises an error for it.
        task, target = model.tasks[example.task_id], example.target
        is_number = isinstance(target, Real) and not isinstance(target, bool) and isfinite(target)
        fits = {
            "classification": is_index(target, len(task.labels)),
            "multi-label": _is_label_set(target, len(task.labels)),
            "regression": is_number,
            "text-to-text": isinstance(target, str),
        }
        if not fits[task.kind]:
            expected = {
                "classification": f"the index of a label, 0 to {len(task.labels) - 1}",
                "multi-label": f"a tuple of indices of labels, 0 to {len(task.labels) - 1} in ascending order,",
                "regression": "a finite number",
                "text-to-text": "a text",
            }
            raise DataError(
                f"evaluate: example {number}: expected {expected[task.kind]} as target of task '{task.name}', "
                f"found {target!r}"
            )


def _is_label_set(target: object, size: int) -> bool:
    """Return whether a target is a tuple of indices below `size` in ascending order."""
    if not isinstance(target, tuple) or not all(is_index(index, size) for index in target):
        return False
    return all(first < second for first, second in pairwise(target))
