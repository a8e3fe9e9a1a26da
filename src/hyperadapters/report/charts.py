"""What a report shows, without saying how it is drawn: figures of a few shapes, tables and texts.

The figures are drawn by `plotly_figures.py` for the page, and by `matplotlib_figures.py` for files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Values = tuple[float | None, ...]
Line = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Figure:
    """What all figures have.

    Attributes:
        name: Name for files and anchors, of lower-case letters, digits and hyphens.
        title: Title.
        caption: What is shown and how to read it.
    """

    name: str
    title: str
    caption: str


@dataclass(frozen=True)
class Categories(Figure):
    """Values of categories, one below the other, by series.

    Attributes:
        categories: Names of the categories.
        series: A value of each category, or None without one, by the name of the series.
        axis: Title of the axis of values.
        mark: "dots" for points on a line, or "bars", for values that start at 0.
        errors: Half the length of error bars in the same form, for some series.
    """

    categories: tuple[str, ...]
    series: dict[str, Values]
    axis: str
    mark: Literal["dots", "bars"] = "dots"
    errors: dict[str, Values] = field(default_factory=dict)


@dataclass(frozen=True)
class Lines(Figure):
    """Lines by name, or points of different sizes.

    Attributes:
        lines: Horizontal and vertical coordinates of the points of each line.
        x_axis: Title of the horizontal axis.
        y_axis: Title of the vertical axis.
        diagonal: Whether the line of equal coordinates is drawn, from 0 to 1.
        log_x: Whether the horizontal axis is logarithmic.
        rows: Number of rows behind each point. If given, the areas of the points show it, and no lines are drawn.
        order: Names whose places determine the colours, so that a task has the same one in all figures. A line with
            another name is grey. Default: the names of the lines.
        panels: Whether each line has axes of its own, under its name.
    """

    lines: dict[str, Line]
    x_axis: str
    y_axis: str
    diagonal: bool = False
    log_x: bool = False
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    panels: bool = False

    @property
    def end(self) -> float:
        """The largest coordinate, at which the diagonal ends; 1 if there is none above 0."""
        return max((value for x, y in self.lines.values() for value in (*x, *y)), default=0) or 1

    @property
    def limits(self) -> tuple[float, float]:
        """Limits of the axes of a panel with a diagonal, with room for large points at its ends."""
        return -0.1 * self.end, 1.1 * self.end


@dataclass(frozen=True)
class Matrix(Figure):
    """A matrix of values as colours.

    Attributes:
        rows: Names of the rows.
        columns: Names of the columns.
        values: Values of each row.
        labels: Text of each value.
        limits: Values of the first and the last colour.
        x_axis: Title of the columns.
        y_axis: Title of the rows.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[Values, ...]
    labels: tuple[tuple[str, ...], ...]
    limits: tuple[float, float]
    x_axis: str
    y_axis: str


@dataclass(frozen=True)
class Map(Figure):
    """Points and one mark for each group, in a plane without units.

    Attributes:
        groups: Coordinates and texts of the points of each group.
        marks: Coordinates of the mark of some groups.
        mark_name: What a mark is.
    """

    groups: dict[str, tuple[tuple[float, ...], tuple[float, ...], tuple[str, ...]]]
    marks: dict[str, tuple[float, float]]
    mark_name: str


Chart = Categories | Lines | Matrix | Map


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: Title.
        header: Titles of the columns.
        rows: Cells of each row.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Text:
    """A text that is shown as it is, in a font of fixed width.

    Attributes:
        title: Title.
        text: The text.
    """

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: Title.
        content: Figures, tables and texts.
    """

    title: str
    content: tuple[Chart | Table | Text, ...]


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        title: Title.
        facts: Short facts with their names, for the head of the page.
        sections: Parts of the report.
        notes: What a reader has to know about the whole page, in sentences.
    """

    title: str
    facts: dict[str, str]
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()

    @property
    def charts(self) -> list[Chart]:
        """All figures."""
        return [item for section in self.sections for item in section.content if isinstance(item, Figure)]


def percent(value: float | None) -> str:
    """Return a share in per cent; empty for None.

    Args:
        value: Share from 0 to 1.
    """
    return "" if value is None else f"{100 * value:.1f}%"


def decimals(values: Values) -> tuple[str, ...]:
    """Return values with four decimals, as tables show them; empty for None.

    Args:
        values: The values.
    """
    return tuple("" if value is None else f"{value:.4f}" for value in values)
