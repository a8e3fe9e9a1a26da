"""The map of a run: its rows and prototypes in two dimensions, and the similarity of its prototypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from hyperadapters.checkpoints.details_file import Point, RunDetails
from hyperadapters.report.charts import Map, Matrix

Array = np.ndarray[Any, Any]

MAX_MATRIX = 100
"""Number of tasks up to which matrices are shown."""


def maps_of(details: RunDetails) -> list[Map]:
    """Return the rows and prototypes of a run by principal components, and by t-SNE of cosine distances.

    Args:
        details: Details of the run.

    Returns:
        Two figures; none if no rows are kept, or fewer than three vectors.
    """
    vectors = np.array([*(point.vector for point in details.points), *details.prototypes], dtype=np.float64)
    if not details.points or len(vectors) < 3 or vectors.shape[1] < 2:
        return []
    what = f"Instance vectors of {details.split} rows, and prototypes of the tasks as stars, "
    return [
        _map(details, "map-pca", "Map by principal components", what + "in the plane of most variance.", pca(vectors)),
        _map(
            details,
            "map-t-sne",
            "Map by t-SNE",
            what + "so that similar ones are close to each other. Distances between groups mean little.",
            t_sne(vectors),
        ),
    ]


def pca(vectors: Array) -> Array:
    """Return the two first principal components of vectors.

    Args:
        vectors: Vectors of shape [N, p], with N and p at least 2.

    Returns:
        Coordinates of shape [N, 2].
    """
    return np.asarray(PCA(2, svd_solver="full").fit_transform(vectors))


def t_sne(vectors: Array) -> Array:
    """Return a t-SNE of the cosine distances of vectors, with a fixed seed.

    Args:
        vectors: Vectors of shape [N, p], with N at least 3.

    Returns:
        Coordinates of shape [N, 2].
    """
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    method = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=0)
    return np.asarray(method.fit_transform(vectors)).astype(np.float64)


def _map(details: RunDetails, name: str, title: str, caption: str, places: Array) -> Map:
    points, prototypes = places[: len(details.points)].tolist(), places[len(details.points) :].tolist()
    groups = {}
    for task_id, task in enumerate(details.tasks):
        rows = [row for row, point in enumerate(details.points) if point.task == task_id]
        x, y = tuple(points[row][0] for row in rows), tuple(points[row][1] for row in rows)
        groups[task.name] = (x, y, tuple(_described(details, details.points[row]) for row in rows))
    named = zip(details.tasks, prototypes, strict=False)  # only the first prototypes are kept
    marks = {task.name: (x, y) for task, (x, y) in named}
    return Map(name, title, caption, groups, marks, "prototype")


def _described(details: RunDetails, point: Point) -> str:
    lines = [point.text, f"task: {details.tasks[point.task].name}", f"target: {point.target}"]
    lines += [f"answer: {'none' if point.answer is None else point.answer}"]
    if point.nearest is not None and point.nearest != point.task:
        lines.append(f"most similar task: {details.tasks[point.nearest].name}")
    return "\n".join(lines)


def similarity_of(details: RunDetails) -> Matrix | None:
    """Return the cosine similarities of the prototypes, ordered by a hierarchical clustering.

    Args:
        details: Details of the run.

    Returns:
        The matrix; None with fewer than two prototypes or more than `MAX_MATRIX`.
    """
    if not 2 <= len(details.prototypes) <= MAX_MATRIX:
        return None
    vectors = np.array(details.prototypes, dtype=np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    similarity = np.clip(vectors @ vectors.T, -1, 1)
    order = clustered(similarity)
    names = tuple(details.tasks[task_id].name for task_id in order)
    values = similarity[np.ix_(order, order)].tolist()
    return Matrix(
        "prototype-similarity",
        "Similarity of prototypes",
        "Cosine similarity of each pair of prototypes. Tasks are ordered by average linkage, so that similar ones are "
        "neighbours.",
        names,
        names,
        tuple(map(tuple, values)),
        labels_of(values, "{:.2f}".format),
        (min(map(min, values)), 1.0),
        "task",
        "task",
    )


def clustered(similarity: Array) -> list[int]:
    """Return the order of a hierarchical clustering by average linkage.

    Args:
        similarity: Symmetric similarities of shape [N, N], at most 1.

    Returns:
        The N indices, in which similar ones are neighbours.
    """
    if len(similarity) < 3:
        return list(range(len(similarity)))
    distances = squareform(1 - similarity, checks=False)
    tree = linkage(np.maximum(distances, 0), method="average", optimal_ordering=True)
    return [int(index) for index in leaves_list(tree)]


def labels_of(values: list[list[float]], shown: Callable[[float], str]) -> tuple[tuple[str, ...], ...]:
    """Return the texts of the values of a matrix.

    Args:
        values: Values of each row.
        shown: Function that returns the text of a value.
    """
    return tuple(tuple(shown(value) for value in row) for row in values)
