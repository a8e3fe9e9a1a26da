"""Regressions are fitted with one thread of BLAS, and the former number is restored."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, Thread

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

from hyperadapters.heads.regression import Products, minimize
from hyperadapters.utils.blas import one_blas_thread


def num_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    with threadpool_limits(2, "blas"):
        if num_threads() != {2}:
            pytest.skip("threadpoolctl cannot set the threads of the BLAS of this machine")
        yield


def test_heads_are_fitted_with_one_thread() -> None:
    """Threads of SciPy's BLAS that waited kept those of PyTorch from the cores."""
    during = set()

    def cost(value: Tensor) -> tuple[Tensor, list[Tensor], Products]:
        during.update(num_threads())
        return value.square().sum(), [2 * value], lambda change: [2 * change]

    minimize(cost, [torch.ones(2)])
    assert during == {1}
    assert num_threads() == {2}


def test_the_limit_ends_with_the_thread_that_has_set_it() -> None:
    entered, may_leave, seen = Event(), Event(), []

    def second() -> None:
        with one_blas_thread():
            entered.set()
            assert may_leave.wait(timeout=60)

    other = Thread(target=second)
    with one_blas_thread():
        other.start()
        assert entered.wait(timeout=60)
        seen.append(num_threads())
    seen.append(num_threads())
    may_leave.set()
    other.join()
    assert [*seen, num_threads()] == [{1}, {2}, {2}]
