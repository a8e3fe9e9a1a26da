"""Suggestion of the rows of a pool without labels that should be labelled next.

Many rows of a pool say little about a task that its examples do not say already. The strategies look for those that say
more: rows of which the model is least certain ("margin"; Settles 2009, section 3.1), rows that represent the pool
("diversity": the nearest one to each centre of k-means), or both ("diverse_margin": k-means among the least certain
rows; Zhdanov 2019, arXiv 1901.05954).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from hyperadapters.inference.finite import check_answers
from hyperadapters.inference.inputs import read_inputs
from hyperadapters.inference.predictor import label_probabilities
from hyperadapters.inference.routing import contains_words, of_batches
from hyperadapters.model.model import HyperAdapterModel

Strategy = Literal["diverse_margin", "margin", "diversity", "random"]
STRATEGIES = ("diverse_margin", "margin", "diversity", "random")
FOR_ALL_KINDS = ("diversity", "random")
"""Strategies that do not read probabilities of labels, and are therefore possible for tasks of all kinds."""
CANDIDATES = 10
"""Number of uncertain rows for each suggestion among which "diverse_margin" chooses."""
NUM_STARTS = 4
"""Number of random starts of k-means, of which the best is taken."""
COLUMNS = ("score", "reason")
"""Columns that are added to the suggested rows of a file."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A row that should be labelled.

    Attributes:
        index: Index of the row in the pool.
        score: Difference of the probabilities of the two likeliest labels ("diverse_margin" and "margin"), or number of
            rows that the row represents ("diversity"); None for "random".
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
    strategy: Strategy | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Suggestion]:
    """Suggest the rows of a pool that should be labelled next for a task.

    Of rows that differ only in case and spaces, only the first can be chosen. Rows in which a text has no letter or
    digit, or that have nothing that the tokenizer knows, are never chosen.

    Args:
        model: Model on an encoder backbone; it does not change.
        task: Name of the task.
        pool: Rows that have not been labelled yet, in any form that `inference.inputs.read_inputs` reads.
        k: Number of rows. If fewer rows can be chosen, all of them are suggested. Default: 20.
        strategy: How rows are chosen. Default: "diverse_margin" for classification tasks and "diversity" for tasks of
            other kinds, for which "random" is the only other choice.

            - "margin": rows whose two likeliest labels have almost the same probability.
            - "diversity": the nearest row to each of k centres of k-means of what the head reads, with the largest
              cluster first.
            - "diverse_margin": the same among the `CANDIDATES` * k rows that "margin" would choose, with the least
              certain row first.
            - "random": random rows, to compare with.
        seed: Seed of k-means and of random rows. Default: 0.
        batch_size: Number of rows in a batch. Default: 64.

    Returns:
        The suggested rows, with the first to be labelled first.

    Raises:
        TaskError: If the backbone generates text, the task or the strategy is unknown, or the strategy is not possible
            for the task.
        DataError: If a row has an unsupported form, no row can be chosen, or a number is out of range.
        NotFiniteError: If the model computes a value for a row that is not a finite number.
    """
    check_int("k", k, 1)
    check_int("batch_size", batch_size, 1)
    check_seed(seed)
    task_id = model.task_id(task)
    definition = model.tasks[task_id]
    strategy = _checked(model, definition, strategy)
    examples = list(read_inputs(pool, model.tasks, task))
    indices = _distinct(model, examples, batch_size)
    if not indices:
        raise DataError("pool: expected at least one row with words, found none; give rows with texts")
    probabilities = torch.empty(len(indices), len(definition.labels))
    if strategy not in FOR_ALL_KINDS:
        rows = [examples[index] for index in indices]
        probabilities = torch.from_numpy(label_probabilities(model, rows, task, batch_size))

    def vectors(rows: Sequence[int]) -> Tensor:
        return _head_inputs(model, examples, [indices[row] for row in rows], task_id, batch_size)

    chosen = choose(probabilities, vectors, min(int(k), len(indices)), strategy, int(seed))
    return [
        Suggestion(indices[row], score, _reason(definition, probabilities[row], score, strategy))
        for row, score in chosen
    ]


def choose(
    probabilities: Tensor,
    vectors: Callable[[Sequence[int]], Tensor],
    k: int,
    strategy: Strategy,
    seed: int = 0,
) -> list[tuple[int, float | None]]:
    """Choose rows by the probabilities of their labels and by their vectors.

    Args:
        probabilities: Probabilities of the labels [N, C]. "diversity" and "random" only read N.
        vectors: Function that returns the vectors [M, d] of M rows, by their indices. It is called for "diversity" and
            "diverse_margin" only.
        k: Number of rows, at most N.
        strategy: How the rows are chosen; see `suggest`.
        seed: Seed of k-means and of random rows. Default: 0.

    Returns:
        Indices of the rows with their scores (see `Suggestion`), with the first to be labelled first.
    """
    if strategy == "random":
        order = torch.randperm(len(probabilities), generator=torch.Generator().manual_seed(seed))
        return [(row, None) for row in order[:k].tolist()]
    if strategy == "diversity":
        return [*_representatives(vectors(range(len(probabilities))), k, seed)]
    likeliest = probabilities.topk(2, dim=1).values
    margins = likeliest[:, 0] - likeliest[:, 1]
    order = margins.argsort(stable=True)[: k if strategy == "margin" else CANDIDATES * k]
    rows: list[int] = order.tolist()
    if strategy == "diverse_margin":
        # The candidates are in the order of their margins, and so are those that are left of them.
        rows = [rows[place] for place in sorted(place for place, _ in _representatives(vectors(rows), k, seed))]
    return [(row, float(margins[row])) for row in rows]


