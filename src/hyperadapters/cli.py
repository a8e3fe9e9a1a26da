"""The command line. PyTorch is imported only inside the commands, so that the help appears quickly."""

from __future__ import annotations

import codecs
import errno
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hyperadapters._version import __version__
from hyperadapters.errors import HyperAdaptersError

if TYPE_CHECKING:
    from hyperadapters.fewshot.add_task import FitReport
    from hyperadapters.model.model import HyperAdapterModel
    from hyperadapters.training.calibration import CalibrationReport
    from hyperadapters.training.plan import MemoryPlan

app = typer.Typer(
    name="hyperadapters",
    help="One frozen language model, one small hypernetwork, sixty-four numbers per task.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

JSON_ESCAPES = "hyperadapters.json_escapes"
"""Name of the error handler of the output streams."""
ENGINES = ("local", "ray")
"""What predicts and serves: this process, or processes of Ray."""
FAIL_ON = {"error": ("error",), "warning": ("error", "warning"), "never": ()}
"""Severities of findings with which a check fails, by the option --fail-on."""
FOUND_FAULTS = 3
"""Exit code of a check that finds faults, which is neither that of a wrong call nor that of a failure."""
UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EFBIG)
"""Errors of an output that cannot be written to any more, which are not failures of the program."""

RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a finished run.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe in YAML, see recipes/.")]
ExamplesFile = Annotated[Path, typer.Option(help="JSON-lines, CSV, TSV or Parquet file.")]
Delimiter = Annotated[
    str | None, typer.Option(help="Delimiter of a CSV or TSV file; default: a comma for CSV and a tab for TSV.")
]
PerLabel = Annotated[int | None, typer.Option(min=1, help="Number of examples of each label to use; default: all.")]
FitOption = Annotated[
    str | None,
    typer.Option(
        help="Parameters to train: prototype, adapter, shared or none; or head for a regression without training. "
        "Default: head if the heads of the model read adapted texts, otherwise adapter."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the subset, the held-out examples and the batches.")]
TextColumns = Annotated[
    list[str] | None,
    typer.Option("--text", help="Column of the text; repeat it for the second text of pairs. Default: it is guessed."),
]
LabelColumn = Annotated[str | None, typer.Option("--label", help="Column of the label. Default: it is guessed.")]
KindOption = Annotated[
    str | None,
    typer.Option(
        "--kind", help="Kind: classification, multi-label, regression or text-to-text. Default: it is guessed."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe; can be repeated."),
]


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


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters train recipes/helpdesk.yaml --output runs/helpdesk\n\n"
    "hyperadapters train recipes/helpdesk.yaml --output runs/small --set data.n_train=100 --set seed=1\n\n"
    "hyperadapters train recipes/helpdesk.yaml --output runs/helpdesk --resume"
)
def train(
    recipe: RecipeFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the checkpoint and metrics.json.")],
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the folder.")] = False,
    overrides: Overrides = None,
) -> None:
    """Train a model on the tasks of a recipe and evaluate it."""
    from hyperadapters.config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from hyperadapters.training.run import train as train_run
    from hyperadapters.training.sharding import process_index

    logging.basicConfig(format="%(message)s")
    logging.getLogger("hyperadapters").setLevel(logging.INFO)
    run = train_run(loaded, output, resume=resume, overwrite=overwrite)
    if process_index() > 0:
        return
    _print_scores(run.metrics)
    typer.echo(f"Checkpoint and metrics.json are in {output}/")


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters evaluate runs/helpdesk\n\n"
    "hyperadapters evaluate runs/helpdesk --split validation --output scores.json"
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
    _print_scores(metrics)


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters predict runs/helpdesk --input texts.jsonl\n\n"
    "hyperadapters predict runs/helpdesk --input texts.csv --task refunds --output answers.csv\n\n"
    "hyperadapters predict runs/helpdesk --input texts.csv --tasks refunds --tasks urgent\n\n"
    "hyperadapters predict runs/helpdesk --input large.parquet --output answers.jsonl --engine ray\n\n"
    "hyperadapters predict runs/helpdesk --input texts.jsonl --store stores/helpdesk\n\n"
    "The input has a column 'text' (and 'text_pair' for pairs). A column 'task' names the task of each row; "
    "rows without one are routed to the most similar task, or declined if none is similar. Other columns are kept."
)
def predict(
    folder: RunFolder,
    input_file: Annotated[
        Path,
        typer.Option("--input", "-i", help="JSON-lines, CSV, TSV or Parquet file, or - for JSON-lines from stdin."),
    ],
    task: Annotated[str | None, typer.Option(help="Task of all rows; default: the row's own, or routed.")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Task that is answered for each row; repeat it for several tasks, or give '*' for all."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON-lines or CSV file; default: JSON-lines to stdout.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of rows in a batch.")] = 64,
    route: Annotated[
        str, typer.Option(help="Adapters of routed rows: nearest, or soft for a mixture of tasks.")
    ] = "nearest",
    decline: Annotated[
        bool, typer.Option("--decline/--no-decline", help="Whether to decline rows that are not similar to any task.")
    ] = True,
    max_error: Annotated[
        float | None,
        typer.Option(help="Maximum share of wrong answers of a task; rows that are not certain enough get no answer."),
    ] = None,
    delimiter: Delimiter = None,
    engine: Annotated[
        str,
        typer.Option(
            help="local for this process, or ray for worker processes of Ray; the same command continues a prediction "
            "with ray that was interrupted."
        ),
    ] = "local",
    shard_rows: Annotated[
        int | None, typer.Option(min=1, help="Number of rows that a worker of Ray predicts at a time; default: 10000.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of workers of Ray; default: one for each GPU, or else for each processor."),
    ] = None,
    on_bad_row: Annotated[
        str, typer.Option(help="error, or skip to omit rows that cannot be read and report their number.")
    ] = "error",
    store: Annotated[
        Path | None, typer.Option(help="Task store, whose tasks are used instead of those of the run.")
    ] = None,
) -> None:
    """Predict the targets of new inputs, and route those without a task."""
    from hyperadapters.errors import DataError, OutputError, TaskError, unknown_name
    from hyperadapters.inference.predict_files import OUTPUT_ENDINGS, predict_file
    from hyperadapters.inference.predictor import Predictor
    from hyperadapters.utils.files import check_target

    if output is not None:
        check_target(output, OUTPUT_ENDINGS)
    if tasks and (route != "nearest" or not decline):
        raise TaskError("--tasks: nothing is routed or declined if tasks are given; remove --route and --no-decline")
    if engine not in ENGINES:
        raise DataError("--engine: " + unknown_name("engine", engine, ENGINES))
    if engine != "ray" and (shard_rows is not None or workers is not None):
        raise DataError("--shard-rows and --workers: only valid with --engine ray; add it, or remove them")
    if store is not None and (tasks or route != "nearest" or engine != "local"):
        raise TaskError("--store: not valid with --tasks, --route or --engine; name the task of each row instead")
    chosen = "*" if tasks == ["*"] else tasks
    if engine == "ray":
        if output is None:
            raise OutputError("--engine ray: expected an output file, found none; add --output")
        from hyperadapters.inference.predict_ray import SHARD_ROWS, predict_file_with_ray

        predict_file_with_ray(
            folder,
            input_file,
            output,
            task,
            cast(Any, chosen),
            batch_size,
            cast(Any, route),
            decline,
            delimiter,
            shard_rows or SHARD_ROWS,
            workers,
            progress=True,
            on_bad_row=cast(Any, on_bad_row),
            max_error=max_error,
        )
        return
    predictor = Predictor.from_pretrained(
        folder, batch_size=batch_size, route=route, decline=decline, max_error=max_error
    )
    if store is not None:
        from hyperadapters.checkpoints.task_store import TaskStore
        from hyperadapters.inference.stored_tasks import StorePredictor

        predictor = StorePredictor(predictor.model, TaskStore.open(store), batch_size, decline, max_error=max_error)
    predict_file(
        predictor,
        input_file,
        task,
        output,
        progress=output is not None,
        delimiter=delimiter,
        tasks=cast(Any, chosen),
        on_bad_row=cast(Any, on_bad_row),
    )


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters add-task runs/helpdesk --name refunds --examples refunds.csv\n\n"
    "hyperadapters add-task runs/helpdesk --name refunds --examples all.jsonl --k-per-label 16 --fit prototype\n\n"
    "The examples have the columns 'text' (and 'text_pair' for pairs) and 'label'."
)
def add_task(
    folder: RunFolder,
    name: Annotated[str, typer.Option(help="Name of the new task.")],
    examples: ExamplesFile,
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
    delimiter: Delimiter = None,
) -> None:
    """Add a task to a run from a few examples. Other tasks only change with --fit shared."""
    from hyperadapters.config import Task, parse
    from hyperadapters.data.sources import read_file
    from hyperadapters.errors import TaskError
    from hyperadapters.inference.batches import best_device

    rows = read_file(examples, delimiter)
    fields = ["text", "text_pair"] if any(row.values.get("text_pair") for row in rows) else ["text"]
    described = {"name": name, "kind": kind, "fields": fields, "metrics": metric or [], "template": template}
    task = parse(Task, described, TaskError)
    _announce(fit)
    with _changed_model(folder) as model:
        model.to(best_device())
        report = model.add_task(task, rows, cast(Any, fit), cast(Any, init), k_per_label, seed=seed)
    _print_report(report)


