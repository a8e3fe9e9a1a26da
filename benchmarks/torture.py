"""Killed trainings and changes of tasks, full disks, damaged files, made-up inputs, and a million rows.

    python benchmarks/torture.py [--kills 20] [--inputs 2000] [--rows 1000000] [--only FIGURE ...] [--output PATH]

Everything is done in processes of its own, on a small model with random weights, for two figures at a time. Writes a
row for each figure to benchmarks/results/reliability.jsonl. The faults of disks need Linux and the right to mount a
file system in memory, and the made-up inputs need the packages of the tests. Takes about a quarter of an hour on
two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torture_parts.small_run import TASKS, command, finished, rows, weights, write_recipe

from hyperadapters.errors import HyperAdaptersError
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.serving.served_model import task_digests
from hyperadapters.training.states import FILES, is_complete, last_checkpoint, trainer_checkpoints

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reliability.jsonl"
TRAINING = {"max_steps": 200, "eval_steps": 2}
LARGE_DISK = "64m"
JOBS = 2
"""Number of figures that are computed at the same time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--inputs", type=int, default=2_000, help="of each fuzz test")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--only", nargs="+", choices=sorted(FIGURES), default=list(FIGURES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with ThreadPoolExecutor(JOBS) as executor:
        for done in as_completed([executor.submit(_row, name, arguments) for name in arguments.only]):
            line = json.dumps(done.result())
            print(line, flush=True)
            with arguments.output.open("a") as file:
                file.write(line + "\n")


def _row(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        found = FIGURES[name](Path(folder), arguments)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    seconds = round(time.monotonic() - started)
    return {"figure": name, "machine": machine, "torch": torch.__version__, **found, "seconds": seconds}


# Kills


def kills_of_a_training(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Kill trainings at random moments and resume them, and compare their weights with those of one that was not."""
    recipe, generator = write_recipe(folder, **TRAINING), random.Random(0)
    started = time.monotonic()
    expected = _trained(recipe, folder / "whole")
    duration = time.monotonic() - started
    moments: Counter[str] = Counter()
    equal = different = 0
    while moments.total() < arguments.kills:
        run = folder / f"run{equal + different}"
        while not (run / "metrics.json").exists():
            process = command("train", recipe, "--output", run, *(["--resume"] if run.exists() else []))
            if moments.total() < arguments.kills:
                _kill(process, generator.uniform(0.3, 1.0) * duration)
            if process.wait() == -signal.SIGKILL:
                moments[_moment(run)] += 1
            elif process.returncode:
                raise SystemExit(f"resuming failed: {process.stderr.read() if process.stderr else ''}")
        same = weights(run) == expected
        equal, different = equal + same, different + (not same)
        shutil.rmtree(run)
    return {"kills": moments.total(), "moments": dict(moments), "runs_equal": equal, "runs_different": different}


def _trained(recipe: Path, run: Path) -> str:
    status, error = finished("train", recipe, "--output", run)
    if status:
        raise SystemExit(f"the training failed: {error}")
    return weights(run)


def _kill(process: subprocess.Popen[str], delay: float) -> None:
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        process.kill()


def _moment(run: Path) -> str:
    """Return what a process that was killed was doing, as far as its files tell."""
    if not run.exists() or not trainer_checkpoints(run):
        return "before the first state"
    if any(not is_complete(state) for state in trainer_checkpoints(run)):
        return "while a state was written"
    return "between two states"


def kills_of_a_change(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Kill commands that add a task at random moments: the folder must have the old or the new tasks."""
    recipe, generator = write_recipe(folder, max_steps=20, eval_steps=20), random.Random(0)
    _trained(recipe, folder / "run")
    before = task_digests(HyperAdapterModel.from_pretrained(folder / "run"))
    examples = folder / "examples.jsonl"
    examples.write_text("".join(rows(32, 9)))
    options = ("--name", "new", "--examples", examples)
    shutil.copytree(folder / "run", folder / "whole")
    started = time.monotonic()
    finished("add-task", folder / "whole", *options)
    duration = time.monotonic() - started
    outcomes: Counter[str] = Counter()
    for number in range(arguments.kills):
        run = folder / f"run{number}"
        shutil.copytree(folder / "run", run)
        process = command("add-task", run, *options)
        _kill(process, generator.uniform(0.5, 1.0) * duration)
        process.wait()
        found = task_digests(HyperAdapterModel.from_pretrained(run))
        is_same = {name: digest for name, digest in found.items() if name != "new"} == before
        outcomes[("new tasks" if "new" in found else "old tasks") if is_same else "damaged"] += 1
        shutil.rmtree(run)
    return {"kills": arguments.kills, "outcomes": dict(outcomes)}


# Disks and files


@contextmanager
def _disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a file system in memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _remount(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)


def faults_of_a_disk(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Let trainings fail, and examine the error and the training that is resumed when the disk is in order again."""
    recipe = write_recipe(folder, **TRAINING)
    expected = _trained(recipe, folder / "whole")
    found: dict[str, Any] = {}
    for name, fail in {"full": _fill, "read-only": _protect}.items():
        with _disk(folder / name, LARGE_DISK) as disk:
            process = command("train", recipe, "--output", disk / "run")
            _wait_for_states(disk / "run", 3)
            mend = fail(disk)
            errors = process.communicate()[1]
            is_usable = last_checkpoint(disk / "run") is not None
            mend()
            status, _ = finished("train", recipe, "--output", disk / "run", "--resume")
            found[name] = {
                "status": process.returncode,
                "error": _last_line(errors).replace(str(folder), "FOLDER"),
                "last_state_is_usable": is_usable,
                "resumed_to_the_same_weights": status == 0 and weights(disk / "run") == expected,
            }
    process = command("train", recipe, "--output", folder / "gone")
    _wait_for_states(folder / "gone", 3)
    shutil.rmtree(folder / "gone", ignore_errors=True)
    errors = process.communicate()[1]
    found["removed"] = {
        "status": process.returncode,
        "error": _last_line(errors).replace(str(folder), "FOLDER") if process.returncode else None,
        "run_is_complete": all((folder / "gone" / name).exists() for name in ("metrics.json", "resolved_recipe.yaml")),
    }
    return {"faults": found}


def _fill(disk: Path) -> Callable[[], None]:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**16))
        except OSError:
            pass
    return ballast.unlink


def _protect(disk: Path) -> Callable[[], None]:
    for _ in range(1000):  # refused while a file is open for writing
        try:
            _remount(disk, "ro")
            return lambda: _remount(disk, "rw")
        except subprocess.CalledProcessError:
            time.sleep(0.001)
    raise SystemExit("the disk cannot be made read-only")


def _wait_for_states(run: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    seen: set[str] = set()
    while len(seen) < count and time.monotonic() < deadline:
        seen |= {state.name for state in trainer_checkpoints(run) if is_complete(state)}
        time.sleep(0.005)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def damaged_files(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Flip a bit of each file of a state and of a checkpoint, or cut the file: the damage must be named."""
    recipe = write_recipe(folder, max_steps=400, eval_steps=10)
    run, generator = folder / "run", random.Random(0)
    process = command("train", recipe, "--output", run)
    _wait_for_states(run, 3)
    process.kill()
    process.wait()
    while not (state := trainer_checkpoints(run)[-1]).joinpath(FILES).exists():
        shutil.rmtree(state)  # it was not written to its end
    finished_run = folder / "finished"
    _trained(recipe, finished_run)
    counts: Counter[str] = Counter()
    for path in sorted(path for path in state.rglob("*") if path.is_file() and path.name != FILES):
        for damage in (_flip, _cut):
            counts[_named(path, damage, lambda: last_checkpoint(run), generator, path.name)] += 1
    for path in sorted([*finished_run.glob("adapters-*"), finished_run / "hyperadapter.json"]):
        for damage in (_flip, _cut):
            load = lambda: HyperAdapterModel.from_pretrained(finished_run)  # noqa: E731
            counts[_named(path, damage, load, generator, path.name)] += 1
    return {"damages": counts.total(), "outcomes": dict(counts)}


def _flip(contents: bytes, generator: random.Random) -> bytes:
    place = generator.randrange(len(contents))
    return contents[:place] + bytes([contents[place] ^ 1 << generator.randrange(8)]) + contents[place + 1 :]


def _cut(contents: bytes, generator: random.Random) -> bytes:
    return contents[: generator.randrange(len(contents))]


def _named(path: Path, damage: Any, load: Callable[[], object], generator: random.Random, name: str) -> str:
    """Return what loading says to a damaged file, which is restored afterwards."""
    contents = path.read_bytes()
    path.write_bytes(damage(contents, generator))
    try:
        load()
        return f"not noticed: {name}"
    except HyperAdaptersError as error:
        return "named" if name in str(error) or str(path.parent) in str(error) else f"not named: {name}: {error}"
    finally:
        path.write_bytes(contents)


# Made-up inputs


def fuzzed_inputs(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the fuzz tests, each of which sends inputs to one reader, with inputs that differ from run to run."""
    report = folder / "report.xml"
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/fuzz", "--junitxml", report]
    environment = {**os.environ, "HYPERADAPTERS_FUZZ": str(arguments.inputs), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(pytest, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if not report.exists():
        raise SystemExit(f"the fuzz tests did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    cases = ElementTree.parse(report).findall(".//testcase")
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return {"inputs_of_each": arguments.inputs, "readers": len(cases), "failed": failed}


# Many rows


def many_rows(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train on and predict many rows, and report the largest memory of each process."""
    found: dict[str, Any] = {"rows": arguments.rows}
    for name, count in (("small", arguments.rows // 10), ("large", arguments.rows)):
        data = folder / name
        data.mkdir()
        recipe = write_recipe(data, count // len(TASKS), max_steps=50, eval_steps=50, prefix_cache="file")
        peak, seconds = _peak("train", recipe, "--output", data / "run")
        found[f"train_{name}"] = {"peak_mb": peak, "seconds": seconds}
        with (data / "in.jsonl").open("w") as file:
            file.writelines(rows(count, 5))
        options = ("--input", data / "in.jsonl", "--task", TASKS[0], "--output", data / "out.jsonl")
        peak, seconds = _peak("predict", data / "run", *options)
        with (data / "out.jsonl").open() as file:
            found[f"predict_{name}"] = {"peak_mb": peak, "seconds": seconds, "answers": sum(1 for _ in file)}
        shutil.rmtree(data)
    return found


def _peak(*arguments: object) -> tuple[int, int]:
    """Run a command, and return its largest resident memory in MB and its duration in seconds."""
    started = time.monotonic()
    process = command(*arguments)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments[0]} failed: {errors}")
    return round(usage.ru_maxrss / 1024), round(time.monotonic() - started)


FIGURES = {  # the longest first
    "many_rows": many_rows,
    "kills_of_a_training": kills_of_a_training,
    "kills_of_a_change": kills_of_a_change,
    "faults_of_a_disk": faults_of_a_disk,
    "fuzzed_inputs": fuzzed_inputs,
    "damaged_files": damaged_files,
}

if __name__ == "__main__":
    main()
