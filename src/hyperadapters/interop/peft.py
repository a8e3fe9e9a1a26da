"""Export of tasks of form "lora" to PEFT, vLLM and LoRAX, and import of a PEFT LoRA as the adapter of a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hyperadapters._version import __version__
from hyperadapters.checkpoints.format import BackboneReference
from hyperadapters.core import AdapterWeights
from hyperadapters.errors import CheckpointError, did_you_mean, shown
from hyperadapters.interop.task_files import read_backbone, write_changed_tokenizer, write_task_files
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.utils.files import new_folder
from hyperadapters.utils.optional import require
from hyperadapters.utils.reading import parse_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = "hyperadapters_index.json"
PREFIX = "base_model.model."
VLLM_DEFAULT_RANK, LORAX_RANK = 16, 128
MAX_NUMBER = 2**31
"""Limit of the rank and of alpha."""
SERVED = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"),
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
"""Linear layers that vLLM and LoRAX adapt in each architecture; they ignore the other layers of a folder."""
_PLAIN: dict[str, tuple[Any, ...]] = {
    "modules_to_save": (None, []),
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "init_lora_weights": (
        True,
        False,
        None,
        "gaussian",
        "orthogonal",
        "eva",
    ),  # the other values also change the base weights
}
"""Values of fields of PEFT's configuration with which an adapter only adds `scale * x A B` to some linear layers."""


def export_peft(model: HyperAdapterModel, task: str, folder: str | Path) -> list[str]:
    """Write a task as a PEFT LoRA: `adapter_config.json`, `adapter_model.safetensors`, its labels and its head.

    PEFT loads it for the same backbone with `PeftModel.from_pretrained(backbone, folder)`.

    Args:
        model: Model of form "lora", which is not changed.
        task: Name of the task.
        folder: Folder to create, which must not exist or be empty.

    Returns:
        Notes on serving the LoRA, as `serving_notes` returns them.

    Raises:
        TaskError: If the task is unknown, or the model does not have form "lora".
        OutputError: If the folder is not empty or cannot be written.
        MissingPackageError: If PEFT is not installed.
    """
    loras = model.task_loras(task)
    config, tensors = _config(model), {}
    for path, lora in loras.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = lora.down.T.cpu().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = lora.up.T.cpu().contiguous()
    with new_folder(folder) as new:
        config.save_pretrained(str(new))
        safetensors.torch.save_file(tensors, new / WEIGHTS_FILE, metadata={"format": "pt"})
        write_task_files(model, task, new)
        write_changed_tokenizer(model, new)
    return serving_notes(model)


