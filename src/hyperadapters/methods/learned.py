"""Adapters without a hypernetwork, as the method is compared with: one for all tasks, or one for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hyperadapters.core.forms import AdapterTensor, AdapterWeights, fill_uniform


class LearnedAdapters(nn.Module):
    """N adapters at each of L layers, learned as they are: N = 1 for all tasks, or adapter t for task t.

    What reads an adapter's input starts as `torch.nn.Linear` does (uniform within 1 / sqrt(inputs)), what writes its
    output at 0, so that the model starts as its backbone.

    Differs from Houlsby et al. (2019) as everything here does: see `forms.bottleneck` and the placements of the sites.
    """

    def __init__(self, num_layers: int, num_adapters: int, tensors: Sequence[AdapterTensor]) -> None:
        """Args: num_layers: L; num_adapters: N, 1 or the number of tasks; tensors: of the adapters' form."""
        super().__init__()
        self._names = tuple(tensor.name for tensor in tensors)
        self._is_shared = num_adapters == 1
        for tensor in tensors:
            parameter = nn.Parameter(torch.empty(num_layers, num_adapters, *tensor.shape))
            fill_uniform(parameter, tensor.bound)
            self.register_parameter(tensor.name, parameter)

    def forward(self, task_ids: Tensor) -> AdapterWeights:
        """Return the adapters [L, U, ...] of the tasks [U]; of one for all tasks U views."""
        learned = AdapterWeights({name: self.get_parameter(name) for name in self._names})
        if not self._is_shared:
            return learned.tasks(task_ids)
        return AdapterWeights(
            {
                name: tensor.expand(-1, len(task_ids), *(-1 for _ in tensor.shape[2:]))
                for name, tensor in learned.items()
            }
        )
