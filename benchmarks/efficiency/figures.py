"""Figures of the result rows, and the command that draws them and fills in the tables."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from tables import RESULTS, read

from efficiency import document_tables, leakage_tables, transfer_tables
from efficiency.data import SUITES
from efficiency.document_tables import NOTHING, fewer_tasks, replaced
from efficiency.summary import (
    CONTROL,
    Column,
    Columns,
    Row,
    Size,
    arm_order,
    difference,
    is_main,
    label,
    pairs,
    parts_of,
    suites,
)

DOCS = RESULTS.parents[1] / "docs"
COLOURS = {"pha": "#c8553d", "plus": "#0b6e99"}
"""Of the arms that stand out; the others have those of a colour map."""

CAPTIONS = {
    "sample_efficiency": "Score against training rows a task",
    "ablations": "What each ingredient is worth with {n} rows a task",
    "parameters": "Score with {n} rows a task against trainable parameters per task",
}
"""Of the figures of a suite."""
MIDDLE = (100, 32)
"""Sizes of figures of one column: the one with the most arms is drawn."""


def figures(suite: str, found: Columns) -> dict[str, tuple[str, Figure | None]]:
    """Caption and figure, if there are rows to show, by the name of its marker and file."""
    n = max(MIDDLE, key=lambda n: len(found.get(n, {})))  # of several with as many arms, the first
    column = found.get(n, {})
    drawn = {"sample_efficiency": curves(found), "ablations": ablations(column), "parameters": parameters(column, n)}
    end, of_suite = ("", "") if suite == "main" else (f"_{suite}", f", suite {suite}")
    return {title + end: (CAPTIONS[title].format(n=n) + of_suite, figure) for title, figure in drawn.items()}


def curves(found: Columns) -> Figure | None:
    """Score against rows a task, with a band of a standard deviation either side; a point where there is one size."""
    arms = sorted({arm for column in found.values() for arm in column if is_main(arm)}, key=arm_order)
    if not arms:
        return None
    figure, axes = new_figure()
    # all rows are not a number of their own: they stand at the right, as far off as 500 from 100
    numbers = [size for size in found if size != "all"]
    places = {n: 5 * max(numbers, default=1) if n == "all" else n for n in found}
    for arm in arms:
        points = [(places[n], *centre(column[arm])) for n, column in found.items() if arm in column]
        x, middle, spread = (list(values) for values in zip(*points, strict=True))
        style = {
            "color": colour(arm),
            "linewidth": 2.5 if arm.removesuffix("_texts") in COLOURS else 1.2,
            "label": name(found, arm),
        }
        # plain heads are dotted, so that arms with the same heads can be compared
        style["linestyle"] = "-" if parts_of(arm).reads_texts or arm.startswith("plus") else ":"
        if len(points) == 1:
            axes.errorbar(x, middle, yerr=spread, fmt="o", markersize=5, **style)
        else:
            axes.plot(x, middle, marker="o", markersize=4, **style)
            low, high = zip(*((m - s, m + s) for m, s in zip(middle, spread, strict=True)), strict=True)
            axes.fill_between(x, low, high, color=colour(arm), alpha=0.12, linewidth=0)
    axes.set(xscale="log", xlabel="training rows a task", ylabel="mean score over tasks")
    axes.set_xticks(list(places.values()), labels=list(map(str, places)))
    axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def ablations(column: Column) -> Figure | None:
    """Each ablation of PHA+ and PHA minus the arm that it is from, with 95 % bootstrap intervals."""
    compared = [
        (arm, base, difference(pairs(column[arm]), pairs(column.get(base, []))))
        for base in ("plus", "pha")
        for arm in column
        if arm.startswith(f"{base}_no_") and not arm.endswith(CONTROL)
    ]
    bars = [(arm, base, found) for arm, base, found in compared if found is not None]
    if not bars:
        return None
    figure, axes = new_figure(height=1.2 + 0.4 * len(bars))
    for place, (_, base, found) in enumerate(bars):
        axes.barh(place, found.mean, color=colour(base), alpha=0.7)
        axes.plot([found.low, found.high], [place, place], color="black", linewidth=1.2)
    axes.set_yticks(range(len(bars)), labels=[label(arm) for arm, _, _ in bars])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change of the mean score, with 95 % interval")
    return figure


def parameters(column: Column, n: Size) -> Figure | None:
    """Score against trainable parameters per task, main arms only."""
    arms = [arm for arm in column if is_main(arm)]
    if not arms:
        return None
    figure, axes = new_figure()
    for arm in arms:
        trainable = mean(row["trainable_per_task"] for row in column[arm])
        middle, spread = centre(column[arm])
        axes.errorbar(trainable, middle, yerr=spread, fmt="o", color=colour(arm), label=name({n: column}, arm))
    axes.set(xscale="log", xlabel="trainable parameters per task", ylabel=f"mean score over tasks, {n} rows a task")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def new_figure(height: float = 5.0) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def centre(rows: list[Row]) -> tuple[float, float]:
    """Mean and standard deviation of the scores over seeds; of one seed the deviation is drawn as 0."""
    scores = [row["score"] for row in rows]
    return mean(scores), stdev(scores) if len(scores) > 1 else 0.0


def colour(arm: str) -> Any:
    return COLOURS.get(arm.removesuffix("_texts")) or matplotlib.colormaps["tab20"](arm_order(arm)[0])


def name(found: Columns, arm: str) -> str:
    """The name of an arm in a legend, with its number of tasks where others have more."""
    counts = [count for column in found.values() if arm in column and (count := fewer_tasks(column, arm))]
    return f"{label(arm)} ({min(counts)} tasks)" if counts else label(arm)


def save(figure: Figure, path: Path) -> None:
    """Write an SVG, the same bytes each time: no date, and ids that depend on the content only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result rows")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder docs/, which is beside README.md")
    folders = parser.parse_args(arguments)
    found = suites(read(folders.results / "sample_efficiency.jsonl"))
    trials, transfer, suite_transfer = (
        read(folders.results / f"{file}.jsonl") for file in ("learning_rates", "transfer", "suite_transfer")
    )
    leakage = folders.results / "leakage.json"
    blocks = {
        **document_tables.tables(found, trials),
        **transfer_tables.tables(transfer, suite_transfer),
        **leakage_tables.tables(json.loads(leakage.read_text()) if leakage.is_file() else {}),
    }
    missing = []
    for suite in SUITES:
        for title, (caption, figure) in figures(suite, found.get(suite, {})).items():
            blocks[title] = f"![{caption}](images/{title}.svg)" if figure else NOTHING
            if figure:
                save(figure, folders.docs / "images" / f"{title}.svg")
            else:
                missing.append(title)
    if missing:
        print(f"not written, since there are no rows to show: {', '.join(missing)}", file=sys.stderr)
    for document in (folders.docs / "sample-efficiency.md", folders.docs.parent / "README.md"):
        document.write_text(replaced(document.read_text(), blocks))
