"""Which tasks and settings a backbone can take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
from hyperadapters.backbones.injection import parameter_name
from hyperadapters.config import Lengths, ModelConfig, Task, check_task_names
from hyperadapters.errors import RecipeError, TaskError


def check_tasks(tasks: Sequence[Task], architecture: ResolvedArchitecture) -> None:
    """Check that a model of these tasks can be made on a backbone.

    Raises:
        TaskError: no task, two of one name, a text-to-text task for a backbone with heads, or labels not known.
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
        if task.kind == "text-to-text" and architecture.kind == "encoder":
            raise TaskError(
                f"task '{task.name}' is text-to-text, which needs an encoder-decoder backbone such as T5 or a "
                "decoder-only one such as GPT-2; this backbone has classification and regression heads"
            )
        if task.kind == "classification" and not task.labels:
            raise TaskError(f"task '{task.name}': labels are not known; give them")


def place(config: ModelConfig, architecture: ResolvedArchitecture) -> ModelConfig:
    """Check the settings against a backbone, and fill in the preset, the layer of the features and target modules.

    Raises:
        RecipeError: a setting does not fit the backbone.
    """
    for name, reason in without_effect(config, architecture).items():
        raise RecipeError(f"{name}: {reason}; remove it")
    config = config.for_backbone(has_heads=architecture.kind == "encoder")
    if architecture.kind != "encoder":
        _check_text_to_text(config)
    if config.form == "lora" and config.target_modules is None:
        if not architecture.target_modules:
            raise RecipeError(
                "target_modules: which linear layers form 'lora' is to change is not known here; name them"
            )
        config = config.model_copy(update={"target_modules": architecture.target_modules})
    for target in config.target_modules or ():
        if target.rpartition(".")[2] in architecture.not_by_row:
            raise RecipeError(
                f"target_modules: '{target}' of this backbone also maps what is no row of a batch, so rows cannot "
                f"differ in it; name others, by default: {', '.join(architecture.target_modules)}"
            )
    if architecture.kind == "encoder-decoder":
        if config.feature_layer is not None:
            raise RecipeError("feature_layer: an encoder-decoder reads features from its encoder's output; remove it")
        if config.preset == "official" and architecture.generated.row.norm is None:
            raise RecipeError("preset 'official' is for T5, as the released code is; use 'paper'")
        _check_frozen_layers(config, architecture)
        return config
    if config.preset == "official":
        raise RecipeError("preset 'official' is for encoder-decoder backbones, as the released code is; use 'paper'")
    if config.shared_adapter_dim is not None:
        raise RecipeError(f"shared_adapter_dim: {architecture.kind} backbones have no shared adapters; remove it")
    if config.frozen_encoder_layers:
        raise RecipeError(
            f"frozen_encoder_layers: this {architecture.kind} is frozen below its feature_layer; set that instead"
        )
    num_layers = len(architecture.generated.layers)
    feature_layer = num_layers // 2 if config.feature_layer is None else config.feature_layer
    if feature_layer >= num_layers:
        raise RecipeError(
            f"feature_layer: expected 0 to {num_layers - 1} (the backbone has {num_layers} layers, and adapters are "
            f"generated above it), found {feature_layer}"
        )
    return config.model_copy(update={"feature_layer": feature_layer})


def without_effect(config: ModelConfig, architecture: ResolvedArchitecture) -> dict[str, str]:
    """Settings that were chosen and change nothing on a backbone, each with the reason."""
    num_shared = len(architecture.shared.layers) if architecture.shared else 0
    useless = {
        "adapter_norm_input": (
            architecture.generated.row.norm is None,
            "this backbone norms its hidden states outside of the feed-forward, and the setting is for T5, whose "
            "feed-forward norms its own input",
        ),
        "label_names": (
            architecture.kind != "encoder",
            "is for encoders, which have task heads, and this backbone writes its answers",
        ),
        "shared_adapter_dim": (
            architecture.kind == "encoder-decoder" and config.frozen_encoder_layers >= num_shared,
            "with all encoder layers frozen there are no shared adapters",
        ),
    }
    return {name: reason for name, (is_useless, reason) in useless.items() if is_useless and config.is_chosen(name)}


def drop_settings_without_effect(config: ModelConfig, architecture: ResolvedArchitecture) -> ModelConfig:
    """The settings of a checkpoint without those that are refused now because they have no effect on its backbone."""
    defaults = {name: type(config).model_fields[name].default for name in without_effect(config, architecture)}
    return config.model_copy(update=defaults)


