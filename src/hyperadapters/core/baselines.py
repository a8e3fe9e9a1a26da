"""Adapters without a hypernetwork, as the method is compared with: one for all tasks, or one for each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperadapters.core.forms import BottleneckWeights


class LearnedAdapters(nn.Module):
    """N bottleneck adapters at each of L sites, learned as they are: N = 1 for all tasks, or adapter t for task t.

    The down weights and biases start as those of `torch.nn.Linear` (uniform within 1 / sqrt(d)), the up weights and
    biases at 0, so that the model starts as its backbone.

    Differs from Houlsby et al. (2019) as everything here does: see `forms.bottleneck` and the placements of the sites.
    """

    def __init__(self, num_sites: int, num_adapters: int, width: int, bottleneck_dim: int) -> None:
        """Args: num_sites: L; num_adapters: N, 1 or the number of tasks; width: d; bottleneck_dim: a."""
        super().__init__()
        leading, bound = (num_sites, num_adapters), width**-0.5
        self.down_weight = nn.Parameter(torch.empty(*leading, width, bottleneck_dim).uniform_(-bound, bound))
        self.down_bias = nn.Parameter(torch.empty(*leading, bottleneck_dim).uniform_(-bound, bound))
        self.up_weight = nn.Parameter(torch.zeros(*leading, bottleneck_dim, width))
        self.up_bias = nn.Parameter(torch.zeros(*leading, width))

    def forward(self, task_ids: Tensor) -> BottleneckWeights:
        """Return the adapters [L, U, ...] of the tasks [U]; of one for all tasks U views."""
        learned = BottleneckWeights(self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        if self.down_weight.shape[1] > 1:
            return learned.tasks(task_ids)
        return BottleneckWeights(
            *(tensor.expand(-1, len(task_ids), *(-1 for _ in tensor.shape[2:])) for tensor in learned)
        )
