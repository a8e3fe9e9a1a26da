"""Sequences of rows that are kept in a file, which is mapped into memory, if they are many.

A row takes up to a kilobyte as Python objects, so a million of them would take most of the memory of a small machine.
The rows of a training are therefore collected by `collect` instead of `list`. `take` and `joined` select and join such
sequences without reading them.
"""

from __future__ import annotations

import errno
import json
import mmap
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain, islice
from typing import IO, Any, Generic, NamedTuple, TypeVar, overload

import numpy as np

from hyperadapters.errors import OutputError

T = TypeVar("T")

ROWS_IN_MEMORY = 10_000
"""Number of rows up to which `collect` returns a list."""


class Codec(NamedTuple, Generic[T]):
    """How rows of a type are written as JSON.

    Attributes:
        encode: Function that returns the values of a row. Rows for which it raises a TypeError, or whose values JSON
            cannot represent, stay in memory.
        decode: Function that makes the row of these values.
    """

    encode: Callable[[T], Any]
    decode: Callable[[Any], T]


class StoredRows(Sequence[T]):
    """A selection of rows, in any order, of which most are kept in files."""

    def __init__(self, parts: Sequence[Sequence[T]], order: np.ndarray[Any, Any] | None = None) -> None:
        """Join sequences of rows.

        Args:
            parts: Sequences of rows, which follow each other.
            order: Indices of the selected rows among all of them. Default: all rows in their order.
        """
        self._parts, self._starts = parts, [0, *accumulate(map(len, parts))]
        self._order = np.arange(self._starts[-1]) if order is None else order

    @classmethod
    def joined(cls, sequences: Iterable[Sequence[T]]) -> StoredRows[T]:
        """Join sequences of rows, of which some are selections themselves.

        Args:
            sequences: Sequences of rows, which follow each other.

        Returns:
            All rows in their order.
        """
        parts, orders, before = list[Sequence[T]](), list[np.ndarray[Any, Any]](), 0
        for rows in sequences:
            selection = rows if isinstance(rows, cls) else cls([rows])
            parts += selection._parts
            orders.append(selection._order + before)
            before += selection._starts[-1]
        return cls(parts, np.concatenate(orders))

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> StoredRows[T]: ...

    def __getitem__(self, index: int | slice) -> T | StoredRows[T]:
        if isinstance(index, slice):
            return StoredRows(self._parts, self._order[index])
        row = int(self._order[index])
        part = bisect_right(self._starts, row) - 1
        return self._parts[part][row - self._starts[part]]

    def __iter__(self) -> Iterator[T]:
        return map(self.__getitem__, range(len(self)))

    def __repr__(self) -> str:
        return f"<StoredRows of {len(self):,} rows>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy the rows as a list, since the file belongs to this process."""
        return list, (list(self),)

    def take(self, indices: Sequence[int]) -> StoredRows[T]:
        """Return some of the rows.

        Args:
            indices: Indices of the rows, in any order.

        Returns:
            The rows in the order of the indices.
        """
        return StoredRows(self._parts, self._order[np.asarray(indices, dtype=np.int64)])


class _File(Sequence[T]):
    """Rows in a file without a name, which disappears when the rows are no longer used."""

    def __init__(self, rows: Iterable[T], codec: Codec[T]) -> None:
        self._decode = codec.decode
        self._in_memory: dict[int, T] = {}
        self._starts = array("Q", [1])
        with _temporary_file() as file:
            _checked(file.write, b"\n")  # an empty file cannot be mapped
            for number, row in enumerate(rows):
                values = _encoded(row, codec)
                if values is None:
                    self._in_memory[number] = row
                self._starts.append(self._starts[-1] + _checked(file.write, values or b""))
            _checked(file.flush)
            self._map = _checked(mmap.mmap, file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: Any) -> Any:
        if index in self._in_memory:
            return self._in_memory[index]
        return self._decode(json.loads(self._map[self._starts[index] : self._starts[index + 1]]))


@contextmanager
def _temporary_file() -> Iterator[IO[bytes]]:
    file = _checked(tempfile.TemporaryFile)
    try:
        yield file
    finally:
        _checked(file.close)  # which writes what is left in the buffer


def _checked(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function that makes, writes or maps a temporary file."""
    try:
        return function(*arguments, **options)
    except OSError as error:
        if error.errno == errno.EMFILE:
            advice = "raise the limit of open files (ulimit -n), because each large split of a task takes one"
        else:
            advice = "free space, or set TMPDIR to another folder"
        where = tempfile.tempdir or "the folder for temporary files"
        raise OutputError(
            f"{where}: the rows of large data are kept in a file there while they are used, and it cannot be made: "
            f"{error}; {advice}"
        ) from error


def _encoded(row: T, codec: Codec[T]) -> bytes | None:
    """Return a row in JSON, or None if it stays in memory."""
    try:
        # With ASCII only, two surrogates in a text, which are no character, would become one.
        return json.dumps(codec.encode(row), ensure_ascii=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError):
        return None


def collect(rows: Iterable[T], codec: Codec[T]) -> Sequence[T]:
    """Return a list of rows, or a sequence that keeps them in a file if there are more than `ROWS_IN_MEMORY`.

    Args:
        rows: Rows, which are read once.
        codec: How they are written.

    Raises:
        OutputError: If there is no space for the file.
    """
    remaining = iter(rows)
    first = list(islice(remaining, ROWS_IN_MEMORY + 1))
    return first if len(first) <= ROWS_IN_MEMORY else StoredRows([_File(chain(first, remaining), codec)])


def take(rows: Sequence[T], indices: Sequence[int]) -> Sequence[T]:
    """Return some of the rows; those in a file remain there.

    Args:
        rows: Rows, as returned by `collect`.
        indices: Indices of the rows, in any order.
    """
    if isinstance(rows, StoredRows):
        return rows.take(indices)
    return [rows[index] for index in indices]


def joined(parts: Iterable[Sequence[T]]) -> Sequence[T]:
    """Return the rows of several sequences, one after the other; those in a file remain there.

    Args:
        parts: Sequences of rows, as returned by `collect`.
    """
    parts = list(parts)
    if any(isinstance(part, StoredRows) for part in parts):
        return StoredRows.joined(parts)
    return [row for part in parts for row in part]
