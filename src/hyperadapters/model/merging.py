"""Low-rank changes of the backbone for one task (form "lora"), and merging them into its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hyperadapters.backbones.passes import AdaptedLinear
from hyperadapters.config import ModelConfig
from hyperadapters.core import LearnedLora
from hyperadapters.errors import BackboneError, TaskError
from hyperadapters.methods import Method


class Lora(NamedTuple):
    """Low-rank change of a linear layer: `scale * x down up` is added to the output for the input x.

    Attributes:
        down: Matrix [i, r], where i is the number of input features and r the rank.
        up: Matrix [r, o], where o is the number of output features.
        scale: Factor of the change.
    """

    down: Tensor
    up: Tensor
    scale: float


@torch.no_grad()
def task_loras(
    method: Method, task_id: int, linears: Sequence[AdaptedLinear], shared: nn.ModuleList
) -> dict[str, Lora]:
    """Collect the changes of one task: generated ones and those that all tasks share.

    Args:
        method: Method of the model, which gives the adapter of the task.
        task_id: Id of the task.
        linears: Linear layers that are changed.
        shared: Learned LoRAs of the encoder layers of an encoder-decoder.

    Returns:
        Changes in float32 or float64, by the paths of the backbone's modules.

    Raises:
        TaskError: If the adapters have another form than "lora", or the method has no adapters of tasks.
    """
    if method.config.form != "lora":
        raise TaskError(
            "expected a model of form 'lora', found form 'bottleneck', whose adapters contain a ReLU and therefore are "
            "no change of the backbone's weights; train a model with model.form: lora"
        )
    device, scale = next(method.parameters()).device, method.config.lora_scale
    weights = method.adapters(torch.tensor([task_id], device=device))
    found = {}
    for linear in linears:
        if linear.is_shared:
            learned = shared[linear.layer]
            assert isinstance(learned, LearnedLora)
            down, up = (learned.get_parameter(f"{side}_{linear.name}").data for side in ("down", "up"))
        else:
            down, up = (weights[f"{side}_{linear.name}"][linear.layer, 0] for side in ("down", "up"))
        found[linear.path] = Lora(_at_least_float32(down), _at_least_float32(up), scale)
    return found


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def check_can_merge(task: str, config: ModelConfig, head_features_are_read: bool) -> None:
    """Check that no part of a model reads the frozen backbone without adapters, which merged weights would change.

    Args:
        task: Name of the task, for the error message.
        config: Settings of the model.
        head_features_are_read: Whether a head has weights other than zero for frozen features.

    Raises:
        TaskError: If the retriever or a head reads the frozen backbone without adapters.
    """
    is_read_by_heads = config.head_inputs != "adapted" and head_features_are_read
    if is_read_by_heads or config.features == "backbone":
        setting = "head_inputs" if is_read_by_heads else "features"
        raise TaskError(
            f"task '{task}' cannot be merged: with {setting} '{getattr(config, setting)}' the model also reads the "
            "frozen backbone without adapters, which merged weights would change; train with preset 'paper' and "
            "features 'layer'"
        )


class Merged:
    """LoRAs of one task that are merged into the backbone's weights until `undo`.

    Attributes:
        task_id: Id of the task.
    """

    def __init__(self, backbone: nn.Module, task_id: int, loras: Mapping[str, Lora]) -> None:
        """Merge the LoRAs. If an error is raised, the backbone has not changed.

        Args:
            backbone: Model whose weights are changed in place.
            task_id: Id of the task.
            loras: Result of `task_loras`.

        Raises:
            BackboneError: If a weight is quantised, offloaded, or shared with another module of the backbone.
        """
        self.task_id = task_id
        weights = {path: _plain_weight(backbone, path) for path in loras}
        _check_not_tied(backbone, weights)
        self._originals = [(weight, weight.detach().clone()) for weight in weights.values()]
        with torch.no_grad():
            for path, (down, up, scale) in loras.items():
                has_inputs_first = isinstance(backbone.get_submodule(path), Conv1D)
                weight, change = weights[path], scale * (down @ up)
                weight.copy_(weight + (change if has_inputs_first else change.T))  # in the wider of both types

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the backbone's weights bit for bit."""
        for weight, original in self._originals:
            weight.copy_(original)


def _plain_weight(backbone: nn.Module, path: str) -> nn.Parameter:
    weight = getattr(backbone.get_submodule(path), "weight", None)
    if isinstance(weight, nn.Parameter) and weight.is_meta:
        raise BackboneError(
            f"merging: expected the weight of '{path}' in memory, found it offloaded; load the backbone without "
            "offloading"
        )
    is_plain = isinstance(weight, nn.Parameter) and type(weight.data) is Tensor and weight.is_floating_point()
    if not is_plain:
        raise BackboneError(
            f"merging: expected plain weights, found {type(getattr(weight, 'data', weight)).__name__} at '{path}'; "
            "load the backbone without quantisation"
        )
    assert isinstance(weight, nn.Parameter)
    return weight


def _check_not_tied(backbone: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
    """Raise BackboneError if a weight is shared with another module, which would change, too."""
    paths: dict[nn.Parameter, str] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        path = name.removesuffix(".weight")
        other = paths.setdefault(parameter, path)
        if other != path and (path in weights or other in weights):
            raise BackboneError(f"the task cannot be merged: '{other}' and '{path}' of the backbone share a weight")
