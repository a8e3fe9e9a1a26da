"""Prediction for the rows of a large file by worker processes of Ray, which continues where it was interrupted.

    OUT.shards/manifest.json           what the predictions depend on; it is written last, when all shards are there
    OUT.shards/00000.input.jsonl       rows of the first shard, which have been checked
    OUT.shards/00000.output.jsonl      predictions for them, written by a worker; a file that exists is complete

This process reads and checks all rows before anything is predicted, and writes them to shards. Each worker loads the
model once and predicts one shard after the other with `predict_file`. In the end the predictions are written to the
output in the order of the rows, and the folder is removed. All processes must see the folder under the same path, so
that a cluster of several machines needs a file system that they share.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import hyperadapters.errors as errors
from hyperadapters._version import __version__
from hyperadapters.checkpoints.format import CheckpointConfig, read_checkpoint, stored_digest
from hyperadapters.checkpoints.hub import find_checkpoint
from hyperadapters.config.model import ROUTING
from hyperadapters.data.bad_rows import BadRows, OnBadRow
from hyperadapters.data.sources import Row
from hyperadapters.errors import (
    CheckpointError,
    ClusterError,
    DataError,
    HyperAdaptersError,
    OutputError,
    TaskError,
    check_int,
)
from hyperadapters.inference.inputs import ids_of_tasks, tasks_that_read
from hyperadapters.inference.predict_files import (
    OUTPUT_ENDINGS,
    as_cell,
    as_json,
    open_rows,
    other_columns,
    predict_file,
    read_rows,
    write_records,
)
from hyperadapters.inference.predictor import Predictor, check_options
from hyperadapters.methods.base import Route
from hyperadapters.utils.files import check_target, is_stream, locked, make_folder, open_atomically, write_atomically
from hyperadapters.utils.optional import require
from hyperadapters.utils.progress import show_progress
from hyperadapters.utils.ray_cluster import start_ray
from hyperadapters.utils.reading import parse_json

SHARD_ROWS = 10_000
"""Default number of rows in a shard."""
MANIFEST = "manifest.json"
SHARD_PATTERNS = ("[0-9]*.input.jsonl", "[0-9]*.output.jsonl", ".*.tmp", MANIFEST)
MAX_FAILURES = 3
"""Number of times that workers may die before any of them has completed a further shard."""

logger = logging.getLogger(__name__)


def predict_file_with_ray(
    folder: str | Path,
    input_file: Path,
    output: Path,
    task: str | None = None,
    tasks: Sequence[str] | Literal["*"] | None = None,
    batch_size: int = 64,
    route: Route = "nearest",
    decline: bool = True,
    delimiter: str | None = None,
    shard_rows: int = SHARD_ROWS,
    workers: int | None = None,
    progress: bool = False,
    on_bad_row: OnBadRow = "error",
    max_error: float | None = None,
    texts: Sequence[str] = (),
) -> None:
    """Predict the targets of the rows of a file with worker processes of Ray, as `predict_file` does with one process.

    If the prediction is interrupted, the same call continues it: shards whose predictions were complete are not
    predicted again. Standard input must then be given again. The records are those of `predict_file`, in the same
    order, with numbers that are equal up to rounding.

    Args:
        folder: Folder of the checkpoint, or its name on the Hub.
        input_file: JSON-lines, CSV, TSV or Parquet file with the column text and optionally text_pair and task. "-" is
            standard input in JSON-lines.
        output: JSON-lines or CSV file, which appears when it is complete. The shards are in a folder beside it, whose
            name has the ending .shards, until then.
        task: Name of the task of all rows. If None (default), the rows have their own tasks or are routed.
        tasks: Names of several tasks that are answered for each row, or "*" for all that read such rows. Default: each
            row is answered for one task.
        batch_size: Number of rows in a batch. Default: 64.
        route: Adapters of routed rows: "nearest" (default) or "soft", see `Predictor`.
        decline: Whether to decline rows that are not similar to any task. Default: True.
        delimiter: Delimiter of a CSV or TSV file. Default: a comma for CSV and a tab for TSV.
        shard_rows: Number of rows in a shard. Default: 10,000.
        workers: Number of worker processes, each with one processor and a copy of the model. Default: the number of
            GPUs of the cluster if it has any, and of its processors otherwise.
        progress: Whether to show a progress bar. Default: False.
        on_bad_row: What is done with a row that cannot be read, see `predict_file`. Default: "error".
        max_error: Maximum share of wrong answers of each task, see `Predictor`. Default: all rows are answered.
        texts: Columns of the texts. Default: text and text_pair.

    Raises:
        MissingPackageError: If Ray is not installed.
        ClusterError: If Ray cannot be started, it has fewer processors than workers, or workers die repeatedly.
        CheckpointError: If the checkpoint is missing or damaged, or is changed meanwhile.
        DataError: If a row or an argument is invalid. Nothing is predicted or written.
        TaskError: If the name of a task is unknown, or both `task` and `tasks` are given.
        OutputError: If the output cannot be written, or there are shards of a prediction with other settings.
        NotFiniteError: If the model computes a value that is not a finite number.
    """
    require("ray.data")
    check_options(batch_size, route, decline, max_error)
    check_int("shard_rows", shard_rows, 1)
    if workers is not None:
        check_int("workers", workers, 1)
    check_target(output, OUTPUT_ENDINGS)
    if is_stream(output):
        raise OutputError(f"{output}: expected a file, found a device or a pipe; Ray writes shards beside the output")
    folder = Path(os.path.abspath(find_checkpoint(folder)))
    checkpoint = read_checkpoint(folder)[0]
    assert checkpoint.weights is not None
    bad_rows = BadRows(on_bad_row)
    rows = open_rows(input_file, task, tasks, delimiter, bad_rows, texts)
    lines = _Lines(checkpoint, rows, str(input_file), output, task, tasks, bad_rows)
    chosen: tuple[str, ...] | Literal["*"] | None = None if tasks is None else "*" if tasks == "*" else tuple(tasks)
    scoring = Scoring(str(folder), checkpoint.weights.sha256, task, chosen, batch_size, route, decline, max_error)
    expected = {
        **_describe(scoring, input_file),
        "delimiter": delimiter,
        "shard_rows": shard_rows,
        "on_bad_row": on_bad_row,
        "texts": list(texts),
    }
    shards = Shards(Path(os.path.abspath(f"{output}.shards")))
    make_folder(shards.folder)
    with locked(shards.folder, wait=False):
        sizes = shards.sizes(expected, lines, bad_rows)
        if missing := shards.missing(len(sizes)):
            with start_ray() as ray:
                reports = _reports(ray, shards, scoring, missing, _num_workers(ray, workers))
                if progress:
                    reports = show_progress(reports, "Predicting", len(sizes), len(sizes) - len(missing))
                _follow(reports, input_file, sizes)
        shards.join(output, len(sizes))
        bad_rows.report(str(input_file))
        shards.remove()


@dataclass(frozen=True)
class Scoring:
    """What a worker needs to predict the rows of a shard.

    Attributes:
        folder: Absolute path of the checkpoint.
        digest: Digest of the checkpoint.
        task: Name of the task of all rows, or None.
        tasks: Names of several tasks that are answered for each row, "*" for all, or None.
        batch_size: Number of rows in a batch.
        route: Adapters of routed rows.
        decline: Whether rows are declined.
        max_error: Maximum share of wrong answers of each task, or None.
    """

    folder: str
    digest: str
    task: str | None
    tasks: tuple[str, ...] | Literal["*"] | None
    batch_size: int
    route: Route
    decline: bool
    max_error: float | None


def _describe(scoring: Scoring, input_file: Path) -> dict[str, Any]:
    """Return what the predictions depend on, as it is written to the manifest."""
    values = asdict(scoring)
    values["tasks"] = list(scoring.tasks) if isinstance(scoring.tasks, tuple) else scoring.tasks
    del values["folder"]
    described = {"version": __version__, "checkpoint": values.pop("digest"), **values}
    if str(input_file) == "-":
        return {**described, "input": "-", "input_size": None, "input_mtime_ns": None}
    found = input_file.stat()
    path = os.path.abspath(input_file)
    return {**described, "input": path, "input_size": found.st_size, "input_mtime_ns": found.st_mtime_ns}


class _Lines:
    """The checked rows of the input as lines of JSON, from which `predict_file` makes the records of the output."""

    def __init__(
        self,
        checkpoint: CheckpointConfig,
        rows: Iterator[Row],
        name: str,
        output: Path,
        task: str | None,
        tasks: Sequence[str] | Literal["*"] | None,
        bad_rows: BadRows,
    ) -> None:
        self._name = name
        self._known, self._method = checkpoint.tasks, checkpoint.model.method
        self._all_tasks, self._routes = tasks == "*", task is None and tasks is None
        self._is_csv = output.suffix == ".csv"
        if tasks is not None and not self._all_tasks:
            task = self._known[ids_of_tasks(self._known, tasks)[0]].name
        self._rows, self._bad_rows = read_rows(rows, self._known, task, bad_rows), bad_rows

    def __iter__(self) -> Iterator[str]:
        columns: dict[str, Any] | None = None
        for number, (row, example) in enumerate(self._rows, start=1):
            others = other_columns(row)
            columns = others if columns is None else columns
            if self._is_csv:
                self._check_columns(row, others, columns)
                others = {name: _as_plain_cell(value) for name, value in others.items()}
            values: dict[str, Any] = {"text": example.text}
            if example.text_pair is not None:
                values["text_pair"] = example.text_pair
            if self._all_tasks:
                tasks_that_read(example, number, self._known)
            elif self._routes and example.task_id is not None:
                values["task"] = self._known[example.task_id].name
            elif self._routes and self._method not in ROUTING:
                raise TaskError(f"{row.place}: method '{self._method}' cannot route: give each input its task")
            yield as_json({**values, **others}) + "\n"
        if columns is None:
            raise DataError(f"{self._name}: expected at least one row, found none{self._bad_rows.note()}")

    def _check_columns(self, row: Row, others: dict[str, Any], columns: dict[str, Any]) -> None:
        for name in others:
            if name not in columns:
                raise DataError(
                    f"{row.place}: the column '{name}' is not in the first row, so that the CSV file does not have it; "
                    "choose an output ending in .jsonl"
                )


def _as_plain_cell(value: Any) -> Any:
    """Return a value that is the same cell of CSV before and after it has been written as JSON."""
    cell = as_cell(value)
    is_plain = isinstance(cell, str | int | None) or (isinstance(cell, float) and math.isfinite(cell))
    return cell if is_plain else str(cell)


class Shards:
    """The folder with the shards of an input and their predictions.

    Attributes:
        folder: Absolute path of the folder.
    """

    def __init__(self, folder: Path) -> None:
        """Store the path of the folder.

        Args:
            folder: Absolute path of the folder.
        """
        self.folder = folder

    def source(self, number: int) -> Path:
        """Return the path of the rows of a shard.

        Args:
            number: Number of the shard, counted from 0.
        """
        return self.folder / f"{number:05}.input.jsonl"

    def target(self, number: int) -> Path:
        """Return the path of the predictions of a shard.

        Args:
            number: Number of the shard, counted from 0.
        """
        return self.folder / f"{number:05}.output.jsonl"

    def missing(self, num_shards: int) -> list[int]:
        """Return the numbers of the shards that have not been predicted yet.

        Args:
            num_shards: Number of all shards.
        """
        return [number for number in range(num_shards) if not self.target(number).exists()]

    def sizes(self, expected: dict[str, Any], lines: Iterable[str], bad_rows: BadRows) -> list[int]:
        """Write the shards, unless those of the same input with the same settings are in the folder already.

        Args:
            expected: What the predictions depend on.
            lines: Rows of the input. They are only read if there are no shards, or to compare standard input.
            bad_rows: The rows that were skipped, which are counted when the lines are read. They are kept with the
                shards, and set to those of the first attempt if there are shards.

        Returns:
            Number of rows of each shard.

        Raises:
            OutputError: If the shards in the folder are those of another input or other settings, the folder has other
                files, or it cannot be written.
            DataError: If a row is invalid. The folder is removed.
        """
        if (found := self._manifest()) is None:
            return self._split(expected, lines, bad_rows)
        different = [name for name in expected if found.get(name) != expected[name]]
        if not different and expected["input"] == "-" and found["sha256"] != _digest_of(lines):
            different, found, expected = ["standard input"], {}, {}
        if not different:
            bad_rows.count, bad_rows.first = found["skipped"]
            return [int(size) for size in found["sizes"]]
        reasons = [
            f"{name} was {found[name]!r} and is {expected[name]!r}" if name in found else f"{name} is another one"
            for name in different
        ]
        raise OutputError(
            f"{self.folder}: an interrupted prediction of this output was begun differently: {'; '.join(reasons)}. "
            "Repeat the former command to continue it, remove the folder to start anew, or choose another output"
        )

    def _manifest(self) -> dict[str, Any] | None:
        path = self.folder / MANIFEST
        try:
            values = parse_json(path.read_bytes())
            skipped = int(values["skipped"][0]), str(values["skipped"][1])
            return {**values, "sizes": list(values["sizes"]), "sha256": str(values["sha256"]), "skipped": skipped}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise OutputError(f"{path}: not readable: {error}; remove the folder to start anew") from None

    def _split(self, settings: dict[str, Any], lines: Iterable[str], bad_rows: BadRows) -> list[int]:
        self._remove_files()
        digest, sizes = hashlib.sha256(), list[int]()
        remaining = iter(lines)
        try:
            for first in remaining:
                sizes.append(0)
                with open_atomically(self.source(len(sizes) - 1)) as file:
                    for line in chain([first], islice(remaining, settings["shard_rows"] - 1)):
                        file.write(line)
                        digest.update(line.encode())
                        sizes[-1] += 1
            skipped = [bad_rows.count, bad_rows.first]
            manifest = {**settings, "sizes": sizes, "sha256": digest.hexdigest(), "skipped": skipped}
            write_atomically(self.folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
        except BaseException:
            self.remove()
            raise
        return sizes

    def _remove_files(self) -> None:
        """Remove the files of a prediction that was interrupted before all of its shards were written."""
        try:
            others = [path for path in self.folder.iterdir() if not any(map(path.match, SHARD_PATTERNS))]
            if others:
                raise OutputError(f"{others[0]}: not a file of a prediction; move it, or choose another output")
            for path in self.folder.iterdir():
                path.unlink()
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be written: {error}") from error

    def join(self, output: Path, num_shards: int) -> None:
        """Write the predictions of all shards to the output.

        Args:
            output: JSON-lines or CSV file.
            num_shards: Number of shards, all of which have been predicted.

        Raises:
            OutputError: If the output cannot be written.
        """
        if output.suffix == ".csv":
            write_records(output, self._records(num_shards))
            return
        with open_atomically(output) as file:
            for number in range(num_shards):
                with self.target(number).open(encoding="utf-8", newline="") as part:
                    shutil.copyfileobj(part, file)

    def _records(self, num_shards: int) -> Iterator[dict[str, Any]]:
        for number in range(num_shards):
            with self.target(number).open(encoding="utf-8", newline="\n") as part:
                yield from map(json.loads, part)

    def remove(self) -> None:
        """Remove the folder. If this fails, what is left is ignored by later predictions."""
        with suppress(OSError):  # The manifest is removed first, since shards without one are written anew.
            (self.folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self.folder)


def _digest_of(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode())
    return digest.hexdigest()


def _num_workers(ray: Any, workers: int | None) -> int:
    """Return the number of workers.

    Raises:
        ClusterError: If there are fewer processors.
    """
    cpus, gpus = (int(ray.cluster_resources().get(name, 0)) for name in ("CPU", "GPU"))
    if (workers or 1) > cpus:
        raise ClusterError(f"workers: expected at most the number of processors that Ray has, {cpus}, found {workers}")
    return workers or min(cpus, gpus) or cpus


def _reports(
    ray: Any, shards: Shards, scoring: Scoring, missing: Sequence[int], workers: int
) -> Iterator[dict[str, Any]]:
    """Predict shards, and those of workers that died again. Yield a report for each shard when it is complete."""
    remaining, failures = set(missing), 0
    while remaining:
        try:
            for report in _run(ray, shards, scoring, sorted(remaining), min(workers, len(remaining))):
                remaining.discard(report["number"])
                failures = 0
                yield report
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            failures += 1
            if failures < MAX_FAILURES:
                continue
            raise ClusterError(
                f"worker processes died {failures} times without completing a shard, for example for lack of memory: "
                f"choose fewer workers or a smaller batch size, then repeat the command to continue. Ray says: {error}"
            ) from error


def _run(ray: Any, shards: Shards, scoring: Scoring, numbers: Sequence[int], workers: int) -> Iterator[dict[str, Any]]:
    data = require("ray.data")
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ == "PlainRayHandler":  # that of the terminal; what fails is raised as an exception
            handler.setLevel(logging.CRITICAL)
    context = data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    pool = data.ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=1)
    with data.DataContext.current(context), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        dataset = data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
        dataset = dataset.map_batches(
            ShardScorer,
            fn_constructor_args=(str(shards.folder), scoring),
            batch_size=1,
            compute=pool,
            num_cpus=1,
            num_gpus=_gpu_share(ray.cluster_resources().get("GPU", 0), workers),
            max_restarts=0,  # Ray would restart a worker that dies any number of times.
        )
    for row in dataset.iter_rows():
        yield json.loads(row["report"])


def _gpu_share(gpus: float, workers: int) -> float | None:
    """Return the part of a GPU that each worker has, with as few workers on a GPU as possible."""
    if gpus < 1:
        return None
    return math.floor(10_000 / math.ceil(workers / int(gpus))) / 10_000  # Ray rounds to four digits.


class ShardScorer:
    """Predicts shards in a worker process of Ray.

    Errors and warnings of this library are returned, because Ray would print them with a traceback, or not at all.
    """

    def __init__(self, folder: str, scoring: Scoring) -> None:
        """Load the model.

        Args:
            folder: Folder of the shards.
            scoring: Settings.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # A worker has one processor.
        self._shards, self._scoring, self._predictor = Shards(Path(folder)), scoring, None
        self._failure: dict[str, Any] = {}
        try:
            self._predictor = self._load()
        except HyperAdaptersError as error:
            self._failure = {"error": type(error).__name__, "message": str(error), "has_rows": False}

    def _load(self) -> Predictor:
        scoring = self._scoring
        options = {name: getattr(scoring, name) for name in ("batch_size", "route", "decline", "max_error")}
        predictor = Predictor.from_pretrained(Path(scoring.folder), **options)
        if stored_digest(Path(scoring.folder)) != scoring.digest:
            raise CheckpointError(f"{scoring.folder}: the checkpoint was changed during the prediction")
        return predictor

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Predict one shard.

        Args:
            batch: Column "number" with the number of the shard.

        Returns:
            Column "report" with the report in JSON.
        """
        [number] = batch["number"]
        report = {"number": int(number), "notes": [], **self._failure}
        if self._predictor is not None:
            scoring = self._scoring
            source, target = self._shards.source(report["number"]), self._shards.target(report["number"])
            with _noted(report["notes"]):
                try:
                    predict_file(self._predictor, source, scoring.task, target, tasks=scoring.tasks)
                except HyperAdaptersError as error:
                    report |= {"error": type(error).__name__, "message": str(error), "has_rows": True}
        return {"report": [json.dumps(report)]}


@contextmanager
def _noted(notes: list[str]) -> Iterator[None]:
    """Append the warnings of this library to a list, whether they are logged or issued."""

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.append(record.getMessage())

    handler, library = Notes(logging.WARNING), logging.getLogger("hyperadapters")
    library.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as issued:
            yield
        notes += [str(item.message) for item in issued if item.category.__module__.startswith("hyperadapters.")]
    finally:
        library.removeHandler(handler)


def _follow(reports: Iterable[dict[str, Any]], input_file: Path, sizes: Sequence[int]) -> None:
    """Wait for the reports of all shards, and log their warnings, each once.

    Raises:
        HyperAdaptersError: If an error is reported. It has the class of the original error.
    """
    notes: set[str] = set()
    for report in reports:
        for note in report["notes"]:
            if note not in notes:
                logger.warning(note)
            notes.add(note)
        if "error" in report:
            raise _error(report, input_file, sizes)


def _error(report: dict[str, Any], input_file: Path, sizes: Sequence[int]) -> HyperAdaptersError:
    """Return the error of a report, of the class that the worker raised."""
    kind = getattr(errors, report["error"])
    if not report["has_rows"]:
        return kind(report["message"])
    number = report["number"]
    start = sum(sizes[:number])
    return kind(
        f"{input_file}: in rows {start + 1} to {start + sizes[number]}, of which the first is input 1: "
        f"{report['message']}"
    )
