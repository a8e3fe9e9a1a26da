"""Checks that tasks and settings fit a backbone. `plan` resolves and checks everything before a change is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from hyperadapters.backbones.architectures import (
    LinearSize,
    ResolvedArchitecture,
    check_feed_forward,
    find_linears,
    resolve_architecture,
)
from hyperadapters.backbones.devices import execution_device
from hyperadapters.config import Lengths, ModelConfig, Task, check_task_names
from hyperadapters.errors import RecipeError, TaskError


class AdaptedLinears(NamedTuple):
    """Sizes of the linear layers that form "lora" changes in each adapted layer, by their paths in the layer.

    Attributes:
        generated: Sizes in the stack with generated adapters; empty for another form.
        shared: Sizes in the stack with shared adapters; empty for another form or if there is no such stack.
    """

    generated: dict[str, LinearSize]
    shared: dict[str, LinearSize]


@dataclass(frozen=True)
class Plan:
    """Everything that the parts of a model are made from.

    Attributes:
        architecture: Architecture of the backbone, with its modules.
        tasks: Tasks in the order of their ids.
        config: Settings with all defaults resolved.
        lengths: Maximum numbers of tokens; longer texts are truncated.
        linears: Linear layers that form "lora" changes.
        num_layers: Number L of layers with generated adapters.
        num_shared: Number of layers with adapters that are learned once for all tasks.
        device: Device on which the backbone computes.
    """

    architecture: ResolvedArchitecture
    tasks: tuple[Task, ...]
    config: ModelConfig
    lengths: Lengths
    linears: AdaptedLinears
    num_layers: int
    num_shared: int
    device: torch.device


def plan(
    backbone: nn.Module, tasks: Sequence[Task], config: ModelConfig | None = None, lengths: Lengths | None = None
) -> Plan:
    """Check tasks and settings against a backbone, and resolve all defaults. The backbone is not changed.

    Args:
        backbone: Model of a supported architecture, or any model if `config.modules` names its modules.
        tasks: At least one task. Their order determines their ids.
        config: Method, sizes and preset. Default: `ModelConfig()`.
        lengths: Maximum numbers of tokens. Default: those of `Lengths`, or fewer if the backbone has fewer positions.

    Returns:
        The plan of the model.

    Raises:
        BackboneError: If the architecture is not supported, a module is missing or of the wrong kind, or the backbone
            already contains adapters or does not compute on one device.
        TaskError: If there is no task, two tasks have the same name, a task does not fit the backbone, or the labels of
            a task are unknown.
        RecipeError: If a setting does not fit the backbone.
    """
    if not isinstance(config, ModelConfig | None) or not isinstance(lengths, Lengths | None):
        wrong = lengths if isinstance(config, ModelConfig | None) else config
        raise RecipeError(f"expected config as a ModelConfig, and lengths as Lengths; found {wrong!r}")
    config = config or ModelConfig()
    architecture = resolve_architecture(backbone, config.modules)
    check_tasks(tasks, architecture)
    device = execution_device(backbone)
    config = _resolved(config, architecture)
    lengths = _fitting(lengths, architecture)
    if config.modules is not None and config.form == "bottleneck":
        check_feed_forward(architecture.generated, architecture.hidden_size)
    linears = _adapted_linears(config, architecture)
    num_adapted = [len(stack.layers) - architecture.first_adapted(stack, config) for stack in architecture.stacks]
    return Plan(architecture, tuple(tasks), config, lengths, linears, num_adapted[0], sum(num_adapted[1:]), device)


def check_tasks(tasks: Sequence[Task], architecture: ResolvedArchitecture) -> None:
    """Check that a model on a backbone can have tasks.

    Args:
        tasks: Tasks in the order of their ids.
        architecture: Architecture of the backbone.

    Raises:
        TaskError: If there is no task, two tasks have the same name, a task is text-to-text and the backbone has task
            heads, a task is multi-label and the backbone has none, or the labels of a task are unknown.
    """
    if not isinstance(tasks, (list, tuple)):
        raise TaskError(f"tasks: expected a list of Task in the order of their ids, found {type(tasks).__name__}")
    for task in tasks:
        if not isinstance(task, Task):
            raise TaskError(f"tasks: expected Task, such as Task.classification(name, labels); found {task!r}")
    try:
        check_task_names(tuple(tasks))
    except ValueError as error:
        raise TaskError(str(error)) from None
    for task in tasks:
        if task.kind == "text-to-text" and architecture.has_heads:
            raise TaskError(
                f"task '{task.name}' is text-to-text, which needs an encoder-decoder backbone such as T5 or a "
                "decoder-only one such as GPT-2; this backbone has classification and regression heads"
            )
        if task.is_multi_label and not architecture.has_heads:
            raise TaskError(
                f"task '{task.name}' is multi-label, which needs an encoder such as BERT, whose heads give each label "
                "a probability; this backbone generates its answers as text: choose an encoder, or make the task "
                "text-to-text"
            )
        if task.is_labelled and not task.labels:
            raise TaskError(f"task '{task.name}': its labels are unknown; specify them")


def drop_settings_without_effect(config: ModelConfig, architecture: ResolvedArchitecture) -> ModelConfig:
    """Reset settings that have no effect on a backbone. `plan` rejects them, but old checkpoints may contain them.

    Args:
        config: Settings of a checkpoint.
        architecture: Architecture of the backbone.

    Returns:
        Settings in which those without an effect have their default values.
    """
    defaults = {name: type(config).model_fields[name].default for name in _without_effect(config, architecture)}
    return config.model_copy(update=defaults)


def _without_effect(config: ModelConfig, architecture: ResolvedArchitecture) -> dict[str, str]:
    """Return the chosen settings that have no effect on the backbone, each with the reason."""
    useless = {
        "adapter_norm_input": (
            architecture.generated.row.norm is None,
            "the setting is for T5, whose feed-forward block normalizes its own input, and this backbone normalizes "
            "the hidden states before the block",
        ),
        "label_names": (
            not architecture.has_heads,
            "the setting is for encoders, which have task heads, and this backbone generates its answers as text",
        ),
        "shared_adapter_dim": (
            architecture.shared is not None and config.frozen_encoder_layers >= len(architecture.shared.layers),
            "with all encoder layers frozen there are no shared adapters",
        ),
    }
    return {name: reason for name, (is_useless, reason) in useless.items() if is_useless and config.is_chosen(name)}


def _resolved(config: ModelConfig, architecture: ResolvedArchitecture) -> ModelConfig:
    """Check the settings against the backbone, and resolve preset, target modules and feature layer."""
    for name, reason in _without_effect(config, architecture).items():
        raise RecipeError(f"{name}: {reason}; remove it")
    config = config.for_backbone(architecture.has_heads)
    if not architecture.has_heads:
        _check_generates_text(config)
    config = _with_target_modules(config, architecture)
    if architecture.shared is not None:
        _check_encoder_decoder(config, architecture, len(architecture.shared.layers))
        return config
    _check_one_stack(config, architecture)
    num_layers = len(architecture.generated.layers)
    feature_layer = num_layers // 2 if config.feature_layer is None else config.feature_layer
    if feature_layer >= num_layers:
        raise RecipeError(
            f"feature_layer: expected 0 to {num_layers - 1} (the backbone has {num_layers} layers, and adapters are "
            f"generated above it), found {feature_layer}"
        )
    return config.model_copy(update={"feature_layer": feature_layer})


def _check_generates_text(config: ModelConfig) -> None:
    """Reject settings that only backbones with task heads have."""
    if config.head_inputs != "adapted":
        raise RecipeError(
            f"head_inputs: '{config.head_inputs}' (preset 'plus' sets it) is for encoders, which have task heads; "
            "this backbone generates its answers as text: use preset 'paper'"
        )
    if config.token_dropout:
        raise RecipeError(
            "token_dropout: the setting is for encoders, and this backbone generates its answers as text; remove it"
        )
    if config.features != "layer":
        raise RecipeError(
            f"features: '{config.features}' is for encoders, and this backbone generates its answers as text; remove it"
        )


def _with_target_modules(config: ModelConfig, architecture: ResolvedArchitecture) -> ModelConfig:
    """Resolve and check the names of the linear layers that form "lora" changes."""
    if config.form == "lora" and config.target_modules is None:
        if not architecture.target_modules:
            raise RecipeError(
                "target_modules: there is no default for this backbone; name the linear layers that form 'lora' changes"
            )
        config = config.model_copy(update={"target_modules": architecture.target_modules})
    for target in config.target_modules or ():
        if target.rpartition(".")[2] in architecture.not_by_row:
            raise RecipeError(
                f"target_modules: '{target}' of this backbone is also applied to inputs that are not rows of the "
                "batch, so it cannot be changed for each row; name others, by default: "
                f"{', '.join(architecture.target_modules)}"
            )
    return config


def _check_encoder_decoder(config: ModelConfig, architecture: ResolvedArchitecture, num_encoder_layers: int) -> None:
    """Reject settings that an encoder-decoder does not have."""
    if config.feature_layer is not None:
        raise RecipeError("feature_layer: an encoder-decoder reads features from its encoder's output; remove it")
    if config.preset == "official" and architecture.generated.row.norm is None:
        raise RecipeError("preset 'official' is for T5, as the released code is; use 'paper'")
    if config.frozen_encoder_layers > num_encoder_layers:
        raise RecipeError(
            f"frozen_encoder_layers: expected 0 to {num_encoder_layers}, the encoder's layers, "
            f"found {config.frozen_encoder_layers}"
        )
    if config.preset == "official" and config.frozen_encoder_layers:
        raise RecipeError("frozen_encoder_layers: preset 'official' adapts every encoder layer; remove it")


def _check_one_stack(config: ModelConfig, architecture: ResolvedArchitecture) -> None:
    """Reject settings that only encoder-decoders have."""
    if config.preset == "official":
        raise RecipeError("preset 'official' is for encoder-decoder backbones, as the released code is; use 'paper'")
    if config.shared_adapter_dim is not None:
        raise RecipeError(f"shared_adapter_dim: {architecture.kind} backbones have no shared adapters; remove it")
    if config.frozen_encoder_layers:
        raise RecipeError(
            f"frozen_encoder_layers: this {architecture.kind} is frozen below its feature_layer; set that instead"
        )


def _adapted_linears(config: ModelConfig, architecture: ResolvedArchitecture) -> AdaptedLinears:
    """Find the linear layers that form "lora" changes, and check their sizes."""
    if config.form != "lora":
        return AdaptedLinears({}, {})
    assert config.target_modules is not None
    found: list[dict[str, LinearSize]] = []
    for stack in architecture.stacks:
        found.append(find_linears(stack, architecture.first_adapted(stack, config), config.target_modules))
    for linears in found:
        _check_rank(config.lora_rank, linears)
    return AdaptedLinears(found[0], found[1] if len(found) > 1 else {})


def _check_rank(rank: int, linears: Mapping[str, LinearSize]) -> None:
    """Reject a rank that is larger than a dimension of a changed linear layer."""
    for path, size in linears.items():
        if rank > min(size):
            raise RecipeError(
                f"lora_rank: expected at most {min(size)}, the smaller side of '{path}' "
                f"({size.inputs} inputs, {size.outputs} outputs), found {rank}"
            )


def _fitting(lengths: Lengths | None, architecture: ResolvedArchitecture) -> Lengths:
    """Check lengths against the number of positions that the backbone has, or choose lengths that fit it."""
    most, has_target = architecture.max_length, architecture.kind == "decoder"  # its target follows the input
    if lengths is None:
        default = Lengths()
        if most is None:
            return default
        target = min(default.target, most // 4) if has_target else default.target
        room = most - target if has_target else most
        return default.model_copy(update={"input": min(default.input, room), "target": target})
    taken, name = lengths.input, "data.max_length"
    if has_target:
        taken, name = lengths.input + lengths.target, "data.max_length + data.max_target_length"
    if most is not None and taken > most:
        raise RecipeError(f"{name}: the backbone takes at most {most} tokens, found {taken}; lower it")
    return lengths
