"""New tasks from a few examples, against LoRA and a logistic regression that get the same examples.

    python benchmarks/transfer.py RUN    # a run of recipes/local-transfer-plus.yaml

Adds each held-out task to the run with k examples a label, for each seed, and scores it on (500 rows of) its test file.
Appends one JSON object a cell to benchmarks/results/transfer.jsonl; cells already there are skipped. Needs peft.

The logistic regression reads the frozen backbone's features of a row ("probe"), or what the heads of `plus` read of it
("probe_texts"). LoRA is PEFT's, in the layers above the third, at the rate that the sample-efficiency benchmark chose.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from efficiency import finetuning_baselines
from efficiency.baseline_networks import Network
from efficiency.experiment import Setting
from efficiency.training_loop import Budget, fit

from hyperadapters import HyperAdapterModel, Task, __version__
from hyperadapters.config import DataConfig
from hyperadapters.data.examples import Example, TaskData, read_fields, read_target
from hyperadapters.data.loading import subset
from hyperadapters.data.sources import read_file
from hyperadapters.heads.regression import few_shot_probe
from hyperadapters.inference.predictor import Predictor
from hyperadapters.training.metrics import score
from hyperadapters.training.probes import frozen_features

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "transfer.jsonl"
HELD_OUT = {
    "cb": {"fields": ["text", "text_pair"]},
    "scitail": {"fields": ["text", "text_pair"]},
    "rte": {"fields": ["text", "text_pair"]},
    "subj": {"fields": ["text"]},
}
SHOTS = (4, 16, 32)
SEEDS = (0, 1, 2, 3, 4)
FITS = ("none", "adapter")
LORA_BUDGET = Budget(steps=80, evaluations=1)
"""As many steps of 8 rows as a task has by itself with 100 rows in the sample-efficiency benchmark; the last state."""
LORA_RATE = 3e-3


def load(name: str, folder: Path) -> tuple[Task, dict[str, list[Example]]]:
    """A held-out task with its labels, and its examples by split."""
    rows = {split: read_file(folder / name / f"{split}.jsonl") for split in ("train", "test")}
    labels = sorted({row.values["label"] for row in rows["train"]})
    task = Task.classification(name, labels, **HELD_OUT[name])
    return task, {
        split: [Example(None, *read_fields(row, task), read_target(row, task)) for row in found]
        for split, found in rows.items()
    }


def lora(setting: Setting, task: Task, few: list[Example], inputs: list[Example], seed: int) -> list[int | float]:
    """Answers to inputs by PEFT's LoRA, trained on a few examples."""
    few, inputs = ([replace(example, task_id=0) for example in rows] for rows in (few, inputs))
    torch.manual_seed(seed)
    network = Network(finetuning_baselines.lora(setting, 1), (TaskData(task, {"train": few}),), setting.hidden_size)
    lengths, budget = setting.texts.lengths(few), LORA_BUDGET
    fit(network, few, few, lengths, budget, budget.steps, budget.task_batch_size, LORA_RATE, seed)
    return network.answers(inputs)


@torch.no_grad()
def text_features(model: HyperAdapterModel, examples: list[Example]) -> np.ndarray[Any, Any]:
    """What the heads of `plus` read of examples besides the adapted hidden states [N, F]."""
    inputs = model.collator.inputs(examples)
    return model.head_features(inputs, torch.empty(0), [example.text_pair is not None for example in examples]).numpy()


def cell(
    model: HyperAdapterModel,
    setting: Setting,
    task: Task,
    splits: dict[str, list[Example]],
    features: dict[str, Any],
    method: str,
    k: int,
    seed: int,
) -> dict[str, Any]:
    """Score one method on the k examples a label that the seed draws; `features` makes those of the probes."""
    few = subset(splits["train"], task, DataConfig(k_per_label=k), seed)
    targets = [example.target for example in splits["test"]]
    started = time.monotonic()
    answers: list[Any]
    if method in features:
        labels = [int(example.target) for example in few]  # type: ignore[arg-type]
        make, known = features[method]
        answers = few_shot_probe(make(model, few), labels, known)
        report: dict[str, Any] = {"seconds": time.monotonic() - started}
    elif method == "lora":
        answers = list(lora(setting, task, few, splits["test"], seed))
        report = {"seconds": time.monotonic() - started}
    else:
        fitted = model.add_task(task, few, fit=method, seed=seed)
        inputs = [Example(None, example.text, example.text_pair) for example in splits["test"]]
        answers = [prediction.target for prediction in Predictor(model)(inputs, task=task.name)]
        model.remove_task(task.name)
        report = {
            "seconds": fitted.seconds,
            "steps": fitted.steps,
            "stopping": fitted.stopping,
            "nearest": fitted.neighbours[0].task,
            "similarity": fitted.neighbours[0].similarity,
        }
    return {
        "task": task.name,
        "k": k,
        "seed": seed,
        "method": method,
        "preset": model.adapter_config.preset,
        "examples": len(few),
        "test_rows": len(targets),
        "score": score(task, targets, answers)["accuracy"],
        **report,
        "threads": torch.get_num_threads(),
        "version": __version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--test-rows", type=int, default=500, help="at most, the first of the test file")
    arguments = parser.parse_args()
    done = set()
    if arguments.output.is_file():
        rows = [json.loads(line) for line in arguments.output.read_text().splitlines()]
        done = {(row["task"], row["k"], row["seed"], row["method"]) for row in rows}
    model = HyperAdapterModel.from_pretrained(arguments.run).eval()
    setting = Setting(arguments.data)
    known = [task.name for task in model.tasks]
    assert not set(known) & set(HELD_OUT), f"the run was trained on held-out tasks: {known}"
    for name in HELD_OUT:
        task, splits = load(name, arguments.data)
        splits["test"] = splits["test"][: arguments.test_rows]
        features = {"probe": (frozen_features, frozen_features(model, splits["test"]))}
        if model.adapter_config.head_inputs != "adapted":
            features["probe_texts"] = (text_features, text_features(model, splits["test"]))
        for k in SHOTS:
            for seed in SEEDS:
                for method in (*features, "lora", *FITS):
                    if (name, k, seed, method) in done:
                        continue
                    row = cell(model, setting, task, splits, features, method, k, seed)
                    with arguments.output.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(row["task"], k, seed, method, f"{row['score']:.3f}", f"{row['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    main()
