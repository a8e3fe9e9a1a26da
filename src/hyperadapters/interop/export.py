"""Tasks of a checkpoint in the formats of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hyperadapters.config import Dtype
from hyperadapters.errors import OutputError, TaskError, unknown_name
from hyperadapters.interop.adapterhub import export_adapterhub
from hyperadapters.interop.merged import export_merged
from hyperadapters.interop.onnx import export_onnx
from hyperadapters.interop.peft import export_all_peft, export_peft
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.utils.files import new_folder

Exporter = Callable[[HyperAdapterModel, str, Path], list[str] | None]
FORMATS: dict[str, Exporter] = {
    "peft-lora": export_peft,
    "merged": export_merged,
    "adapterhub": export_adapterhub,
    "onnx": export_onnx,
}


def export(folder: Path, target: str, output: Path, task: str | None = None, every: bool = False) -> list[str]:
    """Write one task of a checkpoint, or every one into a folder of its name.

    Args:
        folder: of the checkpoint.
        target: one of `FORMATS`.
        output: folder to make.
        task: name of the task.
        every: all tasks, in place of one.

    Returns:
        What a user should know of the result, a sentence each.

    Raises:
        OutputError: the format is unknown, or the output is there already or cannot be written.
        TaskError: not exactly one of `task` and `every` is given, there is no such task, or it cannot be written so.
        ExportError: the format cannot express the model.
        MissingPackageError: the format needs an extra.
        CheckpointError, BackboneError: the model cannot be loaded.
    """
    if target not in FORMATS:
        raise OutputError(unknown_name("format", target, FORMATS))
    if (task is None) != every:
        raise TaskError("expected the name of a task or all tasks, found " + ("neither" if task is None else "both"))
    # ONNX holds float32, whatever type the backbone's files have
    dtype: Dtype | None = "float32" if target == "onnx" else None
    model = HyperAdapterModel.from_pretrained(folder, dtype=dtype).eval()
    if task is not None:
        return FORMATS[target](model, task, output) or []
    if target == "peft-lora":
        return export_all_peft(model, output)
    with new_folder(output) as new:
        notes = [FORMATS[target](model, known.name, new / known.name) or [] for known in model.tasks]
    return notes[0]
