"""Prediction with Ray: the records of the local engine in their order, from shards that are predicted once.

Few tests start workers of Ray, which need seconds to import torch. In the others, shards are predicted in this process.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import save_backbone

from hyperadapters import cli
from hyperadapters.config import Task
from hyperadapters.errors import ClusterError, DataError, HyperAdaptersError, NotFiniteError, OutputError, TaskError
from hyperadapters.inference import predict_ray
from hyperadapters.inference.predict_files import predict_file
from hyperadapters.inference.predict_ray import Shards, ShardScorer, predict_file_with_ray
from hyperadapters.inference.predictor import Predictor
from hyperadapters.model.model import HyperAdapterModel

ray = pytest.importorskip("ray")

TASKS = [
    Task.classification("colour", ["red", "blue", "green"]),
    Task.regression("size"),
    Task.classification("mood", ["bad", "good"], fields=["text", "text_pair"]),
]
TEXTS = ("w1 w2", "two\nlines", 'a "quote", \r and a comma', "grüße, 你好 \u2028 \x85", "", "red w3 w4 w5", "w7 good")
ROWS: list[dict[str, Any]] = [
    {"id": number, "text": f"{text} w{number}", **fields, "meta": {"n": [number, None]}}
    for number, (text, fields) in enumerate(
        (text, fields)
        for text in TEXTS
        for fields in ({}, {"task": "colour"}, {"task": "size"}, {"text_pair": "w8 bad"}, {"text_pair": text[::-1]})
    )
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two processors of Ray, whatever the machine has."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    backbone = save_backbone(folder / "backbone", initializer_range=0.2)
    torch.manual_seed(1)
    model = HyperAdapterModel.from_backbone(str(backbone), TASKS, adapter_dim=4, prototype_dim=8, hidden_dim=6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    similarities = sorted(result.similarity for result in model.route([row["text"] for row in ROWS]))
    model.method.thresholds.fill_(similarities[len(similarities) // 3])  # so that some rows are declined
    model.save_pretrained(folder / "run")
    return folder / "run"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", ROWS)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Predict the shards in this process, the last one first, and list their numbers."""
    predicted: list[int] = []

    def run_here(_: Any, shards: Shards, scoring: Any, numbers: Sequence[int], workers: int) -> Iterator[Any]:
        scorer = ShardScorer(str(shards.folder), scoring)
        for number in reversed(numbers):
            predicted.append(number)
            yield json.loads(scorer({"number": [number]})["report"][0])

    fake = SimpleNamespace(cluster_resources=lambda: {"CPU": 2.0}, exceptions=ray.exceptions)
    monkeypatch.setattr(predict_ray, "start_ray", lambda: nullcontext(fake))
    monkeypatch.setattr(predict_ray, "_run", run_here)
    return predicted


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            return list(csv.DictReader(file, strict=True))
        return [json.loads(line) for line in file]


