"""Answers to inputs: any number, in mixed batches, with tasks given, routed, or given for some."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice, takewhile
from math import isfinite
from pathlib import Path
from typing import IO, Any, Self, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import LogitsProcessorList

from hyperadapters.backbones.passes import FrozenOutput, evaluating
from hyperadapters.config import Dtype, Task
from hyperadapters.data.collate import read_answer
from hyperadapters.data.examples import Example
from hyperadapters.errors import DataError, TaskError, check_int, unknown_name
from hyperadapters.inference.batches import batches_by_length, best_device, device_of, to_device
from hyperadapters.inference.cache import AdapterCache
from hyperadapters.inference.finite import FiniteLogits, check_answers, has_usable_logits
from hyperadapters.inference.inputs import read_inputs
from hyperadapters.inference.routing import RoutingResult, decide
from hyperadapters.methods.base import ROUTES, Route
from hyperadapters.model.model import HyperAdapterModel

CHUNK_BATCHES = 32
CACHE_BYTES = 256 * 2**20

FrozenStates = Callable[[Sequence[int], Mapping[str, Tensor]], FrozenOutput]
"""Gives the states of frozen layers of inputs [B], by their places among all, and by their tensors."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one input.

    Attributes:
        task: the task it was answered under, given or routed to; None when the input was declined.
        answer: name of the label, number or text; None when the input was declined, or when a generated text is no
            label's word or no number.
        probabilities: by label, for classification heads; else None.
        text: what a text-to-text backbone wrote; else None.
        routing: where the input would go by itself, whether or not its task was given; None where the method cannot
            route.
        target: the answer as `Example.target` has it: the index of a label, a number or a text.
        instance: instance vector, p numbers; None for a method without a retriever.
    """

    task: str | None
    answer: str | float | None
    probabilities: dict[str, float] | None
    text: str | None
    routing: RoutingResult | None
    target: int | float | str | None
    instance: tuple[float, ...] | None


class Predictor:
    """Answers inputs with a model.

    Inputs are taken in chunks and batched by length within a chunk, rows of different tasks together. Answers come in
    the order of the inputs, and no more than a chunk is held at a time. Adapters are generated once a task and kept.
    Several threads may share a predictor, and several predictors a model: they take turns, a batch each.
    """

    def __init__(
        self,
        model: HyperAdapterModel,
        batch_size: int = 64,
        route: Route = "nearest",
        decline: bool = True,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Make a predictor.

        Args:
            model: not trained meanwhile; tasks may be added to it and removed.
            batch_size: rows of a batch.
            route: see `HyperAdapterModel.forward`.
            decline: whether an input without a task that no task claims gets no answer; otherwise it is answered
                under the most similar task.
            cache_bytes: of generated adapters that are kept.

        Raises:
            TaskError: there is no such route.
            DataError: `batch_size`, `cache_bytes` or `decline` is of a wrong type or too small.
        """
        if not isinstance(model, HyperAdapterModel):
            raise TaskError(f"model: expected a HyperAdapterModel, found {type(model).__name__}")
        check_int("batch_size", batch_size, 1)
        check_int("cache_bytes", cache_bytes, 0)
        if route not in ROUTES:
            raise TaskError(unknown_name("route", str(route), ROUTES))
        if not isinstance(decline, bool):
            raise DataError(f"decline: expected True or False, found {decline!r}")
        self.model, self.batch_size, self.route, self.decline = model, batch_size, route, decline
        self._cache = AdapterCache(model, cache_bytes)

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
        """Load a checkpoint, onto the accelerator if there is one.

        Args:
            name_or_folder, revision, token, dtype: see `HyperAdapterModel.from_pretrained`.
            device: another device.
            **options: of the constructor.

        Raises:
            CheckpointError: it is missing, damaged, of a newer format, or of another backbone.
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
        """Answer inputs one after the other, as they are asked for.

        Args:
            inputs: see `read_inputs`: strings, pairs, mappings with `text`, `text_pair` and `task`, examples.
            task: name of the task of all inputs; default: each one's own, or the one it is routed to.
            progress: whether to show a bar on the error stream, if that is a terminal.
            frozen: what the frozen layers make of the inputs, where it is there already; not asked for inputs that are
                to be routed.

        Raises:
            DataError, TaskError: an input is wrong, or has no task where the method cannot route, or a task of the
                model has gone meanwhile. Inputs of earlier chunks have been answered then.
            NotFiniteError: the model computes values for an input that are not finite numbers.
        """
        tasks = self.model.tasks
        examples = read_inputs(inputs, tasks, task)
        total = len(inputs) if isinstance(inputs, Sized) else None
        if progress:
            console = Console(file=cast(IO[str], _Tolerant(sys.stderr)))
            hidden = not console.is_terminal
            stream = self._stream(examples, tasks, frozen)
            return iter(track(stream, "Answering", total, console=console, transient=True, disable=hidden))
        return self._stream(examples, tasks, frozen)

    def _stream(
        self, examples: Iterator[Example], tasks: tuple[Task, ...], frozen: FrozenStates | None
    ) -> Iterator[Prediction]:
        start = 0
        while chunk := list(islice(examples, self.batch_size * CHUNK_BATCHES)):
            yield from self._answer_chunk(chunk, start, tasks, frozen)
            start += len(chunk)

    @contextmanager
    def _exclusive(self, tasks: Sequence[Task]) -> Iterator[None]:
        """A context for one batch of inputs whose task ids are those of `tasks`; other threads wait for their turn."""
        with self.model.lock, evaluating(self.model), self.model.method.adapters_from(self._cache):
            if self.model.tasks[: len(tasks)] != tasks:
                raise TaskError("a task was removed or renamed while inputs were answered; answer them again")
            yield

    def _answer_chunk(
        self, examples: Sequence[Example], start: int, tasks: tuple[Task, ...], frozen: FrozenStates | None
    ) -> list[Prediction]:
        if any(example.task_id is None for example in examples):
            self.model.method.check_can_route()
        answers: dict[int, Prediction] = {}
        collator, device = self.model.collator, device_of(self.model)
        for has_task in (True, False):
            rows = [index for index, example in enumerate(examples) if (example.task_id is not None) == has_task]
            for part in batches_by_length([examples[row] for row in rows], self.batch_size):
                indices = [rows[place] for place in part]
                with self._exclusive(tasks):
                    batch = to_device(collator.inputs([examples[index] for index in indices]), device)
                    task_ids = torch.tensor([examples[i].task_id for i in indices], device=device) if has_task else None
                    plain = self._without_templates([examples[index] for index in indices]) if has_task else None
                    states = frozen([start + index for index in indices], batch) if has_task and frozen else None
                    found, usable = self._answer_batch(batch, task_ids, plain, states)
                    inputs, numbers = [examples[i] for i in indices], [start + i + 1 for i in indices]
                    check_answers(self.model, usable, inputs, numbers, "what the model computes")
                    answers.update(zip(indices, found, strict=True))
        return [answers[index] for index in range(len(examples))]

    def _without_templates(self, examples: Sequence[Example]) -> dict[str, Tensor] | None:
        """The inputs as they would be routed, where their tasks' templates make them others."""
        tasks = [self.model.tasks[example.task_id] for example in examples if example.task_id is not None]
        can_differ = self.model.text_to_text and self.model.method.can_route
        if not can_differ or all(task.template is None for task in tasks):
            return None
        plain = [Example(None, example.text, example.text_pair) for example in examples]
        return to_device(self.model.collator.inputs(plain), device_of(self.model))

    @property
    def _ends(self) -> list[int]:
        """The tokens that end an answer: of a decoder the one that ended it in training, and the backbone's own."""
        own = getattr(self.model.backbone.generation_config, "eos_token_id", None)
        own = [] if own is None else torch.as_tensor(own).flatten().tolist()
        trained = [self.model.tokenizer.eos_token_id] if self.model.kind == "decoder" else []
        return list(dict.fromkeys([*trained, *own]))

    @torch.inference_mode()
    def _answer_batch(
        self,
        batch: dict[str, Tensor],
        task_ids: Tensor | None,
        plain: dict[str, Tensor] | None,
        frozen: FrozenOutput | None,
    ) -> tuple[list[Prediction], Tensor]:
        """The answers [B], and whether what they were read from is finite [B]."""
        model = self.model
        if model.text_to_text:
            lower_output = None
            if model.kind == "encoder-decoder" or frozen is not None:
                lower_output = model.forward_lower_layers(**batch, frozen_output=frozen)
            finite = FiniteLogits()
            ends: dict[str, Any] = {"eos_token_id": self._ends} if model.kind == "decoder" else {}
            tokens, used, instances = model.generate_with_tasks(
                **batch,
                task_ids=task_ids,
                lower_output=lower_output,
                route=self.route,
                max_new_tokens=model.lengths.target,
                do_sample=False,
                logits_processor=LogitsProcessorList([finite]),
                **ends,
            )
            if plain is not None:
                instances = model.instance_vectors(**plain)
            # An encoder-decoder begins with the token that starts its decoder, which may also be one that ends a text.
            start = batch["input_ids"].shape[1] if model.kind == "decoder" else 1
            answers = [_before_end(row, self._ends) for row in tokens[:, start:].tolist()]
            outputs: list[Any] = model.collator.tokenizer.batch_decode(answers, skip_special_tokens=True)
            assert finite.usable is not None
            usable = finite.usable
        else:
            output = model(**batch, task_ids=task_ids, route=self.route, frozen_output=frozen)
            instances, used, outputs = output.instances, output.task_ids, output.logits.float().tolist()
            usable = has_usable_logits(output.logits) & output.logits[:, 0].isfinite()
        vectors = [None] * len(used) if instances is None else [tuple(vector) for vector in instances.tolist()]
        routings: Sequence[RoutingResult | None] = [None] * len(used)
        if model.method.can_route and instances is not None:
            routings = decide(model, instances)
            # The most similar task decides, and NaN counts as the most similar.
            usable = usable & torch.tensor([isfinite(routing.similarity) for routing in routings], device=usable.device)
        if instances is not None:
            usable = usable & instances.isfinite().all(dim=1)
        may_decline = task_ids is None and self.decline
        declined = [may_decline and routing is not None and not routing.accepted for routing in routings]
        predictions = [
            Prediction(None, None, None, None, routing, None, instance)
            if is_declined
            else _prediction(model.tasks[task_id], value, routing, instance)
            for task_id, value, routing, instance, is_declined in zip(
                used.tolist(), outputs, routings, vectors, declined, strict=True
            )
        ]
        return predictions, usable


