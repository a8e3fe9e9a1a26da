"""The arithmetic of a runtime around its two graphs, in NumPy: routing, grouping by tasks, and heads.

Each function computes what a part of the model computes in torch, which its docstring names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from hyperadapters.runtime.folder import Array, RuntimeTask

LAYER_NORM_EPS = 1e-5
LEAST_LENGTH = 1e-12


def normalized(values: Array) -> Array:
    """Return vectors [..., d] scaled to length 1, as `torch.nn.functional.normalize` does.

    Args:
        values: Vectors.
    """
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), LEAST_LENGTH)


def mean_of_texts(pooled: Array, pair_rows: Array, num_inputs: int) -> Array:
    """Compute the means [B, d] of the sequences of each input, as `text_features.mean_of_texts` does.

    Args:
        pooled: Pooled hidden states of each sequence [R, d].
        pair_rows: Inputs with a second sequence [P].
        num_inputs: Number of inputs B.
    """
    means = pooled[:num_inputs].copy()
    means[pair_rows] = (means[pair_rows] + pooled[num_inputs:]) / 2
    return means


def compare_texts(pooled: Array, pair_rows: Array, num_inputs: int) -> Array:
    """Compute the features [B, 2 d + 1] of the sequences of each input, as `text_features.compare_texts` does.

    Args:
        pooled: Pooled hidden states of each sequence [R, d].
        pair_rows: Inputs with a second sequence [P].
        num_inputs: Number of inputs B.
    """
    directions = normalized(pooled)
    first, second = directions[:num_inputs], np.zeros_like(directions[:num_inputs])
    second[pair_rows] = directions[num_inputs:]
    apart = np.zeros_like(first)
    apart[pair_rows] = np.abs(first - second)[pair_rows]
    return np.concatenate([first + second, apart, (first * second).sum(axis=1, keepdims=True)], axis=1)


# Routing


def log_likelihood_ratios(features: Array, arrays: Mapping[str, Array]) -> Array:
    """Compute the log-likelihood ratios [B, T] of inputs and tasks, as `core.TaskDensities` does.

    Args:
        features: Hidden states of B inputs, averaged over tokens, of n layers [B, n, d].
        arrays: Arrays of the densities by name.
    """
    deviations = features - features.mean(axis=-1, keepdims=True)
    variances = (deviations * deviations).mean(axis=-1, keepdims=True)
    standardized = (deviations / np.sqrt(variances + LAYER_NORM_EPS)).reshape(len(features), -1)
    points = (standardized - arrays["densities.center"]) @ arrays["densities.directions"]
    between, means, counts = (arrays[f"densities.{name}"] for name in ("between", "means", "counts"))
    known = counts[:, None] * between
    variance = 1 + between / (known + 1)
    precise = known / (known + 1) * means / variance
    distance = np.square(points) @ (1 / variance).T - 2 * points @ precise.T
    distance = distance + (np.square(precise) * variance).sum(axis=1)
    background = (np.square(points) / (1 + between) + np.log1p(between)).sum(axis=1)
    return 0.5 * (background[:, None] - distance - np.log(variance).sum(axis=1))


def cosine_similarities(features: Array, arrays: Mapping[str, Array]) -> Array:
    """Compute the similarities [B, T] of inputs to the prototypes or centroids, as `core.PrototypeTable` does.

    Args:
        features: Pooled hidden states of B inputs that the retriever reads [B, d].
        arrays: Arrays of the retriever, the prototypes and the centroids by name.
    """
    hidden = np.maximum(features @ arrays["retriever.down.weight"].T + arrays["retriever.down.bias"], 0)
    instances = normalized(hidden @ arrays["retriever.up.weight"].T + arrays["retriever.up.bias"])
    similarity = instances @ normalized(arrays["prototypes"]).T
    centroids = arrays["centroids"]
    present: Array = (centroids != 0).any(axis=-1)
    for task_id in np.flatnonzero(present.any(axis=-1)):
        of_task = normalized(centroids[task_id][present[task_id]])
        similarity[:, task_id] = (instances @ of_task.T).max(axis=1)
    return similarity


def exclude(similarity: Array, is_pair: Array, reads_pairs: Array) -> Array:
    """Set the similarities to tasks that do not read such inputs to minus infinity, unless no task reads them.

    Args:
        similarity: Similarities [B, T].
        is_pair: Whether each input is a pair [B].
        reads_pairs: Whether each task reads pairs [T].

    Returns:
        Similarities [B, T].
    """
    excluded = is_pair[:, None] != reads_pairs
    excluded &= ~excluded.all(axis=1, keepdims=True)
    return np.where(excluded, -np.inf, similarity)


class Routing(NamedTuple):
    """Result of routing B inputs.

    Attributes:
        nearest: Most similar task [B].
        similarity: Similarity to it [B].
        margin: Difference to the similarity to the second most similar task [B]; infinite if there is none.
        accepted: Whether the similarity reaches the threshold of the task, and the input contains words [B].
    """

    nearest: Array
    similarity: Array
    margin: Array
    accepted: Array


def decide(similarity: Array, thresholds: Array, has_words: Array) -> Routing:
    """Choose the tasks of inputs, as `inference.routing.decide` does.

    Args:
        similarity: Similarities [B, T].
        thresholds: Similarity of each task below which an input is declined [T].
        has_words: Whether each input contains words [B].

    Returns:
        The tasks of the B inputs.
    """
    rows = np.arange(len(similarity))
    nearest = similarity.argmax(axis=1)
    largest = similarity[rows, nearest]
    others = similarity.copy()
    others[rows, nearest] = -np.inf
    accepted = (largest >= thresholds[nearest]) & has_words
    return Routing(nearest, largest, largest - others.max(axis=1), accepted)


# Adapters and heads


class Groups(NamedTuple):
    """An assignment of n sequences to G groups of c slots, as in `core.Grouping`.

    Attributes:
        tasks: Task of each group [G].
        rows: Sequence in each slot [G, c]. Padding slots repeat a sequence of the same task.
        slots: Slot of each sequence [n].
    """

    tasks: Array
    rows: Array
    slots: Array

    @classmethod
    def of(cls, tasks: Array) -> Groups:
        """Group sequences by their tasks.

        Args:
            tasks: Task of each of n sequences [n].

        Returns:
            The groups.
        """
        distinct = np.unique(tasks)
        size = -(-len(tasks) // len(distinct))
        owners: list[int] = []
        rows: list[Array] = []
        slots = np.empty(len(tasks), dtype=np.int64)
        for task_id in distinct:
            own = np.flatnonzero(tasks == task_id)
            for start in range(0, len(own), size):
                part = own[start : start + size]
                slots[part] = len(rows) * size + np.arange(len(part))
                rows.append(np.pad(part, (0, size - len(part)), mode="edge"))
                owners.append(int(task_id))
        return cls(np.array(owners), np.stack(rows), slots)


def head_outputs(task: RuntimeTask, weight: Array, bias: Array, pooled: Array, features: Array) -> Array:
    """Compute the outputs [n, C] of the head of a task, as `heads.task_heads.Head` does.

    Args:
        task: The task.
        weight: Weight [C, i] of its head.
        bias: Bias [C] of its head.
        pooled: Inputs of plain heads [n, h].
        features: Pooled hidden states that the retriever reads [n, d], which wide heads also read.
    """
    if weight.shape[1] != pooled.shape[1]:
        pooled = np.concatenate([normalized(features), normalized(pooled)], axis=1)
    return (pooled @ weight.T + bias) * task.target_std + task.target_mean


def sigmoid(logits: Array) -> Array:
    """Compute the probability [...] of each label for logits [...] of labels that do not exclude each other.

    Args:
        logits: The logits.
    """
    shares = np.exp(-np.abs(logits))  # the exponential of a large number would be infinite
    return np.where(logits >= 0, 1, shares) / (1 + shares)


def softmax(logits: Array) -> Array:
    """Compute the probabilities [n, C] for logits [n, C].

    Args:
        logits: The logits.
    """
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)
