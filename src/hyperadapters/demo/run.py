"""The demo: six small tasks on one frozen MiniLM, compared with a linear probe on the same features."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hyperadapters.checkpoints.details_file import read_details
from hyperadapters.config import load_recipe
from hyperadapters.data.examples import Example
from hyperadapters.inference.predictor import Predictor
from hyperadapters.report.maps import maps_of
from hyperadapters.report.matplotlib_figures import figure_bytes
from hyperadapters.report.runs import COMPARISON_FILE
from hyperadapters.training.probes import linear_probe, majority
from hyperadapters.training.run import Run, train
from hyperadapters.training.views import View
from hyperadapters.utils.files import write_atomically
from hyperadapters.utils.optional import require

MAP_FILE = "task_map.png"

NEW_INPUTS = (
    Example(
        None, "The parcel was supposed to be here last Tuesday and the tracking page hasn't moved since. Any news?"
    ),
    Example(None, "Two hours of beautiful fog and a script that never finds its way out of it. I left before the end."),
    Example(None, "CONGRATS!! your number was picked for a free cruise, reply YES with your card details to claim"),
    Example(None, "which explorer first sailed around the southern tip of Africa?"),
    Example(None, "How do I get candle wax out of a carpet?", "What removes wax that dripped onto my rug?"),
    Example(None, "Central bank holds rates as factory orders slump for third month"),
)


def run_demo(output: Path, overwrite: bool, console: Console, progress: View = "auto") -> Run:
    """Train the demo recipe, print a comparison and predictions for new inputs, and draw a map of the tasks.

    Args:
        output: Folder of the run.
        overwrite: Whether to replace an earlier run in the folder.
        console: Console to print to.
        progress: What is shown during the training; see `TrainingArguments`. Default: "auto".

    Returns:
        The run.
    """
    require("matplotlib")
    run = train(load_recipe(recipe_path()), output, overwrite=overwrite, progress=progress)
    comparison = compare(run)
    write_atomically(output / COMPARISON_FILE, (json.dumps(comparison, indent=2, allow_nan=False) + "\n").encode())
    _draw_map(output)
    _print_comparison(comparison, console)
    _print_answers(run, console)
    console.print(f"\nCheckpoint, metrics.json and {MAP_FILE} are in {output}/")
    return run


def recipe_path() -> Path:
    """Return the path of the demo's recipe: next to the data in an installed package, in `recipes/` in a checkout."""
    package = Path(str(files("hyperadapters")))
    installed = package / "demo_data" / "recipe.yaml"
    return installed if installed.is_file() else package.parents[1] / "recipes" / "demo.yaml"


def compare(run: Run) -> dict[str, Any]:
    """Compute the test scores of the majority class, a linear probe on the frozen features, and the trained model.

    Args:
        run: Run of the demo recipe.

    Returns:
        Scores of each task with each method, their means, the routing accuracy and the training time in seconds.
    """
    methods: dict[str, dict[str, float]] = {"majority": {}, "linear_probe": {}, "pha": {}}
    for data in run.tasks:
        name, metric = data.task.name, data.task.main_metric
        methods["majority"][name] = majority(data)[metric]
        methods["linear_probe"][name] = linear_probe(run.model, data)[metric]
        methods["pha"][name] = run.evaluations["test"].tasks[name][metric]
    return {
        "test": methods,
        "mean": {method: sum(scores.values()) / len(scores) for method, scores in methods.items()},
        "routing_accuracy": run.metrics["routing_accuracy"],
        "seconds": run.metrics["seconds"],
    }


def _draw_map(folder: Path) -> None:
    *_, by_t_sne = maps_of(read_details(folder))
    write_atomically(folder / MAP_FILE, figure_bytes(by_t_sne, ".png"))


def _print_comparison(comparison: dict[str, Any], console: Console) -> None:
    table = Table(title="Accuracy on test rows, per cent")
    table.add_column("task")
    for title in ("majority class", "linear probe", "PHA"):
        table.add_column(title, justify="right")
    methods = comparison["test"]
    for name in methods["pha"]:
        table.add_row(name, *(f"{100 * scores[name]:.1f}" for scores in methods.values()))
    table.add_section()
    table.add_row("mean", *(f"{100 * comparison['mean'][method]:.1f}" for method in methods), style="bold")
    console.print(table)
    console.print(
        f"Routing: {100 * comparison['routing_accuracy']:.1f} % of test rows are most similar to their own task."
    )
    console.print(f"Training took {comparison['seconds']:.0f} s.")


def _print_answers(run: Run, console: Console) -> None:
    table = Table(title="New inputs without a task", show_lines=True)
    table.add_column("input", ratio=3)
    table.add_column("task", no_wrap=True)
    table.add_column("answer", no_wrap=True)
    for example, prediction in zip(NEW_INPUTS, Predictor(run.model, decline=False)(NEW_INPUTS), strict=True):
        text = example.text if example.text_pair is None else f"{example.text} / {example.text_pair}"
        likely = "" if prediction.probabilities is None else f" ({max(prediction.probabilities.values()):.2f})"
        table.add_row(text, prediction.task, f"{prediction.answer}{likely}")
    console.print(table)