def assert_equal(found: Any, expected: Any) -> None:
    """Equal up to 1e-5 in numbers, also in those that cells of CSV contain, with columns in the same order."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_equal(found[name], expected[name])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, str) and found != expected:
        assert_equal(json.loads(found), json.loads(expected))
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    else:
        assert found == expected


def stop(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> None:
    """Interrupt a prediction after its rows have been written to shards."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predict_ray, "start_ray", interrupt)
        with pytest.raises(KeyboardInterrupt):
            predict_file_with_ray(*arguments, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# With workers of Ray


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["hyperadapters", "predict", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_a_killed_prediction_is_continued_without_predicting_a_shard_again(
    cluster: None,
    run: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output, parts = tmp_path / "out.jsonl", tmp_path / "out.jsonl.shards"
    options = ("--input", source, "--output", output, "--engine", "ray", "--shard-rows", 1)
    started = subprocess.Popen(
        [sys.executable, "-m", "hyperadapters.cli", "predict", *map(str, (run, *options)), "--workers", "1"],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
    )
    try:
        deadline = time.monotonic() + 120
        while not list(parts.glob("*.output.jsonl")) and time.monotonic() < deadline:
            assert started.poll() is None
            time.sleep(0.005)
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait()

    def found() -> dict[str, tuple[int, int]]:
        stats = {path.name: path.stat() for path in parts.glob("*.output.jsonl")}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}

    before = found()
    assert 0 < len(before) < len(ROWS)
    assert not output.exists()
    after: list[dict[str, tuple[int, int]]] = []
    join = Shards.join

    def watched_join(*arguments: Any) -> None:
        after.append(found())
        join(*arguments)

    monkeypatch.setattr(Shards, "join", watched_join)
    capfd.readouterr()
    assert command(monkeypatch, run, *options, "--workers", 2) == 0
    assert capfd.readouterr() == ("", "")
    assert {name: after[0][name] for name in before} == before
    assert len(after[0]) == len(ROWS)
    assert names(tmp_path) == ["in.jsonl", "out.jsonl"]
    assert ray.is_initialized()
    predict_file(Predictor.from_pretrained(run), source, None, tmp_path / "local.jsonl")
    assert [record["id"] for record in read(output)] == [row["id"] for row in ROWS]
    assert len({record["task"] for record in read(output)}) == 4
    assert_equal(read(output), read(tmp_path / "local.jsonl"))


def test_more_workers_than_processors_are_refused(cluster: None, run: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="workers: expected at most the number of processors that Ray has, 2, found"):
        predict_file_with_ray(run, source, tmp_path / "out.jsonl", workers=3)


# Records


CHOICES: dict[str, dict[str, Any]] = {
    "routed": {},
    "without declining": {"decline": False},
    "soft": {"route": "soft"},
    "a task": {"task": "colour"},
    "tasks": {"tasks": ["size", "colour"]},
    "all tasks": {"tasks": "*"},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_records_equal_those_of_the_local_engine(
    without_ray: list[int], run: Path, tmp_path: Path, choice: str, ending: str
) -> None:
    options = dict(CHOICES[choice])
    single = [row for row in ROWS if "text_pair" not in row]
    rows = {"routed": ROWS, "all tasks": [{**row, "task": ""} for row in ROWS]}.get(choice, single)
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    output, expected = tmp_path / f"ray.{ending}", tmp_path / f"local.{ending}"
    predict_file_with_ray(run, source, output, batch_size=3, shard_rows=4, **options)
    assert without_ray == list(reversed(range(math.ceil(len(rows) / 4))))
    settings = {name: options.pop(name) for name in ("route", "decline") if name in options}
    predictor = Predictor.from_pretrained(run, batch_size=3, **settings)
    predict_file(predictor, source, options.get("task"), expected, tasks=options.get("tasks"))
    assert_equal(read(output), read(expected))
    assert names(tmp_path) == ["in.jsonl", expected.name, output.name]


def test_the_columns_of_texts_can_be_named(without_ray: list[int], run: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"message": f"w{number}", "id": number} for number in range(6)])
    output, expected = tmp_path / "ray.jsonl", tmp_path / "local.jsonl"
    predict_file_with_ray(run, source, output, "colour", shard_rows=4, texts=["message"])
    predict_file(Predictor.from_pretrained(run), source, "colour", expected, texts=["message"])
    assert_equal(read(output), read(expected))


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_other_columns_are_those_of_the_local_engine(
    without_ray: list[int], run: Path, tmp_path: Path, ending: str
) -> None:
    columns = {
        "text": ["w1", "w2", "w3"],
        "task": ["colour", None, "size"],
        "score": [float("nan"), 0.1, float("inf")],
        "flag": [True, False, None],
        "data": [b"\x00", b"", None],
        "when": pa.array([0, 1, 2], pa.timestamp("s")),
        "some": [[1.5, float("nan")], [], None],
        "whole": [2**60, 0, -1],
    }
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    predict_file_with_ray(run, tmp_path / "in.parquet", tmp_path / f"ray.{ending}", shard_rows=2)
    predict_file(Predictor.from_pretrained(run), tmp_path / "in.parquet", None, tmp_path / f"local.{ending}")
    assert_equal(read(tmp_path / f"ray.{ending}"), read(tmp_path / f"local.{ending}"))


def test_the_output_may_be_the_input(without_ray: list[int], run: Path, source: Path, tmp_path: Path) -> None:
    predict_file_with_ray(run, source, source, shard_rows=10)
    assert [record["id"] for record in read(source)] == [row["id"] for row in ROWS]
    assert names(tmp_path) == ["in.jsonl"]


# What is wrong is found before anything is predicted


def refuse(*_: Any) -> None:
    raise AssertionError("Ray was started")


@pytest.mark.parametrize(
    ("row", "options", "error", "message"),
    [
        ({"text": "w1", "task": "tint"}, {}, TaskError, "in.jsonl, line 36: Unknown task 'tint'"),
        ({"text": 3}, {}, DataError, "in.jsonl, line 36: expected a string in 'text', found 3"),
        ({"text": "w1", "text_pair": "w2"}, {"task": "size"}, DataError, "line 4: found a text_pair, which task"),
        ({"text": "w1", "answer": 1}, {}, DataError, "line 36: the column 'answer' is also a column of the output"),
        ({"text": "w1", "task": "mood"}, {"tasks": "*"}, DataError, "input 2: names the task 'colour'"),
        ({"text": "w1"}, {"task": "tint"}, TaskError, "Unknown task 'tint'"),
        ({"text": "w1"}, {"tasks": ["size", "tint"]}, TaskError, "tasks: Unknown task 'tint'"),
        ({"text": "w1"}, {"task": "size", "tasks": "*"}, TaskError, "expected one of them, found both"),
        ({"text": "w1"}, {"route": "softt"}, TaskError, "Unknown route 'softt'"),
        ({"text": "w1"}, {"shard_rows": 0}, DataError, "shard_rows: expected an integer of 1 or more, found 0"),
        ({"text": "w1"}, {"workers": 0}, DataError, "workers: expected an integer of 1 or more, found 0"),
        ({"text": "w1"}, {"delimiter": ";"}, DataError, "a delimiter is only valid for CSV and TSV files"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    row: dict[str, Any],
    options: dict[str, Any],
    error: type[HyperAdaptersError],
    message: str,
) -> None:
    monkeypatch.setattr(predict_ray, "start_ray", refuse)
    source = write_jsonl(tmp_path / "in.jsonl", [*ROWS, row])
    with pytest.raises(error, match=message):
        predict_file_with_ray(run, source, tmp_path / "out.jsonl", **{"shard_rows": 5, **options})
    assert names(tmp_path) == ["in.jsonl"]


def test_a_column_that_a_csv_output_has_no_place_for_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_ray, "start_ray", refuse)
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "w1"}, {"text": "w2", "id": 1}])
    with pytest.raises(DataError, match=r"in.jsonl, line 2: the column 'id' is not in the first row.*\.jsonl"):
        predict_file_with_ray(run, source, tmp_path / "out.csv")
    assert names(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "ray"], "--engine ray: expected an output file, found none; add --output"),
        (["--engine", "rya", "-o", "out.jsonl"], "--engine: Unknown engine 'rya'. Did you mean 'ray'?"),
        (["--workers", "2"], "--shard-rows and --workers: only valid with --engine ray"),
        (["--engine", "local", "--shard-rows", "5"], "--shard-rows and --workers: only valid with --engine ray"),
        (["--engine", "ray", "-o", "out.txt"], "out.txt: expected a name ending in .jsonl or .csv"),
        (["--engine", "ray", "-o", "/dev/stdout"], "/dev/stdout: expected a file, found a device or a pipe"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    run: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(predict_ray, "start_ray", refuse)
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, run, "-i", source, *options) == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path) == ["in.jsonl"]


