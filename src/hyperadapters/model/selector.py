"""Selection of the tasks and adapters of a batch during its forward pass."""

from __future__ import annotations

from torch import Tensor

from hyperadapters.backbones.active import BatchState
from hyperadapters.methods.base import Method, Route


class BatchSelector:
    """A callback that selects the tasks and adapters of a batch as soon as its pooled hidden states are computed.

    Attributes:
        features: Pooled hidden states that the retriever reads [B, d].
        instances: Instance vectors [B, p]; None for a method without a retriever.
        selected: Ids of the selected tasks [B].
    """

    features: Tensor
    selected: Tensor
    instances: Tensor | None = None

    def __init__(
        self, method: Method, task_ids: Tensor | None, route: Route = "nearest", rows: Tensor | None = None
    ) -> None:
        """Set up the selection for one batch.

        Args:
            method: Method of the model.
            task_ids: Ids of the tasks [B]; None to use the most similar task of each row.
            route: How rows without a task get their adapters; see `Method.select`.
            rows: Row of each sequence [R] if a row can have several sequences. Default: row i is sequence i.
        """
        self._method, self._task_ids, self._route, self._rows = method, task_ids, route, rows

    def __call__(self, features: Tensor) -> BatchState:
        """Select tasks and adapters.

        Args:
            features: Pooled hidden states that the retriever reads [B, d].

        Returns:
            State of the batch with the adapters of its sequences.
        """
        self.features, self.instances = features, self._method.instance_vectors(features)
        self.selected, weights, grouping = self._method.select(self._task_ids, self.instances, self._route, self._rows)
        return BatchState(weights, grouping)
