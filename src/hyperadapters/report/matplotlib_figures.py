"""Figures as files in PNG and SVG, for papers, drawn with matplotlib."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import singledispatch
from pathlib import Path
from typing import Any

from hyperadapters.report.charts import Categories, Chart, Lines, Map, Matrix
from hyperadapters.report.styles import (
    MAX_LABELLED,
    SHADES,
    grid_of,
    height_of,
    label_of,
    offsets_of,
    shown_number,
    sizes_of,
    style_of,
    styles_of,
)
from hyperadapters.utils.files import write_atomically
from hyperadapters.utils.optional import require

ENDINGS = (".png", ".svg")
WIDTH = 8.0
"""Width of a figure in inches."""
MAX_INCHES = 60.0
"""Maximum height of a figure in inches."""
SETTINGS = {
    "text.parse_math": False,  # names may contain dollar signs
    "svg.hashsalt": "hyperadapters",  # the same figure is the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
}


def write_figures(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Write figures as PNG and SVG under their names.

    Args:
        charts: What is drawn.
        folder: Existing folder to write to.

    Returns:
        The files.

    Raises:
        MissingPackageError: If matplotlib is not installed.
        OutputError: If a file cannot be written.
    """
    paths = [folder / f"{chart.name}{ending}" for chart in charts for ending in ENDINGS]
    figures = [figure_bytes(chart, ending) for chart in charts for ending in ENDINGS]
    for path, content in zip(paths, figures, strict=True):
        write_atomically(path, content)
    return paths


def figure_bytes(chart: Chart, ending: str) -> bytes:
    """Return a figure as the contents of a file.

    Args:
        chart: What is drawn.
        ending: Ending of the file, which determines the format.

    Raises:
        MissingPackageError: If matplotlib is not installed.
    """
    picture, metadata = io.BytesIO(), {"Date": None} if ending == ".svg" else {}
    with require("matplotlib").rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # scripts that the font does not have
        draw(chart).savefig(picture, format=ending[1:], dpi=150, metadata=metadata)
    return picture.getvalue()


def draw(chart: Chart) -> Any:
    """Return a figure of matplotlib.

    Args:
        chart: What is drawn.

    Raises:
        MissingPackageError: If matplotlib is not installed.
    """
    figure = require("matplotlib.figure").Figure(figsize=(WIDTH, min(MAX_INCHES, _height(chart))), layout="constrained")
    if isinstance(chart, Lines) and chart.panels:
        _draw_panels(chart, figure)
        return figure
    axes = figure.subplots()
    axes.set_title(chart.title)
    _draw(chart, axes)
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        columns = 1 + len(handles) // 40
        options = {"frameon": False, "fontsize": "small", "ncols": columns}
        legend = figure.legend(handles, labels, loc="outside right upper", **options)
        for handle in legend.legend_handles if isinstance(chart, Lines) and chart.rows else ():
            handle.set_sizes([40.0])
    return figure


def _height(chart: Chart) -> float:
    if isinstance(chart, Categories):
        return 1.5 + 0.28 * max(
            3, len(chart.categories) * (len(chart.series) if chart.mark == "bars" else height_of(len(chart.series)))
        )
    if isinstance(chart, Lines) and chart.panels:
        return 1.0 + 2.2 * grid_of(len(chart.lines))[0]
    return 2.0 + max(3.0, 0.3 * len(chart.rows)) if isinstance(chart, Matrix) else 5.0


@singledispatch
def _draw(chart: Chart, axes: Any) -> None:
    raise TypeError(type(chart).__name__)


@_draw.register
def _(chart: Categories, axes: Any) -> None:
    places = range(len(chart.categories))
    size = 0.8 / max(1, len(chart.series))
    for index, (name, values) in enumerate(chart.series.items()):
        style = style_of(index)
        numbers = [float("nan") if value is None else value for value in values]
        if chart.mark == "bars":
            shifted = [place + size * (index + 0.5) - 0.4 for place in places]
            bars = axes.barh(shifted, numbers, size, color=style.colour, label=_label(name))
            texts = ["" if value is None else shown_number(value) for value in values]
            axes.bar_label(bars, texts, padding=3, fontsize="small")
            axes.margins(x=0.15)  # for these texts
            axes.xaxis.set_major_formatter("{x:,.10g}")
            axes.locator_params(axis="x", nbins=5)  # such numbers are long
            continue
        deviations = [value or 0.0 for value in chart.errors.get(name, (None,) * len(numbers))]
        options = {"fmt": style.mark[1], "color": style.colour, "label": _label(name)}
        shifted = [place + offsets_of(len(chart.series))[index] for place in places]
        axes.errorbar(numbers, shifted, xerr=deviations if any(deviations) else None, **options)
    axes.set_yticks(places, labels=[_label(name) for name in chart.categories])
    axes.invert_yaxis()
    axes.set_xlabel(chart.axis)


