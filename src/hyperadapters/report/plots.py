"""Figures drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.manifold import TSNE

from hyperadapters.utils.files import write_atomically
from hyperadapters.utils.optional import require


def task_map(
    instances: np.ndarray[Any, Any],
    task_ids: Sequence[int],
    prototypes: np.ndarray[Any, Any],
    names: Sequence[str],
    path: Path,
) -> None:
    """Draw instance vectors and prototypes in two dimensions, by t-SNE of their cosine distances with a fixed seed.

    Args:
        instances: Instance vectors [N, p].
        task_ids: Task of each instance [N].
        prototypes: Prototypes [T, p].
        names: Names of the T tasks.
        path: File to write, whose ending determines the format.

    Raises:
        MissingPackageError: If matplotlib is not installed.
        OutputError: If the file cannot be written.
    """
    figure_module = require("matplotlib.figure")
    points = np.concatenate([instances, prototypes]).astype(np.float64)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    perplexity = min(30.0, (len(points) - 1) / 3)
    places = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=0).fit_transform(points)
    colours = require("matplotlib").colormaps["tab10" if len(names) <= 10 else "tab20"]
    figure = figure_module.Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for task_id, name in enumerate(names):
        rows = np.flatnonzero(np.asarray(task_ids) == task_id)
        colour = colours(task_id % colours.N)
        axes.scatter(*places[rows].T, s=16, color=colour, alpha=0.6, linewidths=0, label=name)
        axes.scatter(*places[len(instances) + task_id], s=220, marker="*", color=colour, edgecolors="black", zorder=3)
    axes.scatter([], [], s=160, marker="*", color="white", edgecolors="black", label="prototype")
    axes.set(xticks=[], yticks=[], title="Test inputs and prototypes in the retriever's space")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:] or None, dpi=150)
    write_atomically(path, picture.getvalue())
