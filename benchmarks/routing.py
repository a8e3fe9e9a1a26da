"""Where inputs go when nobody names their task, and whether those of an unknown task are declined.

    python benchmarks/routing.py RUN [RUN ...]    # runs of recipes/local-transfer.yaml

For each run: the share of test rows routed to their own task, the confusion matrix, and how well similarity tells the
rows of known tasks from those of held-out ones (area under the ROC curve). Appends one JSON object a run and way of
recognising tasks to benchmarks/results/routing.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from transfer import HELD_OUT, load

from hyperadapters import HyperAdapterModel, __version__
from hyperadapters.config import RECIPE_FILE, load_recipe
from hyperadapters.inference.predictor import Predictor
from hyperadapters.inference.routing import ROWS_FOR_CENTROIDS, centroids, instance_vectors, thresholds
from hyperadapters.training.run import examples_of, load_run_tasks

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "routing.jsonl"
# Tasks of which the data's own description says that they draw from the same texts.
SHARED_SOURCES = ({"stsb", "mrpc"}, {"stsb", "snli", "sick"}, {"sst2", "subj"})
NLI = {"mnli", "snli", "sick", "rte", "cb", "scitail"}


def accuracies(names: list[str], owners: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> dict[str, float]:
    """Share of rows at their own task; the others also count what goes to another task of the same style or source."""
    right = owners == found
    nli = np.array([name in NLI for name in names])
    within_nli = nli[owners] & nli[found]
    shared = np.zeros_like(right)
    for group in SHARED_SOURCES:
        member = np.array([name in group for name in names])
        shared |= member[owners] & member[found]
    return {
        "accuracy": float(right.mean()),
        "accuracy_but_nli": float((right | within_nli).mean()),
        "accuracy_but_nli_and_shared_sources": float((right | within_nli | shared).mean()),
        "nli_confusions": int((within_nli & ~right).sum()),
    }


def measure(model: HyperAdapterModel, known: dict[str, Any], held_out: dict[str, torch.Tensor]) -> dict[str, Any]:
    """All figures of a model whose keys are set."""
    names = [task.name for task in model.tasks]
    similarity = model.method.prototypes.similarity(known["instances"])
    owners, found = known["owners"].numpy(), similarity.argmax(dim=1).numpy()
    matrix = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(matrix, (owners, found), 1)
    limits = thresholds(model.method.prototypes.similarity(known["validation"]), known["validation_owners"], 0.05)
    auroc, declined = {}, {}
    # The larger the excess over the threshold of the most similar task, the surer that an input belongs to it.
    excess = similarity.amax(dim=1) - limits[similarity.argmax(dim=1)]
    for name, instances in held_out.items():
        unknown = model.method.prototypes.similarity(instances)
        unknown_excess = unknown.amax(dim=1) - limits[unknown.argmax(dim=1)]
        truth = [1] * len(excess) + [0] * len(unknown_excess)
        auroc[name] = {
            "similarity": float(roc_auc_score(truth, torch.cat([similarity.amax(1), unknown.amax(1)]).numpy())),
            "excess": float(roc_auc_score(truth, torch.cat([excess, unknown_excess]).numpy())),
        }
        declined[name] = float((unknown_excess < 0).float().mean())
    return {
        **accuracies(names, owners, found),
        "declined_known": float((excess < 0).float().mean()),
        "declined": declined,
        "auroc": auroc,
        "tasks": names,
        "confusion": matrix.tolist(),
    }


def milliseconds(model: HyperAdapterModel, examples: list[Any], told: bool) -> float:
    """Median time of answering 256 inputs, of three goes after one to warm up."""
    inputs = [{"text": e.text, "text_pair": e.text_pair} for e in examples]
    names = [model.tasks[e.task_id].name for e in examples]
    if told:
        inputs = [{**values, "task": name} for values, name in zip(inputs, names, strict=True)]
    predictor = Predictor(model, decline=False)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        list(predictor(inputs))
        times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for folder in arguments.runs:
        model, recipe = HyperAdapterModel.from_pretrained(folder), load_recipe(folder / RECIPE_FILE)
        tasks = load_run_tasks(model, recipe)
        train = [example for data in tasks for example in data.splits["train"][:ROWS_FOR_CENTROIDS]]
        validation, test = examples_of(tasks, "validation"), examples_of(tasks, "test")
        known = {
            "train": instance_vectors(model, train),
            "train_owners": torch.tensor([e.task_id for e in train]),
            "instances": instance_vectors(model, test),
            "owners": torch.tensor([e.task_id for e in test]),
            "validation": instance_vectors(model, validation),
            "validation_owners": torch.tensor([e.task_id for e in validation]),
        }
        held_out = {name: instance_vectors(model, load(name, arguments.data)[1]["test"]) for name in HELD_OUT}
        generator = torch.Generator().manual_seed(0)
        timed = [test[i] for i in torch.randperm(len(test), generator=generator)[:256].tolist()]
        times = {"told_ms": milliseconds(model, timed, True), "routed_ms": milliseconds(model, timed, False)}
        for keys in ("prototype", "1 centroid", "4 centroids"):
            count = 0 if keys == "prototype" else int(keys[0])
            points = [centroids(known["train"][known["train_owners"] == t], count) for t in range(len(model.tasks))]
            model.method.prototypes.centroids = (
                torch.stack(points) if count else torch.zeros(len(points), 1, model.method.prototypes.weight.shape[1])
            )
            row = {
                "run": folder.name,
                "features": model.adapter_config.features,
                "feature_layer": model.adapter_config.feature_layer,
                "recognised_by": keys,
                **measure(model, known, held_out),
                **times,
                "threads": torch.get_num_threads(),
                "version": __version__,
            }
            with arguments.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print({key: value for key, value in row.items() if key not in ("confusion", "tasks")}, flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
