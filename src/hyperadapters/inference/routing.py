"""Which task an input belongs to, and when it belongs to none.

Similarity is computed by `core.prototypes`; this module holds the policy: what is accepted, and how the thresholds for
that are chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn.functional import normalize

from hyperadapters.backbones.passes import evaluating
from hyperadapters.data.examples import Example
from hyperadapters.errors import DataError, NotFiniteError, TaskError, check_int, check_seed
from hyperadapters.inference.batches import batches_by_length, device_of, to_device
from hyperadapters.inference.finite import check_answers, likely_cause
from hyperadapters.inference.inputs import read_inputs
from hyperadapters.model.model import HyperAdapterModel

NUM_CANDIDATES = 3
ROUNDING = 1e-5
"""How much the similarity of one and the same input may differ with its batch."""
ROWS_FOR_CENTROIDS = 1000
"""Training rows of a task from which its centroids are made, at most; centroids are well known by then."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A task and how similar an input is to it (cosine, -1 to 1)."""

    task: str
    similarity: float


@dataclass(frozen=True, slots=True)
class RoutingResult:
    """Where an input belongs.

    Attributes:
        task: the most similar task, or None when the input is declined.
        similarity: to the most similar task (cosine, -1 to 1).
        margin: how much less similar the next task is; infinite when there is no other.
        accepted: whether the similarity reaches the task's threshold.
        candidates: the most similar tasks, up to three, most similar first.
    """

    task: str | None
    similarity: float
    margin: float
    accepted: bool
    candidates: tuple[Candidate, ...]


def route(model: HyperAdapterModel, texts: Iterable[Any], batch_size: int = 64) -> list[RoutingResult]:
    """Find the task of each text; the layers above the features are not run.

    Args:
        model: its thresholds decide what is declined.
        texts: strings, pairs of strings, mappings with `text` and `text_pair`, or examples.
        batch_size: rows of a batch.

    Raises:
        DataError: an input is none of these.
        TaskError: the model's method cannot route.
        NotFiniteError: the similarities of a text are not finite numbers.
    """
    model.method.check_can_route()
    check_int("batch_size", batch_size, 1)
    examples = list(read_inputs(texts, model.tasks, None))
    if not examples:
        return []
    found = decide(model, instance_vectors(model, examples, batch_size))
    usable = torch.tensor([isfinite(result.similarity) for result in found])
    check_answers(model, usable, examples, range(1, len(examples) + 1), "the similarity to the tasks")
    return found


def decide(model: HyperAdapterModel, instances: Tensor) -> list[RoutingResult]:
    """Apply the policy to instance vectors [B, p]."""
    similarity = model.pha.prototypes.similarity(instances)
    # Of equally similar tasks the first, as `PrototypeTable.nearest` has it; `topk` takes any.
    nearest = similarity.argmax(dim=1, keepdim=True)
    others = similarity.scatter(1, nearest, -torch.inf).topk(min(NUM_CANDIDATES, similarity.shape[1]) - 1, dim=1)
    ids = torch.cat([nearest, others.indices], dim=1)
    values = similarity.gather(1, ids)
    accepted = (values[:, 0] >= model.pha.thresholds[ids[:, 0]]).tolist()
    return [
        _result(model, row_values, row_ids, is_accepted)
        for row_values, row_ids, is_accepted in zip(values.tolist(), ids.tolist(), accepted, strict=True)
    ]


def _result(model: HyperAdapterModel, values: list[float], ids: list[int], accepted: bool) -> RoutingResult:
    candidates = tuple(Candidate(model.tasks[i].name, value) for i, value in zip(ids, values, strict=True))
    return RoutingResult(
        task=candidates[0].task if accepted else None,
        similarity=values[0],
        margin=values[0] - values[1] if len(values) > 1 else float("inf"),
        accepted=accepted,
        candidates=candidates,
    )


@torch.inference_mode()
def instance_vectors(model: HyperAdapterModel, examples: Sequence[Example], batch_size: int = 64) -> Tensor:
    """Instance vectors [N, p] of examples, in their order, all prompted as inputs of no known task are."""
    examples = [Example(None, example.text, example.text_pair) for example in examples]
    found: dict[int, Tensor] = {}
    collator = model.collator
    for rows in batches_by_length(examples, batch_size):
        with model.lock, evaluating(model):
            batch = to_device(collator.inputs([examples[row] for row in rows]), device_of(model))
            found.update(zip(rows, model.instance_vectors(**batch).float(), strict=True))
    return torch.stack([found[row] for row in range(len(examples))])


def encode_texts(model: HyperAdapterModel, texts: Iterable[Any], batch_size: int = 64) -> np.ndarray[Any, Any]:
    """Compute the instance vectors of texts; see `HyperAdapterModel.encode`."""
    check_int("batch_size", batch_size, 1)
    examples = list(read_inputs(texts, model.tasks, None))
    if not examples:
        return np.empty((0, model.adapter_config.prototype_dim), dtype=np.float32)
    vectors = instance_vectors(model, examples, batch_size)
    check_answers(model, vectors.isfinite().all(dim=1), examples, range(1, len(examples) + 1), "the instance vector")
    found: np.ndarray[Any, Any] = vectors.cpu().numpy()
    return found


