"""The number of threads of the BLAS libraries that NumPy and SciPy use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

from threadpoolctl import ThreadpoolController

_LOCK = Lock()
"""Held by the thread that has set the limit."""


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread while a regression is fitted.

    An iteration takes less time than the threads of BLAS need to start and to wait for each other, and those that wait
    keep the threads of PyTorch from the cores, so that fits of few rows took many times as long. The limit holds for
    the whole process and for each BLAS that threadpoolctl finds, which may be that of PyTorch as well. If another
    Python thread has set the limit, it is left as it is, so that it is always restored by the thread that has set it
    (OpenBLAS ignores other threads).

    Yields:
        Nothing.
    """
    if not _LOCK.acquire(blocking=False):
        yield
        return
    try:
        with _controller().limit(limits=1, user_api="blas"):
            yield
    finally:
        _LOCK.release()


@cache
def _controller() -> Any:
    """Find the libraries once, which takes milliseconds. Those of SciPy are loaded together with scikit-learn."""
    return ThreadpoolController()
