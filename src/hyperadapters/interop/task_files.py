"""What goes with a task into the folders of other libraries, which have no place for it: its labels and its head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch

from hyperadapters._version import __version__
from hyperadapters.checkpoints.format import BackboneReference, changed_tokenizer
from hyperadapters.config import parse
from hyperadapters.errors import CheckpointError
from hyperadapters.heads.task_heads import Head
from hyperadapters.model.model import HyperAdapterModel

TASK_FILE = "hyperadapters_task.json"
HEAD_FILE = "hyperadapters_head.safetensors"


def write_task_files(model: HyperAdapterModel, task: str, folder: Path) -> None:
    """Write the description of a task, and its head if the backbone is an encoder.

    `hyperadapters_task.json` holds the task as `Task` describes it, the backbone's name and fingerprints, and `head`:
    what the head reads, in this order (docs/export.md says how each is made), and the mean and standard deviation by
    which a regression's output is scaled. `hyperadapters_head.safetensors` holds `weight` [C, inputs] and `bias` [C].

    Raises:
        TaskError: there is no such task.
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
        head = model.heads.unpack()[task_id]
        values["head"] = _describe(model, head)
        tensors = {"weight": head.weight.cpu().contiguous(), "bias": head.bias.cpu().contiguous()}
        safetensors.torch.save_file(tensors, folder / HEAD_FILE)
    text = json.dumps(values, ensure_ascii=False, indent=2) + "\n"
    (folder / TASK_FILE).write_text(text, encoding="utf-8")


def write_changed_tokenizer(model: HyperAdapterModel, folder: Path) -> None:
    """Write the tokenizer, if it is not the one that the backbone's name leads to.

    Raises:
        BackboneError: it is not a tokenizer of transformers.
    """
    for name, contents in (changed_tokenizer(model) or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)


def read_backbone(folder: Path) -> BackboneReference | None:
    """The backbone that a folder with `hyperadapters_task.json` was written for; None without that file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = folder / TASK_FILE
    try:
        backbone = json.loads(path.read_text(encoding="utf-8"))["backbone"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: not readable: {error}; the file is damaged") from None
    return parse(BackboneReference, backbone, CheckpointError)


def _describe(model: HyperAdapterModel, head: Head) -> dict[str, Any]:
    config, reads = model.adapter_config, ["adapted"]
    if head.weight.shape[1] > model.hidden_size:
        reads.insert(0, config.features if config.head_inputs == "adapted" else config.head_inputs)
    layer = {"layer": config.feature_layer} if "layer" in reads else {}
    return {"reads": reads, **layer, "target_mean": head.target_mean, "target_std": head.target_std}
