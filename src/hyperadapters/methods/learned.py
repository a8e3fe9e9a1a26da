"""Adapters that are learned without a hypernetwork: one for all tasks, or one for each (Houlsby et al., ICML 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hyperadapters.config import ModelConfig
from hyperadapters.core import AdapterTensor, AdapterWeights
from hyperadapters.core.forms import fill_uniform
from hyperadapters.methods.base import Method, Route, Selection


class LearnedAdapters(nn.Module):
    """N adapters in each of L layers: N = 1 for all tasks, or adapter t for task t.

    The tensor that reads an adapter's input starts as `torch.nn.Linear` does (uniform within 1 / sqrt(inputs)), the one
    that writes its output at 0, so that the model starts as its backbone.

    Differs from Houlsby et al. (2019) in where adapters are: see `forms.bottleneck` and `backbones.architectures`.
    """

    def __init__(self, num_layers: int, num_adapters: int, tensors: Sequence[AdapterTensor]) -> None:
        """Make adapters with fresh weights.

        Args:
            num_layers: Number L of layers.
            num_adapters: Number N of adapters in each layer, 1 or the number of tasks.
            tensors: The tensors of an adapter in one layer.
        """
        super().__init__()
        self._names = tuple(tensor.name for tensor in tensors)
        self._is_shared = num_adapters == 1
        for tensor in tensors:
            parameter = nn.Parameter(torch.empty(num_layers, num_adapters, *tensor.shape))
            fill_uniform(parameter, tensor.bound)
            self.register_parameter(tensor.name, parameter)

    def forward(self, task_ids: Tensor) -> AdapterWeights:
        """Return the adapters [L, U, ...] of the tasks [U]; views of the same one where all tasks share it."""
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
    """Methods "shared_adapter" and "task_adapter".

    Attributes:
        learned_adapters: One adapter for all tasks, or one for each.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_tasks: int,
        num_layers: int,
        hidden_size: int,
        tensors: Sequence[AdapterTensor],
    ) -> None:
        """Make the adapters with fresh weights; the arguments are those of `PHA`."""
        super().__init__(config)
        num_adapters = num_tasks if config.method == "task_adapter" else 1
        self.learned_adapters = LearnedAdapters(num_layers, num_adapters, tensors)

    def _select(self, task_ids: Tensor | None, instances: Tensor | None, route: Route) -> Selection:
        assert task_ids is not None
        return self._of_tasks(task_ids)

    def adapters(self, task_ids: Tensor) -> AdapterWeights:
        """Return the learned adapters of tasks; see `Method.adapters`."""
        weights: AdapterWeights = self.learned_adapters(task_ids)
        return weights
