"""Adapters that are learned without a hypernetwork, one for all tasks or one per task (Houlsby et al., ICML 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hyperadapters.config import ModelConfig
from hyperadapters.core import AdapterTensor, AdapterWeights
from hyperadapters.core.forms import fill_uniform
from hyperadapters.methods.base import Assignment, Method, Route


class LearnedAdapters(nn.Module):
    """N adapters in each of L layers: either one adapter for all tasks, or adapter t for task t.

    The matrix that is applied to the input of an adapter is initialised like that of `torch.nn.Linear`, uniformly
    within 1 / sqrt(number of inputs). The matrix that computes its output is initialised with zeros, so that the model
    initially computes the same as its backbone.

    Difference from Houlsby et al. (2019): the positions of the adapters, see `forms.bottleneck` and
    `backbones.architectures`.
    """

    def __init__(self, num_layers: int, num_adapters: int, tensors: Sequence[AdapterTensor]) -> None:
        """Initialise the weights.

        Args:
            num_layers: Number L of layers.
            num_adapters: Number N of adapters in each layer: 1 or the number of tasks.
            tensors: Tensors of an adapter in one layer.
        """
        super().__init__()
        self._names = tuple(tensor.name for tensor in tensors)
        self._is_shared = num_adapters == 1
        for tensor in tensors:
            parameter = nn.Parameter(torch.empty(num_layers, num_adapters, *tensor.shape))
            fill_uniform(parameter, tensor.bound)
            self.register_parameter(tensor.name, parameter)

    def forward(self, task_ids: Tensor) -> AdapterWeights:
        """Return the adapters [L, U, ...] of tasks. If all tasks share one adapter, they are views of it.

        Args:
            task_ids: Ids of the tasks [U].
        """
        learned = AdapterWeights({name: self.get_parameter(name) for name in self._names})
        if not self._is_shared:
            return learned.tasks(task_ids)
        return AdapterWeights(
            {
                name: tensor.expand(-1, len(task_ids), *(-1 for _ in tensor.shape[2:]))
                for name, tensor in learned.items()
            }
        )


class LearnedMethod(Method):
    """Methods "shared_adapter" and "task_adapter", which learn adapters without a hypernetwork.

    Attributes:
        learned_adapters: One adapter for all tasks, or one for each task.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_tasks: int,
        num_layers: int,
        hidden_size: int,
        tensors: Sequence[AdapterTensor],
    ) -> None:
        """Make the adapters with fresh weights. The arguments are those of `methods.make_method`."""
        super().__init__(config)
        num_adapters = num_tasks if config.method == "task_adapter" else 1
        self.learned_adapters = LearnedAdapters(num_layers, num_adapters, tensors)

    def _select(
        self, task_ids: Tensor | None, instances: Tensor | None, route: Route, similarity: Tensor | None
    ) -> Assignment:
        assert task_ids is not None
        return self._of_tasks(task_ids)

    def adapters(self, task_ids: Tensor) -> AdapterWeights:
        """Return the learned adapters of tasks. The arguments and result are those of `Method.adapters`."""
        weights: AdapterWeights = self.learned_adapters(task_ids)
        return weights
