"""Tasks of data files without a recipe: which files hold the splits of which task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hyperadapters.config import SPLITS, Kind, Split, TaskEntry, parse
from hyperadapters.data.bad_rows import BadRows, OnBadRow
from hyperadapters.data.schema import Schema, infer_schema
from hyperadapters.data.sources import ENDINGS, read_file
from hyperadapters.errors import DataError, RecipeError
from hyperadapters.utils.reading import is_folder

SPLIT_NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Names of files that hold a split, without their ending."""
TaskFiles = dict[Split, Path]


def find_tasks(path: Path) -> dict[str, TaskFiles]:
    """Find the tasks in a file or a folder.

    A file is one task with training rows. A folder with a file such as "train.csv" is one task, whose other splits are
    beside it. In any other folder, each such folder and each data file in it is a task.

    Args:
        path: Data file or folder.

    Returns:
        Files of the splits of each task, by the name of the task, which is that of its folder or its file.

    Raises:
        DataError: If the folder contains no data, or two files for a split or with the same name.
    """
    if not is_folder(path):
        name = path.resolve().parent.name if path.stem.lower() in SPLIT_NAMES else path.stem
        return {name: {"train": path}}
    if files := _split_files(path):
        return {path.resolve().name: files}
    found: dict[str, TaskFiles] = {}
    for entry in sorted(path.iterdir()):
        files = _split_files(entry) if entry.is_dir() else {"train": entry} if _is_data(entry) else {}
        name = entry.name if entry.is_dir() else entry.stem
        if files and name in found:
            raise DataError(f"{path}: two tasks have the name '{name}'; rename one of them")
        if files:
            found[name] = files
    if not found:
        raise DataError(
            f"{path}: found no data; expected files ending in {', '.join(ENDINGS)}, or folders with a file such as "
            "train.csv"
        )
    return found


def _is_data(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in ENDINGS


def _split_files(folder: Path) -> TaskFiles:
    """Return the files of the splits in a folder, empty if it has no training rows."""
    found: TaskFiles = {}
    for path in sorted(folder.iterdir()):
        split = SPLIT_NAMES.get(path.stem.lower()) if _is_data(path) else None
        if split in found:
            raise DataError(f"{folder}: two files could be the {split} data: {found[split].name} and {path.name}")
        if split is not None:
            found[split] = path
    return {split: found[split] for split in SPLITS if split in found} if "train" in found else {}


def infer_schemas(
    tasks: Mapping[str, TaskFiles],
    texts: Sequence[str] = (),
    label: str | None = None,
    kind: Kind | None = None,
    on_bad_row: OnBadRow = "error",
    delimiter: str | None = None,
) -> dict[str, Schema]:
    """Guess the columns and the kind of each task from its training rows.

    Args:
        tasks: Files of the splits of each task by its name.
        texts: One or two columns of texts, which are then not guessed. Default: none.
        label: Column of the label. Default: it is guessed.
        kind: Kind of the tasks. Default: it is guessed.
        on_bad_row: What is done with a row that cannot be read: "error" (default) or "skip".
        delimiter: Delimiter of CSV and TSV files. Default: a comma and a tab.

    Returns:
        The schema of each task by its name.

    Raises:
        DataError: If a file cannot be read, or a column cannot be guessed.
        TaskError: If the kind is unknown.
    """
    schemas = {}
    for name, files in tasks.items():
        bad_rows = BadRows(on_bad_row)
        rows = read_file(files["train"], delimiter, bad_rows)
        if not rows and bad_rows.count:
            raise DataError(
                f"{files['train']}: expected at least one row that can be read, found none{bad_rows.note()}"
            )
        schemas[name] = infer_schema(rows, str(files["train"]), texts, label, kind)
    return schemas


def make_entry(name: str, files: TaskFiles, schema: Schema, **source: Any) -> TaskEntry:
    """Make the task of a recipe for data files.

    Args:
        name: Name of the task.
        files: Files of its splits.
        schema: Its columns and its kind.
        **source: Further settings of its source.

    Returns:
        The task with its source.

    Raises:
        RecipeError: If the name cannot be that of a task.
    """
    paths = {split: str(path) for split, path in files.items()}
    values = {
        "name": name,
        "kind": schema.kind,
        "fields": schema.fields,
        "source": {"path": paths, "columns": schema.columns, **source},
    }
    return parse(TaskEntry, values, RecipeError, f"task '{name}'")


def check_different_names(names: Iterable[str]) -> None:
    """Check that no two tasks have the same name.

    Args:
        names: Names of the tasks, which are those of their files.

    Raises:
        DataError: If a name occurs twice.
    """
    seen = set()
    for name in names:
        if name in seen:
            raise DataError(f"expected a name for each task, found two with the name '{name}'; rename one of the files")
        seen.add(name)
