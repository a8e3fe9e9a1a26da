"""What both kinds of figures share: colours, marks, and how names are shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hyperadapters.utils.texts import printable

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Colours of Okabe and Ito that can be told apart with each kind of colour blindness, and are visible on light and dark
backgrounds."""
SHADES = ("#f7fbff", "#d2e3f3", "#9ecae1", "#6baed6", "#4292c6")
"""Colours of matrices from the lowest to the highest value, which differ in lightness, all legible behind black."""
MARKS = (("circle", "o"), ("square", "s"), ("diamond", "D"), ("cross", "P"), ("triangle-up", "^"), ("x", "X"))
"""Marks of points, by their names in Plotly and in matplotlib."""
DASHES = (("solid", "-"), ("dash", "--"), ("dot", ":"), ("dashdot", "-."))
"""Styles of lines, by their names in Plotly and in matplotlib."""
NEUTRAL = "#808080"
"""Colour of what belongs to no series, which is visible on light and dark backgrounds."""
MAX_LABEL = 32
"""Number of characters of a name that axes and legends show."""
MAX_LABELLED = 12
"""Number of columns up to which the values of a matrix are written into it."""


MIN_SIZE, MAX_SIZE = 4.0, 26.0
"""Diameters of points whose areas show numbers of rows."""


SPREAD = 0.27
"""Distance of the marks of two series in a category, in heights of a category with one series."""
PANEL_COLUMNS = 3
"""Number of panels side by side."""


class Style(NamedTuple):
    """How a series is drawn. Up to 36 series differ by colour and mark together.

    Attributes:
        colour: Colour.
        mark: Mark of points in Plotly and in matplotlib.
        dash: Style of lines in Plotly and in matplotlib.
    """

    colour: str
    mark: tuple[str, str]
    dash: tuple[str, str]


def style_of(index: int) -> Style:
    """Return the style of a series.

    Args:
        index: Index of the series.
    """
    turn = index // len(COLOURS)
    return Style(COLOURS[index % len(COLOURS)], MARKS[(index + turn) % len(MARKS)], DASHES[turn % len(DASHES)])


def styles_of(names: Iterable[str], order: Sequence[str]) -> list[Style]:
    """Return the styles of lines.

    Args:
        names: Names of the lines.
        order: Names whose places determine the styles; see `Lines.order`.
    """
    names = tuple(names)
    places = {name: place for place, name in enumerate(order or names)}
    return [style_of(places[name]) if name in places else Style(NEUTRAL, MARKS[0], DASHES[1]) for name in names]


def sizes_of(rows: dict[str, tuple[int, ...]]) -> dict[str, list[float]]:
    """Return the diameters of points whose areas are proportional to their numbers of rows, at least `MIN_SIZE`.

    Args:
        rows: Number of rows behind each point by series.
    """
    most = max((count for counts in rows.values() for count in counts), default=1)
    return {
        name: [max(MIN_SIZE, MAX_SIZE * math.sqrt(count / max(1, most))) for count in counts]
        for name, counts in rows.items()
    }


def grid_of(panels: int) -> tuple[int, int]:
    """Return the numbers of rows and columns of panels.

    Args:
        panels: Number of panels, at least one.
    """
    columns = min(PANEL_COLUMNS, panels)
    return math.ceil(panels / columns), columns


def height_of(series: int) -> float:
    """Return the height of a category with the marks of several series, in heights of one with a single series.

    Args:
        series: Number of series.
    """
    return 1 + SPREAD * (series - 1)


def offsets_of(series: int) -> list[float]:
    """Return how far the marks of each series are below a category, as a share of its height, so that none is hidden.

    Args:
        series: Number of series.
    """
    return [(index - (series - 1) / 2) * SPREAD / height_of(series) for index in range(series)]


def shown_number(value: float) -> str:
    """Return a number as figures show it, whole numbers with all their digits.

    Args:
        value: The number.
    """
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:,.6g}"


def label_of(name: str) -> str:
    """Return a name as axes and legends show it, on one line and shortened.

    Args:
        name: Name from outside.
    """
    shown = printable(name)
    return shown if len(shown) <= MAX_LABEL else shown[: MAX_LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"
