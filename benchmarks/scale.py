"""Task stores of 1,000 to 1,000,000 synthetic tasks: size, time to open, append and route, and resident memory.

    python benchmarks/scale.py [--sizes N ...] [--output PATH]
    python benchmarks/scale.py --table    # only fills the table of docs/scaling.md from the rows

The tasks are those of a model on MiniLM with random prototypes and heads of two labels, whose weights are numbers of
float16 as in fitted heads. One store grows from size to size. Each size is measured in a process of its own, after the
model has been loaded. Memory is what Linux says of the process (`RssAnon` and `RssFile`), beyond what it has with the
model. The files of the store are usually in the page cache of the system, because they have just been written. Times
are medians. The last row has the exponents of a power law that is fitted to each figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from tables import markdown, read
from torch.nn.functional import normalize

from hyperadapters import HyperAdapterModel, Task
from hyperadapters.checkpoints.task_store import TaskStore
from hyperadapters.heads.task_heads import Head
from hyperadapters.inference.stored_tasks import StorePredictor, route
from hyperadapters.model.tasks import TaskState

for variable, value in (("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false")):
    os.environ.setdefault(variable, value)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "scale.jsonl"
DOCUMENT = ROOT / "docs" / "scaling.md"
MARKED = re.compile(r"(<!-- table: scale -->\n).*?(<!-- end -->)", re.DOTALL)
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SIZES = (1_000, 10_000, 100_000, 1_000_000)
CHUNK, BATCH, REPEATS = 10_000, 64, 7
TEXTS = [f"Where is parcel number {number}, and when does it come?" for number in range(BATCH)]
FIGURES = {
    "bytes_a_task": ("bytes a task", 0),
    "open_ms": ("open, ms", 1),
    "append_one_ms": ("append one task, ms", 1),
    "find_name_ms": ("find a name, ms", 1),
    "search_1_ms": ("search for 1 text, ms", 1),
    "search_64_ms": ("search for 64 texts, ms", 0),
    "route_1_ms": ("route 1 text, ms", 1),
    "route_64_ms": ("route 64 texts, ms", 0),
    "after_open_mb": ("memory after opening, MB", 1),
    "after_ten_tasks_mb": ("after using ten tasks, MB", 1),
    "after_routing_mb": ("after routing, MB", 1),
}
"""The figures of a row, with their titles in the table and their decimal places. A search is routing without the
encoder."""


def grow(run: Path, folder: Path, size: int) -> None:
    """Append synthetic tasks to a store until it has `size` tasks."""
    model = HyperAdapterModel.from_pretrained(run)
    store = TaskStore.open(folder)
    torch.manual_seed(len(store))
    while count := min(CHUNK, size - len(store)):
        first = len(store)
        prototypes = torch.randn(count, model.adapter_config.prototype_dim)
        weights = (0.1 * torch.randn(count, 2, model.hidden_size)).half().float()
        states = [
            TaskState(
                task=Task.classification(f"task {first + index}", ["no", "yes"]),
                prototype=prototypes[index],
                centroids=prototypes[:0],
                threshold=-1.0,
                density=torch.empty(0),
                head=Head(weights[index], torch.zeros(2)),
                own_adapter=None,
            )
            for index in range(count)
        ]
        model.task_table.replace(states)
        store.append(model)


def measure(run: Path, folder: Path) -> dict[str, Any]:
    """Measure a store in this process, which has not used it before."""
    model = HyperAdapterModel.from_pretrained(run)
    route(model, _small_store(model, folder), TEXTS)  # everything but the store has been used before
    before = _resident_mb()
    store, opening = _timed(lambda: TaskStore.open(folder))
    after_open = _resident_mb() - before
    tasks = len(store)
    predictor = StorePredictor(model, store, max_tasks=10)
    names = [store.task(number * (tasks // 10)).name for number in range(10)]
    answers = list(predictor({"text": text, "task": name} for text, name in zip(TEXTS, names, strict=False)))
    assert [answer.task for answer in answers] == names
    after_ten = _resident_mb() - before
    queries = normalize(torch.randn(BATCH, model.adapter_config.prototype_dim), dim=-1)
    timed: dict[str, Callable[[], Any]] = {
        "open_ms": lambda: TaskStore.open(folder),
        "find_name_ms": lambda: store.known_ids(["task 7"]),
        "search_1_ms": lambda: store.nearest(lambda keys, _: queries[:1] @ keys.T, 3),
        "search_64_ms": lambda: store.nearest(lambda keys, _: queries @ keys.T, 3),
        "route_1_ms": lambda: route(model, store, TEXTS[:1]),
        "route_64_ms": lambda: route(model, store, TEXTS),
    }
    times = {name: _median_ms(call) for name, call in timed.items()}
    after_routing = _resident_mb() - before
    size = sum(path.stat().st_size for path in folder.iterdir())
    numbers = iter(range(REPEATS + 1))

    def append_one() -> None:
        model.task_table.rename(model.tasks[0].name, f"appended {tasks} {next(numbers)}")
        store.append(model, [model.tasks[0].name])

    return {
        "tasks": tasks,
        "bytes_a_task": round(size / tasks, 1),
        "first_open_ms": round(1000 * opening, 3),
        **times,
        "append_one_ms": _median_ms(append_one),
        "after_open_mb": after_open,
        "after_ten_tasks_mb": after_ten,
        "after_routing_mb": after_routing,
        "peak_mb": _status("VmHWM"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": _processor(),
    }


def _small_store(model: HyperAdapterModel, folder: Path) -> TaskStore:
    store = TaskStore.create(folder.with_name("small"), model)
    store.append(model)
    list(StorePredictor(model, store)([{"text": "a", "task": model.tasks[0].name}]))
    return store


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = perf_counter()
    found = call()
    return found, perf_counter() - started


def _median_ms(call: Callable[[], Any]) -> float:
    call()
    return round(1000 * median(_timed(call)[1] for _ in range(REPEATS)), 3)


def _resident_mb() -> float:
    return round(_status("RssAnon") + _status("RssFile"), 1)


def _status(name: str) -> float:
    """Return a value of /proc/self/status in MB."""
    text = Path("/proc/self/status").read_text()
    return round(int(re.findall(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)[0]) * 1024 / 1e6, 1)


def _processor() -> str:
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.processor()


def exponents(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return the exponent b of a power law a T^b for each figure; None if a figure is not positive everywhere."""
    found: dict[str, float | None] = {}
    for name in FIGURES:
        values = [row[name] for row in rows]
        if min(values) <= 0:
            found[name] = None
        else:
            found[name] = round(float(np.polyfit(np.log([row["tasks"] for row in rows]), np.log(values), 1)[0]), 3)
    return found


