"""Which tasks and settings a backbone can take."""

from __future__ import annotations

from collections.abc import Sequence

from hyperadapters.config import Lengths, ModelConfig, Task, check_task_names
from hyperadapters.errors import RecipeError, TaskError
from hyperadapters.hosts.sites import Sites


def check_tasks(tasks: Sequence[Task], sites: Sites) -> None:
    """Check that a model of these tasks can be made on a backbone.

    Raises:
        TaskError: no task, two of one name, a text-to-text task for a backbone with heads, or labels not known.
    """
    try:
        check_task_names(tuple(tasks))
    except ValueError as error:
        raise TaskError(str(error)) from None
    for task in tasks:
        if task.kind == "text-to-text" and sites.kind != "encoder-decoder":
            raise TaskError(
                f"task '{task.name}' is text-to-text, which needs an encoder-decoder backbone such as T5; "
                "this backbone has classification and regression heads"
            )
        if task.kind == "classification" and not task.labels:
            raise TaskError(f"task '{task.name}': labels are not known; give them")


def place(config: ModelConfig, sites: Sites) -> ModelConfig:
    """Check the settings against a backbone, and fill in the preset and the layer of an encoder's features.

    Raises:
        RecipeError: a setting does not fit the backbone.
    """
    config = config.for_backbone(has_heads=sites.kind != "encoder-decoder")
    if sites.kind == "encoder-decoder":
        if config.head_inputs != "adapted":
            raise RecipeError(
                f"head_inputs: '{config.head_inputs}' (preset 'plus' sets it) is for encoders, which have task heads; "
                "an encoder-decoder writes its answers: use preset 'paper'"
            )
        if config.features != "layer":
            raise RecipeError(
                f"features: '{config.features}' is for encoders; an encoder-decoder reads its encoder's output"
            )
        if config.feature_layer is not None:
            raise RecipeError("feature_layer: an encoder-decoder reads features from its encoder's output; remove it")
        _check_frozen_layers(config, sites)
        return config
    if config.preset == "official":
        raise RecipeError("preset 'official' is for encoder-decoder backbones, as the released code is; use 'paper'")
    if config.shared_adapter_dim is not None:
        raise RecipeError("shared_adapter_dim: encoder backbones have no shared adapters; remove it")
    if config.frozen_encoder_layers:
        raise RecipeError("frozen_encoder_layers: an encoder is frozen below its feature_layer; set that instead")
    num_layers = len(sites.generated.layers)
    feature_layer = num_layers // 2 if config.feature_layer is None else config.feature_layer
    if feature_layer >= num_layers:
        raise RecipeError(
            f"feature_layer: expected 0 to {num_layers - 1} (the backbone has {num_layers} layers, and adapters are "
            f"generated above it), found {feature_layer}"
        )
    return config.model_copy(update={"feature_layer": feature_layer})


def _check_frozen_layers(config: ModelConfig, sites: Sites) -> None:
    num_layers = len(sites.shared.layers) if sites.shared else 0
    if config.frozen_encoder_layers > num_layers:
        raise RecipeError(
            f"frozen_encoder_layers: expected 0 to {num_layers}, the encoder's layers, "
            f"found {config.frozen_encoder_layers}"
        )
    if config.preset == "official" and config.frozen_encoder_layers:
        raise RecipeError("frozen_encoder_layers: preset 'official' adapts every encoder layer; remove it")


def fit_lengths(lengths: Lengths | None, sites: Sites) -> Lengths:
    """Check lengths against a backbone, or choose them.

    Raises:
        RecipeError: the backbone has no positions for inputs of that length.
    """
    if lengths is None:
        default = Lengths()
        return default.model_copy(update={"input": min(default.input, sites.max_length or default.input)})
    if sites.max_length is not None and lengths.input > sites.max_length:
        raise RecipeError(
            f"data.max_length: the backbone takes at most {sites.max_length} tokens, found {lengths.input}; lower it"
        )
    return lengths
