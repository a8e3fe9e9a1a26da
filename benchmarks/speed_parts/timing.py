"""Times of several things, taken in turn."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """The times of one thing, in seconds."""

    seconds: tuple[float, ...]

    @property
    def ms(self) -> float:
        """Median, in milliseconds."""
        return 1000 * float(np.median(self.seconds))

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """First and third quartile, in milliseconds."""
        first, third = np.quantile(self.seconds, (0.25, 0.75))
        return 1000 * float(first), 1000 * float(third)


def interleaved(
    functions: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu", warmup: int = 2
) -> dict[str, Timing]:
    """Time functions in turn, so that whatever slows the machine down for a while slows all of them.

    Args:
        functions: by name, without arguments.
        repeats: of each.
        device: that they compute on; it is waited for before and after each call.
        warmup: untimed calls of each before.

    Returns:
        Times by name.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    gc.collect()
    gc.disable()  # as timeit does
    try:
        for _ in range(repeats):
            shuffle(order)  # so that none always follows the same other one
            for name in order:
                seconds[name].append(timed(functions[name], device)[0])
    finally:
        gc.enable()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def timed(function: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """Seconds that a call takes, and its result."""
    synchronise(device)
    started = time.perf_counter()
    result = function()
    synchronise(device)
    return time.perf_counter() - started, result


def synchronise(device: str) -> None:
    """Wait until a device has finished what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def exponent(sizes: list[int], times: list[float]) -> float:
    """Slope of times against sizes when both are logarithms: 1 where twice the size takes twice the time."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
