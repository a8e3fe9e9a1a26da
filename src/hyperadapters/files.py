"""Writing files so that nobody ever finds half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from hyperadapters.errors import OutputError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that at any moment it has its old contents or all of the new ones, also after a power cut.

    Raises:
        OutputError: it cannot be written; what was there before is unchanged.
    """
    with _replacing(path, "wb") as file:
        file.write(data)


@contextmanager
def open_atomically(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 text file for writing piece by piece, which appears when the context is left without an exception.

    Raises:
        OutputError: it cannot be written; what was there before is unchanged, as it is after any exception.
    """
    with _replacing(path, "w", encoding="utf-8", newline="") as file:
        yield file


@contextmanager
def _replacing(path: Path, mode: str, **options: Any) -> Iterator[Any]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open(mode, **options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error


def _sync_folder(folder: Path) -> None:
    """Make the folder's entries survive a power cut too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are not there.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: the folder cannot be made: {error}") from error


def check_target(path: Path, endings: tuple[str, ...]) -> None:
    """Check before a long computation that its result can be written to a file.

    Raises:
        OutputError: the ending is not one of `endings`, the folder does not exist, or the path is a folder.
    """
    if path.suffix not in endings:
        raise OutputError(f"{path}: expected a name ending in {' or '.join(endings)}")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise OutputError(f"{path}: expected a file, found a folder")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which appears under its name when the context is left without an exception.

    Raises:
        OutputError: there is something of that name already, other than an empty folder, or it cannot be written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path}: already there; choose another name, or remove it")
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.mkdir()
            yield temporary
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error
