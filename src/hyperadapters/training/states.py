"""The states from which a training is resumed: folders named `checkpoint-STEP` that `transformers.Trainer` writes.

A file with the SHA-256 of all others is written last, so that a state that was not written to its end, or was damaged
later, is never mistaken for a complete one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from hyperadapters.errors import CheckpointError
from hyperadapters.utils.files import write_atomically
from hyperadapters.utils.reading import leads_outside, parse_json

FILES = "files.json"
"""Name of the file with the SHA-256 of the others."""


def trainer_checkpoints(folder: Path) -> list[Path]:
    """Return the states in a folder, complete or not, in the order of their steps.

    Args:
        folder: Output folder of a training.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest state in a folder that was written to its end, if there is one.

    Args:
        folder: Output folder of a training.

    Raises:
        CheckpointError: If it was damaged later.
    """
    complete = [path for path in trainer_checkpoints(folder) if is_complete(path)]
    if not complete:
        return None
    check_intact(complete[-1])
    return str(complete[-1])


def is_complete(state: Path) -> bool:
    """Return whether a state was written to its end.

    Args:
        state: Folder of the state.
    """
    if (state / FILES).exists():
        return True
    try:  # an earlier version, or a process that was killed just before
        parse_json((state / TRAINER_STATE_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return True


def write_files(state: Path) -> None:
    """Write the file with the SHA-256 of all others.

    Args:
        state: Folder of a state.

    Raises:
        OutputError: If it cannot be written.
    """
    digests = {path.relative_to(state).as_posix(): _sha256(path) for path in sorted(state.rglob("*")) if path.is_file()}
    write_atomically(state / FILES, (json.dumps(digests, indent=2) + "\n").encode())


def check_intact(state: Path) -> None:
    """Check that the files of a state are those that were written.

    Args:
        state: Folder of a complete state.

    Raises:
        CheckpointError: If a file is missing or differs. The message names it, and the state before, if there is one.
    """
    path = state / FILES
    if not path.exists():
        return
    try:
        digests = parse_json(path.read_bytes())
        damaged = [
            name for name, digest in digests.items() if leads_outside(state, name) or _sha256(state / name) != digest
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not readable: {error}; {_instead(state)}") from None
    if damaged:
        raise CheckpointError(f"{state / damaged[0]}: the file is missing, truncated or altered; {_instead(state)}")


def _instead(state: Path) -> str:
    before = [path for path in trainer_checkpoints(state.parent) if is_complete(path)]
    before = before[: before.index(state)] if state in before else []
    what = f"continue from {before[-1].name}" if before else "start from the beginning"
    return f"restore it, or remove the folder {state} to {what}"


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file; empty if there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""
