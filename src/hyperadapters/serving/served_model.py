"""The model that a server answers with, and its tasks as they are stored in a folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hyperadapters.checkpoints.format import CONFIG_FILE, stored_digest
from hyperadapters.checkpoints.update import update_model
from hyperadapters.config import Task
from hyperadapters.errors import HyperAdaptersError
from hyperadapters.inference.batches import best_device
from hyperadapters.inference.inputs import read_inputs
from hyperadapters.inference.predictor import (
    Prediction,
    Predictor,
    check_heads_for_errors,
    without_uncertain_answer,
)
from hyperadapters.inference.routing import RoutingResult, route
from hyperadapters.methods import PHA
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.model.tasks import TaskState
from hyperadapters.serving.memory import overwrite_free_memory

TASK_TENSORS = (
    "heads.",
    "method.adapter_scales",
    "method.densities.counts",
    "method.densities.means",
    "method.own_adapters.",
    "method.prototypes.",
    "method.thresholds",
)
"""Beginnings of the names of parameters and buffers that hold the states of tasks."""


@dataclass(frozen=True)
class Question:
    """What is to be answered for the inputs of one request.

    Attributes:
        inputs: Inputs in any form that `inference.inputs.read_inputs` reads.
        task: Task of all inputs; None if they have their own or are routed.
        tasks: Tasks that are answered for each input; None for one task.
        only_routes: Whether the inputs are only routed.
        max_error: Maximum share of wrong answers of a task; None for no limit.
    """

    inputs: Sequence[Any]
    task: str | None = None
    tasks: tuple[str, ...] | Literal["*"] | None = None
    only_routes: bool = False
    max_error: float | None = None


@dataclass(frozen=True)
class Answer:
    """Answer to a question, by one version of each task.

    Attributes:
        results: Predictions, lists of predictions, or results of routing, in the order of the inputs.
        versions: Version of each task of the model.
        digests: Digest of the weights of each task of the model.
    """

    results: Sequence[Prediction | list[Prediction] | RoutingResult]
    versions: Mapping[str, int]
    digests: Mapping[str, str]


@dataclass(frozen=True)
class Snapshot:
    """The tasks of a model at one time, which can be read without its lock.

    Attributes:
        revision: Number of changes of the tasks so far.
        tasks: Definitions of the tasks.
        versions: Version of each task.
        digests: Digest of the weights of each task.
        thresholds: Threshold of routing of each task; none for a method that cannot route.
    """

    revision: int
    tasks: tuple[Task, ...]
    versions: Mapping[str, int]
    digests: Mapping[str, str]
    thresholds: Mapping[str, float]

    @classmethod
    def of(cls, model: HyperAdapterModel) -> Snapshot:
        """Take a snapshot of a model.

        Args:
            model: The model.

        Returns:
            The snapshot.
        """
        names = [task.name for task in model.tasks]
        thresholds = model.pha.thresholds.tolist() if model.method.can_route else []
        table = model.task_table
        found = dict(zip(names, thresholds, strict=False))
        return cls(table.revision, table.tasks, dict(table.versions), task_digests(model), found)


class ServedModel:
    """A model whose tasks follow those of a folder.

    All inputs that are answered together are answered by the same versions of all tasks.

    Attributes:
        folder: Folder of the checkpoint.
        model: The model.
        predictor: Predictor of the model.
        snapshot: The tasks that are served.
    """

    def __init__(self, folder: Path, batch_size: int = 64) -> None:
        """Load the model.

        Args:
            folder: Folder of the checkpoint.
            batch_size: Maximum number of inputs in a batch of the model.

        Raises:
            CheckpointError: If the checkpoint is missing or damaged, or belongs to another backbone.
        """
        self.folder = folder
        self.model = HyperAdapterModel.from_pretrained(folder).to(best_device())
        self.predictor = Predictor(self.model, batch_size)
        self._stored: str | None = None
        self._examined: tuple[int, ...] = ()
        self._unreadable: tuple[int, ...] | None = None
        if not self.refresh():
            self.snapshot = Snapshot.of(self.model)

    def answer(self, questions: Sequence[Question]) -> list[Answer | HyperAdaptersError]:
        """Answer several questions by the same versions of all tasks.

        Args:
            questions: Questions of any kind.

        Returns:
            The answer to each question, or the error in it.
        """
        found: dict[int, Any] = {}
        with self.model.lock:
            versions, digests = self.snapshot.versions, self.snapshot.digests
            single = [i for i, question in enumerate(questions) if question.tasks is None and not question.only_routes]
            self._predict([(i, questions[i]) for i in single], found)
            for i in found.keys() ^ range(len(questions)):
                with _errors_to(found, i):
                    question = questions[i]
                    if question.tasks is not None:
                        found[i] = list(self.predictor.predict_tasks(question.inputs, question.tasks))
                    else:
                        found[i] = route(self.model, question.inputs, self.predictor.batch_size)
            for i, question in enumerate(questions):
                if question.max_error is not None and not isinstance(found[i], HyperAdaptersError):
                    with _errors_to(found, i):
                        found[i] = _certain(self.model, found[i], question.max_error)
        return [
            found[i] if isinstance(found[i], HyperAdaptersError) else Answer(found[i], versions, digests)
            for i in range(len(questions))
        ]

    def _predict(self, questions: Sequence[tuple[int, Question]], found: dict[int, Any]) -> None:
        """Predict the inputs of several questions together."""
        known, readable = self.model.tasks, {}
        for i, question in questions:
            with _errors_to(found, i):
                examples = list(read_inputs(question.inputs, known, question.task))
                if any(example.task_id is None for example in examples):
                    self.model.method.check_can_route()
                readable[i] = examples
        try:
            together = iter(list(self.predictor([example for examples in readable.values() for example in examples])))
        except HyperAdaptersError:  # One of the questions has an input for which the model computes no finite number.
            for i, examples in readable.items():
                with _errors_to(found, i):
                    found[i] = list(self.predictor(examples))
            return
        found.update({i: [next(together) for _ in examples] for i, examples in readable.items()})

    def is_touched(self) -> bool:
        """Return whether the checkpoint was written since the model agreed with it. This takes a few microseconds.

        A checkpoint that could not be read is not examined for each request again.
        """
        return self.model.method.can_change_tasks and _stamp(self.folder) not in (self._examined, self._unreadable)

    def is_outdated(self) -> bool:
        """Return whether the folder has other tasks than the model, which `refresh` would switch to.

        Raises:
            CheckpointError: If the checkpoint is missing or damaged.
        """
        if not self.model.method.can_change_tasks:
            return False
        with self._examining() as stamp:
            is_outdated = stored_digest(self.folder) != self._stored
        if not is_outdated:
            self._examined = stamp
        return is_outdated

    @contextmanager
    def _examining(self) -> Iterator[tuple[int, ...]]:
        """Remember a checkpoint that cannot be read. The stamp is taken before, since it may be written meanwhile."""
        stamp = _stamp(self.folder)
        try:
            yield stamp
        except HyperAdaptersError:
            self._unreadable = stamp
            raise

    def refresh(self) -> bool:
        """Switch to the tasks in the folder. What the former tasks occupied in memory is overwritten.

        Only one thread may call this at a time. Nothing is done if the method of the model keeps the tasks that it was
        trained with.

        Returns:
            Whether the tasks have changed.

        Raises:
            CheckpointError: If the checkpoint is missing, damaged, or of another model. The tasks have not changed.
        """
        if not self.model.method.can_change_tasks:
            return False
        with self.model.lock:
            with self._examining() as stamp:
                known, self._stored = self._stored, refresh(self.model, self.folder, self._stored, self.predictor)
            if known != self._stored:
                self.snapshot = Snapshot.of(self.model)
            self._examined = stamp  # from now on requests need not wait
            if known == self._stored:
                return False
        overwrite_free_memory()
        return True


def _certain(model: HyperAdapterModel, results: Sequence[Any], max_error: float) -> list[Any]:
    """Remove the answers that are not certain enough from predictions, or from lists of predictions."""
    check_heads_for_errors(model)
    return [
        _certain(model, found, max_error)
        if isinstance(found, list)
        else without_uncertain_answer(model, found, max_error)
        for found in results
    ]


def _stamp(folder: Path) -> tuple[int, ...]:
    """Return numbers that change whenever a checkpoint is written; none if it cannot be found."""
    try:
        found = os.stat(folder / CONFIG_FILE)
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def refresh(
    model: HyperAdapterModel, folder: Path, known: str | None = None, predictor: Predictor | None = None
) -> str:
    """Bring the tasks of a model up to date with a folder, and overwrite what the former tasks occupied in memory.

    Args:
        model: The model.
        folder: Folder of the checkpoint.
        known: Digest of the checkpoint that the model agrees with; see `checkpoints.update.update_model`.
        predictor: Predictor of the model, whose cached adapters are erased.

    Returns:
        Digest of the checkpoint.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged, or of another model. The tasks have not changed.
    """
    with model.lock:
        before = task_tensors(model)
        found = update_model(model, folder, known)
        if found != known:
            erase(before, task_tensors(model))
            if predictor is not None:
                predictor.adapter_cache.erase()
    return found


def task_tensors(model: HyperAdapterModel) -> dict[str, Tensor]:
    """Return the parameters and buffers that hold the states of the tasks, by name.

    Args:
        model: The model.
    """
    return {name: value for name, value in model.adapter_state_dict().items() if name.startswith(TASK_TENSORS)}


@torch.inference_mode()
def erase(outdated: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    """Overwrite the memory of tensors that are not used any more.

    Args:
        outdated: Tensors to overwrite, unless they share their memory with one of `present`.
        present: Tensors that are still used.
    """
    used = {tensor.untyped_storage().data_ptr() for tensor in present.values()}
    for tensor in outdated.values():
        if tensor.untyped_storage().data_ptr() not in used:
            tensor.zero_()


def task_digests(model: HyperAdapterModel) -> dict[str, str]:
    """Compute the digests of the weights of all tasks.

    Args:
        model: The model.

    Returns:
        SHA-256 of the definition and the state of each task, and of all parameters that tasks share, by name.
    """
    own = task_tensors(model)
    shared = _digest({name: value for name, value in model.adapter_state_dict().items() if name not in own})
    if not isinstance(model.method, PHA):
        shared.update(_digest(own).digest())
        return {task.name: _with(shared, task.model_dump_json().encode()) for task in model.tasks}
    return {state.task.name: _with(shared, *_parts_of(state)) for state in model.task_table.states()}


def _digest(tensors: Mapping[str, Tensor]) -> Any:
    found = hashlib.sha256()
    for name, value in tensors.items():
        found.update(name.encode())
        found.update(_memory(value))
    return found


def _with(shared: Any, *parts: Any) -> str:
    found = shared.copy()
    for part in parts:
        found.update(part)
        found.update(b"\0")
    digest: str = found.hexdigest()
    return digest


def _parts_of(state: TaskState) -> Iterator[Any]:
    yield state.task.model_dump_json().encode()
    yield from map(_memory, (state.prototype, state.centroids, state.density))
    yield repr((state.threshold, state.adapter_scale)).encode()
    if state.head is not None:
        calibration = [found for found in (state.head.error_bounds, state.head.thresholds) if found is not None]
        yield from map(_memory, (state.head.weight, state.head.bias, *calibration))
        yield repr((state.head.target_mean, state.head.target_std, state.head.temperature)).encode()
    if state.own_adapter is not None:
        yield from map(_memory, state.own_adapter.values())


def _memory(tensor: Tensor) -> Any:
    """Return the values of a tensor as a buffer, on the CPU without a copy."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


@contextmanager
def _errors_to(found: dict[int, Any], index: int) -> Iterator[None]:
    """Store an error of the user as the answer to a question."""
    try:
        yield
    except HyperAdaptersError as error:
        found[index] = error
