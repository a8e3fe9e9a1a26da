"""What the names and descriptions of labels are worth beside k examples of each label.

    python benchmarks/zero_examples.py [--suites main hwu64 tweeteval fdu] [--seeds 0 1]

For each classification task of single texts and each k, heads are fitted to the frozen sentence vectors of k training
rows a label, as `add_task` does without related tasks: "without" names, with each name as "one example", and with the
weight that left-out examples choose ("chosen"). With k = 0 the names are all that there is. A name is that of the label
with spaces for underscores. Tasks other than intents also have descriptions, which are in
benchmarks/data/label_descriptions.json, and all have "wrong names", those of the next label, which show what misleading
ones cost. Scores are those of the first 300 test rows.

    python benchmarks/zero_examples.py --routing

adds held-out tasks of hwu64 and tweeteval to models of the others, from names or descriptions or from k examples a
label, and routes 100 test rows of the task and 40 of each other one. The densities by which the models route do not
depend on adapters, which are not trained. Both append one JSON object for each task, kind of text, k and seed to
benchmarks/results/zero_examples.jsonl. Tasks whose scores are there already are passed over. --tables prints the tables
of docs/tasks.md from this file.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from efficiency.code_digest import code_digest
from efficiency.data import MAX_LENGTHS, Suite, load, numbered, rows_of
from tables import read
from torch import Tensor

from hyperadapters import HyperAdapterModel, Task, __version__
from hyperadapters.config import DEFAULT_BACKBONE, DataConfig
from hyperadapters.data.examples import Example, TaskData, label_examples
from hyperadapters.data.loading import subset
from hyperadapters.heads.name_weights import choose_name_weight
from hyperadapters.heads.new_heads import fit_new_head
from hyperadapters.heads.regression import TaskRows
from hyperadapters.heads.task_heads import Head
from hyperadapters.inference.routing import calibrate, of_batches
from hyperadapters.training.metrics import score

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "zero_examples.jsonl"
DESCRIPTIONS = HERE / "data" / "label_descriptions.json"
SUITES: tuple[Suite, ...] = ("main", "hwu64", "tweeteval", "fdu")
SHOTS = (0, 1, 2, 4, 8, 16)
ARMS = ("without", "one example", "chosen")
TEST_ROWS = 300
MANY_LABELS = 50
"""Number of labels from which on a task is measured with one seed and at most 4 examples a label, to save time."""
EVERY: dict[Suite, int] = {"fdu": 3}
"""Of a suite whose tasks all have the same labels, every third task is measured."""
HELD_OUT: dict[Suite, tuple[str, ...]] = {
    "hwu64": ("general", "iot", "qa", "play", "transport", "email"),
    "tweeteval": ("emotion", "stance_abortion", "stance_climate"),
}
ROUTING_SHOTS, KNOWN_ROWS, OWN_ROUTED, OTHERS_ROUTED = (0, 2, 8), 100, 100, 40


def texts_of(suite: Suite, task: Task) -> dict[str, Task]:
    """The task with the names of its labels, with their descriptions if it has some, and with wrong names."""
    described = json.loads(DESCRIPTIONS.read_text())
    texts = task.label_texts
    wrong = dict(zip(task.labels, [*texts[1:], *texts[:1]], strict=True))
    found = {"names": None, "descriptions": described.get(task.name, described.get(suite)), "wrong names": wrong}
    return {
        kind: task.model_copy(update={"descriptions": of_labels})
        for kind, of_labels in found.items()
        if of_labels is not None or kind == "names"
    }


class Encoder:
    """What the heads of a model read of single texts without adapters; each text is encoded once."""

    def __init__(self, max_length: int) -> None:
        task = Task.classification("any", ["a", "b"])
        self._model = HyperAdapterModel.from_backbone(DEFAULT_BACKBONE, [task], max_length=max_length).eval()
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, rows: Sequence[Example]) -> Tensor:
        """What the heads read of the rows [N, F]."""
        new = [Example(None, text) for text in dict.fromkeys(row.text for row in rows) if text not in self._known]
        if new:
            (found,) = of_batches(self._model, new, 64, lambda batch: (self._read(batch),))
            self._known.update(zip([row.text for row in new], found, strict=True))
        return torch.stack([self._known[row.text] for row in rows])

    def _read(self, batch: dict[str, Tensor]) -> Tensor:
        return self._model.head_features(batch, torch.empty(0), False)


def cells(encode: Encoder, suite: Suite, data: TaskData, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The scores of a task for each kind of text, k and seed."""
    test = data.splits["test"][:TEST_ROWS]
    inputs, targets = encode(test), [row.target for row in test]
    is_large = len(data.task.labels) >= MANY_LABELS
    found = []
    for kind, task in texts_of(suite, data.task).items():
        names = label_examples([task])
        for k in [k for k in SHOTS if k <= 4 or not is_large]:
            for seed in seeds[:1] if is_large or not k else seeds:
                few = subset(data.splits["train"], task, DataConfig(k_per_label=k), seed) if k else []
                heads, weight = fitted(task, encode([*few, *names]), [*few, *names], len(few), seed)
                scores = {arm: _score(task, head, inputs, targets) for arm, head in heads.items()}
                cell = {"suite": suite, "task": task.name, "labels": len(task.labels), "texts": kind, "k": k}
                found.append({**cell, "seed": seed, "scores": scores, "weight": weight, "test_rows": len(test)})
    return found


