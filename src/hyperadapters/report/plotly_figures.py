"""Figures as Plotly reads them. It needs no package: they are dictionaries that become JSON.

Plotly reads some HTML in names and texts, so those from outside are escaped, except for quotation marks, which Plotly
does not read. Names of categories are tick labels of numbered places, because Plotly would merge equal names and read
some as numbers or dates.
"""

from __future__ import annotations

import html
import textwrap
from functools import singledispatch
from typing import Any

from hyperadapters.report.charts import Categories, Chart, Lines, Map, Matrix
from hyperadapters.report.styles import (
    MAX_LABELLED,
    NEUTRAL,
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
from hyperadapters.utils.texts import printable

PlotlyFigure = dict[str, Any]

LINE_HEIGHT = 26
"""Pixels of a category."""
MARGIN = 90
"""Pixels of a figure above and below what it shows."""
HEIGHT = 440
"""Pixels of a figure whose height does not depend on its contents."""
MAX_HEIGHT = 1000
"""Maximum height of a matrix in pixels."""
PANEL_HEIGHT = 230
"""Pixels of a panel with its name."""
HOVER_WIDTH = 60
"""Number of characters in a line of a text that is shown on hover."""
INVISIBLE = "rgba(0,0,0,0)"


def plotly_figure(chart: Chart) -> PlotlyFigure:
    """Return a figure with the keys "data" and "layout", without colours that depend on the background.

    Args:
        chart: What is drawn.
    """
    figure: PlotlyFigure = _figure_of(chart)
    figure["layout"] = {"margin": {"l": 8, "r": 8, "t": 32, "b": 8}, "hovermode": "closest", **figure["layout"]}
    return figure


def template_of(text: str, grid: str, background: str) -> dict[str, Any]:
    """Return a template with the colours for one background.

    Args:
        text: Colour of texts.
        grid: Colour of grid lines.
        background: Colour behind texts that are shown on hover.
    """
    axis = {"gridcolor": grid, "zerolinecolor": grid, "linecolor": grid, "automargin": True}
    layout = {
        "font": {"color": text, "family": "system-ui, sans-serif", "size": 13},
        "paper_bgcolor": INVISIBLE,
        "plot_bgcolor": INVISIBLE,
        "xaxis": axis,
        "yaxis": axis,
        "hoverlabel": {"bgcolor": background, "bordercolor": NEUTRAL, "font": {"color": text}, "align": "left"},
        "modebar": {"bgcolor": INVISIBLE, "color": NEUTRAL, "activecolor": text},
    }
    return {"layout": layout}


@singledispatch
def _figure_of(chart: Chart) -> PlotlyFigure:
    raise TypeError(type(chart).__name__)


@_figure_of.register
def _(chart: Categories) -> PlotlyFigure:
    places, count = range(len(chart.categories)), len(chart.series)
    data = []
    for index, (name, values) in enumerate(chart.series.items()):
        style = style_of(index)
        trace: dict[str, Any] = {
            "name": _label(name),
            "x": list(values),
            "y": list(places),
            "hovertext": [
                _lines(f"{category}\n{name}: {shown_number(value)}") if value is not None else ""
                for category, value in zip(chart.categories, values, strict=True)
            ],
            "hoverinfo": "text",
        }
        if chart.mark == "bars":
            trace |= {"type": "bar", "orientation": "h", "marker": {"color": style.colour}}
            texts = ["" if value is None else shown_number(value) for value in values]
            trace |= {"text": texts, "textposition": "auto", "textangle": 0}  # inside where there is room
        else:
            marker = {"color": style.colour, "symbol": style.mark[0], "size": 11}
            trace |= {"type": "scatter", "mode": "markers", "marker": marker}
            trace["y"] = [place + offsets_of(count)[index] for place in places]
        if deviations := chart.errors.get(name):
            trace["error_x"] = {"type": "data", "array": [value or 0 for value in deviations], "color": style.colour}
        data.append(trace)
    layout = {
        "height": MARGIN + LINE_HEIGHT * max(2, len(places) * (count if chart.mark == "bars" else height_of(count))),
        "xaxis": {"title": {"text": chart.axis}, "rangemode": "tozero" if chart.mark == "bars" else "normal"},
        "yaxis": {**_ticks(chart.categories), "autorange": "reversed"},
        "showlegend": count > 1,
    }
    return {"data": data, "layout": layout}


@_figure_of.register
def _(chart: Lines) -> PlotlyFigure:
    data = []
    sizes = sizes_of(chart.rows)
    for style, (name, (x, y)) in zip(styles_of(chart.lines, chart.order), chart.lines.items(), strict=True):
        hover = [f"{name}\n{chart.x_axis}: {a:.6g}\n{chart.y_axis}: {b:.6g}" for a, b in zip(x, y, strict=True)]
        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": "lines+markers",
            "name": _label(name),
            "x": list(x),
            "y": list(y),
            "line": {"color": style.colour, "dash": style.dash[0]},
            "marker": {"color": style.colour, "symbol": style.mark[0], "size": 7},
            "hoverinfo": "text",
        }
        if rows := chart.rows.get(name):
            trace["mode"] = "markers"
            trace["marker"] |= {"size": sizes[name], "opacity": 0.7}
            hover = [f"{text}\nrows: {count}" for text, count in zip(hover, rows, strict=True)]
        data.append(trace | {"hovertext": [_lines(text) for text in hover]})
    return _in_panels(chart, data) if chart.panels else {"data": data, "layout": _line_layout(chart)}