def suggested_rows(rows: Sequence[Row], suggestions: Iterable[Suggestion]) -> list[dict[str, Any]]:
    """Return the suggested rows of a file with all their columns, followed by the score and the reason.

    Args:
        rows: All rows of the pool.
        suggestions: Result of `suggest` for these rows.

    Raises:
        DataError: If a suggested row already has one of these two columns.
    """
    chosen = [(rows[one.index], one) for one in suggestions]
    for row, _ in chosen:
        if taken := [name for name in COLUMNS if name in row.values]:
            raise DataError(f"{row.place}: the column '{taken[0]}' is also a column of the output; rename it")
    return [{**row.values, "score": one.score, "reason": one.reason} for row, one in chosen]


def _checked(model: HyperAdapterModel, task: Task, strategy: str | None) -> Strategy:
    """Return the strategy or its default, or raise a TaskError if it is not possible."""
    if model.heads is None:
        raise TaskError("suggest: expected an encoder with task heads, found a backbone that generates text")
    if strategy is None:
        return "diverse_margin" if task.kind == "classification" else "diversity"
    if strategy not in STRATEGIES:
        raise TaskError(unknown_name("strategy", str(strategy), STRATEGIES))
    if task.kind != "classification" and strategy not in FOR_ALL_KINDS:
        raise TaskError(
            f"strategy '{strategy}': task '{task.name}' is a {task.kind} task, and the margin is that of two labels "
            "that exclude each other; use 'diversity'"
        )
    return strategy  # type: ignore[return-value]


def _distinct(model: HyperAdapterModel, examples: Sequence[Example], batch_size: int) -> list[int]:
    """Return the indices of rows with words, of equal ones only the first."""
    first: dict[tuple[str, ...], int] = {}
    for index, example in enumerate(examples):
        texts = [text for text in (example.text, example.text_pair) if text is not None]
        if all(any(map(str.isalnum, text)) for text in texts):
            first.setdefault(tuple(" ".join(text.casefold().split()) for text in texts), index)
    indices = list(first.values())
    if not indices:
        return []
    rows = [examples[index] for index in indices]
    (readable,) = of_batches(model, rows, batch_size, lambda batch: (contains_words(model, batch),))
    return [index for index, is_readable in zip(indices, readable.tolist(), strict=True) if is_readable]


@torch.inference_mode()
def _head_inputs(
    model: HyperAdapterModel, examples: Sequence[Example], indices: Sequence[int], task_id: int, batch_size: int
) -> Tensor:
    """Compute what the head of a task reads of some examples [M, F]; see `HyperAdapterModel.head_inputs`."""

    def of_batch(batch: dict[str, Tensor]) -> tuple[Tensor]:
        ids = batch["input_ids"]
        return (model.head_inputs(batch, ids.new_full((len(ids),), task_id)).float(),)

    rows = [examples[index] for index in indices]
    (found,) = of_batches(model, rows, batch_size, of_batch)
    numbers = [index + 1 for index in indices]
    check_answers(model, found.isfinite().all(dim=1), rows, numbers, "the output of the adapted backbone")
    return found.cpu()


def _representatives(vectors: Tensor, k: int, seed: int) -> list[tuple[int, float]]:
    """Return the nearest row to each centre of k-means and the size of its cluster, with the largest cluster first.

    The directions of the vectors are compared. If fewer than k of them differ, other rows follow, which represent
    themselves.
    """
    points = normalize(vectors.double(), dim=1).numpy()
    clusters = min(k, len(np.unique(points, axis=0)))
    fitted = KMeans(clusters, n_init=NUM_STARTS, random_state=seed).fit(points)
    distances = np.linalg.norm(points - fitted.cluster_centers_[fitted.labels_], axis=1)
    nearest: dict[int, int] = {}
    for row in np.argsort(distances, kind="stable").tolist():
        nearest.setdefault(int(fitted.labels_[row]), row)
    sizes = np.bincount(fitted.labels_)
    found = [(row, float(sizes[cluster])) for cluster, row in nearest.items()]
    found.sort(key=lambda pair: (-pair[1], pair[0]))
    others = sorted(set(range(len(points))) - set(nearest.values()))
    return found + [(row, 1.0) for row in others[: k - len(found)]]


def _reason(task: Task, probabilities: Tensor, score: float | None, strategy: Strategy) -> str:
    if strategy == "random":
        return "random"
    if strategy == "diversity":
        return f"represents {score:.0f} row" + "s" * (score != 1)
    first, second = (f"'{task.labels[i]}' ({probabilities[i]:.2f})" for i in probabilities.topk(2).indices.tolist())
    return f"uncertain: {first} or {second}"
