"""The map of prototypes and recent inputs in two dimensions."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from hyperadapters.model.model import HyperAdapterModel

MAX_PROTOTYPES = 500
MAX_INPUTS = 400


class TaskMap:
    """Recent instance vectors, and the plane in which prototypes and instance vectors are shown.

    Only the vectors and tasks of recent inputs are kept, not their texts.
    """

    def __init__(self) -> None:
        """Create a map without inputs."""
        self._recent: deque[tuple[str | None, tuple[float, ...]]] = deque(maxlen=MAX_INPUTS)

    def add(self, task: str | None, instance: tuple[float, ...] | None) -> None:
        """Remember an input.

        Args:
            task: Task that answered; None if the input was declined.
            instance: Instance vector; None for a method without a retriever.
        """
        if instance is not None:
            self._recent.append((task, instance))

    def keep(self, tasks: set[str]) -> None:
        """Forget the inputs of tasks that do not exist any more.

        Args:
            tasks: Names of all tasks of the model.
        """
        kept = [entry for entry in self._recent if entry[0] is None or entry[0] in tasks]
        self._recent.clear()
        self._recent.extend(kept)

    def compute(self, model: HyperAdapterModel) -> dict[str, Any]:
        """Compute the body of `schemas.MapResponse`: the plane of the two first principal components.

        Args:
            model: The model. If its method has no prototypes, all lists are empty.
        """
        if not model.method.can_route:
            return {"mean": [], "axes": [], "prototypes": [], "inputs": []}
        with model.lock, torch.inference_mode():
            names = [task.name for task in model.tasks[:MAX_PROTOTYPES]]
            prototypes = normalize(model.pha.prototypes.weight[:MAX_PROTOTYPES].float(), dim=-1).cpu().numpy()
        recent = list(self._recent)
        directions = np.array([vector for _, vector in recent], dtype=np.float32).reshape(-1, prototypes.shape[1])
        directions /= np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-12)
        mean = prototypes.mean(axis=0)
        axes = np.linalg.svd(np.concatenate([prototypes - mean, np.zeros((2, len(mean)))]), full_matrices=False)[2][:2]
        points = (directions - mean) @ axes.T
        return {
            "mean": mean.tolist(),
            "axes": axes.tolist(),
            "prototypes": [
                {"task": name, "vector": vector} for name, vector in zip(names, prototypes.tolist(), strict=True)
            ],
            "inputs": [
                {"task": task, "x": x, "y": y} for (task, _), (x, y) in zip(recent, points.tolist(), strict=True)
            ],
        }
