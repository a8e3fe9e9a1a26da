"""Selection of the tasks and adapters of a batch during its forward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hyperadapters.backbones.active import BatchState
from hyperadapters.methods import PHA
from hyperadapters.methods.base import Method, Route


class BatchSelector:
    """A callback that selects the tasks and adapters of a batch as soon as its pooled hidden states are computed.

    Attributes:
        features: Pooled hidden states that the retriever reads [B, d].
        instances: Instance vectors [B, p]; None for a method without a retriever.
        similarity: Similarity to each task [B, T]; None for a method that cannot route, or if it is not needed.
        selected: Ids of the selected tasks [B].
    """

    features: Tensor
    selected: Tensor
    instances: Tensor | None = None
    similarity: Tensor | None = None

    def __init__(
        self,
        method: Method,
        task_ids: Tensor | None,
        route: Route = "nearest",
        rows: Tensor | None = None,
        embeddings: Callable[[], Tensor | None] = lambda: None,
        excluded: Tensor | None = None,
        reports_similarity: bool = True,
    ) -> None:
        """Set up the selection for one batch.

        Args:
            method: Method of the model.
            task_ids: Ids of the tasks [B]; None to use the most similar task of each row.
            route: How rows without a task get their adapters; see `Method.select`.
            rows: Row of each sequence [R] if a row can have several sequences. Default: row i is sequence i.
            embeddings: Function that returns the pooled input of the first layer [B, d], or None if the method does
                not read it. It is called when tasks are selected.
            excluded: Whether a task cannot be that of a row whose task is to be found [B, T]. Default: every task can.
            reports_similarity: Whether the similarity to the tasks is computed for rows whose task is given, too.
        """
        self._method, self._task_ids, self._route = method, task_ids, route
        self._rows, self._embeddings, self._excluded = rows, embeddings, excluded
        self._needs_similarity = reports_similarity or task_ids is None

    def __call__(self, features: Tensor) -> BatchState:
        """Select tasks and adapters.

        Args:
            features: Pooled hidden states that the retriever reads [B, d].

        Returns:
            State of the batch with the adapters of its sequences.
        """
        self.features, self.instances = features, self._method.instance_vectors(features)
        self.similarity = self._similarity()
        self.selected, weights, grouping = self._method.select(
            self._task_ids, self.instances, self._route, self._rows, self.similarity
        )
        return BatchState(weights, grouping)

    def _similarity(self) -> Tensor | None:
        method = self._method
        if not self._needs_similarity or not isinstance(method, PHA) or self.instances is None:
            return None
        features = density_features(self.features, self._embeddings())
        return method.similarity(self.instances.detach(), features, self._excluded)


def density_features(pooled: Tensor, embeddings: Tensor | None) -> Tensor:
    """Stack the features that the densities of the tasks' texts read.

    Args:
        pooled: Pooled hidden states that the retriever reads [B, d].
        embeddings: Pooled input of the first layer [B, d]; None if no layer is below all adapters.

    Returns:
        Features [B, n, d].
    """
    pooled = pooled.detach()
    return pooled[:, None] if embeddings is None else torch.stack([embeddings, pooled], dim=1)
