"""Each command, in a process of its own, prints what this package has to say and no line of another library."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import ROWS, write_recipe, write_rows
from helpers import save_backbone

COLOURS = [("red w1", "red"), ("blue w2", "blue"), ("red w3", "red"), ("blue w4", "blue")]
FROZEN = r"Frozen layers: the states of \d+ rows, \d+ tokens, are kept in memory \(\d+\.\d\d GiB when full\)\."
NOTE = r"note: vLLM and LoRAX only serve LoRAs of decoder-only language models; this backbone is an encoder"
LORA = {"preset": "paper", "form": "lora", "lora_rank": 2}


def assert_says(lines: str, *arguments: object) -> str:
    """Run a command, each line of whose error output must match `lines`; what it prints is returned."""
    program = [sys.executable, "-m", "hyperadapters.cli", *map(str, arguments)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not re.fullmatch(lines, line)] == []
    return done.stdout


def write_run(folder: Path, kind: str, **model: Any) -> tuple[Path, Path]:
    """A recipe of two tasks on a tiny backbone, and the folder of its run."""
    write_rows(folder / "data", **ROWS, **{f"colour-{split}": COLOURS for split in ROWS})
    answer = {} if kind == "bert" else {"kind": "text-to-text", "template": "{text} :"}
    tasks = [
        {"name": name, "source": {"path": f"data/{prefix}{{split}}.jsonl"}, **answer}
        for name, prefix in (("mood", ""), ("colour", "colour-"))
    ]
    values = {"data": {"max_length": 32}, "training": {"max_steps": 3, "eval_steps": 1}, "model": model, "tasks": tasks}
    backbone = save_backbone(folder / "backbone", kind)
    return write_recipe(folder / "recipe.yaml", backbone=str(backbone), **values), folder / "run"


def test_commands_on_an_encoder(tmp_path: Path) -> None:
    recipe, run = write_run(tmp_path, "bert", **LORA)
    examples = tmp_path / "data" / "colour-train.jsonl"
    assert "Usage" in assert_says("", "--help")
    assert "valid" in assert_says("", "validate", recipe, "--data")
    assert "accuracy" in assert_says(FROZEN, "train", recipe, "--output", run)
    assert "accuracy" in assert_says("", "evaluate", run)
    answers = assert_says("", "predict", run, "--input", examples)
    assert len([json.loads(line) for line in answers.splitlines()]) == len(COLOURS)
    for target, lines in (("peft-lora", NOTE), ("merged", ""), ("onnx", "")):
        arguments = ("--task", "mood", "--format", target, "--output", tmp_path / target)
        assert assert_says(lines, "export", run, *arguments) == f"Written to {tmp_path / target}/\n"
    assert "4 examples" in assert_says("", "add-task", run, "--name", "new", "--examples", examples)
    assert "4 examples" in assert_says("", "refit-task", run, "--name", "new", "--examples", examples)
    assert "Renamed" in assert_says("", "rename-task", run, "--name", "new", "--to", "newer")
    assert "Removed" in assert_says("", "remove-task", run, "--name", "newer")


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_commands_on_a_backbone_that_writes(kind: str, tmp_path: Path) -> None:
    recipe, run = write_run(tmp_path, kind, **(LORA if kind == "gpt2" else {"adapter_norm_input": False}))
    assert "exact_match" in assert_says(FROZEN, "train", recipe, "--output", run)
    answers = assert_says("", "predict", run, "--input", tmp_path / "data" / "test.jsonl")
    assert len([json.loads(line) for line in answers.splitlines()]) == len(ROWS["test"])
    if kind == "t5":
        arguments = ("--task", "mood", "--format", "adapterhub", "--output", tmp_path / "adapterhub")
        assert_says("", "export", run, *arguments)
