"""Construction of the trained parts of a model with fresh weights, and operations on all of their parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hyperadapters.backbones.architectures import LinearSize
from hyperadapters.backbones.checks import Plan
from hyperadapters.backbones.injection import parameter_name
from hyperadapters.backbones.text_features import features_size
from hyperadapters.core import AdapterTensor, LearnedBottleneck, LearnedLora, bottleneck_tensors, lora_tensors
from hyperadapters.heads.task_heads import TaskHeads


def adapter_tensors(plan: Plan) -> Sequence[AdapterTensor]:
    """Return the tensors of a generated adapter in one layer.

    Args:
        plan: Plan of the model.
    """
    if plan.config.form == "lora":
        return lora_tensors(_by_parameter(plan.linears.generated), plan.config.lora_rank)
    return bottleneck_tensors(plan.architecture.hidden_size, plan.config.adapter_dim)


def make_shared_adapters(plan: Plan) -> nn.ModuleList:
    """Make the adapters in the encoder of an encoder-decoder, which are learned once for all tasks.

    Args:
        plan: Plan of the model.

    Returns:
        An adapter for each adapted layer of the encoder; empty for other backbones.
    """
    config, hidden_size = plan.config, plan.architecture.hidden_size
    return nn.ModuleList(
        LearnedBottleneck(hidden_size, config.shared_adapter_dim or config.adapter_dim)
        if config.form == "bottleneck"
        else LearnedLora(_by_parameter(plan.linears.shared), config.lora_rank)
        for _ in range(plan.num_shared)
    )


def make_unused_adapters(plan: Plan) -> nn.ModuleList:
    """Make the adapters that the released code allocates, counts and saves, but never uses.

    Args:
        plan: Plan of the model.

    Returns:
        An adapter for each layer with generated adapters for the preset "official"; empty for other presets.
    """
    num_adapters = plan.num_layers if plan.config.preset == "official" else 0
    hidden_size = plan.architecture.hidden_size
    return nn.ModuleList(LearnedBottleneck(hidden_size, plan.config.adapter_dim) for _ in range(num_adapters))


def make_heads(plan: Plan) -> TaskHeads | None:
    """Make the task heads.

    Args:
        plan: Plan of the model.

    Returns:
        The heads of an encoder backbone; None for text-to-text backbones.
    """
    if plan.architecture.kind != "encoder":
        return None
    hidden_size, head_inputs = plan.architecture.hidden_size, plan.config.head_inputs
    if head_inputs == "adapted":
        return TaskHeads(hidden_size, plan.tasks)
    if plan.config.separates_texts:
        return TaskHeads(features_size(hidden_size, compared=True), plan.tasks)
    size = features_size(hidden_size, head_inputs == "pair_features")
    return TaskHeads(hidden_size, plan.tasks, [True] * len(plan.tasks), size)


def convert_parameter(convert: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Move or convert a trained parameter, but never to a floating-point type shorter than float32.

    In shorter types, small steps of an optimizer would be lost.

    Args:
        convert: Function that moves or converts a tensor.
        tensor: The parameter or buffer.

    Returns:
        The result of `convert`, or the tensor in float32 on the same device as the result.
    """
    converted = convert(tensor)
    if not tensor.is_floating_point() or converted.dtype == tensor.dtype:
        return converted
    return tensor.to(converted.device, torch.promote_types(converted.dtype, torch.float32))


def copy_state(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy the values of named tensors. Nothing is changed if an error is raised.

    Args:
        target: Tensors to change in place, by name.
        source: Tensors with the new values, by name.

    Raises:
        KeyError: If the names differ.
        ValueError: If a shape differs.
    """
    if target.keys() != source.keys():
        raise KeyError(f"expected and found names differ in {sorted(target.keys() ^ source.keys())}")
    for name, value in source.items():
        if target[name].shape != value.shape:
            raise ValueError(f"'{name}': expected shape {tuple(target[name].shape)}, found {tuple(value.shape)}")
    with torch.no_grad():
        for name, value in source.items():
            target[name].copy_(value)


def _by_parameter(linears: Mapping[str, LinearSize]) -> dict[str, LinearSize]:
    return {parameter_name(path): size for path, size in linears.items()}
