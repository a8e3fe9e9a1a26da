"""Files of values of fixed size that only grow, and are mapped to memory instead of being read."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from hyperadapters.errors import CheckpointError, OutputError
from hyperadapters.utils.reading import is_file, leads_outside

Array = np.ndarray[Any, Any]


class Column:
    """A number of values at the beginning of a file, of which only the parts that are used are in memory.

    Attributes:
        path: The file.
        values: The values. Those that other processes append meanwhile are not among them.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], count: int) -> None:
        """Map the values to memory.

        Args:
            path: The file.
            dtype: Type of a value.
            count: Number of values. What the file contains after them is ignored.

        Raises:
            CheckpointError: If the file is missing, has fewer values, or is a link to another folder.
        """
        self.path = path
        _check_path(path)
        expected = count * dtype.itemsize
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found < expected:
                    raise CheckpointError(
                        f"{path}: expected at least {expected} bytes, found {found}; the file is cut: restore it"
                    )
                # With ACCESS_COPY the arrays are writable, as torch requires, but nothing is written to the file.
                self._map = mmap.mmap(file.fileno(), expected, access=mmap.ACCESS_COPY) if expected else None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        self.values: Array = np.frombuffer(self._map or b"", dtype)

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Release the memory of values, which are read again when they are used again.

        Args:
            start: Index of the first value; its offset is a multiple of the size of a page. Default: the first one.
            stop: Index after the last value. Default: all following values.
        """
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            size = self.values.nbytes // len(self.values)
            stop = len(self.values) if stop is None else min(stop, len(self.values))
            self._map.madvise(mmap.MADV_DONTNEED, start * size, (stop - start) * size)


def write_column(path: Path, position: int, content: bytes) -> None:
    """Write values to a column at a position, after those that are kept, and wait until they are on the disk.

    Args:
        path: File of the column, which exists.
        position: Offset of the first value to write, in bytes.
        content: The values.

    Raises:
        CheckpointError: If the file is missing or a link to another folder.
        OutputError: If the file cannot be written.
    """
    _check_path(path)
    try:
        with path.open("r+b") as file:
            file.seek(position)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error


def _check_path(path: Path) -> None:
    if leads_outside(path.parent, path.name) or not is_file(path):
        raise CheckpointError(f"{path}: expected a file in this folder, found none, or a link out of it; restore it")
