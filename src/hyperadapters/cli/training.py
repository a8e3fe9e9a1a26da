"""Commands that train and evaluate models, or prepare that."""

from __future__ import annotations

import json
import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hyperadapters.cli.app import TRAINING, app
from hyperadapters.cli.options import (
    Delimiter,
    JsonLog,
    KindOption,
    LabelColumn,
    Overrides,
    Quiet,
    RecipeFile,
    RunFolder,
    TextColumns,
)
from hyperadapters.cli.tables import print_plan, print_result, print_scores, print_trials
from hyperadapters.utils.texts import counted

if TYPE_CHECKING:
    from hyperadapters.training.views import View


@app.command(
    rich_help_panel=TRAINING,
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters train recipes/helpdesk.yaml --output runs/helpdesk\n\n"
    "hyperadapters train recipes/helpdesk.yaml --output runs/small --set data.n_train=100 --set seed=1\n\n"
    "hyperadapters train recipes/helpdesk.yaml --output runs/helpdesk --resume",
)
def train(
    recipe: RecipeFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the checkpoint and metrics.json.")],
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the folder.")] = False,
    quiet: Quiet = False,
    json_log: JsonLog = False,
    overrides: Overrides = None,
) -> None:
    """Train a model on the tasks of a recipe and evaluate it."""
    from hyperadapters.config import load_recipe

    view = _view(quiet, json_log)
    loaded = load_recipe(recipe, overrides or ())
    from hyperadapters.training.run import train as train_run
    from hyperadapters.training.sharding import process_index

    run = train_run(loaded, output, resume=resume, overwrite=overwrite, progress=view)
    if process_index() > 0:
        return
    if view == "auto":
        print_scores(run.metrics)
        typer.echo(f"Checkpoint and metrics.json are in {output}/")
    elif view == "json":
        print_result(run.metrics)


@app.command(
    rich_help_panel=TRAINING,
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters evaluate runs/helpdesk\n\n"
    "hyperadapters evaluate runs/helpdesk --split validation --output scores.json",
)
def evaluate(
    folder: RunFolder,
    split: Annotated[str, typer.Option(help="Split to evaluate: train, validation or test.")] = "test",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file to which the scores are written too.")
    ] = None,
) -> None:
    """Evaluate the model of a run on the data of its recipe."""
    import time

    from hyperadapters.config import SPLITS
    from hyperadapters.errors import DataError, RecipeError, unknown_name
    from hyperadapters.training import run as runs
    from hyperadapters.utils.files import check_target, write_atomically

    if split not in SPLITS:
        raise RecipeError(unknown_name("split", split, SPLITS))
    if output is not None:
        check_target(output, (".json",))
    model, recipe = runs.load_run(folder)
    tasks = runs.load_run_tasks(model, recipe)
    scored = {data.task.name for data in tasks}
    for name in sorted({task.name for task in (*model.tasks, *recipe.tasks)} - scored):
        is_renamed = name in (*model.task_table.renamed, *model.task_table.renamed.values())
        reason = "which was renamed" if is_renamed else "which is not both in the model and in the recipe of the run"
        typer.echo(f"not scored: '{name}', {reason}", err=True)
    started = time.monotonic()
    found = runs.evaluate_splits(model, tasks, recipe.training.eval_batch_size, [split])
    if not found:
        raise DataError(f"expected {split} rows in the recipe of {folder}, found none; choose another split")
    metrics = runs.metrics_of(found, model.num_trainable_parameters(), time.monotonic() - started)
    if output is not None:
        write_atomically(output, (json.dumps(metrics, indent=2, allow_nan=False) + "\n").encode())
    print_scores(metrics)


