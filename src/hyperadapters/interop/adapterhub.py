"""Export of a task as a parallel bottleneck adapter ("ParBn") of the package `adapters` (AdapterHub)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hyperadapters.errors import ExportError, unknown_name
from hyperadapters.interop.task_files import HEAD_FILE, write_changed_tokenizer, write_task_files
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.utils.files import new_folder

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter.safetensors"
FORMAT_VERSION = "adapters.1.3.0"
"""Release of AdapterHub that defines the format, with which the exported files were tested."""


class _Paths(NamedTuple):
    """Paths of the modules that contain the adapters of an architecture, with a placeholder for the layer."""

    generated: str
    shared: str = ""


_T5 = _Paths("decoder.block.{}.layer.2", "encoder.block.{}.layer.1")
_BERT = _Paths("encoder.layer.{}.output")
PATHS = {"t5": _T5, "mt5": _T5, "bert": _BERT, "roberta": _BERT, "xlm-roberta": _BERT}


class _Bottleneck(NamedTuple):
    """Weights of an adapter in the layout of `torch.nn.Linear`: [a, d], [a], [d, a] and [d]."""

    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor


_PARTS = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
_LINEARS = ("down.weight", "down.bias", "up.weight", "up.bias")
"""Names of these weights in AdapterHub's adapters, and in `LearnedBottleneck`."""


def export_adapterhub(model: HyperAdapterModel, task: str, folder: str | Path) -> list[str]:
    """Write a task for `load_adapter(folder, use_safetensors=True)` of the package `adapters`.

    With the adapter, the backbone computes the hidden states (for text-to-text backbones, the logits) that
    `HyperAdapterModel.forward` computes for rows of the task. The labels and the head are written as in the other
    formats (see `task_files.write_task_files`).

    Args:
        model: Model, which is not changed.
        task: Name of the task.
        folder: Folder to create, which must not exist or be empty.

    Returns:
        Notes for the user, a sentence each.

    Raises:
        TaskError: If the task is unknown, or the method of the model has no adapters of tasks.
        ExportError: If AdapterHub's parallel adapters cannot represent those of the model.
        OutputError: If the folder is not empty or cannot be written.
    """
    task_id = model.task_id(task)
    _check(model)
    name, adapters = adapter_name(task), _adapters(model, task_id)
    with new_folder(folder) as new:
        save_file(_tensors(name, adapters), new / WEIGHTS_FILE)
        config = json.dumps(_config(model, name, list(adapters.values())), ensure_ascii=False, indent=2) + "\n"
        (new / CONFIG_FILE).write_text(config, encoding="utf-8")
        write_task_files(model, task, new)
        write_changed_tokenizer(model, new)
    if model.heads is None:
        return []
    return [f"AdapterHub has no head that reads the mean of the tokens: apply {HEAD_FILE} as docs/export.md says"]


def adapter_name(task: str) -> str:
    """Return the name of a task's adapter: the name of the task, changed if it is not a valid key of a `ModuleDict`.

    Args:
        task: Name of the task.
    """
    name = task.replace(".", "_")
    return f"{name}_task" if hasattr(nn.ModuleDict(), name) else name


def reduction_factor(hidden_size: int, bottleneck_dim: int) -> float:
    """Return the factor with which AdapterHub computes the bottleneck's size as `int(hidden_size // factor)`.

    The quotient of the two sizes is adjusted if rounding would make the result too small.

    Args:
        hidden_size: Hidden size d of the backbone.
        bottleneck_dim: Size a of the bottleneck.
    """
    factor = hidden_size / bottleneck_dim
    return factor if int(hidden_size // factor) == bottleneck_dim else hidden_size / (bottleneck_dim + 0.5)


def _check(model: HyperAdapterModel) -> None:
    model_type, form = _model_type(model), model.adapter_config.form
    if form != "bottleneck":
        raise ExportError(
            f"AdapterHub's parallel adapters have form 'bottleneck', but those of this model have form '{form}'; "
            "export to PEFT, or train with the setting model.form: bottleneck"
        )
    if model_type not in PATHS:
        raise ExportError(unknown_name("architecture for AdapterHub", model_type, PATHS))
    if model.text_to_text and model.adapter_config.adapter_norm_input:
        raise ExportError(
            "the adapters of this model read the input of their feed-forward block after the layer norm, but those of "
            f"AdapterHub for '{model_type}' read it before; train with the setting model.adapter_norm_input: false"
        )


def _model_type(model: HyperAdapterModel) -> str:
    return str(getattr(getattr(model.backbone, "config", None), "model_type", None))


@torch.no_grad()
def _adapters(model: HyperAdapterModel, task_id: int) -> dict[str, _Bottleneck]:
    """Return the adapters by the paths of their modules, in AdapterHub's order of layers, the encoder first."""
    paths, first = PATHS[_model_type(model)], _first_layer(model)
    found = {}
    for index, shared in enumerate(model.shared_adapters, start=first):
        found[paths.shared.format(index)] = _Bottleneck(*(shared.get_parameter(name) for name in _LINEARS))
    weights = model.method.adapters(torch.tensor([task_id], device=model.device))
    layers = zip(*(weights[name][:, 0] for name in _Bottleneck._fields), strict=True)
    for index, (down, down_bias, up, up_bias) in enumerate(layers, start=0 if model.text_to_text else first):
        found[paths.generated.format(index)] = _Bottleneck(down.T, down_bias, up.T, up_bias)
    return found


def _first_layer(model: HyperAdapterModel) -> int:
    """Return the index of the first layer with an adapter; all layers above it have one."""
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
    factors = [reduction_factor(model.hidden_size, len(adapter.down_bias)) for adapter in adapters]
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
        "hidden_size": model.hidden_size,
        "model_class": type(model.backbone).__name__,
        "model_name": model.backbone_name or "",
        "model_type": _model_type(model),
        "name": name,
        "version": FORMAT_VERSION,
    }