@app.command(
    epilog="[bold]Example[/bold]\n\nhyperadapters refit-task runs/helpdesk --name refunds --examples refunds.csv"
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
    delimiter: Delimiter = None,
) -> None:
    """Fit a task of a run to new examples. Other tasks only change with --fit shared."""
    from hyperadapters.data.sources import read_file
    from hyperadapters.inference.batches import best_device

    rows = read_file(examples, delimiter)
    _announce(fit)
    with _changed_model(folder) as model:
        model.to(best_device())
        report = model.refit_task(name, rows, cast(Any, fit), cast(Any, init), k_per_label, seed=seed)
    _print_report(report)


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters suggest runs/helpdesk --task refunds --pool texts.jsonl -k 20\n\n"
    "hyperadapters suggest runs/helpdesk --task refunds --pool texts.csv --output next.csv\n\n"
    "The pool has the column 'text' (and 'text_pair' for pairs). Its other columns are kept."
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
    delimiter: Delimiter = None,
) -> None:
    """Suggest which rows to label next for a task."""
    from hyperadapters.data.sources import read_file
    from hyperadapters.fewshot.suggest import suggest as suggest_rows
    from hyperadapters.fewshot.suggest import suggested_rows
    from hyperadapters.inference.batches import best_device
    from hyperadapters.inference.predict_files import OUTPUT_ENDINGS, as_json, write_records
    from hyperadapters.model.model import HyperAdapterModel
    from hyperadapters.utils.files import check_target

    if output is not None:
        check_target(output, OUTPUT_ENDINGS)
    rows = read_file(pool, delimiter)
    model = HyperAdapterModel.from_pretrained(folder).to(best_device())
    records = suggested_rows(rows, suggest_rows(model, task, rows, k, cast(Any, strategy), seed))
    if output is not None:
        write_records(output, records, columns=())
    for record in records if output is None else ():
        typer.echo(as_json(record))


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters calibrate runs/helpdesk --inputs labelled.csv\n\n"
    "hyperadapters calibrate runs/helpdesk --inputs labelled.csv --foreign other.csv --false-accept-rate 0.1\n\n"
    "The inputs have the columns 'text' (and 'text_pair' for pairs), 'task', and 'label' if there are labels. "
    "They must not have been used for training."
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
    delimiter: Delimiter = None,
) -> None:
    """Set thresholds of routing, temperatures and error bounds from new rows, without training."""
    from hyperadapters.data.sources import read_file
    from hyperadapters.errors import DataError
    from hyperadapters.inference.batches import best_device

    data: dict[str, list[Any]] = {}
    for row in read_file(inputs, delimiter):
        name = task or row.values.get("task")
        if not isinstance(name, str) or not name:
            raise DataError(f"{row.place}: expected a task in the column 'task', found none; add it, or use --task")
        data.setdefault(name, []).append(row)
    outside = None if foreign is None else read_file(foreign, delimiter)
    with _changed_model(folder) as model:
        model.to(best_device())
        report = model.calibrate(data, outside, false_decline_rate, false_accept_rate)
    _print_calibration(report)


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters store runs/helpdesk stores/helpdesk\n\n"
    "hyperadapters store runs/helpdesk stores/helpdesk --task refunds --replace"
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
    typer.echo(f"The task store {store_folder} has {len(opened)} tasks")


