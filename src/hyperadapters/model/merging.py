"""Form "lora" for one task: its weights by the backbone's modules, and merging them into the backbone and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hyperadapters.backbones.passes import AdaptedLinear
from hyperadapters.core import AdapterWeights, LearnedLora
from hyperadapters.errors import BackboneError


class Lora(NamedTuple):
    """The low-rank change of a linear layer: `scale * x down up` is added to its output for the input x.

    Attributes:
        down: [i, r].
        up: [r, o].
        scale: Factor of the change.
    """

    down: Tensor
    up: Tensor
    scale: float


@torch.no_grad()
def task_loras(
    linears: Sequence[AdaptedLinear], weights: AdapterWeights, shared: nn.ModuleList, scale: float
) -> dict[str, Lora]:
    """Collect the changes of one task, generated ones and those that all tasks share.

    Args:
        linears: The linear layers that are changed.
        weights: Generated LoRA weights of the task [L, 1, ...].
        shared: Learned LoRAs of the encoder layers of an encoder-decoder.
        scale: Factor of all changes.

    Returns:
        The changes, in float32 or a longer type, by the paths of the backbone's modules.
    """
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


class Merged:
    """LoRAs of one task in the backbone's weights, until `undo`.

    Attributes:
        task_id: Id of the task.
    """

    def __init__(self, backbone: nn.Module, task_id: int, loras: Mapping[str, Lora]) -> None:
        """Merge.

        Args:
            backbone: Its weights are changed in place.
            task_id: Id of the task.
            loras: Result of `task_loras`.

        Raises:
            BackboneError: If a weight is quantised, offloaded, or also used elsewhere in the backbone. Nothing has been
                changed then.
        """
        self.task_id = task_id
        weights = {path: _plain_weight(backbone, path) for path in loras}
        _check_not_tied(backbone, weights)
        self._originals = [(weight, weight.detach().clone()) for weight in weights.values()]
        with torch.no_grad():
            for path, (down, up, scale) in loras.items():
                has_inputs_first = isinstance(backbone.get_submodule(path), Conv1D)
                weight, change = weights[path], scale * (down @ up)
                weight.copy_(weight + (change if has_inputs_first else change.T))  # added in the wider of both types

    @torch.no_grad()
    def undo(self) -> None:
        """Put the backbone's weights back as they were, bit for bit."""
        for weight, original in self._originals:
            weight.copy_(original)


def _plain_weight(backbone: nn.Module, path: str) -> nn.Parameter:
    weight = getattr(backbone.get_submodule(path), "weight", None)
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


def _check_not_tied(backbone: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
    """Raise BackboneError if a weight is also that of another module, which would change with it."""
    paths: dict[nn.Parameter, str] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        path = name.removesuffix(".weight")
        other = paths.setdefault(parameter, path)
        if other != path and (path in weights or other in weights):
            raise BackboneError(f"cannot be merged: '{other}' and '{path}' of the backbone have one weight in common")
