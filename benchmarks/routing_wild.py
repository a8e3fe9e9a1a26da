"""Whether texts as people write them find their task: short forms of rows, and everyday texts that no data file holds.

    python benchmarks/routing_wild.py RUN [--set dev|test]    # a run of recipes/demo.yaml

For the rows of the run's validation or test files, for these rows cut to their first words, without punctuation or in
lower case, and for the everyday texts of benchmarks/data/everyday_texts.jsonl (written by somebody who had not read the
demo's rows): the shares that find their task, are declined, and go to another task; for texts that belong to no task,
the share that is declined and the area under the ROC curve. Appends one JSON object to
benchmarks/results/routing_wild.jsonl.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sklearn.metrics import roc_auc_score

from hyperadapters import HyperAdapterModel, __version__
from hyperadapters.config import RECIPE_FILE, load_recipe
from hyperadapters.data.examples import Example
from hyperadapters.inference.routing import RoutingResult, route
from hyperadapters.training.run import examples_of, load_run_tasks

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "routing_wild.jsonl"
EVERYDAY = HERE / "data" / "everyday_texts.jsonl"


def first_words(count: int) -> Callable[[str], str]:
    """A function that cuts a text to its first words."""
    return lambda text: " ".join(text.split()[:count])


def no_punctuation(text: str) -> str:
    """The text without punctuation."""
    return re.sub(r"[^\w\s]", "", text)


FORMS: dict[str, Callable[[str], str]] = {
    "rows": str,
    "first 3 words": first_words(3),
    "first 5 words": first_words(5),
    "first 8 words": first_words(8),
    "lower case": str.lower,
    "no punctuation": no_punctuation,
}


def in_form(examples: Sequence[Example], form: Callable[[str], str]) -> list[Example]:
    """The examples with both of their texts in another form."""
    return [
        replace(e, text=form(e.text), text_pair=None if e.text_pair is None else form(e.text_pair)) for e in examples
    ]


def everyday_texts(model: HyperAdapterModel, part: str) -> tuple[list[Example], list[Example]]:
    """The everyday texts of the model's tasks, and those that belong to no task."""
    known, foreign = [], []
    for line in EVERYDAY.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["set"] != part:
            continue
        task_id = None if row["task"] is None else model.task_id(row["task"])
        (foreign if task_id is None else known).append(Example(task_id, row["text"], row.get("text_pair")))
    return known, foreign


def shares(names: Sequence[str], examples: Sequence[Example], found: Sequence[RoutingResult]) -> dict[str, float]:
    """The shares of examples that are nearest to their own task, and that are right, declined or misplaced."""
    nearest = [r.candidates[0].task == names[e.task_id or 0] for e, r in zip(examples, found, strict=True)]
    accepted = [r.accepted for r in found]
    pairs = list(zip(nearest, accepted, strict=True))
    count = len(pairs)
    return {
        "nearest": sum(nearest) / count,
        "right": pairs.count((True, True)) / count,
        "declined": 1 - sum(accepted) / count,
        "misplaced": pairs.count((False, True)) / count,
    }


def measure(model: HyperAdapterModel, rows: Sequence[Example], part: str) -> dict[str, Any]:
    """All figures of a model, with rows of known tasks."""
    names = [task.name for task in model.tasks]
    figures: dict[str, Any] = {}
    for name, form in FORMS.items():
        examples = in_form(rows, form)
        figures[name] = shares(names, examples, route(model, examples))
    known, foreign = everyday_texts(model, part)
    found, unknown = route(model, known), route(model, foreign)
    figures["everyday texts"] = shares(names, known, found)
    for task_id, name in enumerate(names):
        own = [(e, r) for e, r in zip(known, found, strict=True) if e.task_id == task_id]
        figures[f"everyday texts of {name}"] = shares(names, [e for e, _ in own], [r for _, r in own])
    scores = [r.similarity for r in (*found, *unknown)]
    figures["texts of no task"] = {
        "declined": sum(not r.accepted for r in unknown) / len(unknown),
        "auroc": float(roc_auc_score([1] * len(found) + [0] * len(unknown), scores)),
    }
    return figures


def main() -> None:
    """Measure a run, print the figures and append them to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("run", type=Path)
    parser.add_argument("--set", choices=("dev", "test"), default="dev")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model, recipe = HyperAdapterModel.from_pretrained(arguments.run), load_recipe(arguments.run / RECIPE_FILE)
    rows = examples_of(load_run_tasks(model, recipe), "test" if arguments.set == "test" else "validation")
    figures = measure(model, rows, arguments.set)
    for name, values in figures.items():
        print(f"{name:34s}", *(f"{key} {100 * value:5.1f}" for key, value in values.items()))
    record = {
        "run": arguments.run.name,
        "seed": recipe.seed,
        "set": arguments.set,
        "preset": model.adapter_config.preset,
        "routing": model.adapter_config.routing,
        "figures": figures,
        "version": __version__,
    }
    with arguments.output.open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
