"""Prediction for streams of inputs in batches of mixed tasks, with given or routed tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from math import isfinite
from numbers import Real
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from hyperadapters.backbones.passes import FrozenOutput, evaluating
from hyperadapters.config import Dtype, Task
from hyperadapters.data.collate import Collator
from hyperadapters.data.examples import Example
from hyperadapters.data.targets import Target, label_indices, read_answer
from hyperadapters.errors import DataError, TaskError, check_int, unknown_name
from hyperadapters.heads.calibration import confidence_for
from hyperadapters.heads.unfitted import warn_of_unfitted_heads
from hyperadapters.inference.answers import answer_batch, answer_tasks, can_share_layers
from hyperadapters.inference.batches import batches_by_length, best_device, device_of, to_device
from hyperadapters.inference.cache import AdapterCache
from hyperadapters.inference.finite import check_answers
from hyperadapters.inference.inputs import ids_of_tasks, read_inputs, tasks_that_read
from hyperadapters.inference.routing import RoutingResult, contains_words, decide
from hyperadapters.methods.base import ROUTES, Route
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.utils.progress import show_progress

CHUNK_BATCHES = 32
CACHE_BYTES = 256 * 2**20

FrozenStates = Callable[[Sequence[int], Mapping[str, Tensor]], FrozenOutput]
"""Returns stored outputs of the frozen layers for B inputs, as a function of their row indices and their tensors."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Prediction for one input.

    Attributes:
        task: Name of the task that was given or chosen by routing; None if the input was declined.
        answer: Name of the label, names of any number of labels (multi-label), number or text; None if the input was
            declined, if the answer is not certain enough for the `max_error` of the predictor, or if the generated text
            is not that of a label or not a number.
        probabilities: Probability of each label for classification and multi-label heads; None otherwise. Those of a
            multi-label task do not add up to 1.
        text: Generated text of a text-to-text backbone; None otherwise.
        routing: Result of routing the input, also if its task was given; None if the method cannot route.
        target: The answer in the form of `Example.target`: index of a label, indices of labels, number or text.
        instance: Instance vector with p elements, which `repr` leaves out; None for a method without a retriever.
    """

    task: str | None
    answer: str | float | tuple[str, ...] | None
    probabilities: dict[str, float] | None
    text: str | None
    routing: RoutingResult | None
    target: Target | None
    instance: tuple[float, ...] | None = field(repr=False)


def check_options(batch_size: int, route: str, decline: bool, max_error: float | None = None) -> None:
    """Check the options of a `Predictor`.

    Args:
        batch_size: Number of inputs in a batch.
        route: Adapters of routed inputs.
        decline: Whether inputs are declined.
        max_error: Maximum share of wrong answers; None for no limit. Default: None.

    Raises:
        TaskError: If `route` is unknown.
        DataError: If `batch_size`, `decline` or `max_error` has a wrong type or is out of range.
    """
    check_int("batch_size", batch_size, 1)
    if route not in ROUTES:
        raise TaskError(unknown_name("route", str(route), ROUTES))
    if not isinstance(decline, bool):
        raise DataError(f"decline: expected True or False, found {decline!r}")
    is_number = isinstance(max_error, Real) and not isinstance(max_error, bool)
    if max_error is not None and not (is_number and 0 < max_error < 1):
        raise DataError(f"max_error: expected a number between 0 and 1, or None; found {max_error!r}")


def check_heads_for_errors(model: HyperAdapterModel) -> None:
    """Check that shares of wrong answers are known for a model.

    Args:
        model: Model that is to answer with a `max_error`.

    Raises:
        TaskError: If the backbone of the model generates text.
    """
    if model.heads is None:
        raise TaskError("max_error: only for models with task heads, and this one generates its answers; remove it")


def tasks_without_bounds(model: HyperAdapterModel) -> list[str]:
    """Return the names of the classification tasks for which no shares of wrong answers are known.

    Args:
        model: Model with task heads, to which such tasks may have been added since it was calibrated.
    """
    assert model.heads is not None
    is_known = (model.heads.error_bounds != 1).flatten(1).any(dim=1).tolist()
    return [
        task.name
        for task, known in zip(model.tasks, is_known, strict=True)
        if task.kind == "classification" and not known
    ]


def without_uncertain_answer(model: HyperAdapterModel, prediction: Prediction, max_error: float) -> Prediction:
    """Return a prediction, without its answer if left-out rows do not support it.

    Args:
        model: Model with task heads that made the prediction.
        prediction: The prediction.
        max_error: Maximum share of wrong answers among the answers of its task; see `Predictor`.
    """
    if prediction.task is None or model.heads is None:
        return prediction
    bounds = model.heads.error_bounds[model.task_id(prediction.task)]
    confidence = max(prediction.probabilities.values()) if prediction.probabilities else 0.0
    return (
        prediction if confidence > confidence_for(bounds, max_error) else replace(prediction, answer=None, target=None)
    )


class Predictor:
    """Predicts the targets of inputs with a model.

    The inputs are read in chunks, so that a stream of any length can be processed. Those of a chunk are batched by
    length, with rows of different tasks in a batch. The predictions are in the order of the inputs. The adapters of
    each task are generated once and cached. Several threads may share a predictor, and several predictors may share a
    model; their batches are processed in turn.

    Attributes:
        model: Model whose predictions are returned.
        adapter_cache: Cache of the generated adapters.
        tokenization_seconds: Time that the tokenisation of all inputs so far has taken.
        inference_seconds: Time that everything else has taken for them.
    """

    def __init__(
        self,
        model: HyperAdapterModel,
        batch_size: int = 64,
        route: Route = "nearest",
        decline: bool = True,
        cache_bytes: int = CACHE_BYTES,
        max_error: float | None = None,
    ) -> None:
        """Store the settings.

        Args:
            model: Model, which must not be trained meanwhile. Tasks may be added and removed.
            batch_size: Number of inputs in a batch. Default: 64.
            route: Adapters of routed inputs: "nearest" (default) for those of the most similar task, or "soft" for
                those of a mixture of prototypes.
            decline: If True (default), an input without a task is declined if its similarity to the most similar task
                is below that task's threshold. If False, it is predicted with the most similar task, unless it
                contains no words.
            cache_bytes: Maximum size of cached adapters in bytes. Default: 256 MiB.
            max_error: Maximum share of wrong answers among the answers of each task. Only inputs for which left-out
                rows of their task support this are answered (see `heads.calibration.error_bounds`); the `answer` of the
                others is None, and so is that of regression and multi-label tasks. Default: all inputs are answered.

        Raises:
            TaskError: If `model` is not a `HyperAdapterModel`, `route` is unknown, or `max_error` is given and the
                backbone of the model generates text.
            DataError: If `batch_size`, `cache_bytes`, `decline` or `max_error` has a wrong type or is out of range.
        """
        if not isinstance(model, HyperAdapterModel):
            raise TaskError(f"model: expected a HyperAdapterModel, found {type(model).__name__}")
        check_options(batch_size, route, decline, max_error)
        check_int("cache_bytes", cache_bytes, 0)
        if max_error is not None:
            check_heads_for_errors(model)
        self.model, self.batch_size, self.route, self.decline = model, batch_size, route, decline
        self.max_error = max_error
        self.adapter_cache = AdapterCache(model, cache_bytes)
        self.tokenization_seconds = self.inference_seconds = 0.0

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        device: str | torch.device | None = None,
        revision: str | None = None,
        token: str | None = None,
        dtype: Dtype | None = None,
        **options: Any,
    ) -> Self:
        """Load a model from a checkpoint.

        Args:
            name_or_folder: Local folder, or name of a repository on the Hub.
            device: Device of the model. Default: the accelerator if there is one, and the CPU otherwise.
            revision: Branch, tag or commit on the Hub. Default: the main branch.
            token: Access token of the Hub. Default: the stored one.
            dtype: Data type of the backbone. Default: the one in the checkpoint.
            **options: Further arguments of the constructor.

        Returns:
            A predictor with the model.

        Raises:
            CheckpointError: If the checkpoint is missing, is damaged, has a newer format, or belongs to another
                backbone.
        """
        model = HyperAdapterModel.from_pretrained(name_or_folder, revision=revision, token=token, dtype=dtype)
        return cls(model.to(device or best_device()), **options)

    def __call__(
        self,
        inputs: Iterable[Any],
        task: str | None = None,
        progress: bool = False,
        frozen: FrozenStates | None = None,
    ) -> Iterator[Prediction]:
        """Predict the targets of inputs lazily.

        An error in an input is raised when its chunk is processed, after the predictions for all earlier chunks.

        Args:
            inputs: Inputs in any form that `inference.inputs.read_inputs` reads, such as strings, pairs of strings, and
                mappings with `text`, `text_pair` and `task`.
            task: Name of the task of all inputs. If None (default), inputs have their own task, or are routed.
            progress: Whether to show a progress bar on standard error if it is a terminal. Default: False.
            frozen: Function that returns stored outputs of the frozen layers, which are then not computed. It is not
                called for inputs that are routed. Default: the outputs are computed.

        Returns:
            Iterator over the predictions in the order of the inputs.

        Raises:
            DataError: If an input has an unsupported form.
            TaskError: If a task is unknown, an input has no task and the method cannot route, or a task is removed from
                the model meanwhile.
            NotFiniteError: If the model computes values for an input that are not finite numbers.
        """
        tasks = self.model.tasks
        warn_of_unfitted_heads(self.model.heads, tasks)
        examples = read_inputs(inputs, tasks, task)
        total = len(inputs) if isinstance(inputs, Sized) else None
        return self._shown(self._stream(examples, tasks, frozen), total, progress)

    def _shown(self, stream: Iterator[Any], total: int | None, progress: bool) -> Iterator[Any]:
        return show_progress(stream, "Predicting", total) if progress else stream

    def predict_tasks(
        self, inputs: Iterable[Any], tasks: Sequence[str] | Literal["*"], progress: bool = False
    ) -> Iterator[list[Prediction]]:
        """Predict the targets of several tasks for each input lazily.

        If the model is an encoder, the layers below the adapters run once for an input, however many tasks there are.
        No input is declined.

        Args:
            inputs: Inputs in any form that `inference.inputs.read_inputs` reads. Tasks of their own are ignored; with
                "*" they may not have any.
            tasks: Names of the tasks, or "*" for all tasks that read such inputs: single texts, or pairs of texts.
            progress: Whether to show a progress bar on standard error if it is a terminal. Default: False.

        Returns:
            Iterator over lists of predictions in the order of the inputs. Each list is in the order of `tasks`, or in
            that of the model's tasks for "*".

        Raises:
            DataError: If an input has an unsupported form, or no task reads such inputs.
            TaskError: If a task is unknown or named twice, some tasks read pairs and others single texts, or a task is
                removed from the model meanwhile.
            NotFiniteError: If the model computes values for an input that are not finite numbers.
        """
        known = self.model.tasks
        warn_of_unfitted_heads(self.model.heads, known)
        task_ids = None if isinstance(tasks, str) and tasks == "*" else ids_of_tasks(known, tasks)
        total = len(inputs) if isinstance(inputs, Sized) else None
        examples = read_inputs(inputs, known, None if task_ids is None else known[task_ids[0]].name)
        return self._shown(self._stream_tasks(examples, known, task_ids), total, progress)

    def _stream_tasks(
        self, examples: Iterator[Example], known: tuple[Task, ...], task_ids: list[int] | None
    ) -> Iterator[list[Prediction]]:
        start, batches = 0, max(1, CHUNK_BATCHES // len(known if task_ids is None else task_ids))
        while chunk := list(islice(examples, self.batch_size * batches)):
            chosen = [
                tasks_that_read(example, start + i + 1, known) if task_ids is None else task_ids
                for i, example in enumerate(chunk)
            ]
            if can_share_layers(self.model):
                yield from self._answer_chunk_of_tasks(chunk, chosen, start, known)
            else:
                numbers = [i for i, of_input in enumerate(chosen) for _ in of_input]
                rows = [
                    Example(task_id, example.text, example.text_pair)
                    for example, of_input in zip(chunk, chosen, strict=True)
                    for task_id in of_input
                ]
                found = iter(self._answer_chunk(rows, [start + i for i in numbers], known, None))
                yield from (list(islice(found, len(of_input))) for of_input in chosen)
            start += len(chunk)

    def _answer_chunk_of_tasks(
        self, examples: Sequence[Example], chosen: Sequence[list[int]], start: int, known: tuple[Task, ...]
    ) -> list[list[Prediction]]:
        answers: dict[int, list[Prediction]] = {}
        lengths = self.model.adapter_config.separates_texts, self.model.lengths.input
        for has_pairs in (False, True):
            rows = [index for index, example in enumerate(examples) if (example.text_pair is not None) == has_pairs]
            for part in batches_by_length([examples[row] for row in rows], self.batch_size, *lengths):
                indices = [rows[place] for place in part]
                inputs, numbers = [examples[i] for i in indices], [start + i + 1 for i in indices]
                with self._exclusive(known):
                    found, usable = self._answer_batch_of_tasks(inputs, chosen[indices[0]])
                    check_answers(self.model, usable, inputs, numbers, "what the model computes")
                    answers.update(zip(indices, found, strict=True))
        return [answers[index] for index in range(len(examples))]

    @torch.inference_mode()
    def _answer_batch_of_tasks(
        self, examples: Sequence[Example], task_ids: list[int]
    ) -> tuple[list[list[Prediction]], Tensor]:
        """Return the predictions of K tasks for each of B inputs, and whether all values are finite [B]."""
        model, device = self.model, device_of(self.model)
        batch = to_device(self._tokenized(model.collator, examples), device)
        answers = answer_tasks(model, batch, torch.tensor(task_ids, device=device), self.batch_size)
        readable = None if answers.similarity is None else contains_words(model, batch)
        routings, vectors, usable = self._route(readable, answers.instances, answers.similarity, answers.is_finite)
        logits, thresholds = answers.logits.tolist(), self._thresholds(task_ids)
        found = [
            [
                self._prediction(task_id, logits[place][row], routing, vector, thresholds.get(task_id, ()))
                for place, task_id in enumerate(task_ids)
            ]
            for row, (routing, vector) in enumerate(zip(routings, vectors, strict=True))
        ]
        return found, usable

    def _stream(
        self, examples: Iterator[Example], tasks: tuple[Task, ...], frozen: FrozenStates | None
    ) -> Iterator[Prediction]:
        start = 0
        while chunk := list(islice(examples, self.batch_size * CHUNK_BATCHES)):
            yield from self._answer_chunk(chunk, range(start, start + len(chunk)), tasks, frozen)
            start += len(chunk)

    @contextmanager
    def _exclusive(self, tasks: Sequence[Task]) -> Iterator[None]:
        """Hold the model's lock for one batch of inputs whose task ids refer to `tasks`."""
        with self.model.lock, evaluating(self.model), self.model.method.adapters_from(self.adapter_cache):
            if self.model.tasks[: len(tasks)] != tasks:
                raise TaskError("a task was removed or renamed during the prediction; predict the inputs again")
            started, tokenized = perf_counter(), self.tokenization_seconds
            yield
            self.inference_seconds += perf_counter() - started - (self.tokenization_seconds - tokenized)

    def _tokenized(self, collator: Collator, examples: Sequence[Example]) -> dict[str, Tensor]:
        started = perf_counter()
        inputs = collator.inputs(examples)
        self.tokenization_seconds += perf_counter() - started
        return inputs

    def _answer_chunk(
        self, examples: Sequence[Example], places: Sequence[int], tasks: tuple[Task, ...], frozen: FrozenStates | None
    ) -> list[Prediction]:
        """Predict the examples; `places` are the indices of their inputs in the stream."""
        if any(example.task_id is None for example in examples):
            self.model.method.check_can_route()
        answers: dict[int, Prediction] = {}
        collator, device = self.model.collator, device_of(self.model)
        lengths = self.model.adapter_config.separates_texts, self.model.lengths.input
        for has_task in (True, False):
            rows = [index for index, example in enumerate(examples) if (example.task_id is not None) == has_task]
            for part in batches_by_length([examples[row] for row in rows], self.batch_size, *lengths):
                indices = [rows[place] for place in part]
                with self._exclusive(tasks):
                    batch = to_device(self._tokenized(collator, [examples[index] for index in indices]), device)
                    task_ids = torch.tensor([examples[i].task_id for i in indices], device=device) if has_task else None
                    plain = self._without_templates([examples[index] for index in indices]) if has_task else None
                    states = frozen([places[index] for index in indices], batch) if has_task and frozen else None
                    found, usable = self._answer_batch(batch, task_ids, plain, states)
                    inputs, numbers = [examples[i] for i in indices], [places[i] + 1 for i in indices]
                    check_answers(self.model, usable, inputs, numbers, "what the model computes")
                    answers.update(zip(indices, found, strict=True))
        return [answers[index] for index in range(len(examples))]

    def _without_templates(self, examples: Sequence[Example]) -> dict[str, Tensor] | None:
        """Return the inputs without templates, as routing reads them; None if the templates do not change them."""
        tasks = [self.model.tasks[example.task_id] for example in examples if example.task_id is not None]
        can_differ = self.model.text_to_text and self.model.method.can_route
        if not can_differ or all(task.template is None for task in tasks):
            return None
        plain = [Example(None, example.text, example.text_pair) for example in examples]
        return to_device(self.model.collator.inputs(plain), device_of(self.model))

    @torch.inference_mode()
    def _answer_batch(
        self,
        batch: dict[str, Tensor],
        task_ids: Tensor | None,
        plain: dict[str, Tensor] | None,
        frozen: FrozenOutput | None,
    ) -> tuple[list[Prediction], Tensor]:
        """Return the B predictions, and whether the values from which they were computed are finite [B]."""
        model = self.model
        outputs, used, instances, similarity, usable = answer_batch(model, batch, task_ids, self.route, frozen)
        if plain is not None:
            instances, similarity = model.instance_vectors(**plain), model.task_similarity(plain)
        readable = None if similarity is None else contains_words(model, batch if plain is None else plain)
        routings, vectors, usable = self._route(readable, instances, similarity, usable)
        declined = [False] * len(used)
        if readable is not None and task_ids is None:
            accepted = [routing is not None and routing.accepted for routing in routings]
            declined = [not is_accepted for is_accepted in (accepted if self.decline else readable.tolist())]
        chosen = used.tolist()
        thresholds = self._thresholds(chosen)
        predictions = [
            Prediction(None, None, None, None, routing, None, instance)
            if is_declined
            else self._prediction(task_id, value, routing, instance, thresholds.get(task_id, ()))
            for task_id, value, routing, instance, is_declined in zip(
                chosen, outputs, routings, vectors, declined, strict=True
            )
        ]
        return predictions, usable

    def _thresholds(self, task_ids: Iterable[int]) -> dict[int, list[float]]:
        """Return the thresholds of the labels of each multi-label task among some tasks, by its id."""
        heads = self.model.heads
        if heads is None:
            return {}
        wanted = [task_id for task_id in {*task_ids} if self.model.tasks[task_id].is_multi_label]
        return {task_id: heads.thresholds[heads.outputs_of(task_id)].tolist() for task_id in wanted}

    def _prediction(
        self,
        task_id: int,
        output: str | list[float],
        routing: RoutingResult | None,
        instance: tuple[float, ...] | None,
        thresholds: Sequence[float] = (),
    ) -> Prediction:
        """Return the prediction for a generated text, or for the logits of the head of a task.

        The thresholds are those of `_thresholds` for a multi-label task.
        """
        task = self.model.tasks[task_id]
        target: Target | None
        if isinstance(output, str):
            target = read_answer(task, output)
            return Prediction(task.name, answer_of(task, target), None, output, routing, target, instance)
        assert self.model.heads is not None
        target, likely = _decided(task, output, thresholds)
        probabilities = dict(zip(task.labels, likely, strict=True)) if likely else None
        found = Prediction(task.name, answer_of(task, target), probabilities, None, routing, target, instance)
        return found if self.max_error is None else without_uncertain_answer(self.model, found, self.max_error)

    def _route(
        self, readable: Tensor | None, instances: Tensor | None, similarity: Tensor | None, usable: Tensor
    ) -> tuple[Sequence[RoutingResult | None], Sequence[tuple[float, ...] | None], Tensor]:
        """Return the routing and the instance vector of each row, and whether its values are finite [B]."""
        vectors: Sequence[tuple[float, ...] | None] = [None] * len(usable)
        routings: Sequence[RoutingResult | None] = [None] * len(usable)
        if similarity is not None and readable is not None:
            found = decide(self.model, similarity, readable)
            # Only the largest similarity is examined, because `argmax` treats NaN as the largest number.
            usable = usable & torch.tensor([isfinite(routing.similarity) for routing in found], device=usable.device)
            routings = found
        if instances is not None:
            vectors = [tuple(vector) for vector in instances.tolist()]
            usable = usable & instances.isfinite().all(dim=1)
        return routings, vectors, usable


