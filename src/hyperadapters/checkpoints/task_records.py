"""The record of a task in a task store: its definition as JSON, followed by its tensors in the format safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from hyperadapters.config import Task, parse
from hyperadapters.core import AdapterWeights
from hyperadapters.errors import CheckpointError, TaskError
from hyperadapters.heads.task_heads import DEFAULT_THRESHOLD, ERROR_LEVELS, Head
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.model.tasks import TaskState
from hyperadapters.utils.reading import parse_json

_LENGTH = 4
"""Number of bytes at the beginning of a record that contain the size of the JSON."""
_OWN = "own_adapter."


def pack(state: TaskState) -> bytes:
    """Return the record of a task.

    Args:
        state: Everything that belongs to the task.
    """
    head = state.head
    scale = (0.0, 1.0, 1.0) if head is None else (head.target_mean, head.target_std, head.temperature)
    tensors = {
        "prototype": state.prototype,
        "centroids": state.centroids,
        "density": state.density,
        "numbers": torch.tensor([state.threshold, state.adapter_scale, *scale], dtype=torch.float64),
    }
    if head is not None:
        half = head.weight.half()  # the weights of a head that was fitted are often numbers of float16
        tensors["head.weight"] = half if half.to(head.weight).equal(head.weight) else head.weight
        tensors["head.bias"] = head.bias
        if head.error_bounds is not None and not head.error_bounds.eq(1).all():
            tensors["head.error_bounds"] = head.error_bounds
        if head.thresholds is not None and not head.thresholds.eq(DEFAULT_THRESHOLD).all():
            tensors["head.thresholds"] = head.thresholds
    if state.own_adapter is not None:
        tensors.update({f"{_OWN}{name}": tensor for name, tensor in state.own_adapter.items()})
    definition = json.dumps(state.task.model_dump(mode="json", exclude_defaults=True)).encode()
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return len(definition).to_bytes(_LENGTH, "little") + definition + safetensors.torch.save(stored)


def unpack_task(record: bytes) -> Task:
    """Return the definition of a task.

    Args:
        record: Record of the task.

    Raises:
        ValueError: If it is not a record.
    """
    try:
        return parse(Task, parse_json(record[_LENGTH : _tensors_start(record)]), TaskError)
    except TaskError as error:
        raise ValueError(str(error)) from None


def unpack(record: bytes, task: Task, model: HyperAdapterModel) -> TaskState:
    """Return everything that belongs to a task, on the device of the model that it is for.

    Args:
        record: Record of the task.
        task: Its definition, as returned by `unpack_task`.
        model: Model with the sizes that the tensors must have.

    Raises:
        ValueError: If it is not a record, or its tensors do not fit the model.
    """
    try:
        tensors = safetensors.torch.load(record[_tensors_start(record) :])
    except (SafetensorError, KeyError) as error:  # KeyError: a type of numbers that torch does not have
        raise ValueError(f"the tensors cannot be read: {error}") from None
    _check(tensors, model)
    tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    threshold, adapter_scale, mean, std, temperature = tensors["numbers"].tolist()
    head = None
    if model.heads is not None:
        bias = tensors["head.bias"]
        bounds, thresholds = tensors.get("head.error_bounds"), tensors.get("head.thresholds")
        head = Head(tensors["head.weight"].to(bias), bias, mean, std, temperature, bounds, thresholds)
    own = {name.removeprefix(_OWN): tensor for name, tensor in tensors.items() if name.startswith(_OWN)}
    return TaskState(
        task=task,
        prototype=tensors["prototype"],
        centroids=tensors["centroids"],
        threshold=threshold,
        density=tensors["density"],
        head=head,
        own_adapter=AdapterWeights(own) if own else None,
        adapter_scale=adapter_scale,
    )


def _tensors_start(record: bytes) -> int:
    return _LENGTH + int.from_bytes(record[:_LENGTH], "little")


def _check(tensors: Mapping[str, Tensor], model: HyperAdapterModel) -> None:
    """Raise ValueError if tensors are missing or do not have the shapes and types of a model's."""
    pha = model.pha
    size, dtype = pha.prototypes.weight.shape[1], pha.prototypes.weight.dtype
    directions = 0 if pha.densities is None else len(pha.densities.between) + 1
    expected: dict[str, tuple[int | None, ...]] = {"prototype": (size,), "centroids": (None, size), "numbers": (5,)}
    expected["density"] = (directions,)
    if model.heads is not None:
        expected.update({"head.weight": (None, None), "head.bias": (None,)})
        if "head.error_bounds" in tensors:
            expected["head.error_bounds"] = (2, ERROR_LEVELS)
        if "head.thresholds" in tensors and "head.bias" in tensors:
            expected["head.thresholds"] = tuple(tensors["head.bias"].shape)
    if any(name.startswith(_OWN) for name in tensors):
        with torch.no_grad():
            generated = pha.adapters(torch.zeros(1, dtype=torch.long, device=model.device))
        expected.update({f"{_OWN}{name}": tuple(tensor.shape) for name, tensor in generated.items()})
    if tensors.keys() != expected.keys():
        raise ValueError(f"expected and found tensors differ in {sorted(tensors.keys() ^ expected.keys())}")
    for name, shape in expected.items():
        found = tensors[name]
        types = {"numbers": (torch.float64,), "head.weight": (dtype, torch.float16)}.get(name, (dtype,))
        fits = len(shape) == found.ndim and all(e in (None, f) for e, f in zip(shape, found.shape, strict=True))
        if not fits or found.dtype not in types:
            raise ValueError(f"'{name}': expected shape {shape} and type {dtype}, found {tuple(found.shape)}")


def set_states(model: HyperAdapterModel, states: list[TaskState]) -> None:
    """Replace the tasks of a model by those of records.

    Args:
        model: The model.
        states: Results of `unpack`.

    Raises:
        TaskError: If the model cannot have such tasks. It has not changed then.
        CheckpointError: If a head does not fit its task. The model has not changed then.
    """
    model.check_tasks([state.task for state in states])
    try:
        model.task_table.replace(states)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"the tasks do not fit the model: {error}") from None