# Continuing


def test_only_shards_without_predictions_are_predicted(
    without_ray: list[int], run: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.csv"
    stop(monkeypatch, run, source, output, shard_rows=10)
    folder = tmp_path / "out.csv.shards"
    assert names(folder) == [*(f"{number:05}.input.jsonl" for number in range(4)), "manifest.json"]
    part = write_jsonl(folder / "00002.output.jsonl", [{"text": "from the first attempt"}])
    (folder / ".0123456789abcdef.tmp").write_text("left by a worker that was killed")
    predict_file_with_ray(run, source, output, shard_rows=10)
    assert without_ray == [3, 1, 0]
    assert [row["text"] for row in read(output)][20] == "from the first attempt"
    assert len(read(output)) == 26
    assert not part.parent.exists()


def test_a_continued_prediction_reports_the_rows_that_were_skipped_before(
    without_ray: list[int], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "w1"}\nno JSON\n{"text": "w2"}\n{}\n')
    stop(monkeypatch, run, source, tmp_path / "out.jsonl", shard_rows=1, on_bad_row="skip")
    caplog.clear()
    predict_file_with_ray(run, source, tmp_path / "out.jsonl", shard_rows=1, on_bad_row="skip")
    [report] = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert "2 rows were skipped because they cannot be read; the first: " in report
    assert "in.jsonl, line 2" in report


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 3}, "batch_size was 64 and is 3"),
    ({"route": "soft"}, "route was 'nearest' and is 'soft'"),
    ({"decline": False}, "decline was True and is False"),
    ({"shard_rows": 5}, "shard_rows was 10 and is 5"),
    ({"task": "colour", "batch_size": 3}, "task was None and is 'colour'; batch_size was 64 and is 3"),
    ({"tasks": ["size"]}, r"tasks was None and is \['size'\]"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_other_settings_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", [{"text": "w1"}]), tmp_path / "out.jsonl"
    stop(monkeypatch, run, source, output, shard_rows=10)
    with pytest.raises(OutputError, match=f"out.jsonl.shards: .*begun differently: {message}.*remove the folder"):
        predict_file_with_ray(run, source, output, **{"shard_rows": 10, **change})
    assert names(Path(f"{output}.shards")) == ["00000.input.jsonl", "manifest.json"]


def test_another_input_or_checkpoint_is_refused(
    run: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    stop(monkeypatch, run, source, output)
    size = source.stat().st_size
    write_jsonl(source, [*ROWS, {"text": "w1"}])
    with pytest.raises(OutputError, match=f"input_size was {size} and is {source.stat().st_size}; input_mtime_ns was"):
        predict_file_with_ray(run, source, output)
    write_jsonl(source, ROWS)
    os.utime(source, ns=(0, 0))
    with pytest.raises(OutputError, match=r"begun differently: input_mtime_ns was \d+ and is 0\."):
        predict_file_with_ray(run, source, output)
    model = HyperAdapterModel.from_pretrained(run)
    model.method.thresholds.fill_(0.5)
    model.save_pretrained(tmp_path / "changed")
    with pytest.raises(OutputError, match="begun differently: checkpoint was '"):
        predict_file_with_ray(tmp_path / "changed", source, output)


def test_standard_input_is_compared_when_it_is_given_again(
    without_ray: list[int], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give(*texts: str) -> None:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))

    output = tmp_path / "out.jsonl"
    give("w1", "w2", "w3")
    stop(monkeypatch, run, Path("-"), output, shard_rows=2)
    give("w1", "w2", "w4")
    with pytest.raises(OutputError, match="begun differently: standard input is another one"):
        predict_file_with_ray(run, Path("-"), output, shard_rows=2)
    give("w1", "w2", "w3")
    predict_file_with_ray(run, Path("-"), output, shard_rows=2)
    assert [record["text"] for record in read(output)] == ["w1", "w2", "w3"]
    assert without_ray == [1, 0]


def test_incomplete_shards_are_written_anew_and_other_files_are_kept(
    without_ray: list[int], run: Path, source: Path, tmp_path: Path
) -> None:
    output, folder = tmp_path / "out.jsonl", tmp_path / "out.jsonl.shards"
    folder.mkdir()
    for name in ("00000.input.jsonl", "00000.output.jsonl", "00007.input.jsonl"):
        write_jsonl(folder / name, [{"text": "earlier"}])
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes.txt: not a file of a prediction; move it, or choose another output"):
        predict_file_with_ray(run, source, output)
    assert len(names(folder)) == 4
    (folder / "notes.txt").unlink()
    predict_file_with_ray(run, source, output)
    assert [record["id"] for record in read(output)] == [row["id"] for row in ROWS]


def test_a_damaged_manifest_and_a_second_process_are_refused(
    run: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, folder = tmp_path / "out.jsonl", tmp_path / "out.jsonl.shards"
    stop(monkeypatch, run, source, output)
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match="another process is writing to this folder"):
        predict_file_with_ray(run, source, output)
    os.close(descriptor)
    for damaged in ("{", "[]", "{}"):
        (folder / "manifest.json").write_text(damaged)
        with pytest.raises(OutputError, match=r"manifest.json: not readable: .*; remove the folder to start anew"):
            predict_file_with_ray(run, source, output)


# Errors and warnings of workers


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Predictor], None]], None]:
    """Changes the model that workers load."""

    def change(how: Callable[[Predictor], None]) -> None:
        load = ShardScorer._load

        def loaded(scorer: ShardScorer) -> Predictor:
            predictor = load(scorer)
            how(predictor)
            return predictor

        monkeypatch.setattr(ShardScorer, "_load", loaded)

    return change