def _line_layout(chart: Lines) -> dict[str, Any]:
    layout: dict[str, Any] = {
        "height": HEIGHT,
        "xaxis": {"title": {"text": chart.x_axis}, "type": "log" if chart.log_x else "linear"},
        "yaxis": {"title": {"text": chart.y_axis}},
        "showlegend": len(chart.lines) > 1,
        "legend": {"itemsizing": "constant" if chart.rows else "trace"},
    }
    if chart.diagonal:
        layout["shapes"] = [_diagonal(chart, "")]
        layout["xaxis"]["rangemode"] = layout["yaxis"]["rangemode"] = "tozero"
    return layout


def _diagonal(chart: Lines, panel: str) -> dict[str, Any]:
    end = chart.end
    line = {"color": NEUTRAL, "dash": "dot", "width": 1.5}
    ends = {"x0": 0, "y0": 0, "x1": end, "y1": end, "xref": f"x{panel}", "yref": f"y{panel}"}
    return {"type": "line", "line": line, "layer": "below", **ends}


def _in_panels(chart: Lines, data: list[dict[str, Any]]) -> PlotlyFigure:
    rows, columns = grid_of(len(data))
    text = {"showarrow": False, "xref": "paper", "yref": "paper"}
    annotations: list[dict[str, Any]] = [
        {**text, "text": chart.x_axis, "x": 0.5, "y": 0, "yanchor": "top", "yshift": -28},
        {**text, "text": chart.y_axis, "x": 0, "y": 0.5, "xanchor": "right", "xshift": -44, "textangle": -90},
    ]
    layout: dict[str, Any] = {
        "height": MARGIN + PANEL_HEIGHT * rows,
        "margin": {"l": 72, "r": 8, "t": 40, "b": 60},
        "grid": {"rows": rows, "columns": columns, "pattern": "independent", "xgap": 0.2, "ygap": 0.3},
        "showlegend": False,
    }
    for place, trace in enumerate(data, start=1):
        panel = "" if place == 1 else str(place)
        trace |= {"xaxis": f"x{panel}", "yaxis": f"y{panel}"}
        place_of_name = {"xref": f"x{panel} domain", "yref": f"y{panel} domain", "x": 0.5, "y": 1, "yanchor": "bottom"}
        annotations.append({**text, **place_of_name, "text": trace["name"]})
        limits = {"range": list(chart.limits)} if chart.diagonal else {}
        layout |= {f"xaxis{panel}": limits, f"yaxis{panel}": limits}
    shapes = [_diagonal(chart, trace["xaxis"][1:]) for trace in data] if chart.diagonal else []
    return {"data": data, "layout": {**layout, "annotations": annotations, "shapes": shapes}}


