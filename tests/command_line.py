"""What the tests of the command line share: the result of a command, the files that a recipe names, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

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


def write_recipe(path: Path, **values: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def assert_refused(result: Result, *messages: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert [message for message in messages if message not in result.err] == []
