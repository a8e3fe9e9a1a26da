"""One task as a parallel bottleneck adapter ("ParBn") of the package `adapters` (AdapterHub), with its head."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hyperadapters.errors import ExportError, unknown_name
from hyperadapters.files import new_folder
from hyperadapters.hosts.heads import Head
from hyperadapters.interop.folders import DESCRIPTION_FILE, describe, write_json
from hyperadapters.model import HyperAdapterModel

CONFIG_FILE, WEIGHTS_FILE, HEAD_FILE = "adapter_config.json", "adapter.safetensors", "head.safetensors"
FORMAT_VERSION = "adapters.1.3.0"
"""The release whose files these are, and which they were checked with."""


class _Paths(NamedTuple):
    """Of the modules that hold the adapters of an architecture's layers, with a place for the layer's number."""

    generated: str
    shared: str = ""


_T5 = _Paths("decoder.block.{}.layer.2", "encoder.block.{}.layer.1")
_BERT = _Paths("encoder.layer.{}.output")
PATHS = {"t5": _T5, "mt5": _T5, "bert": _BERT, "roberta": _BERT, "xlm-roberta": _BERT}


class _Bottleneck(NamedTuple):
    """An adapter's weights as `torch.nn.Linear` has them: [a, d], [a], [d, a], [d]."""

    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor


_PARTS = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
_LINEARS = ("down.weight", "down.bias", "up.weight", "up.bias")
"""Names of these weights in AdapterHub's adapters, and in `LearnedBottleneck`."""


def export_adapterhub(model: HyperAdapterModel, task: str, folder: str | Path) -> list[Path]:
    """Write a task of a model for `load_adapter(folder, use_safetensors=True)` of the package `adapters`.

    With the adapter, the hidden states (text-to-text: the logits) are those of `HyperAdapterModel.forward` for rows of
    the task. AdapterHub has no heads like those of this library, so an encoder task's head is in `head.safetensors`
    as one linear map; `hyperadapter_task.json` has the labels and says what the head reads (see docs/export.md).

    Args:
        model: it is left as it is.
        task: its name.
        folder: to be made; there must be nothing in it.

    Returns:
        The files.

    Raises:
        TaskError: there is no such task, or the model's method has no adapters of tasks.
        ExportError: AdapterHub's adapters have another arithmetic than the model's.
        OutputError: the folder has something in it, or cannot be written.
    """
    task_id, folder = model.task_id(task), Path(folder)
    _check(model)
    name, adapters = adapter_name(task), _adapters(model, task_id)
    description = describe(model, task_id)
    with new_folder(folder) as inside:
        save_file(_tensors(name, adapters), inside / WEIGHTS_FILE)
        write_json(inside / CONFIG_FILE, _config(model, name, list(adapters.values())))
        if model.heads is not None:
            head = model.heads.head(task_id)
            save_file(_linear(head), inside / HEAD_FILE)
            description["head"] = {"file": HEAD_FILE, **_what_it_reads(model, head)}
        write_json(inside / DESCRIPTION_FILE, description)
    return sorted(folder.iterdir())


def adapter_name(task: str) -> str:
    """The name of a task's adapter: the task's, changed where a `torch.nn.ModuleDict` cannot have it as a key."""
    name = task.replace(".", "_")
    return f"{name}_task" if hasattr(nn.ModuleDict(), name) else name


def reduction_factor(width: int, bottleneck_dim: int) -> float:
    """What AdapterHub divides d by, to get a: `int(width // factor)`, of which rounding may make one less."""
    factor = width / bottleneck_dim
    return factor if int(width // factor) == bottleneck_dim else width / (bottleneck_dim + 0.5)


def _check(model: HyperAdapterModel) -> None:
    model_type = _model_type(model)
    if model_type not in PATHS:
        raise ExportError(unknown_name("architecture for AdapterHub", model_type, PATHS))
    if model.text_to_text and model.adapter_config.adapter_norm_input:
        raise ExportError(
            "this model's adapters read the layer-normed input of their feed-forward, and AdapterHub's on "
            f"'{model_type}' read it as it is: train with the setting model.adapter_norm_input: false to export"
        )


def _model_type(model: HyperAdapterModel) -> str:
    return str(getattr(model.backbone.config, "model_type", None))


@torch.no_grad()
def _adapters(model: HyperAdapterModel, task_id: int) -> dict[str, _Bottleneck]:
    """The adapters by the path of their module, in the order in which AdapterHub counts layers: the encoder's first."""
    paths, first = PATHS[_model_type(model)], _first_layer(model)
    found = {}
    for index, shared in enumerate(model.shared_adapters, start=first):
        found[paths.shared.format(index)] = _Bottleneck(*(shared.get_parameter(name) for name in _LINEARS))
    weights = model.adapters(torch.tensor([task_id], device=model.thresholds.device))
    sites = zip(weights.down_weight, weights.down_bias, weights.up_weight, weights.up_bias, strict=True)
    for index, (down, down_bias, up, up_bias) in enumerate(sites, start=0 if model.text_to_text else first):
        found[paths.generated.format(index)] = _Bottleneck(down[0].T, down_bias[0], up[0].T, up_bias[0])
    return found


def _first_layer(model: HyperAdapterModel) -> int:
    """The first layer with an adapter; all layers above it have one."""
    config = model.adapter_config
    return config.frozen_encoder_layers if model.text_to_text else config.feature_layer or 0


def _tensors(name: str, adapters: dict[str, _Bottleneck]) -> dict[str, Tensor]:
    return {
        f"{path}.adapters.{name}.{part}": tensor.float().clone(memory_format=torch.contiguous_format)
        for path, adapter in adapters.items()
        for part, tensor in zip(_PARTS, adapter, strict=True)
    }


def _config(model: HyperAdapterModel, name: str, adapters: list[_Bottleneck]) -> dict[str, Any]:
    first = _first_layer(model)
    factors = [reduction_factor(model.width, len(adapter.down_bias)) for adapter in adapters]
    by_layer = {str(layer): factor for layer, factor in enumerate(factors, start=first)}
    return {
        "config": {
            "is_parallel": True,
            "mh_adapter": False,
            "output_adapter": True,
            "reduction_factor": factors[0] if len(set(factors)) == 1 else by_layer,
            "non_linearity": "relu",
            "scaling": 1.0,
            "leave_out": list(range(first)),
            "original_ln_before": False,
            "original_ln_after": True,
            "ln_before": False,
            "ln_after": False,
        },
        "hidden_size": model.width,
        "model_class": type(model.backbone).__name__,
        "model_name": model.backbone_name or "",
        "model_type": _model_type(model),
        "name": name,
        "version": FORMAT_VERSION,
    }


def _linear(head: Head) -> dict[str, Tensor]:
    """A head as one linear map, the scale of a regression's targets folded in."""
    return {
        "weight": head.weight.float() * head.target_std,
        "bias": head.bias.float() * head.target_std + head.target_mean,
    }


def _what_it_reads(model: HyperAdapterModel, head: Head) -> dict[str, Any]:
    """The parts of the head's inputs in their order; docs/export.md says how each is made."""
    config = model.adapter_config
    if head.weight.shape[1] == model.width:
        return {"reads": ["adapted"]}
    if config.head_inputs != "adapted":
        return {"reads": [config.head_inputs, "adapted"]}
    if config.features == "backbone":
        return {"reads": ["backbone", "adapted"]}
    return {"reads": ["layer", "adapted"], "layer": config.feature_layer}
