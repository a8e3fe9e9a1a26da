"""Export of a task merged into the weights of its backbone, as an ordinary transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hyperadapters.backbones.loading import quiet_transformers
from hyperadapters.errors import BackboneError
from hyperadapters.interop.task_files import write_task_files
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.utils.files import new_folder


def export_merged(model: HyperAdapterModel, task: str, folder: str | Path) -> None:
    """Write the backbone with a task's LoRA merged into its weights, the tokenizer, and the task's labels and head.

    Args:
        model: Model, whose weights are restored afterwards.
        task: Name of the task.
        folder: Folder to create, which must not exist or be empty.

    Raises:
        TaskError: If the task is unknown or cannot be merged (see `HyperAdapterModel.merge`).
        BackboneError: If a weight is quantised, the backbone is not a model of transformers, or its tokenizer cannot be
            loaded.
        OutputError: If the folder is not empty or cannot be written.
    """
    backbone: Any = model.backbone
    if not hasattr(backbone, "save_pretrained"):
        raise BackboneError(
            f"expected a transformers model to write, found {type(backbone).__name__}; call model.merge() and save the "
            "backbone yourself"
        )
    with new_folder(folder) as new:
        model.merge(task)
        try:
            with quiet_transformers():
                backbone.save_pretrained(new)
        finally:
            model.unmerge()
        if model.has_tokenizer:
            model.tokenizer.save_pretrained(new)
        write_task_files(model, task, new)
