"""Texts with several labels: topics of joined texts, beside a logistic regression for each label.

    python benchmarks/multi_label.py [--suites hwu64 fdu] [--seeds 0 1 2]

A text is one to three texts of different tasks of a family, joined by "and", and its labels are the names of these
tasks. A model of the preset "plus" with this one task is trained on 100 of them, with 50 validation rows, and scored on
500. The baseline is scikit-learn's `OneVsRestClassifier` with logistic regressions on the mean hidden states of the
frozen backbone, whose penalty is the one with the best score on the validation rows. Both are scored with thresholds of
one half and with those of `heads.thresholds.fit_thresholds`. Appends one JSON object for each suite and seed to
benchmarks/results/multi_label.jsonl; --tables prints the table of docs/tasks.md from this file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from efficiency.code_digest import code_digest
from efficiency.data import entries_of

from hyperadapters import HyperAdapterModel, Task, Trainer, TrainingArguments, __version__
from hyperadapters.config import DEFAULT_BACKBONE, SPLITS, DataConfig
from hyperadapters.data.examples import Example
from hyperadapters.data.loading import load_tasks
from hyperadapters.data.targets import multi_hot
from hyperadapters.heads.regression import STANDARDIZED_STRENGTHS, standardized_regression
from hyperadapters.heads.thresholds import fit_thresholds
from hyperadapters.training.metrics import score
from hyperadapters.training.probes import frozen_features

Array = np.ndarray[Any, Any]

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "multi_label.jsonl"
ROWS = {"train": 100, "validation": 50, "test": 500}
MAX_TEXTS, MAX_WORDS, STEPS = 3, 24, 250
MAX_LENGTH = 96
"""Maximum number of tokens; `MAX_TEXTS` times `MAX_WORDS` words fit."""
METRICS = ("micro_f1", "macro_f1", "subset_accuracy")


def joined(folder: Path, suite: Any, seed: int) -> tuple[Task, dict[str, list[Example]]]:
    """The task, and the rows of its splits. No text is in two splits."""
    tasks = load_tasks(entries_of(folder, suite), DataConfig(), seed=0)
    task = Task.multi_label("topics", sorted(data.task.name for data in tasks), metrics=METRICS)
    rows = {}
    for split in SPLITS:
        generator = random.Random(f"{seed}/{split}")
        texts = {data.task.name: [row.text for row in data.splits[split]] for data in tasks}
        rows[split] = [_row(task, texts, generator) for _ in range(ROWS[split])]
    return task, rows


def _row(task: Task, texts: dict[str, list[str]], generator: random.Random) -> Example:
    topics = generator.sample(task.labels, generator.randint(1, MAX_TEXTS))
    parts = [" ".join(generator.choice(texts[topic]).split()[:MAX_WORDS]) for topic in topics]
    return Example(0, " and ".join(parts), None, tuple(sorted(map(task.labels.index, topics))))


def scores(task: Task, rows: list[Example], probabilities: Array, thresholds: Array) -> dict[str, float]:
    """Metrics of the labels whose probability exceeds their threshold."""
    answers = [tuple(np.flatnonzero(row > thresholds).tolist()) for row in probabilities]
    return score(task, [row.target for row in rows], answers)


def both(task: Task, rows: dict[str, list[Example]], validation: Array, test: Array) -> dict[str, dict[str, float]]:
    """Metrics with thresholds of one half, and with those that are fitted to the validation rows."""
    fitted = fit_thresholds(task, torch.from_numpy(validation), torch.tensor(sets(task, rows["validation"]))).numpy()
    half = np.full(len(task.labels), 0.5)
    return {name: scores(task, rows["test"], test, limits) for name, limits in (("half", half), ("fitted", fitted))}


def sets(task: Task, rows: list[Example]) -> Array:
    """Labels of the rows as zeros and ones [N, C]."""
    return np.array([multi_hot(row.target, len(task.labels)) for row in rows])  # type: ignore[arg-type]


def probe(model: HyperAdapterModel, task: Task, rows: dict[str, list[Example]]) -> dict[str, dict[str, float]]:
    """Metrics of logistic regressions on frozen features."""
    features = {split: frozen_features(model, found) for split, found in rows.items()}

    def probabilities(strength: float) -> dict[str, Array]:
        fitted = standardized_regression(features["train"], sets(task, rows["train"]), strength, False)
        return {split: fitted.predict_proba(features[split]) for split in ("validation", "test")}

    half = np.full(len(task.labels), 0.5)
    found = [probabilities(strength) for strength in STANDARDIZED_STRENGTHS]
    best = max(found, key=lambda one: scores(task, rows["validation"], one["validation"], half)["micro_f1"])
    return both(task, rows, best["validation"], best["test"])


def measure(folder: Path, suite: str, seed: int) -> dict[str, Any]:
    """Train and score one model and the baseline."""
    task, rows = joined(folder, suite, seed)
    torch.manual_seed(seed)
    model = HyperAdapterModel.from_backbone(DEFAULT_BACKBONE, [task], max_length=MAX_LENGTH)
    baseline = probe(model, task, rows)
    args = TrainingArguments(max_steps=STEPS, seed=seed, disable_tqdm=True, logging_strategy="no")
    data = {split: {task.name: rows[split]} for split in ("train", "validation")}
    Trainer(model, data["train"], data["validation"], args).train()
    of = {split: model.predict_proba([row.text for row in rows[split]], task.name) for split in rows}
    found = both(task, rows, of["validation"], of["test"])
    answers = model.predict([row.text for row in rows["test"]], task=task.name)
    predicted = score(task, [row.target for row in rows["test"]], [one.target for one in answers])
    return {
        "version": __version__,
        "code": code_digest(),
        "suite": suite,
        "seed": seed,
        "labels": len(task.labels),
        "logistic regression": baseline,
        "plus": {**found, "predict": predicted},
    }


def print_tables() -> None:
    """Print the table of docs/tasks.md: means and standard deviations over seeds, in per cent."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    print("| texts | thresholds | metric | logistic regression | `plus` |\n|---|---|---|---|---|")
    for suite in dict.fromkeys(line["suite"] for line in lines):
        of_suite = [line for line in lines if line["suite"] == suite]
        for limits in ("half", "fitted"):
            for metric in METRICS:
                cells = [[line[arm][limits][metric] for line in of_suite] for arm in ("logistic regression", "plus")]
                shown = [f"{100 * np.mean(cell):.1f} ± {100 * np.std(cell):.1f}" for cell in cells]
                print(f"| {suite} | {limits} | {metric} | {' | '.join(shown)} |")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--suites", nargs="+", default=["hwu64", "fdu"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tables", action="store_true", help="print the table from the results")
    options = parser.parse_args()
    if options.tables:
        print_tables()
        return
    for suite in options.suites:
        for seed in options.seeds:
            found = measure(options.data, suite, seed)
            with RESULTS.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found))


if __name__ == "__main__":
    main()
