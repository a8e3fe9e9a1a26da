"""Writing files so that nobody ever finds half of one."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from hyperadapters.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_STANDARD_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that at any moment it has its old contents or all of the new ones, also after a power cut.

    A symbolic link stays, and the file that it points to is replaced. A file that is replaced keeps its permissions.
    What is not a regular file, such as a pipe or `/dev/stdout`, is written to directly.

    Raises:
        OutputError: it cannot be written; what was there before is unchanged.
    """
    with _replacing(path, "wb") as file:
        file.write(data)


@contextmanager
def open_atomically(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 text file for writing piece by piece; it appears when the context is left without an exception.

    Links, permissions and what is not a regular file are treated as by `write_atomically`.

    Raises:
        OutputError: it cannot be written; what was there before is unchanged, as it is after any exception.
    """
    with _replacing(path, "w", encoding="utf-8", newline="") as file:
        yield file


@contextmanager
def _replacing(path: Path, mode: str, **options: Any) -> Iterator[Any]:
    try:
        if is_stream(path):
            with _open_stream(path, mode, **options) as file:
                yield file
            return
        target = _real(path)
        permissions = _permissions(target)
        temporary = _temporary(target.parent)
        try:
            with temporary.open(mode.replace("w", "x"), **options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if permissions is not None:
                temporary.chmod(permissions)
            os.replace(temporary, target)
            _sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error


def is_stream(path: Path) -> bool:
    """Whether a path is something to write to directly: a device, a pipe, or a standard stream of this process."""
    if str(path) in _STANDARD_STREAMS:
        return True
    with suppress(OSError):
        mode = path.stat().st_mode
        return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
    return False


def _open_stream(path: Path, mode: str, **options: Any) -> Any:
    descriptor = _STANDARD_STREAMS.get(str(path))
    if descriptor is None:
        return path.open(mode, **options)
    # A copy of the descriptor goes on where the process has written to, also if that is a file.
    sys.stdout.flush()
    return open(os.dup(descriptor), mode, **options)


def _permissions(path: Path) -> int | None:
    """The permissions of a file that may be written; None if there is no file.

    Raises:
        OSError: it is a folder, or may not be written.
    """
    try:
        os.close(os.open(path, os.O_WRONLY))  # replacing it would need the permissions of its folder only
    except FileNotFoundError:
        return None
    return stat.S_IMODE(path.stat().st_mode)


def _real(path: Path) -> Path:
    """What a path leads to, through all symbolic links; `Path.resolve` raises RuntimeError for some."""
    return Path(os.path.realpath(path))


def _temporary(folder: Path) -> Path:
    """A new name in a folder, which does not depend on a file's own name, since that may have the greatest length."""
    return folder / f".{secrets.token_hex(8)}.tmp"


def _sync_folder(folder: Path) -> None:
    """Make the folder's entries survive a power cut too, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # always on Windows, elsewhere for a folder that may be written but not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context that one thread or process at a time is in for a folder.

    It does not exclude anything on Windows, or on file systems without locks.
    """
    descriptor = None
    if fcntl is not None:
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they do not exist.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        _real(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: the folder cannot be made: {error}") from error


@contextmanager
def making_folder(path: Path) -> Iterator[None]:
    """Make a folder and those above it; after an exception those that were made and are empty are removed again.

    Raises:
        OutputError: it cannot be made.
    """
    resolved = _real(path)
    made = [folder for folder in (resolved, *resolved.parents) if not os.path.lexists(folder)]
    try:
        make_folder(path)
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def check_target(path: Path, endings: tuple[str, ...]) -> None:
    """Check before a long computation that its result can be written to a file.

    Raises:
        OutputError: the ending is not one of `endings`, the folder does not exist, the path is a folder, or nothing can
            be written there. A device or a pipe may have any name.
    """
    if is_stream(path):
        return
    if path.suffix not in endings:
        raise OutputError(f"{path}: expected a name ending in {' or '.join(endings)}")
    try:
        target = _real(path)
        if not target.parent.is_dir():
            raise OutputError(f"{path}: the folder {target.parent} does not exist; make it first")
        if target.is_dir():
            raise OutputError(f"{path}: expected a file, found a folder")
        _permissions(target)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error


def check_folder(path: Path) -> None:
    """Check before a long computation that a folder can be written to, or made.

    Raises:
        OutputError: it is a file, or it or the folder to make it in cannot be written to.
    """
    folder = _real(path)
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISDIR(path.stat().st_mode):
                raise OutputError(f"{path}: expected a folder, found a file")
        nearest = next(other for other in (folder, *folder.parents) if other.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OutputError(f"{path}: the folder cannot be written: {error}") from error


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which appears under its name when the context is left without an exception.

    An empty folder that exists already is kept, since it may be a mount point or the working directory of a shell; its
    entries then appear in it one by one.

    Raises:
        OutputError: there is something of that name already, other than an empty folder, or it cannot be written.
    """
    name, path = path, _real(Path(path))
    try:
        exists = os.path.lexists(path)
        if exists and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(f"{name}: already there; choose another name, or remove it")
        with making_folder(path.parent):
            temporary = _temporary(path if exists else path.parent)
            try:
                temporary.mkdir()
                yield temporary
                if exists:
                    _move_entries(temporary, path)
                else:
                    os.replace(temporary, path)
                    _sync_folder(path.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors has errors of its own, of a full disk for example
        raise OutputError(f"{name}: cannot be written: {error}") from error


def _move_entries(source: Path, target: Path) -> None:
    """Move what is in a folder into the one above, which must have nothing else in it."""
    if [entry for entry in target.iterdir() if entry != source]:
        raise FileExistsError(errno.EEXIST, "something was written into the folder meanwhile", str(target))
    for entry in source.iterdir():
        os.replace(entry, target / entry.name)
    _sync_folder(target)