@app.command(epilog="[bold]Example[/bold]\n\nhyperadapters remove-task runs/helpdesk --name refunds")
def remove_task(folder: RunFolder, name: Annotated[str, typer.Option(help="Name of the task.")]) -> None:
    """Remove a task from a run. Other tasks do not change."""
    with _changed_model(folder) as model:
        model.remove_task(name)
    typer.echo(f"Removed '{name}'. Tasks now: {', '.join(task.name for task in model.tasks)}")


@app.command(epilog="[bold]Example[/bold]\n\nhyperadapters rename-task runs/helpdesk --name refunds --to returns")
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
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters export runs/helpdesk --task refunds --format peft-lora --output exports/refunds\n\n"
    "hyperadapters export runs/helpdesk --all --format peft-lora --output exports/helpdesk\n\n"
    "hyperadapters export runs/helpdesk --format runtime --quantize int8 --output exports/runtime"
)
def export(
    folder: RunFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create.")],
    target: Annotated[str, typer.Option("--format", help="Format: peft-lora, merged, adapterhub, onnx or runtime.")],
    task: Annotated[str | None, typer.Option(help="Name of the task.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Export all tasks, each to a folder with its name.")] = False,
    quantize: Annotated[
        str | None, typer.Option(help="int8 to compute in eight bits with format runtime; default: float32.")
    ] = None,
) -> None:
    """Export a task to the format of another library, or all tasks for hyperadapters.runtime, which needs no torch."""
    from hyperadapters.interop.export import export as export_tasks

    for note in export_tasks(folder, target, output, task, every, quantize):
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"Written to {output}/")


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters serve runs/helpdesk\n\n"
    "hyperadapters serve runs/helpdesk --host 0.0.0.0 --port 80 --token-file tokens.txt"
)
def serve(
    folder: RunFolder,
    host: Annotated[str, typer.Option(help="Address on which the server listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port on which the server listens; 0 for any free port.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with a line 'predict TOKEN' or 'admin TOKEN' for each client."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let other machines use a server without tokens.")
    ] = False,
    max_batch_rows: Annotated[int, typer.Option(help="Maximum number of inputs that are answered together.")] = 64,
    max_batch_tokens: Annotated[int, typer.Option(help="Maximum number of tokens that are answered together.")] = 8192,
    max_wait_ms: Annotated[
        float, typer.Option(help="Time for which an idle server waits for further requests, in milliseconds.")
    ] = 2.0,
    max_queue_rows: Annotated[
        int, typer.Option(help="Maximum number of inputs that wait; further requests are refused.")
    ] = 2048,
    timeout_ms: Annotated[int, typer.Option(help="Deadline of a request in milliseconds.")] = 10_000,
    log_texts: Annotated[bool, typer.Option("--log-texts", help="Write the texts of requests to the log.")] = False,
    engine: Annotated[
        str, typer.Option(help="local for one process, or ray for replicas on one machine or many with Ray Serve.")
    ] = "local",
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Number of replicas with --engine ray; default: 1.")
    ] = None,
) -> None:
    """Serve the model of a run by HTTP, with a page to try it. Tasks can be changed while it serves."""
    from hyperadapters.errors import ServingError, unknown_name
    from hyperadapters.utils.optional import require

    if engine not in ENGINES:
        raise ServingError("--engine: " + unknown_name("engine", engine, ENGINES))
    if engine != "ray" and replicas is not None:
        raise ServingError("--replicas: only valid with --engine ray; add it, or remove --replicas")

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package)
    from hyperadapters.serving.server import serve as serve_run
    from hyperadapters.serving.settings import ServerSettings

    settings = ServerSettings(
        host=host,
        port=port,
        token_file=token_file,
        insecure=insecure,
        max_batch_rows=max_batch_rows,
        max_batch_tokens=max_batch_tokens,
        max_wait_ms=max_wait_ms,
        max_queue_rows=max_queue_rows,
        timeout_ms=timeout_ms,
        log_texts=log_texts,
    )

    def tell(address: str) -> None:
        typer.echo(f"Serving {folder} at {address}")

    if engine == "ray":
        from hyperadapters.serving.ray_engine import serve_with_ray

        serve_with_ray(folder, settings, replicas or 1, tell)
    else:
        serve_run(folder, settings, tell)


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters validate recipes/helpdesk.yaml\n\n"
    "hyperadapters validate recipes/helpdesk.yaml --data"
)
def validate(
    recipe: RecipeFile,
    data: Annotated[bool, typer.Option("--data", help="Also read and check all rows.")] = False,
    overrides: Overrides = None,
) -> None:
    """Check a recipe without training."""
    from hyperadapters.config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    typer.echo(f"{recipe}: {len(loaded.tasks)} tasks on {loaded.backbone}")
    if data:
        from hyperadapters.data.loading import load_tasks

        for found in load_tasks(loaded.tasks, loaded.data, loaded.seed):
            sizes = ", ".join(f"{len(rows)} {split}" for split, rows in found.splits.items())
            labels = f", {len(found.task.labels)} labels" if found.task.labels else ""
            typer.echo(f"  {found.task.name}: {sizes}{labels}")
    typer.echo("valid")


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters check recipes/helpdesk.yaml\n\n"
    "hyperadapters check data.csv --output report.html --output report.json\n\n"
    "hyperadapters check data/ --json --fail-on warning\n\n"
    "The exit code is 3 if there is a finding of the severity of --fail-on or a graver one."
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
        str, typer.Option(help="Least severity with which the exit code is 3: error, warning or never.")
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
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters plan recipes/helpdesk.yaml\n\n"
    "hyperadapters plan recipes/helpdesk.yaml --set training.batch_size=64 --processes 4"
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
        _print_plan(found)


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters quickstart intents.csv --output runs/intents\n\n"
    "hyperadapters quickstart intents.csv spam.jsonl --text message --label class\n\n"
    "The columns and the kind are guessed, missing splits are held out, and recipe.yaml says what was done."
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
) -> None:
    """Train a model on data files without a recipe, and write the recipe that does the same again."""
    from rich.console import Console

    from hyperadapters.config import DEFAULT_BACKBONE
    from hyperadapters.quickstart import plan_quickstart, print_results
    from hyperadapters.training.run import check_output
    from hyperadapters.training.run import train as train_run
    from hyperadapters.utils.files import write_atomically

    check_output(output, resume=False, overwrite=overwrite)
    planned = plan_quickstart(
        data, output, backbone or DEFAULT_BACKBONE, texts or (), label, cast(Any, kind), delimiter
    )
    typer.echo(planned.text)
    run = train_run(planned.recipe, output, overwrite=overwrite)
    write_atomically(output / "recipe.yaml", planned.text.encode())
    print_results(run, output, Console())


