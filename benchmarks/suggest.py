"""How much sooner a new task is learned if the rows to label are suggested, and not drawn at random.

    python benchmarks/suggest.py

For each suite, a model of the preset "plus" is trained on 100 rows of each task that is not held out. A held-out task
then starts with two random rows of each label. In each round, a strategy chooses eight more rows of a pool, which are
at most 1,000 training rows of the task, and its head is fitted to all of its rows so far: as a logistic regression on
frozen features, and for some tasks with `add_task` and fit "head". The accuracy is that of at most 500 of the task's
test and validation rows, which nothing else uses. Appends one JSON object for each task, fit, seed, strategy and space
of k-means to benchmarks/results/suggest.jsonl; --tables prints the table of docs/tasks.md from this file
and draws docs/images/suggest.svg (extra `plot`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from efficiency.code_digest import code_digest
from efficiency.data import MAX_LENGTHS, Suite, load, numbered
from torch import Tensor

from hyperadapters import HyperAdapterModel, Trainer, TrainingArguments, __version__
from hyperadapters.config import DEFAULT_BACKBONE, DataConfig
from hyperadapters.data.examples import Example, TaskData, label_examples
from hyperadapters.data.loading import subset
from hyperadapters.fewshot.suggest import Strategy, choose
from hyperadapters.heads.new_heads import fit_new_head
from hyperadapters.heads.regression import TaskRows
from hyperadapters.heads.task_heads import Head
from hyperadapters.inference.routing import instance_vectors, of_batches

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "suggest.jsonl"
FIGURE = HERE.parent / "docs" / "images" / "suggest.svg"
HELD_OUT: dict[Suite, tuple[str, ...]] = {
    "hwu64": ("general", "iot", "qa", "play", "transport", "email"),
    "tweeteval": ("emotion", "irony", "stance_abortion"),
}
FITTED_WITH_ADD_TASK = ("general", "iot", "qa", "emotion", "irony")
"""Tasks with which the fit "head" is made, too, which takes longer."""
ROWS, STEPS = 100, 150
FIRST_PER_LABEL, ROWS_PER_ROUND, ROUNDS = 2, 8, 4
COUNTS = [ROWS_PER_ROUND * turn for turn in range(1, ROUNDS + 1)]
POOL_ROWS, SCORED_ROWS = 1000, 500
ARMS: tuple[tuple[str, str | None], ...] = (
    ("random", None),
    ("margin", None),
    ("entropy", None),
    ("diversity", "instances"),
    ("diversity", "head_inputs"),
    ("diverse_margin", "instances"),
    ("diverse_margin", "head_inputs"),
)
"""Strategies, with the space of k-means: instance vectors of the retriever, or what heads read. The library does not
have "entropy", because it is worse than random rows here."""
ARMS_OF = {"regression": ARMS, "head": tuple(ARMS[place] for place in (0, 1, 6))}
"""The same by the fit of the task: a logistic regression on frozen features, or `add_task` with fit "head"."""

Array = np.ndarray[Any, Any]


def trained(folder: Path, suite: Suite) -> HyperAdapterModel:
    """A model of the tasks of a suite that are not held out."""
    known = [data for data in load(folder, suite, ROWS, 0) if data.task.name not in HELD_OUT[suite]]
    tasks = [numbered(data, task_id) for task_id, data in enumerate(known)]
    model = HyperAdapterModel.from_backbone(
        DEFAULT_BACKBONE, [data.task for data in tasks], max_length=MAX_LENGTHS[suite]
    )
    rows = ({data.task.name: data.splits[split] for data in tasks} for split in ("train", "validation"))
    Trainer(model, *rows, TrainingArguments(max_steps=STEPS, seed=0, report_to="none")).train()
    return model.eval()


class Simulation:
    """One held-out task, with a pool whose labels are known only when a row is chosen."""

    def __init__(self, model: HyperAdapterModel, data: TaskData, fit: str) -> None:
        self.model, self.task, self.fit = model, data.task, fit
        pool = random.Random(0).sample(data.splits["train"], min(len(data.splits["train"]), POOL_ROWS))
        self.pool = _without_task(pool)
        self.scored = _without_task([*data.splits["test"], *data.splits["validation"]][:SCORED_ROWS])
        self.names = _without_task(label_examples([data.task]))
        self.instances = instance_vectors(model, self.pool)
        self._features: dict[tuple[float, ...], Tensor] = {}
        self._first: dict[int, tuple[list[int], Head, Tensor]] = {}

    def curve(self, strategy: str, space: str | None, seed: int) -> list[float]:
        """The accuracy with the first rows, and after each round."""
        if seed not in self._first:
            rows = subset(self.pool, self.task, DataConfig(k_per_label=FIRST_PER_LABEL), seed)
            labelled = [self.pool.index(row) for row in rows]
            self._first[seed] = labelled, *self._fitted(labelled, seed)
        labelled, head, features = self._first[seed]
        labelled, scores = [*labelled], [self._accuracy(head, features)]
        for turn in range(ROUNDS):
            left = [row for row in range(len(self.pool)) if row not in set(labelled)]
            vectors = self.instances if space == "instances" else features
            probabilities = _logits(head, features[left]).softmax(dim=1)
            labelled += [left[row] for row in _chosen(strategy, probabilities, vectors[left], ROUNDS * seed + turn)]
            head, features = self._fitted(labelled, seed)
            scores.append(self._accuracy(head, features))
        return scores

    def _fitted(self, labelled: list[int], seed: int) -> tuple[Head, Tensor]:
        """The head of the task with some rows of the pool, and what heads read of all rows [N, F]."""
        examples = [self.pool[row] for row in labelled]
        if self.fit == "regression":
            features = self._features_of((0.0,), lambda inputs: self.model.head_features(inputs, torch.empty(0), False))
            names = features[len(features) - len(self.names) :]
            targets = [float(row.target or 0) for row in (*examples, *self.names)]
            return fit_new_head(TaskRows(self.task, torch.cat([features[labelled], names]), targets)), features
        self.model.add_task(self.task, examples, fit="head", seed=seed)
        task_id, method, heads = len(self.model.tasks) - 1, self.model.pha, self.model.heads
        assert heads is not None
        assert str(task_id) not in method.own_adapters
        scale = float(method.adapter_scales[task_id])
        key = (scale, *(method.prototypes.weight[task_id].tolist() if scale else ()))
        features = self._features_of(
            key, lambda inputs: self.model.head_inputs(inputs, torch.full((len(inputs["input_ids"]),), task_id))
        )
        head = heads.head(task_id)
        self.model.remove_task(self.task.name)
        return head, features

    @torch.inference_mode()
    def _features_of(self, key: tuple[float, ...], compute: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """What heads read of pool, scored rows and names of labels; computed once for each adapter."""
        if key not in self._features:
            rows = [*self.pool, *self.scored, *self.names]
            (self._features[key],) = of_batches(self.model, rows, 64, lambda batch: (compute(batch),))
        return self._features[key]

    def _accuracy(self, head: Head, features: Tensor) -> float:
        answers = _logits(head, features[len(self.pool) :][: len(self.scored)]).argmax(dim=1).tolist()
        return sum(answer == row.target for answer, row in zip(answers, self.scored, strict=True)) / len(answers)


def _chosen(strategy: str, probabilities: Tensor, vectors: Tensor, seed: int) -> list[int]:
    if strategy == "entropy":
        return torch.special.entr(probabilities).sum(dim=1).topk(ROWS_PER_ROUND).indices.tolist()
    found = choose(probabilities, vectors.__getitem__, ROWS_PER_ROUND, cast(Strategy, strategy), seed)
    return [row for row, _ in found]


def _without_task(rows: Sequence[Example]) -> list[Example]:
    return [Example(None, row.text, row.text_pair, row.target) for row in rows]


def _logits(head: Head, features: Tensor) -> Tensor:
    return (features @ head.weight.T + head.bias) / head.temperature


def benefits(rows: list[dict[str, Any]], fit: str, strategy: str, space: str | None) -> list[Array]:
    """Accuracy after each round beyond that with random rows, in points: an array [seeds, rounds] of each task."""
    of_fit = [row for row in rows if row["fit"] == fit]
    random_rows = {(row["task"], row["seed"]): row["accuracy"] for row in of_fit if row["strategy"] == "random"}
    by_task: dict[str, list[Array]] = {}
    for row in of_fit:
        if (row["strategy"], row["space"]) == (strategy, space):
            difference = np.array(row["accuracy"]) - np.array(random_rows[row["task"], row["seed"]])
            by_task.setdefault(row["task"], []).append(100 * difference[1:])
    return [np.stack(found) for found in by_task.values()]


def tables(rows: list[dict[str, Any]]) -> str:
    """The table of the documentation in Markdown, with means over the tasks."""
    columns = [
        *("fit", "strategy", "k-means reads"),
        *(f"+{count} rows" for count in COUNTS),
        *("mean", "standard deviation", "tasks ahead"),
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for fit, arms in ARMS_OF.items():
        for strategy, space in arms[1:]:
            found = benefits(rows, fit, strategy, space)
            if not found:
                continue
            means = np.stack([of_task.mean(axis=0) for of_task in found])
            spread = np.concatenate([of_task.mean(axis=1) for of_task in found]).std(ddof=1)
            ahead = f"{sum(means.mean(axis=1) > 0)} of {len(found)}"
            figures = [f"{value:+.1f}" for value in (*means.mean(axis=0), means.mean())]
            lines.append(f"| {' | '.join([fit, strategy, space or '', *figures, f'{spread:.1f}', ahead])} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The curves of the table for the fit "regression"."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for strategy, space in ARMS[1:]:
        found = benefits(rows, "regression", strategy, space)
        curve = np.mean([of_task.mean(axis=0) for of_task in found], axis=0)
        label = strategy if space is None else f"{strategy}, {space}"
        axes.plot(
            [0, *COUNTS], [0, *curve], ":" if space == "instances" else "-", marker="o", markersize=4, label=label
        )
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="labels added", ylabel="accuracy beyond random rows, points", xticks=[0, *COUNTS])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--suites", nargs="+", choices=list(HELD_OUT), default=list(HELD_OUT))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--fits", nargs="+", choices=list(ARMS_OF), default=list(ARMS_OF))
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--tables", action="store_true", help="print the table and draw the figure of the results, measure nothing"
    )
    arguments = parser.parse_args()
    if arguments.tables:
        rows = [json.loads(line) for line in arguments.output.read_text().splitlines()]
        print(tables(rows))
        draw(rows, FIGURE)
        return
    digest = code_digest()
    for suite in arguments.suites:
        model = trained(arguments.data, suite)
        every = {data.task.name: data for data in load(arguments.data, suite, "all", 0)}
        for fit, name in product(arguments.fits, HELD_OUT[suite]):
            if fit == "head" and name not in FITTED_WITH_ADD_TASK:
                continue
            simulation = Simulation(model, every[name], fit)
            for seed, (strategy, space) in product(arguments.seeds, ARMS_OF[fit]):
                row = {
                    "suite": suite,
                    "task": name,
                    "labels": len(simulation.task.labels),
                    "fit": fit,
                    "seed": seed,
                    "strategy": strategy,
                    "space": space,
                    "accuracy": simulation.curve(strategy, space, seed),
                    "first_rows": FIRST_PER_LABEL * len(simulation.task.labels),
                    "rows_per_round": ROWS_PER_ROUND,
                    "pool_rows": len(simulation.pool),
                    "scored_rows": len(simulation.scored),
                    "version": __version__,
                    "digest": digest,
                }
                with arguments.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            print(f"{suite} {name}, fit {fit}: done", flush=True)


if __name__ == "__main__":
    main()
