"""The learning rate of an arm at a size: tried with seed 0, on the validation rows, as many trials for each arm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from efficiency.result_rows import append, read_rows

TRIALS = 5
"""Of each arm that has a learning rate, at each size."""


def search(rate: float, measure: Callable[[float], float]) -> float:
    """The best of `TRIALS` rates: one, a lower and a higher one, then those beside the best so far.

    Args:
        rate: where to begin.
        measure: larger is better. It is called once for each rate.
    """
    grid = (next_rate(rate, up=False), rate, next_rate(rate, up=True))
    found = {rate: measure(rate) for rate in grid}
    while len(found) < TRIALS:
        rate = beside_best(found)
        found[rate] = measure(rate)
    return max(found, key=found.__getitem__)


def beside_best(found: Mapping[float, float]) -> float:
    """A rate beyond the best one where that is at an edge, otherwise one between it and a neighbour.

    Args:
        found: the measure of each rate.
    """
    rates, best = sorted(found), max(found, key=found.__getitem__)
    place = rates.index(best)
    if place in (0, len(rates) - 1):
        return next_rate(best, up=place > 0)

    def promise(neighbour: float) -> tuple[bool, float]:
        is_whole_step = max(neighbour / best, best / neighbour) > 2
        return is_whole_step, found[neighbour]

    neighbour = max(rates[place - 1], rates[place + 1], key=promise)
    return float(f"{math.sqrt(best * neighbour):.1e}")


def next_rate(rate: float, up: bool) -> float:
    """The next of 1e-4, 3e-4, 1e-3, 3e-3, ..."""
    return float(f"{rate * 3.3:.0e}" if up else f"{rate / 3:.0e}")


class Trials:
    """The trials in a file, those of an earlier run included."""

    def __init__(self, path: Path, again: bool = False) -> None:
        """Args: again: whether those of an earlier run are made again."""
        self.path = path
        self._known = {} if again else {_key(row): float(row["validation"]) for row in read_rows(path)}

    def validation(self, suite: str, arm: str, n: int | str, device: str, rate: float) -> float | None:
        """The score of a trial, None if it has not been made."""
        return self._known.get((suite, arm, n, device, rate))

    def add(self, row: dict[str, Any]) -> None:
        """Append a trial to the file."""
        append(self.path, row)
        self._known[_key(row)] = float(row["validation"])


def _key(row: dict[str, Any]) -> tuple[str, str, int | str, str, float]:
    return row["suite"], row["arm"], row["n"], row["device"], row["learning_rate"]
