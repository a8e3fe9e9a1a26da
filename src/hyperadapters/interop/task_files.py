"""Files with the labels and the head of a task, which the formats of other libraries cannot represent."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import safetensors.torch

from hyperadapters._version import __version__
from hyperadapters.checkpoints.format import BackboneReference, changed_tokenizer
from hyperadapters.config import parse
from hyperadapters.errors import CheckpointError
from hyperadapters.heads.task_heads import Head
from hyperadapters.heads.unfitted import warn_of_unfitted_heads
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.utils.reading import parse_json

TASK_FILE = "hyperadapters_task.json"
HEAD_FILE = "hyperadapters_head.safetensors"
_PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
"""Names that transformers has for the kinds of tasks of encoders."""


def write_task_files(model: HyperAdapterModel, task: str, folder: Path) -> None:
    """Write the definition of a task, and its head if the backbone is an encoder.

    `hyperadapters_task.json` contains the attributes of `Task`, the name and fingerprints of the backbone, and `head`:
    the inputs of the head in their order (see docs/export.md), and the mean and standard deviation with which the
    output of a regression task is scaled. For a multi-label task it also has `thresholds`, the probabilities above
    which the labels are answers. `hyperadapters_head.safetensors` contains `weight` [C, inputs] and `bias` [C].

    Args:
        model: Model with the task.
        task: Name of the task.
        folder: Existing folder to write to.

    Raises:
        TaskError: If the task is unknown.
    """
    task_id = model.task_id(task)
    values: dict[str, Any] = {
        "library_version": __version__,
        "backbone": BackboneReference.of(model).model_dump(),
        "task": model.tasks[task_id].model_dump(mode="json"),
        "lengths": model.lengths.model_dump(mode="json"),
        "head": None,
    }
    if model.heads is not None:
        warn_of_unfitted_heads(model.heads, model.tasks)
        head = model.heads.unpack()[task_id].folded()
        values["head"] = _describe(model, head)
        if model.tasks[task_id].is_multi_label:
            values["head"]["thresholds"] = head.label_thresholds
        tensors = {"weight": head.weight.cpu().contiguous(), "bias": head.bias.cpu().contiguous()}
        safetensors.torch.save_file(tensors, folder / HEAD_FILE)
    text = json.dumps(values, ensure_ascii=False, indent=2) + "\n"
    (folder / TASK_FILE).write_text(text, encoding="utf-8")


def classifier_config(model: HyperAdapterModel, task_id: int) -> Any:
    """Return the backbone's configuration with the labels of a task, or None if the backbone has none of transformers.

    Args:
        model: Model with the task, which is not changed.
        task_id: Index of the task.
    """
    task, config = model.tasks[task_id], cast(Any, copy.deepcopy(getattr(model.backbone, "config", None)))
    if not hasattr(config, "save_pretrained"):
        return None
    config.problem_type = _PROBLEM_TYPES[task.kind]
    config.id2label = {0: task.name} if task.kind == "regression" else dict(enumerate(task.labels))
    config.label2id = {label: index for index, label in config.id2label.items()}
    return config


def write_changed_tokenizer(model: HyperAdapterModel, folder: Path) -> None:
    """Write the tokenizer if it differs from the one that belongs to the backbone's name.

    Args:
        model: Model with the tokenizer.
        folder: Existing folder to write to.

    Raises:
        BackboneError: If it is not a tokenizer of transformers.
    """
    for name, contents in (changed_tokenizer(model) or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)


def read_backbone(folder: Path) -> BackboneReference | None:
    """Return the backbone in the file `hyperadapters_task.json` of a folder, or None if there is no such file.

    Args:
        folder: Folder of an exported task.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    path = folder / TASK_FILE
    try:
        backbone = parse_json(path.read_text(encoding="utf-8"))["backbone"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; the file is damaged") from None
    return parse(BackboneReference, backbone, CheckpointError)


def _describe(model: HyperAdapterModel, head: Head) -> dict[str, Any]:
    config = model.adapter_config
    reads = ["adapted_texts" if config.separates_texts else "adapted"]
    if model.heads is not None and head.weight.shape[1] > model.heads.hidden_size:
        reads.insert(0, config.features if config.head_inputs == "adapted" else config.head_inputs)
    layer = {"layer": config.feature_layer} if "layer" in reads else {}
    return {"reads": reads, **layer, "target_mean": head.target_mean, "target_std": head.target_std}
