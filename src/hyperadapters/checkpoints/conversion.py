"""Conversion between the tensors of a model and those of a checkpoint, also of older formats.

format 1   a weight and a bias for each head
format 2   heads packed into three tensors, as in `TaskHeads`
format 3   wide heads in two parts, those of pairs and those of single texts, in float16 if this is lossless
format 4   may contain a tokenizer
format 5   names of the method's parameters start with "method."; some settings and tensors have new names
format 6   may contain a common adapter and densities of the tasks' texts; the preset "plus" has other defaults; heads
           that read adapted texts are stored in two parts, too
format 7   may contain scales of the generated adapters
format 8   the JSON file contains the revision of the tasks
format 9   may contain temperatures and error bounds of the heads, and thresholds of the labels of multi-label tasks
format 10  tasks may contain descriptions of their labels
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hyperadapters.config.validation import RENAMED_KEYS, RENAMED_VALUES
from hyperadapters.core import AdapterWeights, OwnAdapter
from hyperadapters.heads.task_heads import DEFAULT_THRESHOLD, Head, TaskHeads
from hyperadapters.model.model import HyperAdapterModel

RENAMED_TENSORS = {
    "prototypes.keys": "method.prototypes.centroids",
    "hypernetwork.site_embeddings": "method.hypernetwork.layer_embeddings",
}
METHOD_TENSORS = ("retriever", "prototypes", "hypernetwork", "learned_adapters", "own_adapters", "thresholds")
"""First parts of the names that start with "method." since format 5."""
CENTROIDS = "method.prototypes.centroids"
DENSITIES = "method.densities."
SCALES = "method.adapter_scales"
TEMPERATURES = "heads.temperature"
ERROR_BOUNDS = "heads.error_bounds"
THRESHOLDS = "heads.thresholds"


def convert_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Convert the settings of a model from formats 1 to 4 to the present names.

    Args:
        values: Settings in the checkpoint.

    Returns:
        Settings with the present names and values.
    """
    found = _with_present_keys(values)
    for name, renamed in RENAMED_VALUES.items():
        if isinstance(found.get(name), str):
            found[name] = renamed.get(found[name], found[name])
    if isinstance(found.get("modules"), dict):
        found["modules"] = _with_present_keys(found["modules"])
    return found


def convert_task(values: Any) -> Any:
    """Convert a task from formats 1 to 4 to the present names.

    Args:
        values: Fields of the task in the checkpoint.

    Returns:
        Fields with the present names; a value of another type than a dictionary is returned as it is.
    """
    return _with_present_keys(values) if isinstance(values, dict) else values


def _with_present_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    return {RENAMED_KEYS.get(name, name): value for name, value in values.items()}