def fitted(
    task: Task, inputs: Tensor, rows: Sequence[Example], num_examples: int, seed: int
) -> tuple[dict[str, Head], float]:
    """The heads of all arms, and the weight of a name that was chosen."""
    every = TaskRows(task, inputs, [row.target for row in rows])
    chosen = choose_name_weight(every, num_examples, seed=seed)
    heads = {"one example": fit_new_head(every), "chosen": fit_new_head(chosen.rows)}
    if num_examples:
        heads["without"] = fit_new_head(every.subset(range(num_examples)))
    return heads, chosen.name_weight


def _score(task: Task, head: Head, inputs: Tensor, targets: Sequence[Any]) -> dict[str, float]:
    """The main metric, the accuracy and the mean negative log-likelihood at a temperature of 1."""
    logits = inputs @ head.weight.T + head.bias
    answers = logits.argmax(dim=1).tolist()
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(targets))
    return {
        "main": score(task, targets, answers)[task.main_metric],
        "accuracy": float(np.mean([answer == target for answer, target in zip(answers, targets, strict=True)])),
        "loss": float(loss),
    }


def routing_cells(folder: Path, suite: Suite, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """How many rows are accepted by a held-out task: of its own, and of the known tasks."""
    every = load(folder, suite, KNOWN_ROWS, 0)
    others = [data for data in every if data.task.name not in HELD_OUT[suite]]
    known = [numbered(data, task_id) for task_id, data in enumerate(others)]
    tasks = [data.task for data in known]
    model = HyperAdapterModel.from_backbone(DEFAULT_BACKBONE, tasks, max_length=MAX_LENGTHS[suite]).eval()
    calibrate(model, *(rows_of(tuple(known), split) for split in ("train", "validation")))
    foreign = [row.text for data in known for row in data.splits["test"][:OTHERS_ROUTED]]
    found = []
    for data in every:
        if data.task.name not in HELD_OUT[suite]:
            continue
        kinds = texts_of(suite, data.task)
        kind = "descriptions" if "descriptions" in kinds else "names"
        for k in ROUTING_SHOTS:
            for seed in seeds if k else seeds[:1]:
                few = subset(data.splits["train"], data.task, DataConfig(k_per_label=k), seed) if k else []
                model.add_task(kinds[kind], few, seed=seed)
                own = [row.text for row in data.splits["test"][:OWN_ROUTED]]
                accepted = {
                    of: float(np.mean([result.task == data.task.name for result in model.route(texts)]))
                    for of, texts in (("own", own), ("others", foreign))
                }
                model.remove_task(data.task.name)
                cell = {"suite": suite, "task": data.task.name, "texts": kind, "k": k, "seed": seed}
                found.append({**cell, "accepted": accepted})
    return found


def print_tables() -> None:
    """Print the tables of docs/tasks.md: means over tasks and seeds, in per cent."""
    every = read(RESULTS)
    rows = [row for row in every if "scores" in row]
    print(f"| tasks | names | {' | '.join(f'k = {k}' for k in SHOTS)} |\n{'|---' * (2 + len(SHOTS))}|")
    for row in rows:
        if row["labels"] >= MANY_LABELS:
            row["suite"] = row["task"]
    for suite in dict.fromkeys(row["suite"] for row in rows):
        of_suite = [row for row in rows if row["suite"] == suite]
        kinds = dict.fromkeys(row["texts"] for row in of_suite)
        for kind, arm in [("names", "without"), *product(kinds, ARMS[1:])]:
            name = arm if arm == "without" else f"{kind}, {arm}"
            shown = [_mean([row for row in of_suite if row["texts"] == kind], k, arm) for k in SHOTS]
            print(f"| {suite} | {name} | {' | '.join(shown)} |")
    print("\n| tasks | accepted of its own rows | of the others |")
    print("|---|---|---|")
    routed = [row for row in every if "accepted" in row]
    for suite, k in dict.fromkeys((row["suite"], row["k"]) for row in routed):
        cell = [row["accepted"] for row in routed if (row["suite"], row["k"]) == (suite, k)]
        shown = [f"{100 * np.mean([row[of] for row in cell]):.1f}" for of in ("own", "others")]
        print(f"| {suite}, k = {k} | {' | '.join(shown)} |")


def _mean(rows: Sequence[dict[str, Any]], k: int, arm: str) -> str:
    """The mean accuracy over tasks of the means over seeds; for no examples and names, that of chance."""
    by_task: dict[str, list[float]] = {}
    for row in rows:
        if row["k"] == k:
            chance = 1 / row["labels"]
            by_task.setdefault(row["task"], []).append(row["scores"].get(arm, {"accuracy": chance})["accuracy"])
    if not by_task:
        return ""
    return f"{100 * np.mean([np.mean(found) for found in by_task.values()]):.1f}"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--routing", action="store_true", help="route to held-out tasks")
    parser.add_argument("--tables", action="store_true", help="print the tables from the results")
    options = parser.parse_args()
    if options.tables:
        print_tables()
        return
    facts = {"version": __version__, "code": code_digest(), "backbone": DEFAULT_BACKBONE}
    for suite in [suite for suite in options.suites if suite in HELD_OUT] if options.routing else []:
        _append(routing_cells(options.data, suite, options.seeds), facts)
    done = {(row["suite"], row["task"]) for row in read(RESULTS) if "scores" in row}
    for suite in [] if options.routing else options.suites:
        encode = Encoder(MAX_LENGTHS[suite])
        tasks = load(options.data, suite, "all", 0)
        for data in [data for data in tasks if data.task.label_texts][:: EVERY.get(suite, 1)]:
            if (suite, data.task.name) in done:
                continue
            _append(cells(encode, suite, data, options.seeds), facts)
            print(suite, data.task.name, flush=True)


def _append(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> None:
    with RESULTS.open("a") as file:
        file.writelines(json.dumps({**row, **facts}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
