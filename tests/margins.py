"""A pytest plugin that measures how near each comparison of floats came to its tolerance.

    PYTHONPATH=tests python -m pytest -p margins --margins margins.tsv

It records `difference / allowed` for `torch.testing.assert_close`, `torch.allclose`, `numpy.testing.assert_allclose`
and `pytest.approx`. Comparisons that should hold need a margin of ten, which is a ratio of at most 0.1; those that
should not hold (`not torch.allclose`) need a ratio of at least 10. What lies between is listed at the end of the run,
and written to the file with the place of the comparison.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing._comparison import TensorLikePair

TESTS = Path(__file__).parent
worst: dict[str, tuple[float, float, str]] = {}
"""By place of the comparison: the worst ratio of one that holds, the worst of one that does not, and the test."""
current = ""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--margins", metavar="FILE", help="Write the ratio of difference and tolerance of each comparison."
    )


def pytest_configure(config: pytest.Config) -> None:
    _wrap(TensorLikePair, "_compare_regular_values_close", lambda pair, *values, **how: _tensors(*values, **how))
    _wrap(torch, "allclose", _tensors)
    _wrap(np.testing, "assert_allclose", _arrays)
    _wrap(type(pytest.approx(1.0)), "__eq__", lambda approx, actual: _number(actual, approx))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    global current
    current = item.nodeid
    return (yield)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = sorted(worst.items(), key=lambda row: -row[1][0])
    near = [row for row in rows if row[1][0] > 0.1 or row[1][1] < 10]
    terminalreporter.section(f"{len(near)} of {len(rows)} comparisons have a margin of less than ten")
    for place, (holds, fails, test) in near or rows[:5]:
        terminalreporter.write_line(f"{holds:10.4f} {fails:10.3g}  {place}  {test}")
    if config.getoption("margins"):
        lines = [f"{holds:.6g}\t{fails:.6g}\t{place}\t{test}" for place, (holds, fails, test) in rows]
        path = Path(config.getoption("margins"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["holds\tfails\tplace\ttest", *lines]) + "\n")


def _wrap(owner: Any, name: str, measure: Any) -> None:
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        _record(measure(*arguments, **keywords))
        return original(*arguments, **keywords)

    setattr(owner, name, wrapped)


def _tensors(
    actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False, **_: Any
) -> float:
    if actual.shape != expected.shape:
        return 0.0
    return _ratio(actual.detach().double().cpu().numpy(), expected.detach().double().cpu().numpy(), rtol, atol)


def _arrays(actual: Any, desired: Any, rtol: float = 1e-7, atol: float = 0, **_: Any) -> float:
    return _ratio(np.asarray(actual, float), np.asarray(desired, float), rtol, atol)


def _number(actual: Any, approx: Any) -> float:
    try:
        given, expected, tolerance = float(actual), float(approx.expected), float(approx.tolerance)
    except (TypeError, ValueError):
        return 0.0
    return _ratio(np.array(given), np.array(expected), 0.0, tolerance)


def _ratio(actual: np.ndarray, expected: np.ndarray, rtol: float, atol: float) -> float:
    """The largest ratio of difference and tolerance; 0 where both are equal, as infinities are."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(actual == expected, 0.0, np.abs(actual - expected) / (atol + rtol * np.abs(expected)))
    return float(np.nan_to_num(ratios, nan=0.0, posinf=1e30).max(initial=0.0))


def _record(ratio: float) -> None:
    place = _place()
    holds, fails, test = worst.get(place, (0.0, 1e30, current))
    if ratio <= 1:
        worst[place] = (ratio, fails, current) if ratio >= holds else (holds, fails, test)
    else:
        worst[place] = (holds, ratio, current) if ratio <= fails else (holds, fails, test)


def _place() -> str:
    """File and line of the test, or of the helper called by one test file from another."""
    frame = sys._getframe()
    names = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent == TESTS and path.name != "margins.py":
            names.append(f"{path.name}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(names) or current
