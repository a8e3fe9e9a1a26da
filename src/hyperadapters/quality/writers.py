"""Writers of a report on data: as tables on a terminal, as JSON, and as a page of HTML that needs nothing else."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hyperadapters.config import SPLITS
from hyperadapters.quality.findings import Finding, QualityReport, TaskSummary
from hyperadapters.utils.files import check_target, write_atomically
from hyperadapters.utils.optional import require
from hyperadapters.utils.texts import printable

ENDINGS = (".html", ".json")
TABLE_EXAMPLES = 3
"""Number of rows of a finding that the table shows."""
PAGE_EXAMPLES = 50
"""Number of rows of a finding that the page shows."""
TEMPLATE = "report.html.jinja"
NAME_WIDTH = 24
"""Width up to which names of tasks are in one line, while the kinds of tasks are divided if there is no room."""
STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def check_outputs(paths: list[Path]) -> None:
    """Check before a long computation that reports can be written to files.

    Args:
        paths: Files to write.

    Raises:
        OutputError: If one cannot be written, or its name does not end in .html or .json.
        MissingPackageError: If jinja2 is needed and not installed.
    """
    for path in paths:
        check_target(path, ENDINGS)
        if path.suffix == ".html":
            require("jinja2")


def write_report(report: QualityReport, path: Path) -> None:
    """Write a report to a file, as HTML if its name ends in .html and as JSON otherwise.

    Args:
        report: The report.
        path: File to write.

    Raises:
        OutputError: If the file cannot be written.
        MissingPackageError: If jinja2 is needed and not installed.
    """
    text = as_html(report) if path.suffix == ".html" else as_json(report) + "\n"
    write_atomically(path, text.encode())


def as_json(report: QualityReport) -> str:
    """Return a report as a JSON object.

    Args:
        report: The report.
    """
    return json.dumps(report.as_dict(), indent=2, allow_nan=False)


def as_html(report: QualityReport) -> str:
    """Return a report as a page that loads nothing from elsewhere and runs no script. All texts are escaped.

    Args:
        report: The report.

    Raises:
        MissingPackageError: If jinja2 is not installed.
    """
    jinja2 = require("jinja2")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["printable"] = printable
    template = environment.from_string((files("hyperadapters.quality") / TEMPLATE).read_text(encoding="utf-8"))
    page: str = template.render(report=report, max_examples=PAGE_EXAMPLES)
    return page


def print_report(report: QualityReport, console: Console) -> None:
    """Print a report as tables.

    Args:
        report: The report.
        console: Console to print to.
    """
    console.print(_summary(report))
    console.print("tokens: median number of tokens; cut: number of inputs that are truncated")
    for finding in report.findings:
        _print_finding(finding, console)
    for note in report.notes:
        console.print(f"note: {escape(printable(note))}", soft_wrap=True, highlight=False)
    console.print(f"\n[bold]{escape(report.verdict())}[/bold]", soft_wrap=True, highlight=False)


def _summary(report: QualityReport) -> Table:
    """Return the table of the tasks, without the columns of numbers that no task has."""
    cells = [_cells(task) for task in report.tasks]
    titles = [title for title in cells[0] if any(row[title] for row in cells)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for title in titles:
        is_number = title not in ("task", "kind")
        table.add_column(title, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    table.columns[0].width = min(
        NAME_WIDTH, max(len("task"), *(cell_len(printable(task.name)) for task in report.tasks))
    )
    for row in cells:
        table.add_row(*(row[title] for title in titles))
    return table


def _cells(task: TaskSummary) -> dict[str, str]:
    rows = {split: f"{task.rows[split]:,}" if split in task.rows else "" for split in SPLITS}
    return {
        "task": escape(printable(task.name)),
        "kind": task.kind,
        "train": rows["train"],
        "val.": rows["validation"],
        "test": rows["test"],
        "labels": str(len(task.labels) or ""),
        "tokens": str(task.lengths.median),
        "longest": f"{task.lengths.longest:,}",
        "cut": f"{task.lengths.truncated:,}",
    }


def _print_finding(finding: Finding, console: Console) -> None:
    style = STYLES[finding.severity]
    head = f"[{style}]{finding.severity}[/{style}] {finding.check} in [bold]{escape(printable(finding.task))}[/bold]:"
    console.print(f"\n{head} {escape(finding.message)}", soft_wrap=True, highlight=False)
    console.print(f"  {escape(finding.advice)}", soft_wrap=True, highlight=False)
    for example in finding.examples[:TABLE_EXAMPLES]:
        note = f" ({example.note})" if example.note else ""
        line = f"    {printable(example.place)}: {example.text}{printable(note)}"
        console.print(escape(line), soft_wrap=True, highlight=False)
    if len(finding.examples) > TABLE_EXAMPLES:
        console.print(f"    ... and {len(finding.examples) - TABLE_EXAMPLES:,} more", highlight=False)
