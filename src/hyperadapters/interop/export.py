"""Export of the tasks of a checkpoint to the formats of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from hyperadapters.config import Dtype
from hyperadapters.errors import ExportError, OutputError, TaskError, unknown_name
from hyperadapters.interop.adapterhub import export_adapterhub
from hyperadapters.interop.merged import export_merged
from hyperadapters.interop.onnx import export_onnx
from hyperadapters.interop.peft import export_all_peft, export_peft
from hyperadapters.interop.runtime import export_runtime
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.utils.files import new_folder

Exporter = Callable[[HyperAdapterModel, str, Path], list[str] | None]
FORMATS: dict[str, Exporter] = {
    "peft-lora": export_peft,
    "merged": export_merged,
    "adapterhub": export_adapterhub,
    "onnx": export_onnx,
}
"""Formats with one task in a folder."""
RUNTIME = "runtime"
"""Format with all tasks in one folder."""


def export(
    folder: Path,
    target: str,
    output: Path,
    task: str | None = None,
    every: bool = False,
    quantize: str | None = None,
) -> list[str]:
    """Export one task of a checkpoint, or all tasks, each to a folder with its name, or all in one for the runtime.

    Args:
        folder: Folder of the checkpoint.
        target: Name of the format, one of `FORMATS` or `RUNTIME`.
        output: Folder to create.
        task: Name of the task. Required unless `every` is True or the format is `RUNTIME`, which has all tasks.
        every: Whether to export all tasks. Default: False.
        quantize: "int8" to quantise the graphs of the format `RUNTIME`. Default: they are in float32.

    Returns:
        Notes for the user, a sentence each.

    Raises:
        OutputError: If the format is unknown, or the output exists or cannot be written.
        TaskError: If both or neither of `task` and `every` are given, the task is unknown, or it cannot be exported;
            or if `task` is given and the format is `RUNTIME`.
        ExportError: If the format cannot represent the model, or cannot be quantised.
        MissingPackageError: If the format requires a package that is not installed.
        CheckpointError: If the checkpoint cannot be loaded.
        BackboneError: If the backbone cannot be loaded.
    """
    if target not in (*FORMATS, RUNTIME):
        raise OutputError(unknown_name("format", target, (*FORMATS, RUNTIME)))
    if target == RUNTIME:
        if task is not None:
            raise TaskError(f"format '{RUNTIME}' has all tasks in one folder, found task '{task}'; do not name a task")
        model = HyperAdapterModel.from_pretrained(folder, dtype="float32").eval()
        export_runtime(model, output, cast(Any, quantize))
        return []
    if quantize is not None:
        raise ExportError(f"quantize: only format '{RUNTIME}' can be quantised, found format '{target}'; remove it")
    if (task is None) != every:
        raise TaskError(
            "expected the name of a task (--task) or all tasks (--all), found "
            + ("neither" if task is None else "both")
        )
    # The ONNX graph is in float32, whatever the data type of the backbone's files is.
    dtype: Dtype | None = "float32" if target == "onnx" else None
    model = HyperAdapterModel.from_pretrained(folder, dtype=dtype).eval()
    if task is not None:
        return FORMATS[target](model, task, output) or []
    if target == "peft-lora":
        return export_all_peft(model, output)
    with new_folder(output) as new:
        notes = [FORMATS[target](model, known.name, new / known.name) or [] for known in model.tasks]
    return notes[0]
