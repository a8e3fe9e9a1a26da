"""Commands that use a trained model: predict, serve and export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from hyperadapters.cli.app import PREDICTION, app
from hyperadapters.cli.options import Delimiter, InputColumns, RunFolder

ENGINES = ("local", "ray")
"""What predicts and serves: this process, or processes of Ray."""


@app.command(
    rich_help_panel=PREDICTION,
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters predict runs/helpdesk --input texts.jsonl\n\n"
    "hyperadapters predict runs/helpdesk --input texts.csv --task refunds --output answers.csv\n\n"
    "hyperadapters predict runs/helpdesk --input texts.csv --tasks refunds --tasks urgent\n\n"
    "hyperadapters predict runs/helpdesk --input large.parquet --output answers.jsonl --engine ray\n\n"
    "hyperadapters predict runs/helpdesk --input texts.jsonl --store stores/helpdesk\n\n"
    "The input has a column 'text' (and 'text_pair' for pairs). A column 'task' names the task of each row; "
    "rows without one are routed to the most similar task, or declined if none is similar. Other columns are kept.",
)
def predict(
    folder: RunFolder,
    input_file: Annotated[
        Path,
        typer.Option("--input", "-i", help="JSON-lines, CSV, TSV or Parquet file, or - for JSON-lines from stdin."),
    ],
    task: Annotated[
        str | None,
        typer.Option(help="Task of all rows. Default: the task that a row names, or else the most similar one."),
    ] = None,
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
    text: InputColumns = None,
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
    from hyperadapters.inference.predictor import Predictor, tasks_without_bounds
    from hyperadapters.utils.files import check_target
    from hyperadapters.utils.texts import printable

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
            texts=text or (),
        )
        return
    predictor = Predictor.from_pretrained(
        folder, batch_size=batch_size, route=route, decline=decline, max_error=max_error
    )
    if max_error is not None and store is None and (unknown := tasks_without_bounds(predictor.model)):
        typer.echo(
            f"note: --max-error leaves out all answers of {', '.join(map(printable, unknown))}, whose errors have no "
            "bounds yet; `hyperadapters calibrate` sets them",
            err=True,
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
        texts=text or (),
    )


@app.command(
    rich_help_panel=PREDICTION,
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters serve runs/helpdesk\n\n"
    "hyperadapters serve runs/helpdesk --host 0.0.0.0 --port 80 --token-file tokens.txt",
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
    rich_help_panel=PREDICTION,
    epilog="[bold]Examples[/bold]\n\n"
    "hyperadapters export runs/helpdesk --task refunds --format peft-lora --output exports/refunds\n\n"
    "hyperadapters export runs/helpdesk --all --format peft-lora --output exports/helpdesk\n\n"
    "hyperadapters export runs/helpdesk --format runtime --quantize int8 --output exports/runtime",
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
