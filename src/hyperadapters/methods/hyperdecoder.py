"""An adapter for each input, as in Hyperdecoders (Ivison and Peters, Findings of EMNLP 2022)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hyperadapters.config import ModelConfig
from hyperadapters.core import AdapterTensor, InstanceRetriever
from hyperadapters.methods.base import Assignment, Method, Route, make_hypernetwork, select_by_row


class HyperDecoder(Method):
    """Method whose hypernetwork reads the instance vector of each input instead of the prototype of a task.

    Attributes:
        retriever: Module that maps pooled hidden states to instance vectors.
        hypernetwork: Module that generates adapters from instance vectors and layer embeddings.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_tasks: int,
        num_layers: int,
        hidden_size: int,
        tensors: Sequence[AdapterTensor],
    ) -> None:
        """Make the parts with fresh weights. The arguments are those of `methods.make_method`."""
        super().__init__(config)
        self.retriever = InstanceRetriever(hidden_size, config.hidden_dim, config.prototype_dim)
        self.hypernetwork = make_hypernetwork(config, num_layers, tensors)

    def instance_vectors(self, features: Tensor) -> Tensor:
        """Compute the instance vectors. The arguments and result are those of `Method.instance_vectors`."""
        instances: Tensor = self.retriever(features)
        return instances

    def _select(
        self, task_ids: Tensor | None, instances: Tensor | None, route: Route, similarity: Tensor | None
    ) -> Assignment:
        assert task_ids is not None
        return select_by_row(task_ids, self.hypernetwork(instances))
