"""Commands for data without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from hyperadapters.cli.app import DATA, app
from hyperadapters.cli.options import Delimiter, KindOption, LabelColumn, Overrides, TextColumns
from hyperadapters.cli.tables import catalogue_facts, print_catalogue

FAIL_ON = {"error": ("error",), "warning": ("error", "warning"), "never": ()}
"""Severities of findings with which a check fails, by the option --fail-on."""

FOUND_FAULTS = 3
"""Exit code of a check that finds faults, which is neither that of a wrong call nor that of a failure."""


@app.command(
    rich_help_panel=DATA,
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters check recipes/helpdesk.yaml\n\n"
    "hyperadapters check data.csv --output report.html --output report.json\n\n"
    "hyperadapters check data/ --json --fail-on warning\n\n"
    "The exit code is 3 if there is a finding of the severity of --fail-on or a more severe one.",
)
def check(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA_OR_RECIPE",
            help="Recipe in YAML; JSON-lines, CSV, TSV or Parquet file; or folder of such files, where train.csv, "
            "validation.csv and test.csv are the splits of one task.",
        ),
    ],
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", help="HTML or JSON file to which the report is written too; can be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    fail_on: Annotated[
        str, typer.Option(help="Lowest severity of a finding for which the exit code is 3: error, warning or never.")
    ] = "error",
    texts: TextColumns = None,
    label: LabelColumn = None,
    kind: KindOption = None,
    delimiter: Delimiter = None,
    max_label_rows: Annotated[
        int,
        typer.Option(min=0, help="Maximum number of rows that are searched for label errors, which takes longest."),
    ] = 20_000,
    overrides: Overrides = None,
) -> None:
    """Check the quality of data: duplicates, leakage, contradictory and probably wrong labels, lengths and more."""
    from hyperadapters.errors import DataError, unknown_name

    if fail_on not in FAIL_ON:
        raise DataError("--fail-on: " + unknown_name("severity", fail_on, FAIL_ON))
    from rich.console import Console

    from hyperadapters.quality.check import check_tasks, read_input
    from hyperadapters.quality.writers import as_json as json_of
    from hyperadapters.quality.writers import check_outputs, print_report, write_report

    check_outputs(output or [])
    entries, settings = read_input(
        data, overrides or (), texts or (), label, cast(Any, kind), max_label_rows, delimiter
    )
    report = check_tasks(entries, settings)
    for path in output or ():
        write_report(report, path)
    if as_json:
        typer.echo(json_of(report))
    else:
        print_report(report, Console())
    if report.worst() in FAIL_ON[fail_on]:
        raise typer.Exit(FOUND_FAULTS)


@app.command(
    rich_help_panel=DATA,
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters tasks\n\n"
    "hyperadapters tasks --show glue/mnli\n\n"
    "A task of a recipe with `catalogue: glue/mnli` takes all values that it does not have itself from this entry.",
)
def tasks(
    show: Annotated[str | None, typer.Option(metavar="NAME", help="Task to describe, such as glue/mnli.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table or YAML.")] = False,
) -> None:
    """List the catalogue of known tasks with their data, metrics and splits."""
    from hyperadapters.config.catalogue import catalogue, find_entry

    entries = [find_entry(show)] if show is not None else list(catalogue().values())
    facts = {entry.name: catalogue_facts(entry) for entry in entries} if as_json or show is not None else {}
    if as_json:
        typer.echo(json.dumps(facts if show is None else facts[show], indent=2, ensure_ascii=False))
    elif show is not None:
        import yaml

        typer.echo(yaml.safe_dump(facts[show], sort_keys=False, allow_unicode=True, width=100).rstrip())
    else:
        from rich.console import Console

        print_catalogue(entries, Console())