@app.command(
    rich_help_panel=TRAINING,
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters quickstart intents.csv --output runs/intents\n\n"
    "hyperadapters quickstart intents.csv spam.jsonl --text message --label class\n\n"
    "The columns and the kind are guessed, missing splits are held out, and the choices are explained in recipe.yaml.",
)
def quickstart(
    data: Annotated[
        list[Path],
        typer.Argument(
            help="JSON-lines, CSV, TSV or Parquet files, a task each; or folders with train.csv, validation.csv and "
            "test.csv."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the run and recipe.yaml.")] = Path(
        "runs/quickstart"
    ),
    texts: TextColumns = None,
    label: LabelColumn = None,
    kind: KindOption = None,
    delimiter: Delimiter = None,
    backbone: Annotated[
        str | None, typer.Option(help="Name of the backbone on the Hub, or its folder. Default: all-MiniLM-L6-v2.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the folder.")] = False,
    quiet: Quiet = False,
    json_log: JsonLog = False,
) -> None:
    """Train a model on data files without a recipe, and write a recipe that repeats this training."""
    from rich.console import Console

    from hyperadapters.config import DEFAULT_BACKBONE
    from hyperadapters.quickstart import plan_quickstart, print_results
    from hyperadapters.training.run import check_output
    from hyperadapters.training.run import train as train_run
    from hyperadapters.utils.files import write_atomically

    view = _view(quiet, json_log)
    check_output(output, resume=False, overwrite=overwrite)
    planned = plan_quickstart(
        data, output, backbone or DEFAULT_BACKBONE, texts or (), label, cast(Any, kind), delimiter
    )
    if view == "auto":
        typer.echo(planned.text)
    run = train_run(planned.recipe, output, overwrite=overwrite, progress=view)
    write_atomically(output / "recipe.yaml", planned.text.encode())
    if view == "auto":
        print_results(run, planned.recipe, output, Console())
    elif view == "json":
        print_result(run.metrics)


@app.command(
    rich_help_panel=TRAINING,
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters sweep recipes/paper/low-data.yaml --output runs/low-data\n\n"
    "hyperadapters sweep recipes/paper/low-data.yaml --output runs/low-data --resume\n\n"
    "The section sweep of the recipe has the settings to try (docs/catalogue.md).",
)
def sweep(
    recipe: RecipeFile,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for results.jsonl and the runs of all trials.")
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted sweep in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier sweep in the folder.")] = False,
    quiet: Quiet = False,
    json_log: JsonLog = False,
    overrides: Overrides = None,
) -> None:
    """Train a recipe with several settings, and write a row with the scores of each."""
    from hyperadapters.sweep import RESULTS_FILE
    from hyperadapters.sweep import sweep as run_sweep

    view = _view(quiet, json_log)
    rows = run_sweep(recipe, output, overrides or (), resume=resume, overwrite=overwrite, progress=view)
    if view == "auto":
        print_trials(rows)
        typer.echo(f"The rows are in {output / RESULTS_FILE}")
    elif view == "json":
        print_result({"trials": rows})


@app.command(rich_help_panel=TRAINING, epilog="[bold]Example[/bold]\n\nhyperadapters demo --output runs/demo")
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the run.")] = Path("runs/demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the folder.")] = False,
    quiet: Quiet = False,
    json_log: JsonLog = False,
) -> None:
    """Train a model on six small tasks that come with the package, and show the results."""
    from rich.console import Console

    view = _view(quiet, json_log)
    from hyperadapters.demo.run import run_demo

    run = run_demo(output, overwrite, Console(quiet=view != "auto"), view)
    if view == "json":
        print_result(run.metrics)


@app.command(
    rich_help_panel=TRAINING,
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters plan recipes/helpdesk.yaml\n\n"
    "hyperadapters plan recipes/helpdesk.yaml --set training.batch_size=64 --processes 4",
)
def plan(
    recipe: RecipeFile,
    processes: Annotated[int, typer.Option(min=1, help="Number of processes that train together.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    overrides: Overrides = None,
) -> None:
    """Plan the memory that a training needs, without training."""
    from hyperadapters.config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from hyperadapters.training.plan import plan_memory

    found = plan_memory(loaded, processes)
    if as_json:
        from dataclasses import asdict

        typer.echo(json.dumps({**asdict(found), "total": found.total}, indent=2))
    else:
        print_plan(found)


@app.command(
    rich_help_panel=TRAINING,
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters validate recipes/helpdesk.yaml\n\n"
    "hyperadapters validate recipes/helpdesk.yaml --data",
)
def validate(
    recipe: RecipeFile,
    data: Annotated[bool, typer.Option("--data", help="Also read and check all rows.")] = False,
    overrides: Overrides = None,
) -> None:
    """Check a recipe without training."""
    from hyperadapters.config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    trials = f", {counted(loaded.sweep.num_trials, 'trial')}" if loaded.sweep else ""
    typer.echo(f"{recipe}: {counted(len(loaded.tasks), 'task')} on {loaded.backbone}{trials}")
    if data:
        from hyperadapters.data.loading import load_tasks

        for found in load_tasks(loaded.tasks, loaded.data, loaded.seed):
            sizes = ", ".join(f"{len(rows)} {split}" for split, rows in found.splits.items())
            labels = f", {len(found.task.labels)} labels" if found.task.labels else ""
            typer.echo(f"  {found.task.name}: {sizes}{labels}")
    typer.echo("valid")


def _view(quiet: bool, json_log: bool) -> View:
    """Return the view of a training, and set up the log. Of several processes only the first one prints anything."""
    from hyperadapters.errors import OutputError

    if quiet and json_log:
        raise OutputError("--quiet and --json-log exclude each other: one prints nothing, the other prints JSON")
    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s")
    level = logging.WARNING if quiet or json_log else logging.INFO
    logging.getLogger("hyperadapters").setLevel(level if is_first else logging.ERROR)
    if not is_first:
        warnings.simplefilter("ignore")
        logging.getLogger("transformers").setLevel(logging.ERROR)
    return "none" if quiet else "json" if json_log else "auto"