@torch.no_grad()
def calibrate(
    model: HyperAdapterModel,
    train_examples: Sequence[Example],
    validation_examples: Sequence[Example],
    false_decline_rate: float = 0.05,
    seed: int = 0,
) -> None:
    """Set the thresholds of all tasks, and their centroids where they are to have several.

    With `ModelConfig.centroids_per_task` above 1, a task has that many k-means centroids of the instance vectors of its
    training rows; otherwise inputs are compared to its prototype. Its threshold is the similarity below which the given
    share lies of the validation rows that are most similar to it (or of its own rows, where none is).

    Args:
        model: changed in place.
        train_examples: of all tasks.
        validation_examples: of all tasks; where there are none at all the training rows serve, whose similarities are
            higher, so that more is declined than asked for.
        false_decline_rate: share of known inputs that may be declined, at most.
        seed: of k-means.

    Raises:
        DataError: the rate is not from 0 to below 1, the examples are no list of them or there is none to train on, or
            instance vectors are not finite.
        NotFiniteError: similarities are not finite.
        TaskError: the model's method cannot route, or an example is of no task of the model.
    """
    model.method.check_can_route()
    check_seed(seed)
    is_number = isinstance(false_decline_rate, Real) and not isinstance(false_decline_rate, bool)
    if not is_number or not 0 <= false_decline_rate < 1:
        raise DataError(f"false_decline_rate: expected 0 to below 1, found {false_decline_rate!r}")
    _check_examples(model, "train_examples", train_examples)
    _check_examples(model, "validation_examples", validation_examples)
    if not train_examples:
        raise DataError("train_examples: expected at least one example, found none")
    if model.adapter_config.centroids_per_task > 1:
        kept = _first_of_each_task(train_examples, ROWS_FOR_CENTROIDS)
        instances, owners = _instances_and_owners(model, kept)
        found = [_task_centroids(model, instances[owners == task_id], seed) for task_id in range(len(model.tasks))]
        model.task_table.set_centroids(found)
    instances, owners = _instances_and_owners(model, validation_examples or train_examples)
    similarity = model.pha.prototypes.similarity(instances)
    if not similarity.isfinite().all():
        raise NotFiniteError(f"similarities of inputs to the tasks are not finite; {likely_cause(model)}")
    chosen = thresholds(similarity, owners, false_decline_rate)
    model.task_table.set_thresholds(chosen - ROUNDING)


def _check_examples(model: HyperAdapterModel, name: str, examples: Sequence[Example]) -> None:
    if not isinstance(examples, Sequence) or not all(isinstance(example, Example) for example in examples):
        raise DataError(f"{name}: expected a list of Example, found {examples!r:.100}")
    known = range(len(model.tasks))
    if unknown := [example.task_id for example in examples if example.task_id not in known]:
        raise TaskError(f"{name}: expected task_id from 0 to {len(model.tasks) - 1}, found {unknown[0]}")


def _instances_and_owners(model: HyperAdapterModel, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    instances = instance_vectors(model, examples)
    return instances, torch.tensor([example.task_id for example in examples], device=instances.device)


def _first_of_each_task(examples: Sequence[Example], count: int) -> list[Example]:
    seen: Counter[int | None] = Counter()
    kept = []
    for example in examples:
        seen[example.task_id] += 1
        if seen[example.task_id] <= count:
            kept.append(example)
    return kept


def _task_centroids(model: HyperAdapterModel, instances: Tensor, seed: int) -> Tensor:
    return centroids(instances, model.adapter_config.centroids_per_task, seed).to(model.pha.prototypes.centroids)


def centroids(instances: Tensor, count: int, seed: int = 0) -> Tensor:
    """Centres [K, p] of the directions of instance vectors [N, p], by k-means; zeros in the place of missing ones."""
    points = normalize(instances.float(), dim=-1).cpu().numpy()
    if not np.isfinite(points).all():
        raise DataError("instance vectors are not finite: training has diverged; lower retriever_learning_rate")
    centres = np.zeros((count, points.shape[1]), dtype=np.float32)
    clusters = min(count, len(np.unique(points, axis=0)))
    if clusters:
        centres[:clusters] = KMeans(clusters, n_init=4, random_state=seed).fit(points).cluster_centers_
    return torch.from_numpy(centres)


def thresholds(similarity: Tensor, owners: Tensor, false_decline_rate: float) -> Tensor:
    """Thresholds [T] for similarities [N, T] of rows whose tasks `owners` [N] are known.

    Of the rows most similar to a task, at most the given share lies below its threshold. A task without any rows
    declines nothing.
    """
    nearest = similarity.argmax(dim=1)
    found = similarity.new_full((similarity.shape[1],), -torch.inf)
    for task_id in range(similarity.shape[1]):
        rows = nearest == task_id
        rows = rows if bool(rows.any()) else owners == task_id
        if bool(rows.any()):
            ordered = similarity[rows, task_id].sort().values
            found[task_id] = ordered[int(false_decline_rate * len(ordered))]
    return found
