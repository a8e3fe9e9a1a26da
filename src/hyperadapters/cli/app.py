"""The application to which the commands are added."""

from __future__ import annotations

from typing import Annotated

import typer

from hyperadapters._version import __version__

TRAINING, PREDICTION, TASKS, DATA = "Training", "Prediction", "Tasks", "Data"
"""Groups of commands in the help."""

app = typer.Typer(
    name="hyperadapters",
    help="One frozen language model, one small hypernetwork, sixty-four numbers per task.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
