"""How fast and how right the server is under load, and while tasks change.

    python benchmarks/server_load.py [--run runs/demo] [--seconds 60] [--output PATH]

The server runs in another process on the same cores as the clients. Twelve tasks are mixed: those of the demo, and six
that are added from its training rows. Each figure is compared with a predictor without a server, which answers the same
inputs before. Every batch and every state of the tasks is written down, and all batches are answered again afterwards
by a fresh process-local model with the tasks of that state: the body of every response must be equal byte by byte.
Writes a row for each figure to benchmarks/results/serving.jsonl. Needs aiohttp and psutil and an idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pickle
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import psutil
import torch
from server_load_parts.load import Measured, change_tasks, closed_loop, open_loop

from hyperadapters.checkpoints.update import update_model
from hyperadapters.config import Task, load_recipe
from hyperadapters.data.loading import load_tasks
from hyperadapters.demo.run import recipe_path
from hyperadapters.errors import HyperAdaptersError
from hyperadapters.inference.predictor import Predictor
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.serving.responses import json_response, prediction_bodies
from hyperadapters.serving.served_model import ServedModel

RESULTS = Path(__file__).parent / "results" / "serving.jsonl"
PER_LABEL = 16
CHANGES_PER_MINUTE = 50
PER_LABEL_OF_CHANGE = 4
CHANGING_PART = 4.0
"""Duration of the load while tasks change, in durations of the others."""
DEADLINE_MS = 2000
WARM_UP = 0.5
"""Part of the duration for which the capacity is measured, after which memory should not grow."""
FIGURES = ("closed_loop", "open_loop", "changes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, examples = prepare(arguments.run, Path(folder) / "run")
        found = list(measure(Path(folder), rows, examples, arguments.seconds, arguments.only))
    with arguments.output.open("a") as file:
        for row in found:
            print(json.dumps(row))
            file.write(json.dumps(row) + "\n")


def prepare(run: Path, folder: Path) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """Make a run with twelve tasks, and return the inputs and the examples of further tasks."""
    recipe = load_recipe(recipe_path())
    data = load_tasks(recipe.tasks, recipe.data, recipe.seed)
    model = HyperAdapterModel.from_pretrained(run)
    rows, examples = [], []
    for task in data:
        of_task = [
            {"text": one.text, "label": task.task.labels[int(one.target or 0)]} | _pair(one)
            for one in task.splits["train"]
        ]
        name = f"{task.task.name} again"
        model.add_task(
            Task.classification(name, task.task.labels, fields=task.task.fields), of_task, k_per_label=PER_LABEL
        )
        for index, one in enumerate(task.splits["test"]):
            rows.append({"text": one.text, "task": task.task.name if index % 2 else name} | _pair(one))
        examples.append([_few(of_task, part) for part in range(4)])
    model.save_pretrained(folder)
    return rows, examples


def _few(rows: list[dict[str, Any]], part: int) -> list[dict[str, Any]]:
    """Return one of several parts of the rows, with a few rows of each label."""
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    start = part * PER_LABEL_OF_CHANGE
    return [row for of_label in by_label.values() for row in of_label[start : start + PER_LABEL_OF_CHANGE]]


def _pair(example: Any) -> dict[str, str]:
    return {} if example.text_pair is None else {"text_pair": example.text_pair}


def measure(
    folder: Path, rows: list[dict[str, Any]], examples: list[list[Any]], seconds: float, only: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Make all figures."""
    four, eight = partial(_drawn, rows, 4), partial(_drawn, rows, 8)
    alone = predictor_rows_per_second(folder / "run", rows, min(30.0, seconds))
    yield figure("predictor_alone", rows_per_second=alone)
    if "closed_loop" in only:
        for count in (1, 8):
            with server(folder) as (address, process):
                found = asyncio.run(closed_loop(address, partial(_drawn, rows, count), seconds))
                yield summary(f"closed_loop_{count}_rows", found, process, alone) | repeated(folder, found)
    if "open_loop" in only:
        with server(folder) as (address, process):
            warm = asyncio.run(closed_loop(address, eight, WARM_UP * seconds))
            before, rate = process.memory_info().rss, 2 * warm.rows / warm.seconds / 8
            found = asyncio.run(open_loop(address, eight, seconds, rate, DEADLINE_MS))
            growth = (process.memory_info().rss - before) / 2**20
            row = summary("open_loop_twice_the_capacity", found, process, alone, rss_growth_mb=round(growth, 1))
            refused = found.statuses[503] + found.statuses[504]
            yield row | {"late": found.late, "refused": refused} | repeated(folder, found)
    if "changes" in only:
        with server(folder) as (address, process):
            states: Counter[str] = Counter()

            async def changes(session: Any, started: float, duration: float) -> None:
                states.update(await change_tasks(session, started, duration, examples, CHANGES_PER_MINUTE))

            found = asyncio.run(closed_loop(address, four, CHANGING_PART * seconds, changes))
            ratio = found.percentile(99) / quiet_p99(folder, four, seconds)
            row = summary("closed_loop_while_tasks_change", found, process, alone, p99_vs_quiet=round(ratio, 2))
            yield row | {"changes": dict(states)} | repeated(folder, found)


