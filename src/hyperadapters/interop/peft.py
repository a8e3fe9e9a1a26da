"""Tasks of form "lora" as PEFT LoRA folders, which PEFT, vLLM and LoRAX read; and such a folder as a task's adapter."""

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
from hyperadapters.errors import CheckpointError, did_you_mean
from hyperadapters.interop.task_files import read_backbone, write_changed_tokenizer, write_task_files
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.utils.files import new_folder
from hyperadapters.utils.optional import require

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = "hyperadapters_index.json"
PREFIX = "base_model.model."
VLLM_DEFAULT_RANK, LORAX_RANK = 16, 128
SERVED = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"),
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
"""Linear maps, by architecture, that vLLM and LoRAX change by a LoRA; they leave out a folder's others."""
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
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the base weights too
}
"""Values of fields of PEFT's config under which an adapter only adds `scale * x A B` to some linear layers."""


def export_peft(model: HyperAdapterModel, task: str, folder: str | Path) -> list[str]:
    """Write a task as a PEFT LoRA: `adapter_config.json`, `adapter_model.safetensors`, its labels and its head.

    PEFT loads it onto the same backbone: `PeftModel.from_pretrained(backbone, folder)`.

    Returns:
        What stands in the way of serving it with vLLM or LoRAX, a sentence each; see `serving_notes`.

    Raises:
        TaskError: there is no such task, or the model is not of form "lora".
        OutputError: the folder is there already, or cannot be written.
        MissingPackageError: PEFT is not installed.
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
    """Write every task into a folder of its name, as `export_peft` does, and `hyperadapters_index.json` beside them.

    Returns, Raises: see `export_peft`.
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
    """Why vLLM or LoRAX would refuse the exported folders, or leave out a part of them; empty if they would not."""
    config, notes = model.adapter_config, []
    if model.kind != "decoder":
        return [f"vLLM and LoRAX serve LoRAs of decoder-only language models; this backbone is an {model.kind}"]
    model_type = getattr(getattr(model.backbone, "config", None), "model_type", None)
    if model_type not in SERVED:
        notes.append(f"it was not checked which linear layers of '{model_type}' vLLM and LoRAX change by a LoRA")
    else:
        ignored = sorted({place.path.split(".")[-1] for place in model.adapted_linears()} - {*SERVED[model_type]})
        if ignored:
            notes.append(f"vLLM and LoRAX would leave out the changes of {', '.join(ignored)}")
    if config.lora_rank > VLLM_DEFAULT_RANK:
        notes.append(f"vLLM needs --max-lora-rank {config.lora_rank} or the next larger one that it has")
    if config.lora_rank > LORAX_RANK:
        notes.append(f"LoRAX's kernels take ranks up to {LORAX_RANK}, found {config.lora_rank}")
    return notes


def _config(model: HyperAdapterModel) -> Any:
    """PEFT's config of the model's adapters."""
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
    """Path of the list of layers, path in the layer, and index of the layer of a module."""
    parts = path.split(".")
    place = next(i for i, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[:place]), ".".join(parts[place + 1 :]), int(parts[place])


def import_peft(model: HyperAdapterModel, task: str, folder: str | Path, check_backbone: bool = True) -> None:
    """Give a task of the model the LoRA of a PEFT folder as its own adapter.

    What is learned further starts from there (`refit_task` with `fit="adapter"`). The folder may have a lower rank
    than the model, another scale, and fewer layers or linear layers.

    Args:
        model: of form "lora".
        task: one of its tasks.
        folder: that PEFT, or `export_peft`, wrote.
        check_backbone: whether to refuse a folder of a backbone with another fingerprint, or where the folder has none,
            as those of PEFT, with another name (the part after the last slash).

    Raises:
        TaskError: there is no such task, the model is not of form "lora", or its method is not "pha": the tasks of
            others do not change after training.
        CheckpointError: the folder is none of PEFT's LoRAs, is damaged, has more than a LoRA, is of another backbone,
            or changes what the model does not.
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
                f"{folder}: changes '{path}', which this model does not: its target_modules, or the layers above "
                f"feature_layer, leave it out.{did_you_mean(path, places)}"
            )
        place, known = places[path], loras[path]
        if place.is_shared:
            raise CheckpointError(
                f"{folder}: changes '{path}' of the encoder, whose adapters all tasks share; make a model with "
                "frozen_encoder_layers for a LoRA of the decoder alone"
            )
        rank = down.shape[1]
        fits = rank <= known.down.shape[1] and (len(down), up.shape[1]) == (len(known.down), known.up.shape[1])
        if not fits or rank != len(up):
            raise CheckpointError(
                f"{folder}: '{path}' has shapes {tuple(down.shape)} and {tuple(up.shape)}; expected "
                f"{tuple(known.down.shape)} and {tuple(known.up.shape)}, or a lower rank"
            )
        own[f"down_{place.name}"][place.layer, 0, :, :rank] = down.to(own[f"down_{place.name}"])
        own[f"up_{place.name}"][place.layer, 0, :rank] = factor * up.to(own[f"up_{place.name}"])
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
            f"{'' if reference is None else ' with other weights'}; import it into a model of that backbone, or with "
            "check_backbone=False if you know that both are the same"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: Any = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: expected a PEFT adapter with {CONFIG_FILE} in it: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{folder}: expected a PEFT adapter of type LORA, found {found}")
    numbers = {name: config.get(name) for name in ("r", "lora_alpha")}
    if not all(isinstance(value, int | float) and value > 0 for value in numbers.values()):
        raise CheckpointError(f"{folder}: expected r and lora_alpha above 0 in {CONFIG_FILE}, found {numbers}")
    for name, plain in _PLAIN.items():
        if config.get(name) not in plain:
            raise CheckpointError(
                f"{folder}: {name} is {config[name]!r}, which is more than a plain LoRA; train it without, or let "
                "PEFT save it as one, which it can for some kinds (path_initial_model_for_weight_conversion)"
            )
    return config


def _read_tensors(folder: Path, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The low-rank maps of a folder, [i, r] and [r, o], by the paths of the backbone's modules."""
    path = folder / WEIGHTS_FILE
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, _, part = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not name.startswith(PREFIX) or part not in ("lora_A", "lora_B") or tensor.ndim != 2:
            raise CheckpointError(f"{path}: '{name}' is no part of the LoRA of a linear layer")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: '{name}' has values that are not finite; its training diverged")
        if tensor.shape[part == "lora_B"] != rank:
            raise CheckpointError(
                f"{path}: '{name}' has shape {tuple(tensor.shape)}; expected rank {rank}, as {CONFIG_FILE} says"
            )
        found.setdefault(module, {})[part] = tensor
    if not found:
        raise CheckpointError(f"{path}: holds no tensors; the file is damaged")
    for module, sides in found.items():
        if len(sides) != 2:
            raise CheckpointError(f"{path}: '{module}' has lora_A or lora_B alone; the file is damaged")
    return {module: (sides["lora_A"].T, sides["lora_B"].T) for module, sides in found.items()}