class _Tolerant:
    """A stream that takes everything: what cannot be written, because a terminal has gone for example, is lost."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, if the stream can take it."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if it can be."""
        with suppress(OSError):
            self._stream.flush()


def _before_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first one that ends an answer, which need not be a special token of the tokenizer."""
    return list(takewhile(lambda token: token not in ends, tokens))


def _prediction(
    task: Task, output: str | list[float], routing: RoutingResult | None, instance: tuple[float, ...] | None
) -> Prediction:
    """Read the answer from a generated text, or from a head's logits."""
    likely, text = None, None
    target: int | float | str | None
    if isinstance(output, str):
        text, target = output, read_answer(task, output)
    elif task.kind == "regression":
        target = output[0]
    else:
        likely = torch.tensor(output[: len(task.labels)]).softmax(dim=0).tolist()
        target = likely.index(max(likely))
    answer = task.labels[int(target)] if task.kind == "classification" and target is not None else target
    probabilities = dict(zip(task.labels, likely, strict=True)) if likely else None
    return Prediction(task.name, answer, probabilities, text, routing, target, instance)


def label_probabilities(
    model: HyperAdapterModel, texts: Iterable[Any], task: str, batch_size: int = 64
) -> np.ndarray[Any, Any]:
    """Predict the probabilities of a classification task's labels; see `HyperAdapterModel.predict_proba`."""
    definition = model.tasks[model.task_id(task)]
    if definition.kind != "classification" or model.text_to_text:
        reason = "the backbone writes its answers" if model.text_to_text else f"it is a {definition.kind} task"
        raise TaskError(f"task '{task}' has no probabilities of labels, because {reason}; use predict")
    predictions = Predictor(model, batch_size)(texts, task=task)
    rows = [[found.probabilities[label] for label in definition.labels] for found in predictions if found.probabilities]
    return np.array(rows, dtype=np.float32).reshape(-1, len(definition.labels))
