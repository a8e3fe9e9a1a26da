"""Inputs that stand more than once in the data of a suite: in a split, in two splits of a task, or in two tasks.

    python benchmarks/leakage.py [--data FOLDER] [--output PATH]

Texts are compared without regard to case and spacing. An input of a pair task is the same if both texts are; that one
of them stands among the training rows is counted as well. Writes benchmarks/results/leakage.json, from which
`make figures` makes the tables of docs/sample-efficiency.md.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from efficiency.data import SUITES, load

from hyperadapters.data.examples import Example, TaskData

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "leakage.json"
SPLITS = ("train", "validation", "test")
Input = tuple[str, ...]


def comparable(example: Example) -> Input:
    """The texts of an example in one case and spacing."""
    texts = (example.text, example.text_pair)
    return tuple(" ".join(text.casefold().split()) for text in texts if text is not None)


def report(tasks: Sequence[TaskData]) -> dict[str, Any]:
    """What is counted for a suite.

    Returns:
        "tasks": for each task its name, the number of `rows` of each split, how many of them are `repeated` in their
        split, and for two splits how many rows of the second are `shared` with the first.
        "tested": for a task and one that is trained on, which may be the same, how many test rows of the first have
        their whole input among the training rows of the second (`inputs`), and how many have at least one of their
        texts there (`texts`), where there are any.
        "trained": for two tasks, how many different inputs of training rows they have in common, where there are any.
    """
    inputs = {data.task.name: {split: list(map(comparable, data.splits[split])) for split in SPLITS} for data in tasks}
    trained_on = {name: set(splits["train"]) for name, splits in inputs.items()}
    texts = {name: {text for row in rows for text in row} for name, rows in trained_on.items()}
    tested = [
        {
            "test": name,
            "train": other,
            "rows": len(splits["test"]),
            "inputs": sum(row in trained_on[other] for row in splits["test"]),
            "texts": sum(any(text in texts[other] for text in row) for row in splits["test"]),
        }
        for name, splits in inputs.items()
        for other in inputs
    ]
    trained = [
        {"tasks": [first, second], "inputs": len(trained_on[first] & trained_on[second])}
        for first, second in combinations(inputs, 2)
    ]
    return {
        "tasks": [_within(name, splits) for name, splits in inputs.items()],
        "tested": [found for found in tested if found["texts"]],
        "trained": [found for found in trained if found["inputs"]],
    }


def _within(name: str, splits: dict[str, list[Input]]) -> dict[str, Any]:
    shared = {}
    for first, second in combinations(SPLITS, 2):
        known = set(splits[first])
        shared[f"{first}_{second}"] = sum(row in known for row in splits[second])
    return {
        "task": name,
        "rows": {split: len(rows) for split, rows in splits.items()},
        "repeated": {split: sum(count - 1 for count in Counter(rows).values()) for split, rows in splits.items()},
        "shared": shared,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    found = {suite: report(load(options.data, suite, "all", 0)) for suite in SUITES}
    options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
