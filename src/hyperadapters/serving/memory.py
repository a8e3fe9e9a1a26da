"""Returning memory that has been freed, and overwriting it, so that nothing of a removed task can be read.

The weights of tasks are copied while a batch is computed and while a file is read. What is freed keeps its contents
until it is used again. This is for the allocator of glibc only; elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator

M_ARENA_MAX = -8
PAGE = 4096
KEPT_SIZES, NUM_KEPT = range(24, 1033, 16), 7
"""Sizes in bytes of the blocks that each thread keeps for itself, and their number for each size."""
SIZES = tuple(2**power for power in range(16, 4, -1))
"""Sizes in bytes of the other blocks that are looked for. Larger ones are used up in parts."""
SLACK = 2**20
"""Number of bytes by which the heap may grow meanwhile."""
IS_MAPPED = 2
"""Flag in the word before a block, which says that it is a mapping of its own."""


class _Mallinfo(ctypes.Structure):
    """The structure `mallinfo2` of glibc; `arena` is the size of the heap and `fordblks` what is free of it."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _library() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    if not all(hasattr(library, name) for name in ("mallinfo2", "malloc_trim", "mallopt", "sbrk")):
        return None
    library.mallinfo2.restype = _Mallinfo
    library.sbrk.restype, library.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    return library


_GLIBC = _library()


def can_overwrite_free_memory() -> bool:
    """Return whether the allocator of this process is known."""
    return _GLIBC is not None


def use_one_arena() -> None:
    """Let all threads share their free memory, so that any of them can overwrite it. Call this before threads start."""
    if _GLIBC is not None:
        _GLIBC.mallopt(M_ARENA_MAX, 1)


def return_free_memory() -> None:
    """Return free pages to the system.

    The tensors of batches of ever new sizes come from one heap with what lives longer, between which more and more
    pieces are free. The allocator does not return them by itself, and the process would grow to twice its size.
    """
    if _GLIBC is not None:
        _GLIBC.malloc_trim(0)


def overwrite_free_memory() -> None:
    """Return free pages to the system, and overwrite what is free between them.

    Small blocks that another thread has freed last may stay as they are: call this in each thread that has used them.
    """
    if _GLIBC is None:
        return
    _GLIBC.malloc_trim(0)
    for block in list(_free_blocks(_GLIBC)):
        _GLIBC.free(block)


def _free_blocks(library: ctypes.CDLL) -> Iterator[int]:
    """Allocate the free blocks of this thread, and those of the heap from large to small ones, and overwrite them."""
    for size in (*KEPT_SIZES,) * NUM_KEPT:
        if block := library.malloc(size):
            yield _overwritten(block, size)
    left = library.mallinfo2().fordblks + SLACK
    for size in SIZES:
        while left > 0:
            end_of_heap = library.sbrk(0)
            if not (block := library.malloc(size)):
                break
            flags = ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value
            if library.sbrk(0) != end_of_heap or flags & IS_MAPPED:  # The block was not free, but is new.
                library.free(block)
                break
            left -= size
            yield _overwritten(block, size)


def _overwritten(block: int, size: int) -> int:
    if size <= 2 * PAGE:
        ctypes.memset(block, 0, size)
    else:  # The pages in between have been returned to the system.
        ctypes.memset(block, 0, PAGE)
        ctypes.memset(block + size - PAGE, 0, PAGE)
    return block