def test_an_error_of_a_worker_is_raised_with_its_rows(
    without_ray: list[int], run: Path, source: Path, tmp_path: Path, broken: Any
) -> None:
    broken(lambda predictor: predictor.model.heads.weight.data.fill_(float("nan")))
    message = r"in.jsonl: in rows 31 to 35, of which the first is input 1: input \d \('.*'\): .* not a finite number"
    with pytest.raises(NotFiniteError, match=message):
        predict_file_with_ray(run, source, tmp_path / "out.jsonl", shard_rows=10)
    assert names(tmp_path / "out.jsonl.shards")[-1] == "manifest.json"
    assert not (tmp_path / "out.jsonl").exists()


def test_a_checkpoint_that_is_changed_meanwhile_is_refused(
    without_ray: list[int], run: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_ray, "stored_digest", lambda folder: "another")
    with pytest.raises(HyperAdaptersError, match=f"^{run}: the checkpoint was changed during the prediction$"):
        predict_file_with_ray(run, source, tmp_path / "out.jsonl")


def test_warnings_of_workers_are_logged_once(
    without_ray: list[int], run: Path, tmp_path: Path, broken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "w1"}] * 4)

    def warn(predictor: Predictor) -> None:
        predict = predictor.predict_tasks

        def warning(*arguments: Any) -> Any:
            logging.getLogger("hyperadapters.tests").warning("a text is truncated")
            return predict(*arguments)

        predictor.predict_tasks = warning  # type: ignore[method-assign]

    broken(warn)
    predict_file_with_ray(run, source, tmp_path / "out.jsonl", tasks=["colour"], shard_rows=1)
    logged = [record for record in caplog.records if record.name == "hyperadapters.inference.predict_ray"]
    assert [record.getMessage() for record in logged].count("a text is truncated") == 1


