"""A task merged into its backbone's weights, as an ordinary transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hyperadapters.backbones.loading import quiet_transformers
from hyperadapters.errors import BackboneError
from hyperadapters.interop.task_files import write_task_files
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.utils.files import new_folder


def export_merged(model: HyperAdapterModel, task: str, folder: str | Path) -> None:
    """Write the backbone with a task's LoRA in its weights, the tokenizer, and the task's labels and head.

    The model is as before afterwards.

    Raises:
        TaskError: there is no such task, or it cannot be merged (see `HyperAdapterModel.merge`).
        BackboneError: a weight is quantised, the backbone is no transformers model, or its tokenizer cannot be loaded.
        OutputError: the folder is there already, or cannot be written.
    """
    backbone: Any = model.backbone
    if not hasattr(backbone, "save_pretrained"):
        raise BackboneError(
            f"expected a transformers model to write, found {type(backbone).__name__}; merge() and save it yourself"
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
