"""Form "lora" task by task: its weights by the backbone's modules, and merging them into the backbone and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hyperadapters.core import LearnedLora
from hyperadapters.errors import BackboneError, TaskError

if TYPE_CHECKING:
    from hyperadapters.model.model import HyperAdapterModel


class Lora(NamedTuple):
    """The low-rank change of a linear layer: `scale * x down up` is added for its input x; [i, r] and [r, o]."""

    down: Tensor
    up: Tensor
    scale: float


@torch.no_grad()
def task_loras(model: HyperAdapterModel, task: str) -> dict[str, Lora]:
    """The changes of a task, generated ones and those that all tasks share, by the paths of the backbone's modules.

    Raises:
        TaskError: there is no such task, or adapters are of another form, or the method has none of tasks.
    """
    task_id = model.task_id(task)
    if model.adapter_config.form != "lora":
        raise TaskError(
            "the adapters of this model are bottlenecks, which have a ReLU and are no change of the backbone's "
            "weights; train a model with form 'lora' for that"
        )
    weights = model.adapters(torch.tensor([task_id], device=model.thresholds.device))
    found, scale = {}, model.adapter_config.lora_scale
    for place in model.adapted_linears():
        if place.is_shared:
            shared = model.shared_adapters[place.layer]
            assert isinstance(shared, LearnedLora)
            down, up = (shared.get_parameter(f"{side}_{place.name}").data for side in ("down", "up"))
        else:
            down, up = (weights[f"{side}_{place.name}"][place.layer, 0] for side in ("down", "up"))
        found[place.path] = Lora(_at_least_float32(down), _at_least_float32(up), scale)
    return found


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


class Merged:
    """A task whose LoRA is in the backbone's weights, until `undo`.

    Attributes:
        task_id: which.
    """

    def __init__(self, model: HyperAdapterModel, task: str) -> None:
        """Merge.

        Raises:
            TaskError: see `task_loras`; or what the model reads of the frozen backbone would change with it.
            BackboneError: a weight is quantised, or also used elsewhere in the backbone. Nothing has been changed then.
        """
        loras = task_loras(model, task)
        self.task_id = model.task_id(task)
        _check_features(model, self.task_id)
        weights = {path: _plain_weight(model, path) for path in loras}
        _check_not_tied(model, weights)
        self._originals = [(weight, weight.detach().clone()) for weight in weights.values()]
        with torch.no_grad():
            for path, (down, up, scale) in loras.items():
                has_inputs_first = isinstance(model.backbone.get_submodule(path), Conv1D)
                weight, change = weights[path], scale * (down @ up)
                weight.copy_(weight + (change if has_inputs_first else change.T))  # added in the wider of both types

    @torch.no_grad()
    def undo(self) -> None:
        """Put the backbone's weights back as they were, bit for bit."""
        for weight, original in self._originals:
            weight.copy_(original)


def _plain_weight(model: HyperAdapterModel, path: str) -> nn.Parameter:
    weight = getattr(model.backbone.get_submodule(path), "weight", None)
    if isinstance(weight, nn.Parameter) and weight.is_meta:
        raise BackboneError(f"merging needs the weight of '{path}' in memory, found it offloaded; load it without that")
    is_plain = isinstance(weight, nn.Parameter) and type(weight.data) is Tensor and weight.is_floating_point()
    if not is_plain:
        raise BackboneError(
            f"merging needs plain weights, found {type(getattr(weight, 'data', weight)).__name__} at '{path}'; "
            "load the backbone without quantisation"
        )
    assert isinstance(weight, nn.Parameter)
    return weight


def _check_not_tied(model: HyperAdapterModel, weights: Mapping[str, nn.Parameter]) -> None:
    """Raise BackboneError if a weight is also that of another module, which would change with it."""
    paths: dict[nn.Parameter, str] = {}
    for name, parameter in model.backbone.named_parameters(remove_duplicate=False):
        path = name.removesuffix(".weight")
        other = paths.setdefault(parameter, path)
        if other != path and (path in weights or other in weights):
            raise BackboneError(f"cannot be merged: '{other}' and '{path}' of the backbone have one weight in common")


def _check_features(model: HyperAdapterModel, task_id: int) -> None:
    """Raise TaskError if the task is answered with what only the backbone without the merged weights can give."""
    config = model.adapter_config
    reads_texts = config.head_inputs != "adapted" and model.heads is not None and model.heads.reads_features
    if reads_texts or config.features == "backbone":
        setting = "head_inputs" if reads_texts else "features"
        raise TaskError(
            f"task '{model.tasks[task_id].name}' cannot be merged: with {setting} '{getattr(config, setting)}' the "
            "model also reads the frozen backbone by itself, which merged weights would change; train with preset "
            "'paper' and features 'layer' for that"
        )