def scale_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of the document."""
    *sizes, fitted = rows
    cells = []
    for name, (title, decimals) in FIGURES.items():
        exponent = fitted["exponents"][name]
        shown = "\N{EN DASH}" if exponent is None else f"{exponent:.2f}"
        cells.append([title, *(f"{row[name]:,.{decimals}f}" for row in sizes), shown])
    return markdown(["tasks", *(f"{row['tasks']:,}" for row in sizes), "exponent"], cells)


def filled(text: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return the document with the table of the rows."""
    return MARKED.sub(lambda match: f"{match[1]}\n{scale_table(rows)}\n\n{match[2]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only fill the table of docs/scaling.md")
    parser.add_argument("--step", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step, run, folder, size = args.step
        if step == "grow":
            grow(Path(run), Path(folder), int(size))
        else:
            print(json.dumps(measure(Path(run), Path(folder))))
        return
    if not args.table:
        rows = _measured(args.sizes)
        rows.append({"exponents": exponents(rows)})
        args.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if args.output == RESULTS:
        DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8"), read(RESULTS)), encoding="utf-8")


def _measured(sizes: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        run, folder = Path(name) / "run", Path(name) / "tasks"
        task = Task.classification("first", ["no", "yes"])
        model = HyperAdapterModel.from_backbone(MINILM, [task], preset="paper").eval()
        model.save_pretrained(run)
        TaskStore.create(folder, model)
        for size in sizes:
            for step in ("grow", "measure"):
                command = [sys.executable, __file__, "--step", step, str(run), str(folder), str(size)]
                printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(json.loads(printed.splitlines()[-1]))
            print(rows[-1], file=sys.stderr)
            for path in (Path(name) / "small").iterdir():
                path.unlink()
    return rows


if __name__ == "__main__":
    main()