def test_shards_of_workers_that_died_are_predicted_by_others(
    without_ray: list[int], run: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here, tried = predict_ray._run, []

    def dying(cluster: Any, shards: Shards, scoring: Any, numbers: Sequence[int], workers: int) -> Iterator[Any]:
        tried.append(len(numbers))
        if len(numbers) > lasting:
            yield from run_here(cluster, shards, scoring, numbers[-1:], workers)
        if len(numbers) >= lasting:
            raise ray.exceptions.RayActorError
        yield from run_here(cluster, shards, scoring, numbers, workers)

    monkeypatch.setattr(predict_ray, "_run", dying)
    lasting = 3
    with pytest.raises(ClusterError, match="worker processes died 3 times without completing a shard"):
        predict_file_with_ray(run, source, tmp_path / "out.jsonl", shard_rows=5)
    assert tried == [7, 6, 5, 4, 3, 3]
    lasting = 4
    predict_file_with_ray(run, source, tmp_path / "out.jsonl", shard_rows=5)
    assert [record["id"] for record in read(tmp_path / "out.jsonl")] == [row["id"] for row in ROWS]


@pytest.mark.parametrize(
    ("gpus", "workers", "share"), [(0, 4, None), (1, 1, 1), (2, 1, 1), (1, 4, 0.25), (2, 3, 0.5), (1, 6, 0.1666)]
)
def test_workers_share_gpus_evenly(gpus: int, workers: int, share: float | None) -> None:
    assert predict_ray._gpu_share(gpus, workers) == share


def test_there_is_a_worker_for_each_gpu_or_else_for_each_processor() -> None:
    for resources, workers in (({"CPU": 8.0}, 8), ({"CPU": 8.0, "GPU": 2.0}, 2), ({"CPU": 1.0, "GPU": 2.0}, 1)):
        assert predict_ray._num_workers(SimpleNamespace(cluster_resources=lambda r=resources: r), None) == workers
    with pytest.raises(ClusterError, match="the number of processors that Ray has, 0"):
        predict_ray._num_workers(SimpleNamespace(cluster_resources=dict), None)
