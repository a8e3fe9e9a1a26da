"""The device on which a backbone computes and the values of its weights, also if accelerate has dispatched it.

With a `device_map`, accelerate attaches a hook to each module. The hook moves the inputs to the device on which the
module is executed. Weights that are offloaded to the CPU or the disk are loaded during the call. Between calls, these
parameters are on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hyperadapters.errors import BackboneError


def execution_device(backbone: nn.Module) -> torch.device:
    """Return the device on which a backbone computes.

    Args:
        backbone: The model.

    Raises:
        BackboneError: If it computes on several devices, or its weights are on the meta device, where they have no
            values.
    """
    devices = {
        torch.device(hook.execution_device)
        for module in backbone.modules()
        for hook in _hooks(module)
        if getattr(hook, "execution_device", None) is not None
    }
    if len(devices) > 1:
        raise BackboneError(
            f"the layers of this backbone are executed on several devices ({', '.join(sorted(map(str, devices)))}), "
            "but adapters are generated on one; load it with a device_map that executes on one device, such as "
            "{'': 0}, with or without offloading to the CPU or the disk"
        )
    parameters = list(backbone.parameters())
    if not devices and any(parameter.is_meta for parameter in parameters):
        raise BackboneError(
            "weights of this backbone are on the meta device, where they have no values; load them first, for example "
            "with from_pretrained"
        )
    return devices.pop() if devices else parameters[0].device


def is_offloaded(backbone: nn.Module) -> bool:
    """Return whether accelerate has offloaded at least one weight of a backbone to the CPU or the disk.

    Args:
        backbone: The model.
    """
    return any(parameter.is_meta for parameter in backbone.parameters())


def convert_backbone(backbone: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    """Move or convert a backbone, as its `to`, `half`, `double` and similar methods do.

    Args:
        backbone: The model, which is changed in place.
        convert: Function that moves or converts a tensor.

    Raises:
        BackboneError: If accelerate has offloaded weights of the backbone and `convert` would change its device or
            floating-point type.
    """
    if not is_offloaded(backbone):
        backbone._apply(convert)
        return
    probe = torch.empty(0, device=execution_device(backbone), dtype=next(backbone.parameters()).dtype)
    if (convert(probe).device, convert(probe).dtype) != (probe.device, probe.dtype):
        raise BackboneError(
            "the backbone cannot be moved or converted, because accelerate has offloaded some of its weights; load it "
            "again with another device_map or dtype"
        )


def named_weights(backbone: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the names and values of all parameters, ordered by name. Offloaded values are loaded one by one.

    Args:
        backbone: The model.

    Yields:
        Name and value of a parameter.
    """
    for name, parameter in sorted(backbone.named_parameters()):
        if not parameter.is_meta:
            yield name, parameter.detach()
            continue
        from accelerate.utils import align_module_device

        path, _, own_name = name.rpartition(".")
        module = backbone.get_submodule(path)
        with align_module_device(module):
            yield name, module.get_parameter(own_name).detach()


def _hooks(module: nn.Module) -> list[Any]:
    hook = vars(module).get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