@app.command(epilog="[bold]Example[/bold]\n\nhyperadapters demo --output runs/demo")
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the run.")] = Path("runs/demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the folder.")] = False,
) -> None:
    """Train a model on six small tasks that come with the package, and show the results."""
    from rich.console import Console

    from hyperadapters.demo.run import run_demo

    run_demo(output, overwrite, Console())


def _print_scores(metrics: dict[str, Any]) -> None:
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


def _print_calibration(report: CalibrationReport) -> None:
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


def _print_plan(plan: MemoryPlan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("part", title=f"Memory of each process ({plan.device})")
    table.add_column("size", justify="right")
    for name, size in plan.parts.items():
        table.add_row(name, _size(size))
    table.add_section()
    table.add_row("total", _size(plan.total), style="bold")
    Console().print(table)
    typer.echo(
        f"{plan.backbone_parameters:,} parameters of the backbone, {plan.trained_parameters:,} trained. Largest batch "
        f"of a process: {plan.rows} rows of {plan.tokens} tokens."
    )
    if plan.file_bytes:
        typer.echo(f"In a file of each machine: {_size(plan.file_bytes)} of states of frozen layers.")
    typer.echo(f"Largest part that the recipe can change: {plan.advice}.")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


@contextmanager
def _changed_model(folder: Path) -> Iterator[HyperAdapterModel]:
    """Load the model of a run, and save it when the context is left. Other commands that change the run wait."""
    from hyperadapters.model.model import HyperAdapterModel
    from hyperadapters.utils.files import locked

    with locked(folder):
        model = HyperAdapterModel.from_pretrained(folder)
        yield model
        model.save_pretrained(folder)


def _announce(fit: str | None) -> None:
    if fit == "shared":
        typer.echo(
            "--fit shared trains parameters that all tasks share; the other tasks of this run will change.", err=True
        )


def _print_report(report: FitReport) -> None:
    similar = ", ".join(f"{known.task} ({known.similarity:.3f})" for known in report.neighbours)
    typer.echo(f"'{report.task}': {report.examples} examples, initialised with {report.init}")
    typer.echo(f"  most similar tasks: {similar or 'none'}")
    typer.echo(f"  fit {report.fit}: {report.steps} steps ({report.stopping}), {report.seconds:.1f} s")
    for name, change in report.changes.items():
        typer.echo(f"  changed '{name}': adapter by {change.adapter:.2%}, its logits by {change.output:.4f} on average")


def main() -> None:
    r"""Run the command line. An error of the user ends the command with a message and exit code 2.

    Characters that an output stream cannot encode are written as in JSON, such as \u00f6. An output that cannot be
    written to any more ends the command with exit code 1, with a message if the disk is full, and without one if the
    reader has closed the pipe.
    """
    _prepare_streams()
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, which logs irrelevant warnings
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, because the interpreter prints a traceback if it fails at exit
    except HyperAdaptersError as error:
        with suppress(OSError):  # the error stream may be closed, and the exit code is sufficient then
            typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discards the rest of the buffer
        if error.errno != errno.EPIPE:
            typer.echo(f"error: the output cannot be written: {error}", err=True)
        sys.exit(1)


def _prepare_streams() -> None:
    """Let the output streams accept every character, and discard the output to a closed stream."""
    codecs.register_error(JSON_ESCAPES, _json_escapes)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the stream was closed before the interpreter started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=JSON_ESCAPES)


def _json_escapes(error: UnicodeError) -> tuple[str, int]:
    """Escape characters that cannot be encoded as JSON does, so that JSON remains valid."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


if __name__ == "__main__":
    main()
