"""Measuring a model on the examples of its tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Real

from hyperadapters.data.examples import Example
from hyperadapters.errors import DataError
from hyperadapters.inference.inputs import is_index
from hyperadapters.inference.predictor import Prediction, Predictor
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.metrics import score
from hyperadapters.training.prefix_cache import FrozenPrefix


@dataclass(frozen=True)
class Evaluation:
    """Scores of one split.

    Attributes:
        tasks: Metrics by task name, the task's score first.
        mean: Mean of the tasks' scores.
        routing_accuracy: Share of the examples that are most similar to their own task, declined or not; None where the
            method cannot route.
        predictions: One for each example, in their order.
    """

    tasks: dict[str, dict[str, float]]
    mean: float
    routing_accuracy: float | None
    predictions: list[Prediction]


def evaluate(
    model: HyperAdapterModel,
    examples: Sequence[Example],
    batch_size: int = 64,
    prefix: FrozenPrefix | None = None,
) -> Evaluation:
    """Answer examples under their own tasks, in mixed batches, and score each task that has any.

    Args:
        examples: At least one, each with a task and a target.
        prefix: Of these examples, made for this model or another one of the same backbone. The frozen layers run for
            the examples that it does not hold yet. The logits are those without it to 1e-5, since rows are padded to
            other lengths, and the same bit for bit whether the states are kept or computed anew (in float32).

    Raises:
        BackboneError: If the prefix is of another backbone, or of other frozen layers.
        DataError: If there are no examples, one of them has no task or no target, or the prefix has room for another
            number of examples.
    """
    _check_examples(model, examples)
    if prefix is not None:
        if len(prefix) != len(examples):
            raise DataError(f"expected a prefix of the {len(examples)} examples, found one of {len(prefix)}")
        prefix.use(model)
    return score_predictions(model, examples, list(Predictor(model, batch_size)(examples, frozen=prefix)))


def score_predictions(
    model: HyperAdapterModel, examples: Sequence[Example], predictions: list[Prediction]
) -> Evaluation:
    """Score each task that has any examples.

    Args:
        model: Model that made the predictions.
        examples: Examples with tasks and targets.
        predictions: One for each example, in their order.

    Returns:
        The scores.
    """
    rows_of: dict[int | None, list[int]] = {}
    for row, example in enumerate(examples):
        rows_of.setdefault(example.task_id, []).append(row)
    scores, main = {}, []
    for task_id, task in enumerate(model.tasks):
        if rows := rows_of.get(task_id):
            targets = [examples[row].target for row in rows]
            scores[task.name] = score(task, targets, [predictions[row].target for row in rows])
            main.append(scores[task.name][task.main_metric])
    names = [task.name for task in model.tasks]
    routed = [
        p.routing.candidates[0].task == names[e.task_id]  # type: ignore[index]
        for p, e in zip(predictions, examples, strict=True)
        if p.routing is not None
    ]
    return Evaluation(scores, sum(main) / len(main), sum(routed) / len(routed) if routed else None, predictions)


def _check_examples(model: HyperAdapterModel, examples: Sequence[Example]) -> None:
    if not isinstance(examples, Sequence) or not all(isinstance(example, Example) for example in examples):
        raise DataError(f"evaluate: expected a list of Example, found {examples!r:.100}")
    if not examples:
        raise DataError("evaluate: expected at least one example, found none")
    for number, example in enumerate(examples, start=1):
        if example.task_id is None or example.target is None:
            missing = "task_id" if example.task_id is None else "target"
            raise DataError(f"evaluate: example {number} has no {missing}; without one it cannot be scored")
        if not is_index(example.task_id, len(model.tasks)):
            continue  # the predictor names what is expected
        task, target = model.tasks[example.task_id], example.target
        is_number = isinstance(target, Real) and not isinstance(target, bool) and isfinite(target)
        fits = {
            "classification": is_index(target, len(task.labels)),
            "regression": is_number,
            "text-to-text": isinstance(target, str),
        }
        if not fits[task.kind]:
            expected = {
                "classification": f"the index of a label, 0 to {len(task.labels) - 1}",
                "regression": "a finite number",
                "text-to-text": "a text",
            }
            raise DataError(
                f"evaluate: example {number}: expected {expected[task.kind]} as target of task '{task.name}', "
                f"found {target!r}"
            )
