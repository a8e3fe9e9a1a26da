"""Reading what comes from outside: JSON of limited depth, and paths that may not be valid."""

from __future__ import annotations

import json
import os
from itertools import chain
from pathlib import Path
from typing import Any

MAX_DEPTH = 100
"""Maximum number of levels of nested collections in JSON and YAML, far below the depth of Python's stack."""


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Parse JSON whose collections are nested in at most `MAX_DEPTH` levels.

    Args:
        text: The JSON.
        **options: Options of `json.loads`.

    Returns:
        The value.

    Raises:
        ValueError: If the text is not JSON or is nested too deeply.
    """
    try:
        value = json.loads(text, **options)
    except RecursionError:
        raise _too_deep() from None
    brackets = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, brackets)) > MAX_DEPTH and _is_deep(value):  # type: ignore[arg-type]
        raise _too_deep()
    return value


def _too_deep() -> ValueError:
    return ValueError(f"expected at most {MAX_DEPTH} levels of nested lists and objects, found more")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = chain.from_iterable(item.values() if isinstance(item, dict) else item for item in level)
        level = [item for item in inner if isinstance(item, (dict, list))]
    return bool(level)


def is_file(path: str | Path) -> bool:
    """Return whether a path is that of a file.

    `Path.is_file` raises an error if a name is too long, or a folder must not be read.

    Args:
        path: Path from outside.
    """
    return os.path.isfile(path)


def is_folder(path: str | Path) -> bool:
    """Return whether a path is that of a folder. As with `is_file`, a path that is not valid is not one.

    Args:
        path: Path from outside.
    """
    return os.path.isdir(path)


def leads_outside(folder: Path, name: str) -> bool:
    """Return whether a path inside a folder leads out of it through ".." or a symbolic link.

    In the cache of the Hugging Face Hub, the files of a snapshot are links to the folder `blobs` of the same
    repository. Such links do not lead outside.

    Args:
        folder: Folder that contains the file.
        name: Path of the file, relative to the folder.
    """
    try:
        root, path = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / name))
    except ValueError:  # a null character, with which there is no file
        return False
    allowed = [root]
    allowed += [place.parent / "blobs" for place in root.parents if place.name == "snapshots"][:1]
    return not any(path.is_relative_to(parent) for parent in allowed)
