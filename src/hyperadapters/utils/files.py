"""Writing files and folders atomically, so that an incomplete one is never visible under its name."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import sys
import tempfile
import threading
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

_held = threading.local()
"""The folders that the present thread has locked."""
_STANDARD_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it has either its old contents or all of its new contents, even after a power failure.

    If the path is a symbolic link, the file that it points to is replaced. A replaced file keeps its permissions. Data
    for a path that is not a regular file, such as a pipe or `/dev/stdout`, are written to it directly.

    Args:
        path: File to write.
        data: Its new contents.

    Raises:
        OutputError: If the file cannot be written. An existing file is unchanged.
    """
    with _replacing(path, "wb") as file:
        file.write(data)


@contextmanager
def open_atomically(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 text file for writing, which appears when the context is left without an exception.

    Symbolic links, permissions and paths that are not regular files are treated as in `write_atomically`.

    Args:
        path: File to write.

    Yields:
        The open file.

    Raises:
        OutputError: If the file cannot be written. An existing file is unchanged, as after any other exception.
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
    """Return whether a path is a device, a pipe or a standard stream of this process, which is written to directly.

    Args:
        path: Path to examine.
    """
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
    # A duplicate of the descriptor continues at the current position, which matters if the stream is a file.
    sys.stdout.flush()
    return open(os.dup(descriptor), mode, **options)


def _permissions(path: Path) -> int | None:
    """Return the permissions of a writable file, or None if there is no file.

    Raises:
        OSError: If the path is a folder or the file may not be written.
    """
    try:
        os.close(os.open(path, os.O_WRONLY))  # replacing it would only require write permission for its folder
    except FileNotFoundError:
        return None
    return stat.S_IMODE(path.stat().st_mode)


def _real(path: Path) -> Path:
    """Return a path with all symbolic links resolved; `Path.resolve` raises RuntimeError for some."""
    return Path(os.path.realpath(path))


def _temporary(folder: Path) -> Path:
    """Return a new path in a folder. It does not contain the file's name, which may have the maximum length already."""
    return folder / f".{secrets.token_hex(8)}.tmp"


def _sync_folder(folder: Path) -> None:
    """Write the entries of a folder to disk, where the system supports it, so that they survive a power failure."""
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
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on a folder, for which other threads and processes wait.

    A thread that holds it may lock the folder again. There is no locking on Windows and on file systems without locks.

    Args:
        folder: Folder to lock.
        wait: Whether to wait for a lock that another thread or process holds. Default: True.

    Yields:
        None, while the lock is held.

    Raises:
        OutputError: If `wait` is False and another thread or process holds the lock.
    """
    held: set[Path] = _held.__dict__.setdefault("folders", set())
    path = _real(folder)
    if path in held:
        yield
        return
    descriptor = None
    if fcntl is not None:
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
    try:
        if descriptor is not None:
            _lock(folder, descriptor, wait)
        held.add(path)
        yield
    finally:
        held.discard(path)
        if descriptor is not None:
            os.close(descriptor)


def _lock(folder: Path, descriptor: int, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise OutputError(f"{folder}: another process is writing to this folder; wait until it has ended") from None
    except OSError:  # a file system without locks
        return


class HeldLock:
    """An exclusive lock on a file that only holds the lock, until it is released or the process ends.

    On Windows and on file systems without locks nothing is locked.
    """

    def __init__(self, path: Path) -> None:
        """Create the file and lock it.

        Args:
            path: The file.

        Raises:
            OSError: If the file cannot be created.
        """
        self._path, self._descriptor = path, os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    @property
    def is_held(self) -> bool:
        """Whether the file is still the one that others find under its path."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except OSError:
            return False

    def release(self) -> None:
        """Release the lock and remove the file."""
        if self.is_held:
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def is_locked(path: Path) -> bool:
    """Return whether a process holds a `HeldLock`. A file that cannot be examined counts as locked.

    Args:
        path: File of the lock.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        if fcntl is None:
            return True
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def make_folder(path: Path) -> None:
    """Create a folder and its parents if they do not exist.

    Args:
        path: Folder to create.

    Raises:
        OutputError: If the folder cannot be created.
    """
    try:
        _real(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: the folder cannot be created: {error}") from error


@contextmanager
def making_folder(path: Path) -> Iterator[None]:
    """Create a folder and its parents, and remove those of them that are empty after an exception.

    Args:
        path: Folder to create.

    Yields:
        None, while the folder exists.

    Raises:
        OutputError: If the folder cannot be created.
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

    Args:
        path: File to write. The name of a device or a pipe may have any ending.
        endings: Valid endings of the file's name.

    Raises:
        OutputError: If the ending is not one of `endings`, the parent folder does not exist, the path is a folder, or
            the file cannot be written.
    """
    if is_stream(path):
        return
    if path.suffix not in endings:
        raise OutputError(f"{path}: expected a name ending in {' or '.join(endings)}")
    try:
        target = _real(path)
        if not target.parent.is_dir():
            raise OutputError(f"{path}: the folder {target.parent} does not exist; create it first")
        if target.is_dir():
            raise OutputError(f"{path}: expected a file, found a folder")
        _permissions(target)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error


def check_folder(path: Path) -> None:
    """Check before a long computation that files can be written to a folder, which may not exist yet.

    Args:
        path: Folder to write to.

    Raises:
        OutputError: If the path is a file, or the folder or its nearest existing parent cannot be written to.
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
        raise OutputError(f"{path}: the folder cannot be written to: {error}") from error


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Create a folder that appears under its name when the context is left without an exception.

    An existing empty folder is kept, because it may be a mount point or the working directory of a shell. The files
    then appear in it one by one.

    Args:
        path: Folder to create.

    Yields:
        Temporary folder to write the files to.

    Raises:
        OutputError: If the path exists and is not an empty folder, or the folder cannot be written.
    """
    name, path = path, _real(Path(path))
    try:
        exists = os.path.lexists(path)
        if exists and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(f"{name}: already exists; choose another name, or remove it")
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
    except (OSError, SafetensorError) as error:  # safetensors has its own class of errors
        raise OutputError(f"{name}: cannot be written: {error}") from error


def _move_entries(source: Path, target: Path) -> None:
    """Move the contents of a folder to its parent, which must have no other contents."""
    if [entry for entry in target.iterdir() if entry != source]:
        raise FileExistsError(errno.EEXIST, "something was written into the folder meanwhile", str(target))
    for entry in source.iterdir():
        os.replace(entry, target / entry.name)
    _sync_folder(target)
