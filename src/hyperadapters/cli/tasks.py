"""Commands that change the tasks of a run, and their thresholds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hyperadapters.cli.app import TASKS, app
from hyperadapters.cli.options import (
    Delimiter,
    ExamplesFile,
    FitOption,
    InputColumns,
    NamedLabelColumn,
    PerLabel,
    RunFolder,
    Seed,
)
from hyperadapters.cli.tables import print_calibration, print_fit
from hyperadapters.utils.texts import counted

if TYPE_CHECKING:
    from hyperadapters.model.model import HyperAdapterModel


@app.command(
    rich_help_panel=TASKS,
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters add-task runs/helpdesk --name refunds --examples refunds.csv\n\n"
    "hyperadapters add-task runs/helpdesk --name refunds --examples all.jsonl --k-per-label 16 --fit prototype\n\n"
    "hyperadapters add-task runs/helpdesk --name refunds --label 'yes=the customer wants the money back' "
    "--label 'no=the customer asks about something else'\n\n"
    "The examples have the columns 'text' (and 'text_pair' for pairs) and 'label'.",
)
def add_task(
    folder: RunFolder,
    name: Annotated[str, typer.Option(help="Name of the new task.")],
    examples: Annotated[
        Path | None,
        typer.Option(help="JSON-lines, CSV, TSV or Parquet file; needed unless the labels are given with --label."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL[=DESCRIPTION]",
            help="Label of the task, with a description in one line; can be repeated. Default: the labels of the "
            "examples, in alphabetical order.",
        ),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="Kind of the task: classification, multi-label, regression or text-to-text.")
    ] = "classification",
    metric: Annotated[list[str] | None, typer.Option(help="Metric of the task; can be repeated.")] = None,
    template: Annotated[
        str | None, typer.Option(help="Prompt for text-to-text backbones, such as '{text} ...'.")
    ] = None,
    k_per_label: PerLabel = None,
    fit: FitOption = None,
    init: Annotated[
        str, typer.Option(help="Initial prototype: nearest, mixture, mean_instance or random.")
    ] = "nearest",
    seed: Seed = 0,
    text: InputColumns = None,
    label_column: NamedLabelColumn = None,
    delimiter: Delimiter = None,
) -> None:
    """Add a task to a run from a few examples or from its labels alone. Other tasks only change with --fit shared."""
    from hyperadapters.config import Task, parse
    from hyperadapters.data.sources import read_file
    from hyperadapters.errors import TaskError
    from hyperadapters.inference.batches import best_device
    from hyperadapters.inference.inputs import with_columns

    if examples is None and not label:
        raise TaskError(f"task '{name}': expected --examples, or labels with --label; found neither")
    rows = [] if examples is None else list(with_columns(read_file(examples, delimiter), text or (), label_column))
    fields = ["text", "text_pair"] if any(row.values.get("text_pair") for row in rows) else ["text"]
    described = {"name": name, "kind": kind, "fields": fields, "metrics": metric or [], "template": template}
    task = parse(Task, {**described, "labels": _labels(label or [])}, TaskError)
    _announce(fit)
    with _changed_model(folder) as model:
        model.to(best_device())
        report = model.add_task(task, rows, cast(Any, fit), cast(Any, init), k_per_label, seed=seed)
    print_fit(report)


@app.command(
    rich_help_panel=TASKS,
    epilog="[bold]Example[/bold]\n\nhyperadapters refit-task runs/helpdesk --name refunds --examples refunds.csv",
)
def refit_task(
    folder: RunFolder,
    name: Annotated[str, typer.Option(help="Name of the task.")],
    examples: ExamplesFile,
    k_per_label: PerLabel = None,
    fit: FitOption = None,
    init: Annotated[
        str, typer.Option(help="Initial prototype: current, nearest, mixture, mean_instance or random.")
    ] = "current",
    seed: Seed = 0,
    text: InputColumns = None,
    label_column: NamedLabelColumn = None,
    delimiter: Delimiter = None,
) -> None:
    """Fit a task of a run to new examples. Other tasks only change with --fit shared."""
    from hyperadapters.data.sources import read_file
    from hyperadapters.inference.batches import best_device
    from hyperadapters.inference.inputs import with_columns

    rows = list(with_columns(read_file(examples, delimiter), text or (), label_column))
    _announce(fit)
    with _changed_model(folder) as model:
        model.to(best_device())
        report = model.refit_task(name, rows, cast(Any, fit), cast(Any, init), k_per_label, seed=seed)
    print_fit(report)


@app.command(
    rich_help_panel=TASKS, epilog="[bold]Example[/bold]\n\nhyperadapters remove-task runs/helpdesk --name refunds"
)
def remove_task(folder: RunFolder, name: Annotated[str, typer.Option(help="Name of the task.")]) -> None:
    """Remove a task from a run. Other tasks do not change."""
    with _changed_model(folder) as model:
        model.remove_task(name)
    typer.echo(f"Removed '{name}'. Tasks now: {', '.join(task.name for task in model.tasks)}")


@app.command(
    rich_help_panel=TASKS,
    epilog="[bold]Example[/bold]\n\nhyperadapters rename-task runs/helpdesk --name refunds --to returns",
)
def rename_task(
    folder: RunFolder,
    name: Annotated[str, typer.Option(help="Name of the task.")],
    to: Annotated[str, typer.Option(help="New name of the task.")],
) -> None:
    """Rename a task of a run."""
    with _changed_model(folder) as model:
        model.rename_task(name, to)
    typer.echo(f"Renamed '{name}' to '{to}'")


@app.command(
    rich_help_panel=TASKS,
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters calibrate runs/helpdesk --inputs labelled.csv\n\n"
    "hyperadapters calibrate runs/helpdesk --inputs labelled.csv --foreign other.csv --false-accept-rate 0.1\n\n"
    "The inputs have the columns 'text' (and 'text_pair' for pairs), 'task', and 'label' if there are labels. "
    "They must not have been used for training.",
)
def calibrate(
    folder: RunFolder,
    inputs: Annotated[Path, typer.Option(help="JSON-lines, CSV, TSV or Parquet file with rows of known tasks.")],
    task: Annotated[str | None, typer.Option(help="Task of all rows; default: the column 'task'.")] = None,
    foreign: Annotated[Path | None, typer.Option(help="File with inputs of no known task.")] = None,
    false_decline_rate: Annotated[
        float, typer.Option(help="Maximum share of the inputs of known tasks that are declined.")
    ] = 0.05,
    false_accept_rate: Annotated[
        float | None, typer.Option(help="Maximum share of foreign inputs that are accepted.")
    ] = None,
    text: InputColumns = None,
    label_column: NamedLabelColumn = None,
    delimiter: Delimiter = None,
) -> None:
    """Set thresholds of routing, temperatures and error bounds from new rows, without training."""
    from hyperadapters.data.sources import read_file
    from hyperadapters.errors import DataError
    from hyperadapters.inference.batches import best_device
    from hyperadapters.inference.inputs import with_columns

    data: dict[str, list[Any]] = {}
    for row in with_columns(read_file(inputs, delimiter), text or (), label_column):
        name = task or row.values.get("task")
        if not isinstance(name, str) or not name:
            raise DataError(f"{row.place}: expected a task in the column 'task', found none; add it, or use --task")
        data.setdefault(name, []).append(row)
    outside = None if foreign is None else list(with_columns(read_file(foreign, delimiter), text or ()))
    with _changed_model(folder) as model:
        model.to(best_device())
        report = model.calibrate(data, outside, false_decline_rate, false_accept_rate)
    print_calibration(report)


@app.command(
    rich_help_panel=TASKS,
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters suggest runs/helpdesk --task refunds --pool texts.jsonl -k 20\n\n"
    "hyperadapters suggest runs/helpdesk --task refunds --pool texts.csv --output next.csv\n\n"
    "The pool has the column 'text' (and 'text_pair' for pairs). Its other columns are kept.\n\n"
    "The rows are in the order in which to label them. With diverse_margin and margin, the score is the difference of "
    "the probabilities of the two likeliest labels: the lower, the better to label. With diversity, it is the number "
    "of rows that the row represents: the higher, the better to label.",
)
def suggest(
    folder: RunFolder,
    task: Annotated[str, typer.Option(help="Name of the task.")],
    pool: Annotated[Path, typer.Option(help="JSON-lines, CSV, TSV or Parquet file with rows that have no labels.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Number of rows.")] = 20,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="How rows are chosen: diverse_margin, margin, diversity or random. Default: diverse_margin, or "
            "diversity for tasks of other kinds than classification."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON-lines or CSV file; default: JSON-lines to stdout.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of k-means and of random rows.")] = 0,
    text: InputColumns = None,
    delimiter: Delimiter = None,
) -> None:
    """Suggest which rows to label next for a task."""
    from hyperadapters.data.sources import read_file
    from hyperadapters.fewshot.suggest import suggest as suggest_rows
    from hyperadapters.fewshot.suggest import suggested_rows
    from hyperadapters.inference.batches import best_device
    from hyperadapters.inference.inputs import with_columns
    from hyperadapters.inference.predict_files import OUTPUT_ENDINGS, as_json, write_records
    from hyperadapters.model.model import HyperAdapterModel
    from hyperadapters.utils.files import check_target

    if output is not None:
        check_target(output, OUTPUT_ENDINGS)
    rows = list(with_columns(read_file(pool, delimiter), text or ()))
    model = HyperAdapterModel.from_pretrained(folder).to(best_device())
    records = suggested_rows(rows, suggest_rows(model, task, rows, k, cast(Any, strategy), seed))
    if output is not None:
        write_records(output, records, columns=())
    for record in records if output is None else ():
        typer.echo(as_json(record))


@app.command(
    rich_help_panel=TASKS,
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters store runs/helpdesk stores/helpdesk\n\n"
    "hyperadapters store runs/helpdesk stores/helpdesk --task refunds --replace",
)
def store(
    folder: RunFolder,
    store_folder: Annotated[
        Path, typer.Argument(metavar="STORE", help="Folder of the task store, which is created if there is none.")
    ],
    task: Annotated[
        list[str] | None, typer.Option(help="Task to append; can be repeated. Default: all tasks of the run.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace stored tasks of the same name.")] = False,
) -> None:
    """Append tasks of a run to a task store, which may have more tasks than fit into memory."""
    from hyperadapters.checkpoints.task_store import TaskStore
    from hyperadapters.checkpoints.task_store_files import is_store
    from hyperadapters.model.model import HyperAdapterModel

    model = HyperAdapterModel.from_pretrained(folder)
    for name in task or ():
        model.task_id(name)
    opened = TaskStore.open(store_folder) if is_store(store_folder) else TaskStore.create(store_folder, model)
    opened.append(model, task, replace)
    typer.echo(f"The task store {store_folder} has {counted(len(opened), 'task')}")


@app.command(
    rich_help_panel=TASKS, epilog="[bold]Example[/bold]\n\nhyperadapters copy-store stores/helpdesk stores/compact"
)
def copy_store(
    store_folder: Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the task store.")],
    target: Annotated[Path, typer.Argument(metavar="COPY", help="Folder to create.")],
) -> None:
    """Copy a task store without what its files contain of removed and replaced tasks."""
    from hyperadapters.checkpoints.task_store import TaskStore

    copied = TaskStore.open(store_folder).copy(target)
    typer.echo(f"The task store {target} has {counted(len(copied), 'task')}")


@contextmanager
def _changed_model(folder: Path) -> Iterator[HyperAdapterModel]:
    """Load the model of a run, and save it when the context is left. Other commands that change the run wait."""
    from hyperadapters.model.model import HyperAdapterModel
    from hyperadapters.utils.files import locked

    with locked(folder):
        model = HyperAdapterModel.from_pretrained(folder)
        yield model
        model.save_pretrained(folder)


def _labels(given: list[str]) -> list[str] | dict[str, str]:
    """Return the labels of the option --label, with their descriptions if they have some."""
    from hyperadapters.errors import TaskError

    found = [label.partition("=") for label in given]
    names = [name for name, _, _ in found]
    if not any(equals for _, equals, _ in found):
        return names
    if bare := [name for name, equals, _ in found if not equals]:
        raise TaskError(f"--label: expected a description of each label or of none, found none of '{bare[0]}'")
    if len(set(names)) < len(names):
        raise TaskError(f"--label: labels must be different from each other, found {names}")
    return {name: description for name, _, description in found}


def _announce(fit: str | None) -> None:
    if fit == "shared":
        typer.echo(
            "--fit shared trains parameters that all tasks share; the other tasks of this run will change.", err=True
        )
