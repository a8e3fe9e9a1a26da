"""What commands print about their results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import typer

from hyperadapters.utils.texts import counted, printable, shown_size

if TYPE_CHECKING:
    from rich.console import Console

    from hyperadapters.config import Source
    from hyperadapters.config.catalogue import CatalogueEntry
    from hyperadapters.fewshot.add_task import FitReport
    from hyperadapters.training.calibration import CalibrationReport
    from hyperadapters.training.plan import MemoryPlan

WIDE = 120
"""Width of a terminal from which on the table of the catalogue has all columns."""
MAX_ERROR = 300
"""Number of characters of the error of a trial that are printed; its row has all of them."""


def print_result(result: dict[str, Any]) -> None:
    """Print the result of a command as the last line of a JSON log.

    Args:
        result: The content of metrics.json, or the rows of a sweep.
    """
    from hyperadapters.inference.predict_files import as_json

    typer.echo(as_json({"event": "result", **result}, ensure_ascii=True))


def print_scores(metrics: dict[str, Any]) -> None:
    """Print the scores of each task as a table, and their mean.

    Args:
        metrics: The content of metrics.json.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    splits = list(metrics["mean"])
    table = Table("task", "metric")
    for split in splits:
        table.add_column(split, justify="right")
    for name, scores in metrics["tasks"].items():
        for metric in next(iter(scores.values())):
            cells = [f"{scores[split][metric]:.4f}" if split in scores else "" for split in splits]
            table.add_row(escape(name), metric, *cells)
    table.add_section()
    table.add_row("mean", "", *(f"{metrics['mean'][split]:.4f}" for split in splits), style="bold")
    console = Console()
    console.print(table)
    if metrics["routing_accuracy"] is not None:
        console.print(f"routing accuracy {metrics['routing_accuracy']:.4f}")


def print_calibration(report: CalibrationReport) -> None:
    """Print thresholds and temperatures of each task.

    Args:
        report: What a calibration found.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("task")
    for title in ("rows", "threshold", "declined at most", "temperature"):
        table.add_column(title, justify="right")
    for name, found in report.tasks.items():
        values = (found.threshold, found.decline_bound, found.temperature)
        table.add_row(escape(name), str(found.rows), *("" if value is None else f"{value:.3f}" for value in values))
    Console().print(table)
    if report.declined is not None:
        typer.echo(f"{100 * report.declined:.1f} % of the rows are declined.")
    if report.foreign_accepted is not None:
        typer.echo(f"{100 * report.foreign_accepted:.1f} % of the foreign inputs are accepted.")


def print_plan(plan: MemoryPlan) -> None:
    """Print the memory that each part of a training needs.

    Args:
        plan: The planned memory.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table("part", title=f"Memory of each process ({plan.device})")
    table.add_column("size", justify="right")
    for name, size in plan.parts.items():
        table.add_row(name, shown_size(size))
    table.add_section()
    table.add_row("total", shown_size(plan.total), style="bold")
    Console().print(table)
    typer.echo(
        f"{plan.backbone_parameters:,} parameters of the backbone, {plan.trained_parameters:,} trained. Largest batch "
        f"of a process: {plan.rows} rows of {plan.tokens} tokens."
    )
    if plan.file_bytes:
        typer.echo(f"In a file of each machine: {shown_size(plan.file_bytes)} of states of frozen layers.")
    typer.echo(f"Largest part that the recipe can change: {plan.advice}.")


