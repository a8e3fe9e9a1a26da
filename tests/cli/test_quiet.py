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
TRAINED = (
    r"Frozen layers: the states of \d+ rows, \d+ tokens, are kept in memory \(\d+\.\d MiB when full\)\."
    r"|step [123]/3: mean .*"
)
NOTE = r"note: vLLM and LoRAX only serve LoRAs of decoder-only language models; this backbone is an encoder"
LORA = {"preset": "paper", "form": "lora", "lora_rank": 2}


# A process needs seconds to import what the commands need, so that those of a test run in one. A library that complains
# once in a process does so here too, and no command changes the loggers and warnings of other libraries for later ones.
SEQUENCE = """
import json, sys
from hyperadapters.cli import main

for arguments in json.loads(sys.argv.pop()):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    for stream in (sys.stdout, sys.stderr):
        print(end="\\0", file=stream, flush=True)
"""


def say(*commands: tuple[object, ...]) -> list[tuple[str, str]]:
    """What each of these commands writes to its output and its error stream, one after the other in a new process."""
    arguments = json.dumps([[str(argument) for argument in command] for command in commands])
    program = [sys.executable, "-c", SEQUENCE, arguments]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    *outputs, rest = done.stdout.split("\0")
    *errors, last = done.stderr.split("\0")
    assert (rest, last) == ("", ""), "a line after the last command"
    return list(zip(outputs, errors, strict=True))


def without(lines: str, errors: str) -> list[str]:
    """The lines of an error output that do not match."""
    return [line for line in errors.splitlines() if not re.fullmatch(lines, line)]


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
    commands = {
        "Checkpoint and metrics.json are in": ("train", recipe, "--output", run),
        "valid": ("validate", recipe, "--data"),
        "Not ready": ("check", recipe, "--fail-on", "never"),
        "accuracy": ("evaluate", run),
        '"answer"': ("predict", run, "--input", examples),
        '"reason"': ("suggest", run, "--task", "mood", "--pool", examples),
        "4 examples, ": ("add-task", run, "--name", "new", "--examples", examples),
        "4 examples": ("refit-task", run, "--name", "new", "--examples", examples),
        "Renamed": ("rename-task", run, "--name", "new", "--to", "newer"),
        "Removed": ("remove-task", run, "--name", "newer"),
    }
    for target in ("merged", "onnx", "peft-lora"):
        output = tmp_path / target
        commands[f"Written to {output}/"] = ("export", run, "--task", "mood", "--format", target, "--output", output)
    expected = {"train": TRAINED, "peft-lora": NOTE}
    for (text, command), (output, errors) in zip(commands.items(), say(*commands.values()), strict=True):
        assert text in output, command
        lines = "|".join(lines for word, lines in expected.items() if word in command)
        assert without(lines, errors) == [], command


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_commands_on_a_backbone_that_writes(kind: str, tmp_path: Path) -> None:
    recipe, run = write_run(tmp_path, kind, **(LORA if kind == "gpt2" else {"adapter_norm_input": False}))
    commands: list[tuple[object, ...]] = [
        ("train", recipe, "--output", run),
        ("predict", run, "--input", tmp_path / "data" / "test.jsonl"),
    ]
    if kind == "t5":
        commands.append(
            ("export", run, "--task", "mood", "--format", "adapterhub", "--output", tmp_path / "adapterhub")
        )
    (trained, log), (answers, errors), *exported = say(*commands)
    assert "exact_match" in trained
    assert without(TRAINED, log) == []
    assert len([json.loads(line) for line in answers.splitlines()]) == len(ROWS["test"])
    assert [errors, *(errors for _, errors in exported)] == [""] * (len(commands) - 1)
