"""Routing: the choice of the task of an input, and the thresholds below which an input is declined.

The similarities are computed in `core.prototypes`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hyperadapters.backbones.passes import evaluating
from hyperadapters.core import TaskDensities, most_similar
from hyperadapters.data.examples import Example
from hyperadapters.data.short_forms import weights_with_short_forms, with_short_forms
from hyperadapters.errors import DataError, NotFiniteError, TaskError, check_int, check_seed
from hyperadapters.inference.batches import batches_by_length, device_of, to_device
from hyperadapters.inference.conformal import conformal_threshold
from hyperadapters.inference.finite import check_answers, likely_cause
from hyperadapters.inference.inputs import read_inputs
from hyperadapters.model.model import HyperAdapterModel

NUM_CANDIDATES = 3
ROUNDING = 1e-5
"""Tolerance of thresholds, because the similarity of an input depends on its batch by rounding."""
ROWS_FOR_CENTROIDS = 1000
"""Maximum number of training rows of a task from which its centroids are computed, since more hardly change them."""
ROWS_FOR_DENSITIES = 500
"""Maximum number of training rows of a task to which its density is fitted."""
ROWS_FOR_THRESHOLDS = 1000
"""Maximum number of training rows of a task from which its threshold is computed, if there are no validation rows."""
FOLDS = 5
"""Number of folds in which training rows are left out to calibrate densities, if there are no validation rows."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A task and the similarity of an input to it.

    Attributes:
        task: Name of the task.
        similarity: Cosine similarity in [-1, 1] to the prototype of the task; or, if the setting `routing` is
            "densities", the log-likelihood ratio in nats of this task and any task that is not known.
    """

    task: str
    similarity: float


@dataclass(frozen=True, slots=True)
class RoutingResult:
    """Result of routing an input.

    Attributes:
        task: Name of the most similar task, or None if the input is declined.
        similarity: Similarity to the most similar task; see `Candidate`.
        margin: Difference of this similarity and that to the second most similar task; infinite for a single task.
        accepted: Whether the similarity reaches the threshold of the task, and the input contains words.
        candidates: The most similar tasks, at most three, in descending order of similarity. If the heads of the model
            compare adapted texts, only tasks that read such inputs are candidates, pairs or single texts.
    """

    task: str | None
    similarity: float
    margin: float
    accepted: bool
    candidates: tuple[Candidate, ...]


def route(model: HyperAdapterModel, texts: Iterable[Any], batch_size: int = 64) -> list[RoutingResult]:
    """Route texts to tasks. Only the layers below the features of the retriever are computed.

    Args:
        model: Model, whose thresholds determine which texts are declined.
        texts: Texts in any form that `inference.inputs.read_inputs` reads.
        batch_size: Number of texts in a batch. Default: 64.

    Returns:
        Results in the order of the texts.

    Raises:
        DataError: If a text has an unsupported form.
        TaskError: If the method of the model cannot route.
        NotFiniteError: If the similarities of a text are not finite numbers.
    """
    model.method.check_can_route()
    check_int("batch_size", batch_size, 1)
    examples = list(read_inputs(texts, model.tasks, None))
    if not examples:
        return []
    similarity, readable = similarities(model, examples, batch_size)
    found = decide(model, similarity, readable)
    usable = torch.tensor([isfinite(result.similarity) for result in found])
    check_answers(model, usable, examples, range(1, len(examples) + 1), "the similarity to the tasks")
    return found


def decide(model: HyperAdapterModel, similarity: Tensor, readable: Tensor) -> list[RoutingResult]:
    """Choose the tasks of inputs and compare the similarities to the thresholds.

    Args:
        model: Model with the thresholds.
        similarity: Similarities [B, T] of inputs to the tasks.
        readable: Whether each input contains words [B], without which it is declined.

    Returns:
        Results of the B rows.
    """
    values, ids = most_similar(similarity, NUM_CANDIDATES)
    accepted = ((values[:, 0] >= model.pha.thresholds[ids[:, 0]]) & readable).tolist()
    return [
        result_of([model.tasks[task_id].name for task_id in row_ids], row_values, is_accepted)
        for row_values, row_ids, is_accepted in zip(values.tolist(), ids.tolist(), accepted, strict=True)
    ]


def result_of(names: Sequence[str], values: Sequence[float], accepted: bool) -> RoutingResult:
    """Return the result of routing an input.

    Args:
        names: Names of the most similar tasks, at least one.
        values: Similarities to them in descending order; minus infinity for excluded tasks.
        accepted: Whether the input is accepted for the first task.
    """
    known = [(name, value) for name, value in zip(names, values, strict=True) if value != -inf]
    candidates = tuple(Candidate(name, value) for name, value in known or [(names[0], values[0])])
    return RoutingResult(
        task=candidates[0].task if accepted else None,
        similarity=values[0],
        margin=values[0] - values[1] if len(candidates) > 1 else inf,
        accepted=accepted,
        candidates=candidates,
    )


@torch.inference_mode()
def instance_vectors(model: HyperAdapterModel, examples: Sequence[Example], batch_size: int = 64) -> Tensor:
    """Compute the instance vectors of examples, without their tasks' templates.

    Args:
        model: Model with a retriever.
        examples: N examples, whose tasks are ignored.
        batch_size: Number of examples in a batch. Default: 64.

    Returns:
        Instance vectors [N, p] in float32, in the order of the examples.
    """
    (found,) = of_batches(model, examples, batch_size, lambda batch: (model.instance_vectors(**batch).float(),))
    return found


@torch.inference_mode()
def similarities(model: HyperAdapterModel, examples: Sequence[Example], batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Compute the similarities of examples to the tasks, without the templates of their tasks.

    Args:
        model: Model whose method can route.
        examples: N examples, whose tasks are ignored.
        batch_size: Number of examples in a batch. Default: 64.

    Returns:
        Similarities [N, T], and whether the examples contain words [N], in the order of the examples.
    """

    def of_batch(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return model.task_similarity(batch), contains_words(model, batch)

    similarity, readable = of_batches(model, examples, batch_size, of_batch)
    return similarity, readable


@torch.inference_mode()
def density_points(model: HyperAdapterModel, examples: Sequence[Example], batch_size: int = 64) -> Tensor:
    """Compute the coordinates of examples in the directions of the densities, without their tasks' templates.

    Args:
        model: Model whose densities are fitted.
        examples: N examples, whose tasks are ignored.
        batch_size: Number of examples in a batch. Default: 64.

    Returns:
        Coordinates [N, r] in float32, in the order of the examples.
    """
    densities = model.pha.densities
    assert densities is not None
    (found,) = of_batches(
        model, examples, batch_size, lambda batch: (densities.project(model.density_features(batch)),)
    )
    return found


def contains_words(model: HyperAdapterModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return whether each input of a batch contains other tokens than the tokenizer's special ones [B].

    Args:
        model: Model with the tokenizer.
        batch: Inputs of the model [B, S].
    """
    ids = batch["input_ids"]
    special = torch.tensor(model.tokenizer.all_special_ids, device=ids.device, dtype=ids.dtype)
    readable: Tensor = (batch["attention_mask"].bool() & ~torch.isin(ids, special)).any(dim=1)
    return readable


def of_batches(
    model: HyperAdapterModel,
    examples: Sequence[Example],
    batch_size: int,
    compute: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
) -> list[Tensor]:
    """Compute tensors of examples in batches of similar length, without their tasks' templates.

    Args:
        model: Model, whose lock is held for each batch.
        examples: N examples, whose tasks are ignored.
        batch_size: Number of examples in a batch.
        compute: Function that computes tensors [B, ...] of a batch.

    Returns:
        The tensors [N, ...], in the order of the examples.
    """
    examples = [Example(None, example.text, example.text_pair) for example in examples]
    found: dict[int, tuple[Tensor, ...]] = {}
    collator = model.collator
    for rows in batches_by_length(examples, batch_size, model.adapter_config.separates_texts):
        with model.lock, evaluating(model):
            batch = to_device(collator.inputs([examples[row] for row in rows]), device_of(model))
            found.update(zip(rows, zip(*compute(batch), strict=True), strict=True))
    columns = zip(*(found[row] for row in range(len(examples))), strict=True)
    return [torch.stack(column) for column in columns]


def encode_texts(model: HyperAdapterModel, texts: Iterable[Any], batch_size: int = 64) -> np.ndarray[Any, Any]:
    """Compute the instance vectors of texts, as `HyperAdapterModel.encode` does.

    Args:
        model: Model with a retriever.
        texts: Texts in any form that `inference.inputs.read_inputs` reads.
        batch_size: Number of texts in a batch. Default: 64.

    Returns:
        Instance vectors [N, p] in float32, in the order of the texts.

    Raises:
        DataError: If a text has an unsupported form.
        TaskError: If the method of the model has no retriever.
        NotFiniteError: If an instance vector is not finite.
    """
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
    """Set the routing thresholds of all tasks, and their routing centroids or densities.

    If `ModelConfig.routing` is "densities", these are fitted to training rows and short forms of them, and the
    thresholds are those of the validation rows and short forms of them.
    If `ModelConfig.centroids_per_task` is above 1, the centroids of a task are that many k-means centroids of the
    instance vectors of its training rows. The threshold of a task is the quantile `false_decline_rate` of the
    similarities of the validation rows that are most similar to it, or of its own rows if there are no such rows. It is
    not higher than the conformal threshold of the validation rows, so that at most this share of exchangeable inputs is
    declined if there are at least 1 / `false_decline_rate` - 1 such rows (see `inference.conformal`). A model with a
    single task declines nothing.

    Args:
        model: Model, which is changed in place.
        train_examples: Training examples of all tasks.
        validation_examples: Validation examples of all tasks. If there are none, the training examples are used. Their
            similarities to densities are those under densities that were fitted without them, in five folds; those to
            prototypes are higher than the ones of new inputs, so that more inputs are declined.
        false_decline_rate: Maximum fraction of the inputs of known tasks that are declined, in [0, 1). Default: 0.05.
        seed: Seed of k-means. Default: 0.

    Raises:
        DataError: If the rate is out of range, the examples are not lists of `Example`, there are no training examples,
            or instance vectors are not finite.
        NotFiniteError: If similarities are not finite.
        TaskError: If the method of the model cannot route, or an example does not have a task of the model.
    """
    model.method.check_can_route()
    check_seed(seed)
    is_number = isinstance(false_decline_rate, Real) and not isinstance(false_decline_rate, bool)
    if not is_number or not 0 <= false_decline_rate < 1:
        raise DataError(f"false_decline_rate: expected a number in [0, 1), found {false_decline_rate!r}")
    _check_examples(model, "train_examples", train_examples)
    _check_examples(model, "validation_examples", validation_examples)
    if not train_examples:
        raise DataError("train_examples: expected at least one example, found none")
    if model.adapter_config.centroids_per_task > 1:
        kept = _first_of_each_task(train_examples, ROWS_FOR_CENTROIDS)
        instances, owners = instance_vectors(model, kept), _owners(kept, model.device)
        found = [_task_centroids(model, instances[owners == task_id], seed) for task_id in range(len(model.tasks))]
        model.task_table.set_centroids(found)
    fitted, features = _fit_densities(model, train_examples, seed)
    checked = list(validation_examples or fitted or _first_of_each_task(train_examples, ROWS_FOR_THRESHOLDS))
    weights = torch.ones(len(checked))
    if model.pha.routes_by_densities:
        weights = torch.tensor(weights_with_short_forms(len(checked)))
        checked = with_short_forms(checked, seed)
    similarity, readable = similarities(model, checked)
    if fitted and not validation_examples:
        left_out = _left_out_ratios(features, _owners(fitted, features.device), len(model.tasks))
        similarity = torch.where(left_out.isfinite() & ~similarity.isneginf(), left_out, similarity)
    owners, weights = _owners(checked, similarity.device)[readable], weights.to(similarity.device)[readable]
    similarity = similarity[readable]
    is_excluded = similarity.isneginf()  # tasks that do not read such inputs; each input has others
    if is_excluded.all(dim=1).any() or not (similarity.isfinite() | is_excluded).all():
        raise NotFiniteError(f"the similarities of inputs to the tasks are not finite; {likely_cause(model)}")
    chosen = thresholds(similarity, owners, false_decline_rate, weights)
    if validation_examples:  # the guarantee is for inputs like these, without their short forms
        rows = similarity[: int(readable[: len(validation_examples)].sum())]
        for task_id, (threshold, _) in enumerate(conformal_thresholds(rows, false_decline_rate)):
            chosen[task_id] = min(float(chosen[task_id]), threshold)
    if len(model.tasks) == 1:  # nothing was learned that tells other texts from those of the task
        chosen = torch.full_like(chosen, -inf)
    model.task_table.set_thresholds(chosen - ROUNDING)


def conformal_thresholds(similarity: Tensor, rate: float) -> list[tuple[float, float]]:
    """Compute a threshold for the inputs that are most similar to each task; see `inference.conformal`.

    Args:
        similarity: Similarities [N, T] of inputs to tasks.
        rate: Maximum share of inputs below the threshold, in [0, 1).

    Returns:
        The threshold and the bound on the share for each task. They are infinity and 1 if no input is most similar to
        the task.
    """
    nearest = similarity.argmax(dim=1)
    found = []
    for task_id in range(similarity.shape[1]):
        own = similarity[nearest == task_id, task_id]
        found.append(conformal_threshold(own, rate) if len(own) else (inf, 1.0))
    return found


def _check_examples(model: HyperAdapterModel, name: str, examples: Sequence[Example]) -> None:
    if not isinstance(examples, Sequence) or not all(isinstance(example, Example) for example in examples):
        raise DataError(f"{name}: expected a list of Example, found {examples!r:.100}")
    known = range(len(model.tasks))
    if unknown := [example.task_id for example in examples if example.task_id not in known]:
        raise TaskError(f"{name}: expected task_id from 0 to {len(model.tasks) - 1}, found {unknown[0]}")


def _fit_densities(
    model: HyperAdapterModel, train_examples: Sequence[Example], seed: int
) -> tuple[list[Example], Tensor]:
    """Fit the densities, if the model routes by them and every one of its tasks, at least two, has training rows.

    Args:
        model: Model, which is changed in place.
        train_examples: Training examples of all tasks.
        seed: Seed of the short forms.

    Returns:
        The N examples to which the densities were fitted, none if they were not, and the features of them and of their
        short forms.
    """
    rows = _first_of_each_task(train_examples, ROWS_FOR_DENSITIES)
    counts = Counter(example.task_id for example in rows)
    if model.pha.densities is None or not 1 < len(model.tasks) == len(counts):
        return [], torch.empty(0)
    forms = with_short_forms(rows, seed)
    (features,) = of_batches(model, forms, 64, lambda batch: (model.density_features(batch),))
    if not features.isfinite().all():
        raise NotFiniteError(f"the frozen hidden states of training rows are not finite; {likely_cause(model)}")
    sizes = torch.tensor([float(counts[task_id]) for task_id in range(len(model.tasks))])
    weights = torch.tensor(weights_with_short_forms(len(rows)), device=features.device)
    model.task_table.fit_densities(features, _owners(forms, features.device), weights, sizes)
    return rows, features


def _left_out_ratios(features: Tensor, owners: Tensor, num_tasks: int) -> Tensor:
    """Compute the log-likelihood ratios of training rows under densities that were fitted without them.

    Args:
        features: Features of N rows, and then of their short forms [N * (1 + SHORT_FORMS), n, d].
        owners: Tasks of the rows [N].
        num_tasks: Number T of tasks, each of which has a row.

    Returns:
        Ratios [N * (1 + SHORT_FORMS), T]. They are NaN for the only row of a task, which cannot be left out.
    """
    is_own = owners[:, None] == torch.arange(num_tasks, device=owners.device)
    place = is_own.cumsum(dim=0).gather(1, owners[:, None])[:, 0] - 1
    is_only = is_own.sum(dim=0)[owners] == 1
    folds = torch.where(is_only, -1, place % FOLDS)
    weights = torch.tensor(weights_with_short_forms(len(owners)), device=features.device)
    copies = len(weights) // len(owners)
    ratios = features.new_full((len(features), num_tasks), torch.nan, dtype=torch.float32)
    densities = TaskDensities(num_tasks, features.shape[1] * features.shape[2]).to(features.device)
    for fold in range(int(folds.max()) + 1):
        left_out = (folds == fold).repeat(copies)
        sizes = is_own[folds != fold].sum(dim=0).float()
        densities.fit(features[~left_out], owners.repeat(copies)[~left_out], weights[~left_out], sizes)
        ratios[left_out] = densities(features[left_out])
    return ratios


def _owners(examples: Sequence[Example], device: torch.device) -> Tensor:
    return torch.tensor([example.task_id for example in examples], device=device)


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
    """Compute k-means centroids of normalised instance vectors.

    Args:
        instances: Instance vectors [N, p].
        count: Number of centroids K.
        seed: Seed of k-means. Default: 0.

    Returns:
        Centroids [K, p], padded with zeros if there are fewer than K different vectors.

    Raises:
        DataError: If the instance vectors are not finite.
    """
    from sklearn.cluster import KMeans  # takes a second, which predictions do not need

    points = normalize(instances.float(), dim=-1).cpu().numpy()
    if not np.isfinite(points).all():
        raise DataError("the instance vectors are not finite, because training diverged; lower retriever_learning_rate")
    found = np.zeros((count, points.shape[1]), dtype=np.float32)
    clusters = min(count, len(np.unique(points, axis=0)))
    if clusters:
        found[:clusters] = KMeans(clusters, n_init=4, random_state=seed).fit(points).cluster_centers_
    return torch.from_numpy(found)


def thresholds(similarity: Tensor, owners: Tensor, false_decline_rate: float, weights: Tensor | None = None) -> Tensor:
    """Compute the thresholds of tasks, so that at most a given fraction of the rows is declined.

    Args:
        similarity: Similarities [N, T] of rows to tasks.
        owners: Tasks of the rows [N].
        false_decline_rate: Maximum fraction of the rows most similar to a task that are below its threshold.
        weights: Weights of the rows [N] in this fraction. Default: all rows have the same weight.

    Returns:
        Thresholds [T]. A task without any rows has threshold minus infinity.
    """
    weights = torch.ones_like(owners) if weights is None else weights
    nearest = similarity.argmax(dim=1)
    found = similarity.new_full((similarity.shape[1],), -torch.inf)
    for task_id in range(similarity.shape[1]):
        rows = nearest == task_id
        rows = rows if bool(rows.any()) else owners == task_id
        if bool(rows.any()):
            ordered, order = similarity[rows, task_id].sort()
            shares = weights[rows][order].double().cumsum(dim=0)
            found[task_id] = ordered[int((shares <= false_decline_rate * float(shares[-1])).sum())]
    return found
