"""Memory, time to load and latency against the number of tasks, as a figure.

    python benchmarks/scale_plot.py [--rows PATH] [--output PATH]

Draws the rows `scale_curve` and `scale_curve_peft` that benchmarks/speed.py wrote: those of the default preset, or of
`paper` where that alone was measured. Needs the extra `plot`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

HERE = Path(__file__).parent
OURS, PEFT = "#0b6e99", "#c8553d"
LATENCY = "latency of a batch, ms"
PANELS = {
    "memory beyond the backbone, MB": (
        ("hyperadapters, heads apart", OURS, "-", "without_heads_mb"),
        ("hyperadapters, with heads", OURS, ":", "memory_mb"),
        ("PEFT LoRA", PEFT, "-", "memory_mb"),
    ),
    "time to load, s": (
        ("hyperadapters, one run", OURS, "-", "load_s"),
        ("PEFT LoRA, a folder a task", PEFT, "-", "load_s"),
    ),
    LATENCY: (
        ("hyperadapters, tasks told", OURS, "-", "told_ms"),
        ("hyperadapters, routed", OURS, ":", "routed_ms"),
        ("PEFT LoRA, tasks told", PEFT, "-", "told_ms"),
    ),
}


def draw(ours: dict[str, Any], peft: dict[str, Any], path: Path) -> None:
    """Draw three panels, all axes logarithmic but that of the latency."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for point in ours["points"]:
        point["without_heads_mb"] = point["memory_mb"] - point["heads_mb"]
    for axes, (title, lines) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        for label, colour, style, key in lines:
            points = (peft if colour == PEFT else ours)["points"]
            tasks, values = [point["tasks"] for point in points], [point[key] for point in points]
            axes.plot(tasks, values, style, marker="o", markersize=4, color=colour, label=label)
        axes.set(xscale="log", xlabel="tasks", title=title)
        if title == LATENCY:
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
            axes.set_ylim(top=3 * axes.get_ylim()[1])  # room for the legend
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    stop = peft["stopped_at"]
    figure.text(
        0.5,
        -0.04,
        f"{ours['rows']} rows of {ours['tokens']} tokens, {ours['tasks_of_batch']} tasks in the batch. PEFT: measured "
        f"until loading had taken {stop['load_s']:.0f} s, with {stop['loaded']} tasks.",
        ha="center",
        fontsize=8,
    )
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rows", type=Path, default=HERE / "results" / "speed.jsonl")
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs" / "images" / "scale.svg")
    arguments = parser.parse_args()
    rows = {(row["figure"], row["preset"]): row for row in map(json.loads, arguments.rows.read_text().splitlines())}
    preset = "plus" if ("scale_curve", "plus") in rows else "paper"
    draw(rows["scale_curve", preset], rows["scale_curve_peft", preset], arguments.output)


if __name__ == "__main__":
    main()
