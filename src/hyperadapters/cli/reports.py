"""The command that shows the results of finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hyperadapters.cli.app import TRAINING, app


@app.command(
    rich_help_panel=TRAINING,
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters report runs/helpdesk\n\n"
    "hyperadapters report runs/helpdesk --output helpdesk.html --figures figures/\n\n"
    "hyperadapters report --compare runs/helpdesk runs/small\n\n"
    "hyperadapters report benchmarks/results/sample_efficiency.jsonl\n\n"
    "Only saved files are read. The page loads nothing from elsewhere and contains texts of evaluated rows.",
)
def report(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="DIR|RESULTS...", help="Folder of a finished run, or JSON-lines file of result rows."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(help="Folder to which each figure is written as PNG and SVG, too.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Compare two or more finished runs.")] = False,
) -> None:
    """Show the results of a finished run, of several runs or of result rows as a page with figures."""
    from hyperadapters.report.write import write_report

    written = write_report(results, output, figures, compare)
    more = f"; {len(written.charts)} figures as PNG and SVG are in {figures}/" if figures else ""
    typer.echo(f"The report is in {output}{more}")