def _check_text_to_text(config: ModelConfig) -> None:
    """Check what only backbones with heads have."""
    if config.head_inputs != "adapted":
        raise RecipeError(
            f"head_inputs: '{config.head_inputs}' (preset 'plus' sets it) is for encoders, which have task heads; "
            "this backbone writes its answers: use preset 'paper'"
        )
    if config.features != "layer":
        raise RecipeError(f"features: '{config.features}' is for encoders, found a backbone that writes its answers")


def _check_frozen_layers(config: ModelConfig, architecture: ResolvedArchitecture) -> None:
    num_layers = len(architecture.shared.layers) if architecture.shared else 0
    if config.frozen_encoder_layers > num_layers:
        raise RecipeError(
            f"frozen_encoder_layers: expected 0 to {num_layers}, the encoder's layers, "
            f"found {config.frozen_encoder_layers}"
        )
    if config.preset == "official" and config.frozen_encoder_layers:
        raise RecipeError("frozen_encoder_layers: preset 'official' adapts every encoder layer; remove it")


def check_rank(config: ModelConfig, linears: Mapping[str, LinearSize]) -> None:
    """Check the rank of form "lora" against the linear layers that it changes.

    Raises:
        RecipeError: it is larger than one of them.
    """
    for path, size in linears.items():
        if config.lora_rank > min(size):
            raise RecipeError(
                f"lora_rank: expected at most {min(size)}, the smaller side of '{path}' "
                f"({size.inputs} inputs, {size.outputs} outputs), found {config.lora_rank}"
            )


def fit_lengths(lengths: Lengths | None, architecture: ResolvedArchitecture) -> Lengths:
    """Check lengths against a backbone, or choose them.

    Raises:
        RecipeError: the backbone has no positions for inputs of that length.
    """
    most = architecture.max_length
    if lengths is None:
        default = Lengths()
        if most is None:
            return default
        target = min(default.target, most // 4) if architecture.kind == "decoder" else default.target
        room = most - target if architecture.kind == "decoder" else most
        return default.model_copy(update={"input": min(default.input, room), "target": target})
    taken, what = lengths.input, "data.max_length"
    if architecture.kind == "decoder":  # the answer follows the input
        taken, what = lengths.input + lengths.target, "data.max_length + data.max_target_length"
    if most is not None and taken > most:
        raise RecipeError(f"{what}: the backbone takes at most {most} tokens, found {taken}; lower it")
    return lengths


@dataclass(frozen=True)
class Plan:
    """What a model will be, resolved and checked before anything is changed."""

    architecture: ResolvedArchitecture
    tasks: tuple[Task, ...]
    config: ModelConfig
    lengths: Lengths
    linears: tuple[dict[str, LinearSize], dict[str, LinearSize]]
    num_layers: int
    num_shared: int
    device: torch.device

    def linears_by_parameter(self, stack: int) -> dict[str, LinearSize]:
        return {parameter_name(path): size for path, size in self.linears[stack].items()}


def plan(backbone: nn.Module, tasks: Sequence[Task], config: ModelConfig, lengths: Lengths | None) -> Plan:
    """Resolve and check."""
    architecture = resolve_architecture(backbone, config.modules)
    check_tasks(tasks, architecture)
    tasks, device = tuple(tasks), execution_device(backbone)
    config, lengths = place(config, architecture), fit_lengths(lengths, architecture)
    if config.modules is not None and config.form == "bottleneck":
        check_feed_forward(architecture.generated, architecture.hidden_size)
    num_layers = len(architecture.generated.layers) - (config.feature_layer or 0)
    linears = _linears(config, architecture)
    num_shared = len(architecture.shared.layers) - config.frozen_encoder_layers if architecture.shared else 0
    return Plan(architecture, tasks, config, lengths, linears, num_layers, num_shared, device)


def _linears(
    config: ModelConfig, architecture: ResolvedArchitecture
) -> tuple[dict[str, LinearSize], dict[str, LinearSize]]:
    """The linear layers that form "lora" changes in the stack with generated adapters, and in the shared one."""
    if config.form != "lora":
        return {}, {}
    assert config.target_modules is not None
    generated = find_linears(architecture.generated, config.feature_layer or 0, config.target_modules)
    shared: dict[str, LinearSize] = {}
    if architecture.shared is not None:
        shared = find_linears(architecture.shared, config.frozen_encoder_layers, config.target_modules)
    for linears in (generated, shared):
        check_rank(config, linears)
    return generated, shared
