"""Whether it can be predicted which tasks gain from each other: predictors beside measured gains of pairs of tasks.

    python benchmarks/task_relations.py [--seeds 0 1 2]

The gain of a target task from a source task is the difference of its score on test rows with and without the source,
both with the same 32 training rows. It is measured in two ways:

- "heads", for tasks with the same labels (reviews of ten goods, and stances towards five targets): related heads are
  fitted to the frozen sentence vectors of both tasks, or of the target alone.
- "adapters", for five intent tasks with different labels: a model of the preset "plus" is trained for 40 steps on both
  tasks, or on the target alone.

The predictors read only training rows and one model of the preset "plus" that is trained on all tasks of the suite:

- "prototypes": the cosine of the prototypes of the two tasks in this model;
- "texts": the cosine of the mean sentence vectors of the two tasks;
- "heads": the cosine of the weights of the heads that are fitted to each task alone, or for tasks with different labels
  the mean squared cosine of the angles between the spaces of their weights;
- "left out": the gain in the log-likelihood of left-out target rows, in nats, for tasks with the same labels.

Appends one JSON object for each pair and seed to benchmarks/results/task_relations.jsonl. --tables prints the table of
docs/decisions.md: the rank correlation (Spearman) over pairs with a 95 % interval, from 1,000 draws of the tasks with
replacement, and the mean of the rank correlations over the sources of each target.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from efficiency.code_digest import code_digest
from efficiency.data import MAX_LENGTHS, Suite, load, numbered
from scipy.linalg import subspace_angles
from scipy.stats import spearmanr
from tables import read
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hyperadapters import HyperAdapterModel, Trainer, TrainingArguments, __version__
from hyperadapters.config import DEFAULT_BACKBONE
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.heads.regression import TaskRows, head_losses
from hyperadapters.heads.task_heads import Head
from hyperadapters.heads.trained_heads import fit_related_heads
from hyperadapters.inference.routing import of_batches
from hyperadapters.training.metrics import score

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "task_relations.jsonl"
TASKS: dict[Suite, tuple[str, ...]] = {
    "fdu": (
        *("apparel", "books", "camera_photo", "electronics", "health_personal_care"),
        *("imdb", "kitchen_housewares", "magazines", "software", "video"),
    ),
    "tweeteval": ("stance_abortion", "stance_atheism", "stance_climate", "stance_feminist", "stance_hillary"),
    "hwu64": ("calendar", "general", "iot", "play", "qa"),
}
MEASURES: dict[Suite, str] = {"fdu": "heads", "tweeteval": "heads", "hwu64": "adapters"}
ROWS = 32
STEPS, TEST_ROWS, FOLDS, DRAWS = 40, 300, 4, 1000
PREDICTORS = ("prototypes", "texts", "heads", "left out")

Pair = tuple[str, str]
"""Target and source."""


def trained(tasks: Sequence[TaskData], suite: Suite, seed: int) -> HyperAdapterModel:
    """A model of the preset "plus" of some tasks."""
    known = [numbered(data, task_id) for task_id, data in enumerate(tasks)]
    torch.manual_seed(seed)
    names = [data.task for data in known]
    model = HyperAdapterModel.from_backbone(DEFAULT_BACKBONE, names, max_length=MAX_LENGTHS[suite])
    args = TrainingArguments(max_steps=STEPS, seed=seed, disable_tqdm=True, logging_strategy="no")
    Trainer(model, {data.task.name: data.splits["train"] for data in known}, None, args).train()
    return model.eval()


@torch.no_grad()
def sentence_vectors(model: HyperAdapterModel, rows: Sequence[Example]) -> Tensor:
    """What heads read of single texts without adapters [N, F]."""
    texts = [Example(None, row.text) for row in rows]
    (found,) = of_batches(model, texts, 64, lambda batch: (model.head_features(batch, torch.empty(0), False),))
    return found


def rows_of(data: TaskData, vectors: Tensor) -> TaskRows:
    """The training rows of a task as its head reads them."""
    return TaskRows(data.task, vectors, [row.target for row in data.splits["train"]])


def left_out_gain(target: TaskRows, source: TaskRows, seed: int) -> float:
    """By how much the source raises the log-likelihood of left-out rows of the target."""
    order = random.Random(seed).sample(range(len(target.targets)), len(target.targets))
    gain = 0.0
    for fold in range(FOLDS):
        left_out = order[fold::FOLDS]
        kept = target.subset([row for row in order if row not in set(left_out)])
        if len(set(kept.targets)) < len(target.task.labels):
            continue
        losses = [head_losses(fit_related_heads(data)[0], target.subset(left_out)) for data in ([kept], [kept, source])]
        gain += float((losses[0] - losses[1]).sum())
    return gain


def similarity_of_heads(first: Head, second: Head, have_same_labels: bool) -> float:
    """The similarity of two heads without what all labels of a head have in common."""
    weights = [head.weight - head.weight.mean(dim=0) for head in (first, second)]
    if have_same_labels:
        return float(cosine_similarity(*(weight.flatten() for weight in weights), dim=0))
    angles = subspace_angles(*(weight[1:].T.numpy() for weight in weights))
    return float(np.square(np.cos(angles)).mean())


def gains_of_heads(
    tasks: Mapping[str, TaskData], rows: Mapping[str, TaskRows], model: HyperAdapterModel
) -> dict[Pair, float]:
    """The gain of each task from each other one by related heads."""
    test = {name: data.splits["test"][:TEST_ROWS] for name, data in tasks.items()}
    inputs = {name: sentence_vectors(model, found) for name, found in test.items()}

    def score_of(name: str, fitted_to: Sequence[TaskRows]) -> float:
        head = fit_related_heads(fitted_to)[0]
        answers = (inputs[name] @ head.weight.T + head.bias).argmax(dim=1).tolist()
        return main_score(tasks[name], test[name], answers)

    alone = {name: score_of(name, [rows[name]]) for name in tasks}
    return {
        (target, source): score_of(target, [rows[target], rows[source]]) - alone[target]
        for target, source in permutations(tasks, 2)
    }


def gains_of_adapters(tasks: Mapping[str, TaskData], suite: Suite, seed: int) -> dict[Pair, float]:
    """The gain of each task from each other one in a model that is trained on both."""

    def scores(names: Sequence[str]) -> dict[str, float]:
        model = trained([tasks[name] for name in names], suite, seed)
        found = {}
        for name in names:
            test = tasks[name].splits["test"][:TEST_ROWS]
            answers = model.predict([row.text for row in test], task=name)
            found[name] = main_score(tasks[name], test, [answer.target for answer in answers])
        return found

    alone = {name: scores([name])[name] for name in tasks}
    together = {frozenset(pair): scores(pair) for pair in combinations(tasks, 2)}
    return {
        (target, source): together[frozenset((target, source))][target] - alone[target]
        for target, source in permutations(tasks, 2)
    }


def main_score(data: TaskData, rows: Sequence[Example], answers: Sequence[Any]) -> float:
    """The first metric of a task."""
    return score(data.task, [row.target for row in rows], answers)[data.task.main_metric]


def measure(folder: Path, suite: Suite, seed: int) -> list[dict[str, Any]]:
    """The gains of all pairs of a suite, and what the predictors say."""
    kind = MEASURES[suite]
    tasks = {data.task.name: data for data in load(folder, suite, ROWS, seed) if data.task.name in TASKS[suite]}
    model = trained(list(tasks.values()), suite, seed)
    prototypes = dict(zip(tasks, model.pha.prototypes.weight.detach(), strict=True))
    rows = {name: rows_of(data, sentence_vectors(model, data.splits["train"])) for name, data in tasks.items()}
    heads = {name: fit_related_heads([of_task])[0] for name, of_task in rows.items()}
    gains = gains_of_heads(tasks, rows, model) if kind == "heads" else gains_of_adapters(tasks, suite, seed)
    found = []
    for (target, source), gain in gains.items():
        predicted = {
            "prototypes": float(cosine_similarity(prototypes[target], prototypes[source], dim=0)),
            "texts": float(cosine_similarity(*(rows[name].inputs.mean(dim=0) for name in (target, source)), dim=0)),
            "heads": similarity_of_heads(heads[target], heads[source], kind == "heads"),
        }
        if kind == "heads":
            predicted["left out"] = left_out_gain(rows[target], rows[source], seed)
        cell = {"suite": suite, "measure": kind, "n": ROWS, "seed": seed, "target": target, "source": source}
        found.append({**cell, "gain": gain, "predicted": predicted})
    return found


def correlation(values: Mapping[Pair, tuple[float, float]]) -> tuple[float, float, float, float]:
    """The rank correlation of predicted and measured gains, its interval, and the mean of those within a target."""
    names = sorted({name for pair in values for name in pair})
    generator, drawn = random.Random(0), []
    for _ in range(DRAWS):
        sample = generator.choices(names, k=len(names))
        pairs = [values[target, source] for target, source in permutations(sample, 2) if target != source]
        drawn.append(_rank_correlation(pairs))
    within = [_rank_correlation([values[name, other] for other in names if other != name]) for name in names]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return _rank_correlation(list(values.values())), float(low), float(high), float(np.nanmean(within))


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's rank correlation, or nan if all values of one kind are equal."""
    first, second = np.array(pairs).T if pairs else np.zeros((2, 1))
    if len(set(first)) < 2 or len(set(second)) < 2:
        return float("nan")
    return float(spearmanr(first, second).statistic)


