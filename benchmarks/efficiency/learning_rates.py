"""The learning rate of an arm at a size: tried with seed 0, on the validation rows, until the best is at no edge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from efficiency.result_rows import append, read_rows

MOST_TRIALS = 7
"""Of an arm at a size. A best that is still at an edge then is at a rate a hundred times from where it began."""


def search(grid: Sequence[float], measure: Callable[[float], float]) -> float:
    """The rate with the best measure; the grid is widened where it is at an edge.

    Args:
        grid: rates to try first.
        measure: larger is better. It is called once for each rate.
    """
    found = {rate: measure(rate) for rate in grid}
    best = max(found, key=found.__getitem__)
    while len(found) < MOST_TRIALS and best in (min(found), max(found)):
        wider = next_rate(best, up=best == max(found))
        found[wider] = measure(wider)
        best = max(found, key=found.__getitem__)
    return best


def next_rate(rate: float, up: bool) -> float:
    """The next of 1e-4, 3e-4, 1e-3, 3e-3, ..."""
    return float(f"{rate * 3.3:.0e}" if up else f"{rate / 3:.0e}")


class Trials:
    """The trials in a file, those of an earlier run included."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = {_key(row): float(row["validation"]) for row in read_rows(path)}

    def validation(self, arm: str, n: int | str, device: str, rate: float) -> float | None:
        """The score of a trial, None if it has not been made."""
        return self._known.get((arm, n, device, rate))

    def add(self, row: dict[str, Any]) -> None:
        """Append a trial to the file."""
        append(self.path, row)
        self._known[_key(row)] = float(row["validation"])


def _key(row: dict[str, Any]) -> tuple[str, int | str, str, float]:
    return row["arm"], row["n"], row["device"], row["learning_rate"]