def convert_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the names of tensors from formats 1 to 4 to the present names.

    Args:
        state: Tensors in the checkpoint, by name.

    Returns:
        Tensors by their present names.
    """
    return {
        RENAMED_TENSORS.get(name) or (f"method.{name}" if name.split(".")[0] in METHOD_TENSORS else name): tensor
        for name, tensor in state.items()
    }


@torch.no_grad()
def stored_state(model: HyperAdapterModel) -> dict[str, Tensor]:
    """Return the tensors of the weights file of a checkpoint by name, on the CPU.

    Routing centroids are omitted if no task has any, densities if they are not fitted, and scales, temperatures, bounds
    and thresholds if all of them have their default. Heads that may compare the texts of a pair are stored in two
    parts: those that do, and the other heads, without their zeros for the comparison.

    Args:
        model: Model of the checkpoint.
    """
    state = {name: value.detach().cpu() for name, value in model.adapter_state_dict().items()}
    if not state.get(CENTROIDS, torch.ones(1)).numel():
        del state[CENTROIDS]
    for name in (SCALES, TEMPERATURES, ERROR_BOUNDS):
        if state.get(name, torch.zeros(1)).eq(1).all():
            del state[name]
    if THRESHOLDS in state and state[THRESHOLDS].eq(DEFAULT_THRESHOLD).all():
        del state[THRESHOLDS]
    if not state.get(f"{DENSITIES}counts", torch.ones(1)).any():
        state = {name: value for name, value in state.items() if not name.startswith(DENSITIES)}
    if model.heads is not None and len(state[_packed_name(model)]):
        state.update(_pack(state.pop(_packed_name(model)), model))
    return {name: value.contiguous() for name, value in state.items()}


def _packed_name(model: HyperAdapterModel) -> str:
    """Return the name of the weight of those heads that may compare the texts of a pair."""
    return "heads.weight" if model.adapter_config.separates_texts else "heads.wide_weight"


def _pack(weight: Tensor, model: HyperAdapterModel) -> dict[str, Tensor]:
    """Split a weight [N, i] of heads that may compare texts into two parts, in float16 if this is lossless."""
    compared = _comparing_inputs(model)
    compares = weight[:, compared].any(dim=1)
    packed = {_packed_name(model): weight[compares], "heads.single_weight": weight[~compares][:, ~compared]}
    packed = {name: half if (half := value.half()).to(value).equal(value) else value for name, value in packed.items()}
    return {**packed, "heads.compares": compares}


def _unpack(state: dict[str, Tensor], model: HyperAdapterModel) -> None:
    """Undo `_pack`.

    Raises:
        KeyError: If a part is missing.
        ValueError: If a part has another shape than in this model.
    """
    compares, single = state.pop("heads.compares"), state.pop("heads.single_weight").float()
    pairs, kept = state[_packed_name(model)].float(), ~_comparing_inputs(model)
    expected = (int(compares.sum()), len(kept)), (int((~compares).sum()), int(kept.sum()))
    if compares.dtype != torch.bool or (tuple(pairs.shape), tuple(single.shape)) != expected:
        raise ValueError(f"the heads have shapes {tuple(pairs.shape)} and {tuple(single.shape)}, not {expected}")
    weight = pairs.new_zeros(len(compares), len(kept))
    weight[compares] = pairs
    weight[(~compares).nonzero(), kept.nonzero()[:, 0]] = single
    state[_packed_name(model)] = weight


def _comparing_inputs(model: HyperAdapterModel) -> Tensor:
    """Return a mask [i] of the inputs of a head that are a comparison of the texts of a pair."""
    heads = model.heads
    assert heads is not None
    if model.adapter_config.separates_texts:
        return torch.arange(heads.hidden_size) >= model.hidden_size
    columns = torch.arange(heads.features_size + heads.hidden_size)
    return (columns >= heads.hidden_size) & (columns < heads.features_size)


def complete_state(model: HyperAdapterModel, state: dict[str, Tensor]) -> None:
    """Complete the tensors of a checkpoint, so that their names are those of the model's parameters and buffers.

    Args:
        model: Model that the tensors are loaded into.
        state: Tensors by name, changed in place. Omitted tensors are added, and packed heads are unpacked.

    Raises:
        KeyError: If a head, or a part of the heads, is missing.
        ValueError: If the shape of a head does not fit its task.
    """
    if model.method.can_route:
        state.setdefault("method.thresholds", torch.full_like(model.pha.thresholds, -torch.inf))
        state.setdefault(SCALES, torch.ones_like(model.pha.adapter_scales))
    else:
        state.pop("method.thresholds", None)
    if "method.prototypes.weight" in state and not state.get(CENTROIDS, torch.zeros(0)).any():
        state[CENTROIDS] = torch.zeros(len(model.tasks), 0, model.adapter_config.prototype_dim)
    if model.method.can_route and model.pha.densities is not None:
        for name, value in model.pha.densities.state_dict().items():
            state.setdefault(f"{DENSITIES}{name}", torch.zeros_like(value))
    if model.heads is not None:
        for name, value in ((TEMPERATURES, model.heads.temperature), (ERROR_BOUNDS, model.heads.error_bounds)):
            state.setdefault(name, torch.ones_like(value))
        state.setdefault(THRESHOLDS, torch.full((model.heads.bias.shape[0],), DEFAULT_THRESHOLD))
    if model.heads is not None and "heads.compares" in state:
        _unpack(state, model)
    if model.heads is not None and "heads.weight" not in state:
        names = [f"heads.heads.{task_id}" for task_id in range(len(model.tasks))]
        heads = [Head(state.pop(f"{name}.weight"), state.pop(f"{name}.bias")) for name in names]
        packed = TaskHeads.of(model.tasks, heads, model.heads.hidden_size, model.heads.features_size)
        for name in ("weight", "wide_weight", "bias", "starts"):
            state[f"heads.{name}"] = packed.get_buffer(name) if name == "starts" else packed.get_parameter(name)


@torch.no_grad()
def make_room(model: HyperAdapterModel, state: Mapping[str, Tensor]) -> None:
    """Allocate the parts that only some tasks have: routing centroids, own adapters and wide heads.

    Their values are loaded afterwards.

    Args:
        model: Model that is changed in place.
        state: Tensors by name, after `complete_state`.

    Raises:
        ValueError: If the shape of one of these tensors does not fit the model.
    """
    device = model.device
    if CENTROIDS in state:
        centroids, prototypes = state[CENTROIDS], model.method.get_submodule("prototypes")
        expected = tuple(prototypes.get_parameter("weight").shape)
        if centroids.ndim != 3 or (len(centroids), centroids.shape[2]) != expected:
            raise ValueError(f"the routing centroids have shape {tuple(centroids.shape)}")
        prototypes.centroids = torch.zeros_like(centroids, device=device)
    if model.heads is not None and len(state["heads.wide_weight"]):
        is_wide = (state["heads.starts"] >= len(state["heads.weight"])).tolist()
        heads = TaskHeads(model.heads.hidden_size, model.tasks, is_wide, model.heads.features_size)
        model.task_table.set_heads(heads.to(device).unpack())
    own_ids = sorted({int(name.split(".")[2]) for name in state if name.startswith("method.own_adapters.")})
    if not own_ids:
        return
    expected_weights = model.method.adapters(torch.zeros(1, dtype=torch.long, device=device))
    for task_id in own_ids:
        own = {name: state.get(f"method.own_adapters.{task_id}.{name}") for name in expected_weights}
        if task_id in range(len(model.tasks)) and all(tensor is not None for tensor in own.values()):
            weights = AdapterWeights({name: tensor.to(device) for name, tensor in own.items() if tensor is not None})
            if any(tensor.shape != expected_weights[name].shape for name, tensor in weights.items()):
                raise ValueError(f"the adapter of task {task_id} has other shapes than those of this model")
            model.pha.own_adapters[str(task_id)] = OwnAdapter(weights)
