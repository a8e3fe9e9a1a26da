"""Where inputs go when nobody names their task, and whether those of an unknown task are declined.

    python benchmarks/routing.py RUN [RUN ...]    # runs of recipes/local-transfer.yaml, or this recipe itself

For each run: the share of test rows routed to their own task, the confusion matrix, and how well similarity tells the
rows of known tasks from those of held-out ones (area under the ROC curve). Appends one JSON object a run and way of
recognising tasks to benchmarks/results/routing.jsonl. For a recipe, the preset is "plus" and nothing is trained,
because densities do not depend on the training.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from transfer import HELD_OUT, load

from hyperadapters import HyperAdapterModel, Task, __version__
from hyperadapters.backbones.loading import load_backbone
from hyperadapters.config import RECIPE_FILE, load_recipe
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.data.loading import load_tasks
from hyperadapters.inference.predictor import Predictor
from hyperadapters.inference.routing import (
    ROWS_FOR_CENTROIDS,
    calibrate,
    centroids,
    instance_vectors,
    similarities,
    thresholds,
)
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


def measure(
    names: list[str],
    similarity: torch.Tensor,
    owners: np.ndarray[Any, Any],
    limits: torch.Tensor,
    held_out: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """All figures of one way of recognising tasks, from the similarities of known and held-out rows to the tasks."""
    found = similarity.argmax(dim=1).numpy()
    matrix = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(matrix, (owners, found), 1)
    auroc, declined = {}, {}
    # The larger the excess over the threshold of the most similar task, the surer that an input belongs to it.
    excess = similarity.amax(dim=1) - limits[similarity.argmax(dim=1)]
    for name, unknown in held_out.items():
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


def by_prototypes(
    model: HyperAdapterModel,
    train: list[Example],
    validation: list[Example],
    rows: list[Example],
    held_out: dict[str, list[Example]],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures of prototypes and of centroids, which are set in turn."""
    names, prototypes = [task.name for task in model.tasks], model.pha.prototypes
    instances, owners = instance_vectors(model, train), owners_of(train)
    checked, measured = instance_vectors(model, validation), instance_vectors(model, rows)
    unknown = {name: instance_vectors(model, examples) for name, examples in held_out.items()}
    for keys in ("prototype", "1 centroid", "4 centroids"):
        count = 0 if keys == "prototype" else int(keys[0])
        points = [centroids(instances[owners == task_id], count) for task_id in range(len(names))]
        prototypes.centroids = torch.stack(points) if count else torch.zeros(len(names), 0, prototypes.weight.shape[1])
        limits = thresholds(prototypes.similarity(checked), owners_of(validation), 0.05)
        similarities = {name: prototypes.similarity(vectors) for name, vectors in unknown.items()}
        yield keys, measure(names, prototypes.similarity(measured), owners_of(rows).numpy(), limits, similarities)


def by_densities(
    model: HyperAdapterModel, rows: list[Example], held_out: dict[str, list[Example]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures of the densities of a calibrated model."""
    names = [task.name for task in model.tasks]
    unknown = {name: similarities(model, examples)[0] for name, examples in held_out.items()}
    known = similarities(model, rows)[0]
    yield "density", measure(names, known, owners_of(rows).numpy(), model.pha.thresholds, unknown)


def owners_of(examples: list[Example]) -> torch.Tensor:
    """The task ids of examples."""
    return torch.tensor([example.task_id for example in examples])


def by_label(name: str, task: Task, examples: list[Example]) -> dict[str, list[Example]]:
    """The rows of a held-out task, and those of each of its labels, some of which may be of a known source."""
    labels = {f"{name}: {label}": index for index, label in enumerate(task.labels)}
    return {name: examples, **{key: [e for e in examples if e.target == index] for key, index in labels.items()}}


def load_model(run: Path) -> tuple[HyperAdapterModel, list[TaskData]]:
    """The model and the data of a run, or of a recipe without training: densities do not depend on it."""
    if run.is_dir():
        model = HyperAdapterModel.from_pretrained(run)
        return model, load_run_tasks(model, load_recipe(run / RECIPE_FILE))
    recipe = load_recipe(run)
    tasks = load_tasks(recipe.tasks, recipe.data, recipe.seed)
    settings = recipe.model.model_copy(update={"preset": "plus", "routing": "densities"})
    model = HyperAdapterModel(
        load_backbone(recipe.backbone, recipe.model.modules, recipe.backbone_dtype),
        [data.task for data in tasks],
        settings,
        backbone_name=recipe.backbone,
        lengths=recipe.data.lengths,
    ).eval()
    calibrate(model, examples_of(tasks, "train"), examples_of(tasks, "validation"), seed=recipe.seed)
    return model, tasks


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
    """Measure runs, print the figures and append them to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--rows", choices=("validation", "test"), default="test")
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for run in arguments.runs:
        model, tasks = load_model(run)
        rows = examples_of(tasks, arguments.rows)
        held_out: dict[str, list[Example]] = {}
        for name in HELD_OUT:
            task, splits = load(name, arguments.data)
            held_out |= by_label(name, task, splits["test" if arguments.rows == "test" else "train"])
        generator = torch.Generator().manual_seed(0)
        timed = [rows[i] for i in torch.randperm(len(rows), generator=generator)[:256].tolist()]
        times = {"told_ms": milliseconds(model, timed, True), "routed_ms": milliseconds(model, timed, False)}
        if model.pha.routes_by_densities:
            ways = by_densities(model, rows, held_out)
        else:
            train = [example for data in tasks for example in data.splits["train"][:ROWS_FOR_CENTROIDS]]
            ways = by_prototypes(model, train, examples_of(tasks, "validation"), rows, held_out)
        for way, figures in ways:
            row = {
                "run": run.stem,
                "rows": arguments.rows,
                "features": model.adapter_config.features,
                "feature_layer": model.adapter_config.feature_layer,
                "recognised_by": way,
                **figures,
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
