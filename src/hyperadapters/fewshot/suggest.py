"""Suggestion of the rows of a pool without labels that should be labelled next.

Many rows of a pool say little about a task that its examples do not say already. The strategies look for those that say
more: rows of which the model is least certain ("margin" and "entropy"; Settles 2009, section 3.1), rows that represent
the pool ("diversity": the nearest one to each centre of k-means), or both ("diverse_margin": k-means among the least
certain rows; Zhdanov 2019).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn.functional import normalize

from hyperadapters.config import Task
from hyperadapters.data.examples import Example
from hyperadapters.data.sources import Row
from hyperadapters.errors import DataError, TaskError, check_int, check_seed, unknown_name
from hyperadapters.heads.unfitted import warn_of_unfitted_heads
from hyperadapters.inference.finite import check_answers
from hyperadapters.inference.inputs import read_inputs
from hyperadapters.inference.routing import contains_words, of_batches
from hyperadapters.model.model import HyperAdapterModel

Strategy = Literal["margin", "entropy", "diversity", "diverse_margin", "random"]
STRATEGIES = ("margin", "entropy", "diversity", "diverse_margin", "random")
FOR_REGRESSION = ("diversity", "random")
"""Strategies that do not read probabilities of labels."""
CANDIDATES = 10
"""Number of uncertain rows for each suggestion among which "diverse_margin" chooses."""
NUM_STARTS = 4
"""Number of random starts of k-means, of which the best is taken."""
COLUMNS = ("score", "reason")
"""Columns that are added to suggested rows."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A row that should be labelled.

    Attributes:
        index: Index of the row in the pool.
        score: Difference of the probabilities of the two likeliest labels ("margin" and "diverse_margin"), entropy of
            the probabilities in nats ("entropy"), or number of rows that the row represents ("diversity"); None for
            "random".
        reason: Why the row was chosen, in words.
    """

    index: int
    score: float | None
    reason: str


def suggest(
    model: HyperAdapterModel,
    task: str,
    pool: Iterable[Any],
    k: int = 20,
    strategy: Strategy = "margin",
    seed: int = 0,
    batch_size: int = 64,
) -> list[Suggestion]:
    """Suggest the rows of a pool that should be labelled next for a task.

    Of rows that differ only in case and spaces, only the first can be chosen. Rows in which a text has no letter or
    digit, or nothing that the tokenizer knows, are never chosen.

    Args:
        model: Model on an encoder backbone.
        task: Name of the task.
        pool: Rows without labels, in any form that `inference.inputs.read_inputs` reads. Their hidden states are held
            in memory, which takes rows * hidden_size * 8 bytes.
        k: Number of rows. If the pool has fewer that can be chosen, all of them are suggested. Default: 20.
        strategy: How rows are chosen. For regression tasks, only "diversity" and "random" are possible.

            - "margin" (default): rows for which the two likeliest labels have almost the same probability.
            - "entropy": rows whose probabilities have the largest entropy.
            - "diversity": the nearest row to each of k centres of k-means, with the largest cluster first.
            - "diverse_margin": the same among the `CANDIDATES` * k rows that "margin" chooses, with the least certain
              row first.
            - "random": random rows.
        seed: Seed of k-means and of random rows. Default: 0.
        batch_size: Number of rows in a batch. Default: 64.

    Returns:
        The suggested rows, with the first to be labelled first.

    Raises:
        TaskError: If the backbone generates text, or the task or the strategy is unknown, or the strategy is not
            possible for the task.
        DataError: If a row has an unsupported form, no row can be chosen, or a number is out of range.
        NotFiniteError: If the model computes a value for a row that is not a finite number.
    """
    check_int("k", k, 1)
    check_int("batch_size", batch_size, 1)
    check_seed(seed)
    task_id = model.task_id(task)
    definition = model.tasks[task_id]
    _check_strategy(model, definition, strategy)
    examples = list(read_inputs(pool, model.tasks, task))
    indices = _distinct(examples)
    computed = _compute(model, [examples[index] for index in indices], task_id, indices, batch_size)
    if not computed.indices:
        raise DataError("pool: expected at least one row with words, found none; give rows with texts")
    k = min(k, len(computed.indices))
    chosen = choose(computed.probabilities, computed.vectors, k, strategy, int(seed))
    return [
        Suggestion(computed.indices[row], score, _reason(definition, computed.probabilities[row], score, strategy))
        for row, score in chosen
    ]


def choose(
    probabilities: Tensor, vectors: Tensor, k: int, strategy: Strategy, seed: int = 0
) -> list[tuple[int, float | None]]:
    """Choose rows by their probabilities and vectors.

    Args:
        probabilities: Probabilities of the labels [N, C]; they are not read by "diversity" and "random".
        vectors: Vectors of the rows [N, d], whose directions are compared; they are read by "diversity" and
            "diverse_margin" only.
        k: Number of rows, at most N.
        strategy: How the rows are chosen; see `suggest`.
        seed: Seed of k-means and of random rows. Default: 0.

    Returns:
        Indices of the rows in the order in which they should be labelled, with their scores; see `Suggestion`.
    """
    if strategy == "random":
        order = torch.randperm(len(probabilities), generator=torch.Generator().manual_seed(seed))
        return [(row, None) for row in order[:k].tolist()]
    if strategy == "diversity":
        return list(_representatives(vectors, k, seed))
    if strategy == "entropy":
        entropies = torch.special.entr(probabilities).sum(dim=1)
        return _first(entropies, entropies.argsort(descending=True, stable=True)[:k])
    likeliest = probabilities.topk(2, dim=1).values
    margins = likeliest[:, 0] - likeliest[:, 1]
    order = margins.argsort(stable=True)
    if strategy == "diverse_margin":
        candidates = order[: CANDIDATES * k]
        places = [place for place, _ in _representatives(vectors[candidates], k, seed)]
        order = candidates[sorted(places)]  # the candidates are in the order of their margins
    return _first(margins, order[:k])


def suggested_rows(rows: Sequence[Row], suggestions: Iterable[Suggestion]) -> list[dict[str, Any]]:
    """Return suggested rows of a file with all their columns, followed by the score and the reason.

    Args:
        rows: All rows of the pool.
        suggestions: Result of `suggest` for these rows.

    Raises:
        DataError: If a row of the pool has a column of one of these two names.
    """
    for row in rows:
        if taken := [name for name in COLUMNS if name in row.values]:
            raise DataError(f"{row.place}: the column '{taken[0]}' is also a column of the output; rename it")
    return [{**rows[one.index].values, "score": one.score, "reason": one.reason} for one in suggestions]


def _check_strategy(model: HyperAdapterModel, task: Task, strategy: str) -> None:
    if model.heads is None:
        raise TaskError("suggest: expected an encoder with task heads, found a backbone that generates text")
    if strategy not in STRATEGIES:
        raise TaskError(unknown_name("strategy", str(strategy), STRATEGIES))
    if not task.labels and strategy not in FOR_REGRESSION:
        raise TaskError(
            f"strategy '{strategy}': task '{task.name}' is a regression task, which has no probabilities of labels; "
            "use 'diversity'"
        )
    if task.labels and strategy not in ("diversity", "random"):
        warn_of_unfitted_heads(model.heads, [task])


def _distinct(examples: Sequence[Example]) -> list[int]:
    """Return the indices of the first of equal rows, without rows in which a text has no letter or digit."""
    first: dict[tuple[str, ...], int] = {}
    for index, example in enumerate(examples):
        texts = [text for text in (example.text, example.text_pair) if text is not None]
        if all(any(map(str.isalnum, text)) for text in texts):
            first.setdefault(tuple(" ".join(text.casefold().split()) for text in texts), index)
    return list(first.values())


@dataclass(frozen=True)
class _Computed:
    """Indices of the N rows that can be chosen, the probabilities of their labels [N, C] and their vectors [N, d]."""

    indices: list[int]
    probabilities: Tensor
    vectors: Tensor


@torch.inference_mode()
def _compute(
    model: HyperAdapterModel, examples: Sequence[Example], task_id: int, indices: Sequence[int], batch_size: int
) -> _Computed:
    """Compute the probabilities and vectors of those rows that contain words."""

    def of_batch(batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        task_ids = batch["input_ids"].new_full((len(batch["input_ids"]),), task_id)
        output = model(**batch, task_ids=task_ids)
        return contains_words(model, batch), output.logits.float(), output.instances

    if not examples:
        return _Computed([], torch.empty(0, 0), torch.empty(0, 0))
    readable, logits, vectors = of_batches(model, examples, batch_size, of_batch)
    usable = (logits.isfinite().all(dim=1) & vectors.isfinite().all(dim=1)).logical_or(~readable)
    check_answers(model, usable, examples, [index + 1 for index in indices], "what the model computes")
    kept = [index for index, is_readable in zip(indices, readable.tolist(), strict=True) if is_readable]
    return _Computed(kept, logits[readable].softmax(dim=1).cpu(), vectors[readable].cpu())


def _representatives(vectors: Tensor, k: int, seed: int) -> list[tuple[int, float]]:
    """Return the nearest row to each centre of k-means and the size of its cluster, with the largest cluster first.

    If fewer than k vectors differ, other rows follow in their order, which represent only themselves.
    """
    points = normalize(vectors.double(), dim=1).numpy()
    clusters = min(k, len(np.unique(points, axis=0)))
    fitted = KMeans(clusters, n_init=NUM_STARTS, random_state=seed).fit(points)
    distances = np.linalg.norm(points - fitted.cluster_centers_[fitted.labels_], axis=1)
    nearest: dict[int, int] = {}
    for row in np.argsort(distances, kind="stable").tolist():
        nearest.setdefault(int(fitted.labels_[row]), row)
    sizes = np.bincount(fitted.labels_)
    found = sorted(((row, float(sizes[cluster])) for cluster, row in nearest.items()), key=lambda pair: -pair[1])
    others = set(range(len(points))) - {row for row, _ in found}
    return found + [(row, 1.0) for row in sorted(others)[: k - len(found)]]


def _first(scores: Tensor, rows: Tensor) -> list[tuple[int, float | None]]:
    return list(zip(rows.tolist(), scores[rows].tolist(), strict=True))


def _reason(task: Task, probabilities: Tensor, score: float | None, strategy: Strategy) -> str:
    if strategy == "random":
        return "random"
    if strategy == "diversity":
        return f"represents {score:.0f} row" + "s" * (score != 1)
    first, second = (f"'{task.labels[i]}' ({probabilities[i]:.2f})" for i in probabilities.topk(2).indices.tolist())
    return f"uncertain: {first} or {second}"