@_figure_of.register
def _(chart: Matrix) -> PlotlyFigure:
    hover = [
        [
            _lines(f"{chart.y_axis}: {row}\n{chart.x_axis}: {column}\n{label}")
            for column, label in zip(chart.columns, labels, strict=True)
        ]
        for row, labels in zip(chart.rows, chart.labels, strict=True)
    ]
    trace = {
        "type": "heatmap",
        "z": [list(row) for row in chart.values],
        "zmin": chart.limits[0],
        "zmax": chart.limits[1],
        "colorscale": [[place / (len(SHADES) - 1), colour] for place, colour in enumerate(SHADES)],
        "hovertext": hover,
        "hoverinfo": "text",
        "colorbar": {"thickness": 12, "outlinewidth": 0},
        "xgap": 1,
        "ygap": 1,
    }
    if len(chart.columns) <= MAX_LABELLED:
        trace |= {"text": [list(row) for row in chart.labels], "texttemplate": "%{text}", "textfont": {"color": "#000"}}
    angle = -45 if len(chart.columns) <= MAX_LABELLED else -90
    layout = {
        "height": min(MAX_HEIGHT, MARGIN + 120 + LINE_HEIGHT * len(chart.rows)),
        "xaxis": {**_ticks(chart.columns), **_title(chart.x_axis), "showgrid": False, "tickangle": angle},
        "yaxis": {**_ticks(chart.rows), **_title(chart.y_axis), "showgrid": False, "autorange": "reversed"},
    }
    return {"data": [trace], "layout": layout}


@_figure_of.register
def _(chart: Map) -> PlotlyFigure:
    data: list[dict[str, Any]] = []
    for index, (name, (x, y, texts)) in enumerate(chart.groups.items()):
        style, group = style_of(index), {"name": _label(name), "legendgroup": str(index), "hoverinfo": "text"}
        marker: dict[str, Any] = {"color": style.colour, "symbol": style.mark[0], "size": 7, "opacity": 0.75}
        points = {"type": "scatter", "mode": "markers", "x": list(x), "y": list(y), "marker": marker}
        data.append({**group, **points, "hovertext": [_lines(text) for text in texts]})
        if name in chart.marks:
            outline = {"color": NEUTRAL, "width": 1.5}
            marker = {"color": style.colour, "symbol": "star", "size": 18, "line": outline}
            (mark_x, mark_y), hover = chart.marks[name], _lines(f"{chart.mark_name} of {name}")
            star = {"type": "scatter", "mode": "markers", "x": [mark_x], "y": [mark_y], "marker": marker}
            data.append({**group, **star, "hovertext": [hover], "showlegend": False})
    axis = {"showticklabels": False, "zeroline": False, "showgrid": False}
    layout = {"height": HEIGHT + MARGIN, "xaxis": axis, "yaxis": axis, "showlegend": True}
    return {"data": data, "layout": layout}


def _ticks(names: tuple[str, ...]) -> dict[str, Any]:
    return {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": [_label(name) for name in names]}


def _title(text: str) -> dict[str, Any]:
    return {"title": {"text": text, "standoff": 16}}  # pixels from the names of the ticks


def _label(name: str) -> str:
    return html.escape(label_of(name), quote=False)


def _lines(text: str) -> str:
    """Return a text for hovering, in lines of limited width."""
    lines = [part for line in text.split("\n") for part in textwrap.wrap(printable(line), HOVER_WIDTH) or [""]]
    return "<br>".join(html.escape(line, quote=False) for line in lines)