def quiet_p99(folder: Path, draw: Any, seconds: float) -> float:
    """Return the latency of the same load without changes, in milliseconds."""
    other = folder / "quiet"
    shutil.copytree(folder / "run", other / "run")
    with server(other) as (address, _):
        return asyncio.run(closed_loop(address, draw, seconds)).percentile(99)


def predictor_rows_per_second(folder: Path, rows: list[dict[str, Any]], seconds: float) -> float:
    """Return how many inputs a predictor answers in a second, in batches of 64 mixed inputs."""
    predictor, generator = Predictor(HyperAdapterModel.from_pretrained(folder)), random.Random(0)
    list(predictor(rows[:64]))
    started, count = perf_counter(), 0
    while perf_counter() - started < seconds:
        count += len(list(predictor(_drawn(rows, 64, generator))))
    return count / (perf_counter() - started)


def _drawn(rows: list[dict[str, Any]], count: int, generator: random.Random) -> list[dict[str, Any]]:
    return [generator.choice(rows) for _ in range(count)]


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Start the server of a folder in another process."""
    record = folder / "record"
    shutil.rmtree(record, ignore_errors=True)
    record.mkdir()
    command = [sys.executable, "-m", "server_load_parts.recording_server", str(folder / "run"), str(record)]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    log = (folder / "server.log").open("w")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()
        log.close()


def repeated(folder: Path, found: Measured) -> dict[str, int]:
    """Answer all batches again, and count the responses that are equal byte by byte and those that are not."""
    record = folder / "record"
    served, current = None, None
    expected: Counter[tuple[str, bytes]] = Counter()
    with (record / "batches.pickle").open("rb") as file:
        while True:
            try:
                revision, questions = pickle.load(file)
            except (EOFError, pickle.UnpicklingError):
                break
            if served is None:
                served = ServedModel(record / str(revision))
            elif revision != current:
                update_model(served.model, record / str(revision))
            current = revision
            for question, answer in zip(questions, served.answer(questions), strict=True):
                if isinstance(answer, HyperAdaptersError):
                    continue
                inputs = json.dumps(list(question.inputs), sort_keys=True)
                expected[inputs, json_response(prediction_bodies(answer, False)).body] += 1
    wrong = found.bodies - expected
    return {"equal": found.bodies.total() - wrong.total(), "not_equal": wrong.total()}


def summary(name: str, found: Measured, process: psutil.Process, alone: float, **details: Any) -> dict[str, Any]:
    """Return the row of a load."""
    throughput = found.rows / found.seconds
    return figure(
        name,
        requests=found.statuses.total(),
        statuses={str(status): count for status, count in sorted(found.statuses.items())},
        rows_per_second=round(throughput, 1),
        vs_predictor=round(throughput / alone, 3),
        p50_ms=round(found.percentile(50), 1),
        p99_ms=round(found.percentile(99), 1),
        rss_mb=round(process.memory_info().rss / 2**20),
        **details,
    )


def figure(name: str, **values: Any) -> dict[str, Any]:
    """Return a row of the results."""
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {"figure": name, "machine": machine, "torch": torch.__version__, **values}


if __name__ == "__main__":
    main()
