"""New tasks from a few examples, against LoRA and a logistic regression that get the same examples.

    python benchmarks/transfer.py RUN    # a run of recipes/local-transfer-plus.yaml
    python benchmarks/transfer.py RUN --catalogue super_glue/cb pairs/scitail    # a run of recipes/paper/transfer.yaml
    python benchmarks/transfer.py --suite fdu --methods probe_texts lora_texts pha plus

The first adds four held-out tasks to the run with k examples a label, for each seed, and scores them on (500 rows of)
their test files. It appends one JSON object a cell to benchmarks/results/transfer.jsonl. The logistic regression reads
the frozen backbone's features of a row ("probe"), or what the heads of `plus` read of it ("probe_texts"). LoRA is
PEFT's, in the layers above the third, at the rate that the sample-efficiency benchmark chose. With --catalogue, tasks
of the catalogue are added instead, without LoRA, and on backbones that generate text without a regression.

The last holds every fourth task of a suite out and trains the models on the others, as the arms of the
sample-efficiency benchmark at their first learning rates. Its rows are in suite_transfer.jsonl. The logistic regression
reads frozen features of the texts ("probe_names": with the names of labels as examples), and LoRA has the heads of
`plus`.

Cells already there are skipped. Needs peft.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from efficiency.arms import ARMS
from efficiency.data import MAX_LENGTHS, SUITES, read_size
from efficiency.experiment import Setting
from efficiency.few_shot import BASELINES, lora
from efficiency.suite_transfer import DRAWS, TransferRunner
from efficiency.training_loop import BUDGETS

from hyperadapters import HyperAdapterModel, Task, __version__
from hyperadapters.config import DataConfig, TaskEntry, parse
from hyperadapters.data.examples import Example, read_fields, read_target
from hyperadapters.data.loading import load_task, subset
from hyperadapters.data.sources import read_file
from hyperadapters.heads.regression import few_shot_probe
from hyperadapters.inference.predictor import Predictor
from hyperadapters.training.metrics import score
from hyperadapters.training.probes import frozen_features

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "transfer.jsonl"
CATALOGUE_RESULTS = HERE / "results" / "transfer_catalogue.jsonl"
SUITE_RESULTS = HERE / "results" / "suite_transfer.jsonl"
HELD_OUT = {
    "cb": {"fields": ["text", "text_pair"]},
    "scitail": {"fields": ["text", "text_pair"]},
    "rte": {"fields": ["text", "text_pair"]},
    "subj": {"fields": ["text"]},
}
SHOTS = (4, 16, 32)
SEEDS = (0, 1, 2, 3, 4)


def load(name: str, folder: Path) -> tuple[Task, dict[str, list[Example]]]:
    """A held-out task with its labels, and its examples by split."""
    rows = {split: read_file(folder / name / f"{split}.jsonl") for split in ("train", "test")}
    labels = sorted({row.values["label"] for row in rows["train"]})
    task = Task.classification(name, labels, **HELD_OUT[name])
    return task, {
        split: [Example(None, *read_fields(row, task), read_target(row, task)) for row in found]
        for split, found in rows.items()
    }


def load_from_catalogue(name: str, generates: bool) -> tuple[Task, dict[str, list[Example]]]:
    """A task of the catalogue and its examples by split; its texts are only for backbones that generate text."""
    texts = {} if generates else {"template": None, "verbalizer": None, "step": None}
    data = load_task(parse(TaskEntry, {"catalogue": name, **texts}), 0, DataConfig(), seed=0)
    rows = {split: [Example(None, *row[1:]) for row in map(astuple, found)] for split, found in data.splits.items()}
    return data.task, rows  # type: ignore[return-value]


@torch.no_grad()
def text_features(model: HyperAdapterModel, examples: list[Example]) -> np.ndarray[Any, Any]:
    """What the heads of `plus` read of examples besides the adapted hidden states [N, F]."""
    inputs = model.collator.inputs(examples)
    return model.head_features(inputs, torch.empty(0), [example.text_pair is not None for example in examples]).numpy()


def cell(
    model: HyperAdapterModel,
    setting: Setting | None,
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
        assert setting is not None
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
        "score": score(task, targets, answers)[task.main_metric],
        **report,
        "threads": torch.get_num_threads(),
        "version": __version__,
    }


def transfer_to_new(run: Path, folder: Path, names: list[str] | None, output: Path, test_rows: int) -> None:
    """Add the four held-out tasks, or tasks of the catalogue, to a run."""
    done = set()
    if output.is_file():
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        done = {(row["task"], row["k"], row["seed"], row["method"]) for row in rows}
    model = HyperAdapterModel.from_pretrained(run).eval()
    setting = None if names else Setting(folder)
    new = [load_from_catalogue(name, model.text_to_text) for name in names or ()]
    new = new or [load(name, folder) for name in HELD_OUT]
    reads_texts = model.adapter_config.head_inputs != "adapted"
    known = [task.name for task in model.tasks]
    assert not set(known) & {task.name for task, _ in new}, f"the run was trained on held-out tasks: {known}"
    for task, splits in new:
        splits["test"] = splits["test"][:test_rows]
        features = {}
        if not model.text_to_text:
            features["probe"] = (frozen_features, frozen_features(model, splits["test"]))
        if reads_texts:
            features["probe_texts"] = (text_features, text_features(model, splits["test"]))
        baselines = (*features, *(() if setting is None else ("lora",)))
        for k in SHOTS:
            for seed in SEEDS:
                for method in (*baselines, "none", "head" if reads_texts else "adapter"):
                    if (task.name, k, seed, method) in done:
                        continue
                    row = cell(model, setting, task, splits, features, method, k, seed)
                    with output.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(row["task"], k, seed, method, f"{row['score']:.3f}", f"{row['seconds']:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("run", type=Path, nargs="?", help="to which the four held-out tasks are added")
    parser.add_argument("--catalogue", nargs="+", metavar="NAME", help="tasks of the catalogue to add instead")
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS.name}, or {SUITE_RESULTS.name} with --suite")
    parser.add_argument("--test-rows", type=int, default=500, help="at most, the first of the test file")
    suite = parser.add_argument_group("transfer inside a suite")
    suite.add_argument("--suite", choices=SUITES)
    suite.add_argument(
        "--methods", nargs="+", choices=[*BASELINES, *ARMS], metavar="METHOD", default=["probe_texts", "lora_texts"]
    )
    suite.add_argument("--size", type=read_size, choices=list(BUDGETS), default=100, help="rows a task to train on")
    suite.add_argument("--training-seed", type=int, default=3)
    suite.add_argument("--fit", choices=("none", "head", "adapter"), default="head", help="of add_task")
    suite.add_argument("--shots", nargs="+", type=int, default=SHOTS)
    suite.add_argument("--draws", nargs="+", type=int, default=DRAWS, help="seeds of the examples")
    suite.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    suite.add_argument(
        "--steps", type=int, help="steps of twelve tasks, to see that a method runs; needs an --output of its own"
    )
    arguments = parser.parse_args()
    if (arguments.run is None) == (arguments.suite is None):
        parser.error("give either a RUN or --suite")
    if arguments.run is not None:
        results = arguments.output or (CATALOGUE_RESULTS if arguments.catalogue else RESULTS)
        transfer_to_new(arguments.run, arguments.data, arguments.catalogue, results, arguments.test_rows)
        return
    output = arguments.output or SUITE_RESULTS
    if arguments.steps and output == SUITE_RESULTS:
        parser.error("rows made with --steps are no results; choose another --output")
    setting = Setting(
        arguments.data,
        arguments.suite,
        device=arguments.device,
        budgets={n: replace(budget, steps=arguments.steps or budget.steps) for n, budget in BUDGETS.items()},
        max_length=MAX_LENGTHS[arguments.suite],
    )
    runner = TransferRunner(
        setting, output, arguments.size, arguments.training_seed, arguments.fit, arguments.test_rows
    )
    runner.run(arguments.methods, arguments.shots, arguments.draws)


if __name__ == "__main__":
    main()