def _decided(task: Task, logits: list[float], thresholds: Sequence[float]) -> tuple[Target, list[float]]:
    """Return the target that logits stand for, and the probability of each label, of which a regression has none."""
    if task.kind == "regression":
        return logits[0], []
    own = torch.tensor(logits[: len(task.labels)])
    if task.is_multi_label:
        likely = own.sigmoid().tolist()
        return tuple(label for label, one in enumerate(likely) if one > thresholds[label]), likely
    likely = own.softmax(dim=0).tolist()
    return likely.index(max(likely)), likely


def answer_of(task: Task, target: Target | None) -> str | float | tuple[str, ...] | None:
    """Return a target as the answer of a prediction.

    Args:
        task: Task of the target.
        target: Target in the form of `Example.target`; None if there is none.

    Returns:
        The target, in which labels are names instead of indices.
    """
    if target is None or not task.is_labelled:
        return target  # type: ignore[return-value]
    names = tuple(task.labels[index] for index in label_indices(task, target))
    return names if task.is_multi_label else names[0]


def label_probabilities(
    model: HyperAdapterModel, texts: Iterable[Any], task: str, batch_size: int = 64
) -> np.ndarray[Any, Any]:
    """Compute the probabilities of the labels of a task, as `HyperAdapterModel.predict_proba` does.

    Args:
        model: Model on an encoder backbone.
        texts: Texts in any form that `inference.inputs.read_inputs` reads.
        task: Name of a classification or multi-label task.
        batch_size: Number of texts in a batch. Default: 64.

    Returns:
        Probabilities [N, C] in float32, with the labels in the order of the task's labels.

    Raises:
        TaskError: If the task is unknown or has no labels, or the backbone generates text.
        DataError: If a text has an unsupported form.
    """
    definition = model.tasks[model.task_id(task)]
    if not definition.is_labelled or model.text_to_text:
        reason = "the backbone generates text" if model.text_to_text else f"it is a {definition.kind} task"
        raise TaskError(f"task '{task}' has no probabilities of labels, because {reason}; use predict")
    predictions = Predictor(model, batch_size)(texts, task=task)
    rows = [[found.probabilities[label] for label in definition.labels] for found in predictions if found.probabilities]
    return np.array(rows, dtype=np.float32).reshape(-1, len(definition.labels))