@_draw.register
def _(chart: Lines, axes: Any) -> None:
    sizes = sizes_of(chart.rows)
    for style, (name, (x, y)) in zip(styles_of(chart.lines, chart.order), chart.lines.items(), strict=True):
        options = {"color": style.colour, "marker": style.mark[1], "label": _label(name)}
        if name in chart.rows:
            axes.scatter(x, y, [size**2 for size in sizes[name]], alpha=0.7, linewidths=0, **options)
        else:
            axes.plot(x, y, linestyle=style.dash[1], markersize=4, **options)
    if chart.diagonal:
        axes.axline((0, 0), slope=1, color="grey", linestyle=":", zorder=0)
    axes.set(xlabel=chart.x_axis, ylabel=chart.y_axis, xscale="log" if chart.log_x else "linear")


def _draw_panels(chart: Lines, figure: Any) -> None:
    rows, columns = grid_of(len(chart.lines))
    places = figure.subplots(rows, columns, squeeze=False).flat
    order = chart.order or tuple(chart.lines)
    for axes, (name, line) in zip(places, chart.lines.items(), strict=False):
        _draw(replace(chart, lines={name: line}, order=order, x_axis="", y_axis=""), axes)
        axes.set_title(label_of(name), fontsize="medium")
        if chart.diagonal:
            axes.set(xlim=chart.limits, ylim=chart.limits)
    for axes in places:  # what remains of the last row
        axes.set_axis_off()
    figure.suptitle(chart.title)
    figure.supxlabel(chart.x_axis, fontsize="medium")
    figure.supylabel(chart.y_axis, fontsize="medium")


@_draw.register
def _(chart: Matrix, axes: Any) -> None:
    values = [[float("nan") if value is None else value for value in row] for row in chart.values]
    shades = require("matplotlib.colors").LinearSegmentedColormap.from_list("shades", SHADES)
    image = axes.imshow(values, cmap=shades, vmin=chart.limits[0], vmax=chart.limits[1], aspect="auto")
    axes.figure.colorbar(image)
    angle = {"rotation": 45, "ha": "right"} if len(chart.columns) <= MAX_LABELLED else {"rotation": 90}
    axes.set_xticks(range(len(chart.columns)), labels=[_label(name) for name in chart.columns], **angle)
    axes.set_yticks(range(len(chart.rows)), labels=[_label(name) for name in chart.rows])
    axes.set(xlabel=chart.x_axis, ylabel=chart.y_axis)
    axes.grid(False)
    if len(chart.columns) > MAX_LABELLED:
        return
    for row, labels in enumerate(chart.labels):
        for column, label in enumerate(labels):
            axes.text(column, row, label, ha="center", va="center", color="black", fontsize=8)


@_draw.register
def _(chart: Map, axes: Any) -> None:
    for index, (name, (x, y, _)) in enumerate(chart.groups.items()):
        style = style_of(index)
        options = {"color": style.colour, "marker": style.mark[1], "s": 18, "alpha": 0.7, "linewidths": 0}
        axes.scatter(x, y, label=_label(name), **options)
        if name in chart.marks:
            axes.scatter(*chart.marks[name], s=220, marker="*", color=style.colour, edgecolors="black", zorder=3)
    if chart.marks:
        axes.scatter([], [], s=160, marker="*", color="white", edgecolors="black", label=chart.mark_name)
    axes.set(xticks=[], yticks=[])


def _label(name: str) -> str:
    """Return a name that a legend shows; one that starts with an underscore would be left out of it."""
    label = label_of(name)
    return f"\N{ZERO WIDTH SPACE}{label}" if label.startswith("_") else label
