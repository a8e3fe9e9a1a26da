"""A hypernetwork on learned task embeddings, as in HyperFormer (Karimi Mahabadi et al., ACL 2021)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hyperadapters.config import ModelConfig
from hyperadapters.core import AdapterTensor, AdapterWeights, PrototypeTable
from hyperadapters.methods.base import Assignment, Method, Route, make_hypernetwork


class HyperFormer(Method):
    """PHA without the retriever and the contrastive losses. The prototypes are learned from the task loss only.

    Attributes:
        prototypes: Embeddings of the tasks.
        hypernetwork: Module that generates adapters from task embeddings and layer embeddings.
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
        self.prototypes = PrototypeTable(num_tasks, config.prototype_dim, orthogonal=config.codes == "orthogonal")
        self.hypernetwork = make_hypernetwork(config, num_layers, tensors)

    def _select(
        self, task_ids: Tensor | None, instances: Tensor | None, route: Route, similarity: Tensor | None
    ) -> Assignment:
        assert task_ids is not None
        return self._of_tasks(task_ids)

    def adapters(self, task_ids: Tensor) -> AdapterWeights:
        """Generate the adapters of tasks. The arguments and result are those of `Method.adapters`."""
        weights: AdapterWeights = self.hypernetwork(self.prototypes(task_ids))
        return weights