def print_trials(rows: list[dict[str, Any]]) -> None:
    """Print the settings and scores of the trials of a sweep, the best of them in bold, and why trials failed.

    Args:
        rows: The rows of the trials, of which at least one has not failed.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    best = max(row["validation"] for row in rows if "error" not in row)
    table = Table("trial", "settings", title="Mean scores, per cent")
    for title in ("validation", "test"):
        table.add_column(title, justify="right")
    for row in rows:
        settings = ", ".join(f"{key}={json.dumps(value)}" for key, value in row["settings"].items())
        cells = ["failed", ""] if "error" in row else [f"{row[name]:.1f}" for name in ("validation", "score")]
        style = "bold" if row.get("validation") == best else None
        table.add_row(str(row["trial"]), escape(settings), *cells, style=style)
    Console().print(table)
    failed = [row for row in rows if "error" in row]
    if failed:
        typer.echo(f"{len(failed)} of {counted(len(rows), 'trial')} failed:")
    for row in failed:
        typer.echo(f"  trial {row['trial']}: {printable(shorten(row['error'], MAX_ERROR, placeholder='...'))}")


def print_catalogue(entries: Sequence[CatalogueEntry], console: Console) -> None:
    """Print the tasks of the catalogue: as a table in a terminal, and elsewhere as lines with tabs between the cells.

    Args:
        entries: Entries of the catalogue.
        console: Console to print to.
    """
    from rich.table import Table

    rows = [_catalogue_row(entry) for entry in entries]
    if not console.is_terminal:
        for row in rows:
            typer.echo("\t".join(row))
        return
    titles = ("name", "task", "kind", "metric", "data")[: 5 if console.width >= WIDE else 2]
    table = Table()
    for title in titles:
        table.add_column(title, no_wrap=title == "name", overflow="fold")
    for row in rows:
        table.add_row(*row[: len(titles)])
    console.print(table)
    console.print("hyperadapters tasks --show NAME describes one of them.", highlight=False)


def _catalogue_row(entry: CatalogueEntry) -> tuple[str, ...]:
    from hyperadapters.config import TaskEntry, parse

    task = parse(TaskEntry, {"catalogue": entry.name})
    data = " ".join(filter(None, (task.source.dataset, task.source.subset))) or "local files"
    return entry.name, entry.summary, task.kind, ", ".join(task.metrics), data


def catalogue_facts(entry: CatalogueEntry) -> dict[str, Any]:
    """Return what the catalogue says of a task.

    Args:
        entry: Entry of the catalogue.

    Returns:
        The values of the task in a recipe, its verbalizer in order of the labels, and a description of its splits.
    """
    from hyperadapters.config import SPLITS, TaskEntry, parse

    task = parse(TaskEntry, {"catalogue": entry.name})
    values = task.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude={"verbalizer", "catalogue"})
    words = {label: (task.verbalizer or {}).get(label, label) for label in task.labels}
    values |= {"kind": task.kind, "source": _whole_source(task.source)}
    if task.is_labelled and not task.labels:
        values["labels"] = "the labels of the training rows, sorted"
    facts = {"summary": entry.summary, "note": entry.note, **values, "verbalizer": words}
    splits = {split: _origin(task.source, split) for split in SPLITS}
    return {key: value for key, value in facts.items() if value} | {"splits": splits}


def _whole_source(source: Source) -> dict[str, Any]:
    """Return a source as in a recipe, with the splits from which rows are held out."""
    values = source.model_dump(mode="json", exclude_defaults=True)
    return values | (source.model_dump(mode="json", by_alias=True, include={"held_out"}) if source.held_out else {})


def _origin(source: Source, split: Any) -> str:
    """Return where the rows of a split of a task of the catalogue come from."""
    if split in source.held_out:
        size, origin = source.held_out[split].size, source.held_out[split].from_split
        return f"{f'{size:,}' if size >= 1 else f'{100 * size:g} %'} of the rows of {origin}"
    if source.dataset is None:
        return f"file {str(source.path).replace('{split}', split)}"
    return f"split {(source.splits or {}).get(split, split)} of the data set"


def print_fit(report: FitReport) -> None:
    """Print how a task was fitted, and what changed for other tasks.

    Args:
        report: What a fit found.
    """
    similar = ", ".join(f"{known.task} ({known.similarity:.3f})" for known in report.neighbours)
    typer.echo(f"'{report.task}': {counted(report.examples, 'example')}, initialised with {report.init}")
    typer.echo(f"  most similar tasks by prototypes: {similar or 'none'}")
    steps = f"{counted(report.steps, 'step')} ({report.stopping}), " if report.stopping != "none" else ""
    typer.echo(f"  fit {report.fit}: {steps}{report.seconds:.1f} s")
    if report.name_weight is not None:
        examples = "example" if report.name_weight == 1 else "examples"
        typer.echo(f"  the name or description of each label counts like {report.name_weight:g} more {examples} of it")
    for name, change in report.changes.items():
        typer.echo(f"  changed '{name}': adapter by {change.adapter:.2%}, its logits by {change.output:.4f} on average")