def export_all_peft(model: HyperAdapterModel, folder: str | Path) -> list[str]:
    """Write every task to a folder with its name, as `export_peft` does, and an index `hyperadapters_index.json`.

    The result and errors are those of `export_peft`.

    Args:
        model: Model of form "lora", which is not changed.
        folder: Folder to create, which must not exist or be empty.
    """
    with new_folder(folder) as new:
        for task in model.tasks:
            export_peft(model, task.name, new / task.name)
        index = {
            "library_version": __version__,
            "backbone": BackboneReference.of(model).model_dump(),
            "tasks": {task.name: {"folder": task.name, "kind": task.kind} for task in model.tasks},
        }
        (new / INDEX_FILE).write_text(json.dumps(index, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return serving_notes(model)


def serving_notes(model: HyperAdapterModel) -> list[str]:
    """Return the reasons why vLLM or LoRAX cannot serve the exported LoRAs or ignore a part of them, a sentence each.

    Args:
        model: Model of form "lora".
    """
    config, notes = model.adapter_config, []
    if model.kind != "decoder":
        return [f"vLLM and LoRAX only serve LoRAs of decoder-only language models; this backbone is an {model.kind}"]
    model_type = getattr(getattr(model.backbone, "config", None), "model_type", None)
    if model_type not in SERVED:
        notes.append(f"it has not been tested which linear layers of '{model_type}' vLLM and LoRAX adapt")
    else:
        ignored = sorted({place.path.split(".")[-1] for place in model.adapted_linears()} - {*SERVED[model_type]})
        if ignored:
            notes.append(f"vLLM and LoRAX ignore the LoRAs of {', '.join(ignored)}")
    if config.lora_rank > VLLM_DEFAULT_RANK:
        notes.append(f"vLLM requires --max-lora-rank {config.lora_rank} or the next larger supported value")
    if config.lora_rank > LORAX_RANK:
        notes.append(f"LoRAX supports ranks up to {LORAX_RANK}, found {config.lora_rank}")
    return notes


def _config(model: HyperAdapterModel) -> Any:
    """Return PEFT's configuration of the model's adapters."""
    peft = require("peft")
    places, config = model.adapted_linears(), model.adapter_config
    task_types = {"encoder": "FEATURE_EXTRACTION", "encoder-decoder": "SEQ_2_SEQ_LM", "decoder": "CAUSAL_LM"}
    where: dict[str, Any] = {"target_modules": list(config.target_modules or ())}
    if config.feature_layer:
        layers, _, index = _layer_of(places[0].path)
        where["layers_to_transform"] = list(range(index, index + 1 + max(place.layer for place in places)))
        where["layers_pattern"] = layers.rpartition(".")[2]
    elif config.frozen_encoder_layers:
        where["target_modules"] = [place.path for place in places]  # the layers of the two stacks differ
    linear = model.backbone.get_submodule(places[0].path) if places else None
    return peft.LoraConfig(
        task_type=task_types[model.kind],
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        fan_in_fan_out=isinstance(linear, Conv1D),
        base_model_name_or_path=model.backbone_name,
        inference_mode=True,
        **where,
    )


def _layer_of(path: str) -> tuple[str, str, int]:
    """Return the path of the list of layers, the path in the layer, and the index of the layer of a module."""
    parts = path.split(".")
    place = next(i for i, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[:place]), ".".join(parts[place + 1 :]), int(parts[place])


def import_peft(model: HyperAdapterModel, task: str, folder: str | Path, check_backbone: bool = True) -> None:
    """Load the LoRA in a PEFT folder as the own adapter of a task.

    Further training with `refit_task(..., fit="adapter")` starts from it. The LoRA may have a smaller rank than the
    model, another scale, and fewer layers or linear layers.

    Args:
        model: Model of form "lora", which is changed in place.
        task: Name of the task.
        folder: Folder that PEFT or `export_peft` wrote.
        check_backbone: If True (default), a folder for another backbone is refused. Backbones are compared by
            fingerprint, or, for folders without one such as those of PEFT, by the last part of their names.

    Raises:
        TaskError: If the task is unknown, the model does not have form "lora", or its method is not "pha", since tasks
            of other methods cannot change after training.
        CheckpointError: If the folder is not a LoRA of PEFT, is damaged, has additional changes of the backbone,
            belongs to another backbone, or adapts layers that the model does not adapt.
    """
    model.method.check_can_change_tasks()
    loras, folder = model.task_loras(task), Path(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder, config["r"])
    if check_backbone:
        _check_backbone(model, folder, config.get("base_model_name_or_path"))
    places = {place.path: place for place in model.adapted_linears()}
    weights = model.method.adapters(torch.tensor([model.task_id(task)], device=model.device))
    own = AdapterWeights({name: torch.zeros_like(tensor) for name, tensor in weights.items()})
    root = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
    factor = config["lora_alpha"] / root / model.adapter_config.lora_scale
    for path, (down, up) in tensors.items():
        if path not in places:
            raise CheckpointError(
                f"{folder}: adapts '{path}', which is not in the model's target_modules or not in the layers above its "
                f"feature_layer.{did_you_mean(path, places)}"
            )
        place, known = places[path], loras[path]
        if place.is_shared:
            raise CheckpointError(
                f"{folder}: adapts '{path}' of the encoder, whose adapters are shared by all tasks; import a LoRA of "
                "the decoder only, into a model with frozen_encoder_layers"
            )
        rank = down.shape[1]
        fits = rank <= known.down.shape[1] and (len(down), up.shape[1]) == (len(known.down), known.up.shape[1])
        if not fits or rank != len(up):
            raise CheckpointError(
                f"{folder}: '{path}' has shapes {tuple(down.shape)} and {tuple(up.shape)}; expected "
                f"{tuple(known.down.shape)} and {tuple(known.up.shape)}, or a smaller rank"
            )
        own[f"down_{place.name}"][place.layer, 0, :, :rank] = down.to(own[f"down_{place.name}"])
        scaled = factor * up.to(own[f"up_{place.name}"])
        if not scaled.isfinite().all():
            raise CheckpointError(
                f"{folder}: '{path}' has values that are not finite when they are multiplied by {factor}; correct "
                f"lora_alpha in {CONFIG_FILE}"
            )
        own[f"up_{place.name}"][place.layer, 0, :rank] = scaled
    states = model.task_table.states()
    states[model.task_id(task)].own_adapter = own
    model.task_table.replace(states)


def _check_backbone(model: HyperAdapterModel, folder: Path, name: str | None) -> None:
    reference = read_backbone(folder)
    if reference is not None:
        is_same, name = reference.is_of(model), reference.name
    else:
        is_same = not name or not model.backbone_name or Path(name).name == Path(model.backbone_name).name
    if not is_same:
        raise CheckpointError(
            f"{folder}: was trained on backbone '{name}', this model has '{model.backbone_name}'"
            f"{'' if reference is None else ' with other weights'}; import it into a model with that backbone, or set "
            "check_backbone=False if both backbones are the same"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: Any = parse_json((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: expected a PEFT adapter with {CONFIG_FILE} in it: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(
            f"{folder}: expected a PEFT adapter of type LORA, found {found if isinstance(found, str) else shown(found)}"
        )
    _check_values(folder, config)
    for name, plain in _PLAIN.items():
        if config.get(name) not in plain:
            raise CheckpointError(
                f"{folder}: {name} is {shown(config[name])}, expected a plain LoRA; train without this setting, or "
                "convert the adapter with PEFT, which supports it for some kinds "
                "(path_initial_model_for_weight_conversion)"
            )
    return config


def _check_values(folder: Path, config: dict[str, Any]) -> None:
    numbers = {name: config.get(name) for name in ("r", "lora_alpha")}
    if not all(isinstance(value, int | float) and 0 < value < MAX_NUMBER for value in numbers.values()):
        raise CheckpointError(
            f"{folder}: expected r and lora_alpha above 0 and below 2 ** 31 in {CONFIG_FILE}, found {shown(numbers)}"
        )
    if not isinstance(name := config.get("base_model_name_or_path"), str | None):
        raise CheckpointError(f"{folder}: expected the name of a backbone in {CONFIG_FILE}, found {shown(name)}")


def _read_tensors(folder: Path, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the matrices [i, r] and [r, o] of each LoRA in a folder, by the paths of the backbone's modules."""
    path = folder / WEIGHTS_FILE
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, _, part = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not name.startswith(PREFIX) or part not in ("lora_A", "lora_B") or tensor.ndim != 2:
            raise CheckpointError(f"{path}: '{name}' is not part of the LoRA of a linear layer")
        if not tensor.is_floating_point() or tensor.element_size() == 1:  # types of 8 bits need a scale
            raise CheckpointError(
                f"{path}: '{name}' has type {tensor.dtype}, expected floating-point numbers of 16 bits or more"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: '{name}' has values that are not finite, because its training diverged")
        if tensor.shape[part == "lora_B"] != rank:
            raise CheckpointError(
                f"{path}: '{name}' has shape {tuple(tensor.shape)}; expected rank {rank}, as in {CONFIG_FILE}"
            )
        found.setdefault(module, {})[part] = tensor
    if not found:
        raise CheckpointError(f"{path}: contains no tensors; the file is damaged")
    for module, sides in found.items():
        if len(sides) != 2:
            raise CheckpointError(f"{path}: '{module}' has only one of lora_A and lora_B; the file is damaged")
    return {module: (sides["lora_A"].T, sides["lora_B"].T) for module, sides in found.items()}
