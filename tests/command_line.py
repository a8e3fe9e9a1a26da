"""What the tests of the command line share: the result of a command, the files that a recipe names, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from helpers import save_backbone

from hyperadapters import HyperAdapterModel, Task

ROWS = {
    "train": [("good w1", "yes"), ("bad w2", "no"), ("good w3", "yes"), ("bad w4", "no")],
    "validation": [("good w5", "yes"), ("bad w6", "no")],
    "test": [("good w7", "yes"), ("bad w8", "no"), ("bad w9", "no")],
}


class Result(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Result]


def write_rows(folder: Path, **splits: list[tuple[str, str]]) -> None:
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def save_run(folder: Path, tasks: list[Task]) -> Path:
    """A saved model on a tiny backbone, whose heads give answers that differ."""
    sizes = {"adapter_dim": 2, "prototype_dim": 4, "hidden_dim": 4}
    model = HyperAdapterModel.from_backbone(str(save_backbone(folder / "bert")), tasks, **sizes)
    assert model.heads is not None
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.eval().save_pretrained(folder / "run")
    return folder / "run"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of JSON-lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(path: Path, **values: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def assert_refused(result: Result, *messages: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert [message for message in messages if message not in result.err] == []
