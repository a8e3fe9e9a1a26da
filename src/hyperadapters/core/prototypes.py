"""The prototypes: one learned vector a task, and which of them an instance is nearest to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cosine_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Cosine similarity [M, N] of every row of [M, p] to every row of [N, p], in float32, also under autocast.

    A zero vector has similarity 0 to everything.
    """
    with torch.autocast(first.device.type, enabled=False):
        return F.normalize(first.float(), dim=-1) @ F.normalize(second.float(), dim=-1).T


class PrototypeTable(nn.Module):
    """T learned prototypes of p numbers, row t belonging to task t (Zhao et al. 2023, section 3).

    Initialised from a standard normal distribution, as in the released code. They are the only parameters of the
    method that grow with the number of tasks.
    """

    def __init__(self, num_tasks: int, dim: int = 64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_tasks, dim))

    def forward(self, task_ids: Tensor) -> Tensor:
        """Return the prototypes [U, p] of the tasks [U]; an index out of range is an IndexError."""
        return self.weight[task_ids]

    def similarity(self, instances: Tensor) -> Tensor:
        """Cosine similarity [B, T] of instance vectors [B, p] to every prototype."""
        return cosine_similarity(instances, self.weight)

    def nearest(self, instances: Tensor) -> Tensor:
        """Index [B] of the prototype most similar to each instance vector [B, p]; the lower index wins a tie."""
        return self.similarity(instances).argmax(dim=-1)
