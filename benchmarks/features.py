"""Which hidden states to route by: those of a layer m, in one pass, or those of the whole frozen pass, in two.

    python benchmarks/features.py

For each layer a retriever and prototypes are trained with the contrastive losses alone, on the pooled hidden states of
the frozen backbone, and measured as in benchmarks/routing.py; then both kinds of pass are timed on the same batch, in
turn. Writes benchmarks/results/features.jsonl, a row a layer.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from routing import accuracies
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transfer import HELD_OUT, load

from hyperadapters import HyperAdapterModel, __version__, load_recipe
from hyperadapters.backbones.passes import backbone_inputs
from hyperadapters.core import (
    InstanceRetriever,
    PrototypeTable,
    cosine_similarity,
    instance_contrastive_loss,
    masked_mean,
    prototype_contrastive_loss,
)
from hyperadapters.data.examples import Example
from hyperadapters.data.loading import load_tasks
from hyperadapters.inference.batches import batches_by_length
from hyperadapters.inference.routing import centroids

HERE = Path(__file__).parent
ROWS = {"train": 600, "test": 200}
STEPS, BATCH, SEEDS = 1500, 128, (0, 1, 2)


def pooled_layers(model: HyperAdapterModel, examples: list[Example]) -> Tensor:
    """Pooled hidden states of the bare backbone [N, layers + 1, d], the embeddings first."""
    found: dict[int, Tensor] = {}
    for rows in batches_by_length(examples, 64):
        batch = model.collator.inputs([Example(None, examples[row].text, examples[row].text_pair) for row in rows])
        with torch.inference_mode(), model.adapters_disabled():
            states = model.backbone(**backbone_inputs(batch), output_hidden_states=True).hidden_states
        pooled = torch.stack([masked_mean(hidden, batch["attention_mask"]) for hidden in states], dim=1)
        found.update(zip(rows, pooled, strict=True))
    return torch.stack([found[row] for row in range(len(examples))]).clone()


def fit_retriever(features: Tensor, owners: Tensor, num_tasks: int, seed: int) -> InstanceRetriever:
    """A retriever trained with both contrastive losses on features [N, d]."""
    torch.manual_seed(seed)
    retriever, prototypes = InstanceRetriever(features.shape[1]), PrototypeTable(num_tasks)
    optimizer = torch.optim.AdamW([*retriever.parameters(), prototypes.weight], lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(features), (BATCH,))
        instances = retriever(features[rows])
        loss = instance_contrastive_loss(instances, owners[rows])
        loss = loss + prototype_contrastive_loss(instances, prototypes.weight, owners[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return retriever


def milliseconds(models: dict[str, HyperAdapterModel], examples: list[Example]) -> dict[str, float]:
    """Median time of a routed batch of 32 rows, the models taking turns."""
    batch = next(iter(models.values())).collator.inputs(examples[:32])
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(12):
        for name, model in models.items():
            started = time.perf_counter()
            with torch.inference_mode():
                model(**batch)
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: float(np.median(values[2:])) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--recipe", type=Path, default=HERE.parent / "recipes" / "local-glue.yaml")
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "features.jsonl")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    settings = recipe.data.model_copy(update={"n_train": ROWS["train"], "n_validation": 1})
    data = load_tasks(recipe.tasks, settings, recipe.seed)
    tasks = [found.task for found in data]
    known = {task.name for task in tasks}
    sizes = {"adapter_dim": recipe.model.adapter_dim, "feature_layer": recipe.model.feature_layer}
    models = {
        kind: HyperAdapterModel.from_backbone(recipe.backbone, tasks, "paper", features=kind, **sizes).eval()
        for kind in ("layer", "backbone")
    }
    examples = {split: [e for found in data for e in found.splits[split][:count]] for split, count in ROWS.items()}
    held_out = {name: load(name, arguments.data)[1]["test"][: ROWS["test"]] for name in HELD_OUT if name not in known}
    bare = models["layer"]
    features: dict[str, Any] = {split: pooled_layers(bare, rows) for split, rows in examples.items()}
    unknown = {name: pooled_layers(bare, rows) for name, rows in held_out.items()}
    owners = {split: torch.tensor([e.task_id for e in rows]) for split, rows in examples.items()}
    times = milliseconds(models, [Example(None, e.text, e.text_pair) for e in examples["test"][:: len(tasks) + 1]])
    last = features["train"].shape[1] - 1
    with arguments.output.open("w") as file:
        for layer in range(last + 1):
            for seed in SEEDS:
                retriever = fit_retriever(features["train"][:, layer], owners["train"], len(tasks), seed)
                with torch.no_grad():
                    own = retriever(features["train"][:, layer])
                    keys = torch.cat([centroids(own[owners["train"] == task], 1) for task in range(len(tasks))])
                    similarity = cosine_similarity(retriever(features["test"][:, layer]), keys)
                    others = {
                        name: cosine_similarity(retriever(found[:, layer]), keys) for name, found in unknown.items()
                    }
                found = similarity.argmax(dim=1).numpy()
                nearest = similarity.amax(dim=1)
                row = {
                    "layer": layer,
                    "passes": 2 if layer == last else 1,
                    "seed": seed,
                    **accuracies([task.name for task in tasks], owners["test"].numpy(), found),
                    "auroc": {
                        name: float(
                            roc_auc_score([1] * len(nearest) + [0] * len(other), torch.cat([nearest, other.amax(1)]))
                        )
                        for name, other in others.items()
                    },
                    "one_pass_ms": times["layer"],
                    "two_pass_ms": times["backbone"],
                    "threads": torch.get_num_threads(),
                    "version": __version__,
                }
                file.write(json.dumps(row) + "\n")
                print(layer, seed, f"{row['accuracy']:.4f}", row["auroc"], flush=True)


if __name__ == "__main__":
    main()
