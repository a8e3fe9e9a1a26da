"""Progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import IO, Any, TypeVar, cast

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def show_progress(items: Iterable[T], description: str, total: int | None = None, completed: int = 0) -> Iterator[T]:
    """Iterate over items and show a progress bar on standard error if it is a terminal.

    Args:
        items: Items to iterate over.
        description: Text in front of the bar.
        total: Number of items, with those that are completed. Default: unknown.
        completed: Number of items that are completed already. Default: 0.
    """
    console = Console(file=tolerant(sys.stderr))
    hidden = not console.is_terminal
    return iter(track(items, description, total, completed, console=console, transient=True, disable=hidden))


def tolerant(stream: IO[str]) -> IO[str]:
    """Return a stream that ignores errors in writing, for example because the terminal was closed.

    Args:
        stream: Stream to write to.
    """
    return cast(IO[str], _Tolerant(stream))


class _Tolerant:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text if possible."""
        with suppress(OSError, UnicodeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream if possible."""
        with suppress(OSError):
            self._stream.flush()
