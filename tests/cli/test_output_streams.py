"""Commands in fresh processes whose standard output or error stream cannot take what is written."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import save_backbone

from hyperadapters.config import load_recipe
from hyperadapters.inference.predictor import Predictor
from hyperadapters.training.run import train

TASK = "fröhlich 😀"
NEEDS_FULL_DEVICE = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


def run(
    *arguments: object, encoding: str = "ascii", stdout: Any = subprocess.PIPE, unbuffered: bool = False
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    command = [sys.executable, "-m", "hyperadapters.cli", *map(str, arguments)]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, encoding="latin-1", env=environment, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a task whose name is not ASCII, and a run of it."""
    folder = tmp_path_factory.mktemp("streams")
    save_backbone(folder / "bert")
    rows = [{"text": f"w{row} {('bad', 'good')[row % 2]}", "label": ("übel", "gut")[row % 2]} for row in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    path = dict.fromkeys(("train", "validation", "test"), f"{folder}/rows.jsonl")
    recipe = {
        "backbone": str(folder / "bert"),
        "model": {"adapter_dim": 2, "prototype_dim": 8, "hidden_dim": 8},
        "data": {"max_length": 16},
        "training": {"max_steps": 2, "batch_size": 4, "eval_steps": 1, "logging_steps": 1},
        "tasks": [{"name": TASK, "source": {"path": path}}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(load_recipe(folder / "recipe.yaml"), folder / "run")
    (folder / "texts.jsonl").write_text(json.dumps({"text": "größer 😀", "task": TASK}) + "\n")
    return folder


@pytest.mark.slow
def test_a_training_goes_on_to_its_end(world: Path, tmp_path: Path) -> None:
    done = run("train", world / "recipe.yaml", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert r"fr\u00f6hlich \ud83d\ude00 0." in done.stderr
    assert (tmp_path / "run" / "metrics.json").is_file()


@pytest.mark.slow
@NEEDS_FULL_DEVICE
def test_a_training_whose_log_cannot_be_written_leaves_its_result(world: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run("train", world / "recipe.yaml", "--output", tmp_path / "run", stdout=full)
    assert done.returncode == 1
    assert "error: the output cannot be written: [Errno 28]" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "metrics.json").is_file()
    assert (tmp_path / "run" / "hyperadapter.json").is_file()


@pytest.mark.slow
@NEEDS_FULL_DEVICE
def test_scores_are_written_where_they_cannot_be_printed(world: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run("evaluate", world / "run", "--output", tmp_path / "scores.json", stdout=full, unbuffered=True)
    assert done.returncode == 1
    assert "error: the output cannot be written: [Errno 28]" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(json.loads((tmp_path / "scores.json").read_text())["tasks"]) == [TASK]


@pytest.mark.slow
def test_answers_are_valid_json_in_an_encoding_that_lacks_some_of_their_characters(world: Path) -> None:
    done = run("predict", world / "run", "--input", world / "texts.jsonl", encoding="latin-1")
    assert done.returncode == 0, done.stderr
    assert "größer" in done.stdout
    found = json.loads(done.stdout)
    assert (found["text"], found["task"], set(found["probabilities"])) == ("größer 😀", TASK, {"übel", "gut"})


@NEEDS_FULL_DEVICE
def test_answers_that_cannot_be_printed_are_an_error(world: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run("predict", world / "run", "--input", world / "texts.jsonl", stdout=full)
    assert done.returncode == 1
    assert "error: the output cannot be written: [Errno 28]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_the_command_quietly(world: Path, tmp_path: Path) -> None:
    (tmp_path / "many.csv").write_text("text\n" + "red blue w1 w2\n" * 2000)
    command = [sys.executable, "-m", "hyperadapters.cli", "predict", str(world / "run")]
    with subprocess.Popen(
        [*command, "--input", str(tmp_path / "many.csv"), "--task", TASK],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["task"] == TASK
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    assert "error:" not in errors


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs a shell that closes streams")
def test_answers_to_a_closed_standard_output_are_discarded(world: Path) -> None:
    command = [sys.executable, "-m", "hyperadapters.cli", "predict", str(world / "run")]
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *command, "--input", str(world / "texts.jsonl")]
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True, check=False, timeout=300)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


class GoneTerminal(io.StringIO):
    """An error stream to a terminal that takes no more after some writes."""

    def __init__(self, writes: int) -> None:
        super().__init__()
        self.left = writes

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.EIO, "Input/output error")
        return len(text)

    def flush(self) -> None:
        if self.left < 0:
            raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("writes", [0, 2])
def test_a_terminal_that_has_gone_ends_neither_a_training_nor_a_prediction(
    world: Path, tmp_path: Path, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", GoneTerminal(writes))
    trained = train(load_recipe(world / "recipe.yaml"), tmp_path / "run")
    monkeypatch.setattr(sys, "stderr", GoneTerminal(writes))
    assert len(list(Predictor(trained.model)(["w1"] * 3, progress=True))) == 3
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_the_exit_code_of_an_error_stays_where_nobody_reads_it(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "hyperadapters.cli", "validate", str(tmp_path / "gone.yaml")]
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(command, stderr=closed, check=False)
    assert done.returncode == 2


def test_errors_are_written_to_a_stream_that_lacks_some_of_their_characters(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("größe😀: 1\n", encoding="utf-8")
    done = run("validate", tmp_path / "recipe.yaml", encoding="latin-1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert r"größe\ud83d\ude00: unknown key" in done.stderr
    assert "Traceback" not in done.stderr