def print_tables() -> None:
    """Print the table of docs/decisions.md, with means of gains and predictions over the seeds."""
    rows = read(RESULTS)
    print("| tasks | mean gain | between seeds | predictor | rank correlation | interval | within a target |")
    print("|---" * 7 + "|")
    for suite in dict.fromkeys(row["suite"] for row in rows):
        cell = [row for row in rows if row["suite"] == suite]
        mean = 100 * np.mean([row["gain"] for row in cell])
        for predictor in [name for name in PREDICTORS if name in cell[0]["predicted"]]:
            by_pair: dict[Pair, list[tuple[float, float]]] = {}
            for row in cell:
                value = row["predicted"][predictor], row["gain"]
                by_pair.setdefault((row["target"], row["source"]), []).append(value)
            means = {pair: tuple(np.mean(found, axis=0)) for pair, found in by_pair.items()}
            found, low, high, within = correlation(means)  # type: ignore[arg-type]
            shown = f"{found:.2f} | {low:.2f} to {high:.2f} | {within:.2f}"
            print(f"| {suite} | {mean:.1f} | {_reliability(cell):.2f} | {predictor} | {shown} |")


def _reliability(rows: Sequence[dict[str, Any]]) -> float:
    """The mean rank correlation of the gains between two seeds, which limits what can be predicted."""
    seeds = sorted({row["seed"] for row in rows})
    gains = {seed: [row["gain"] for row in rows if row["seed"] == seed] for seed in seeds}
    pairs = combinations(seeds, 2)
    found = [_rank_correlation(list(zip(gains[a], gains[b], strict=True))) for a, b in pairs]
    return float(np.mean(found)) if found else float("nan")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--suites", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tables", action="store_true", help="print the table from the results")
    options = parser.parse_args()
    if options.tables:
        print_tables()
        return
    facts = {"version": __version__, "code": code_digest(), "backbone": DEFAULT_BACKBONE}
    for suite in options.suites:
        for seed in options.seeds:
            found = measure(options.data, suite, seed)
            with RESULTS.open("a") as file:
                file.writelines(json.dumps({**row, **facts}) + "\n" for row in found)
            print(suite, seed, flush=True)


if __name__ == "__main__":
    main()
