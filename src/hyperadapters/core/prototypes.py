"""The prototypes: one learned vector a task, and which of them an instance is nearest to."""

from __future__ import annotations

from collections.abc import Sequence

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

    Initialised from a standard normal distribution, as in the released code, or orthogonal to each other, of length
    sqrt(p), as far as there are no more tasks than numbers. They are the only parameters of the
    method that grow with the number of tasks.

    A task may have routing centroids, to which inputs are compared instead of its prototype: several where its inputs
    form several clusters, or one where the prototype was copied from another task. Adapters are generated from the
    prototype in any case. `centroids` is [T, K, p] with K the largest number of centroids of a task, at first 0; a
    row of zeros is padding.
    """

    centroids: Tensor

    def __init__(self, num_tasks: int, dim: int = 64, orthogonal: bool = False) -> None:
        """Args: num_tasks: T; dim: p; orthogonal: how they start."""
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_tasks, dim))
        if orthogonal:
            with torch.no_grad():
                for start in range(0, num_tasks, dim):  # so many are orthogonal to each other
                    nn.init.orthogonal_(self.weight[start : start + dim], gain=dim**0.5)
        self.register_buffer("centroids", torch.zeros(num_tasks, 0, dim))

    def forward(self, task_ids: Tensor) -> Tensor:
        """Return the prototypes [U, p] of the tasks [U]; an index out of range is an IndexError."""
        return self.weight[task_ids]

    def similarity(self, instances: Tensor) -> Tensor:
        """Cosine similarity [B, T] of instance vectors [B, p] to each task: to its nearest key, or its prototype."""
        similarity = cosine_similarity(instances, self.weight)
        present = self.centroids.any(dim=-1)
        keyed = present.any(dim=-1).nonzero()[:, 0]
        if not len(keyed):
            return similarity
        to_keys = cosine_similarity(instances, self.centroids[keyed].flatten(0, 1)).view(len(instances), len(keyed), -1)
        return similarity.index_copy(1, keyed, to_keys.masked_fill(~present[keyed], -torch.inf).amax(dim=-1))

    def nearest(self, instances: Tensor) -> Tensor:
        """Index [B] of the task most similar to each instance vector [B, p]; the lower index wins a tie."""
        return self.similarity(instances).argmax(dim=-1)

    def mixture(self, instances: Tensor, temperature: float = 0.1) -> Tensor:
        """Mixture [B, p] of the prototypes for each instance vector [B, p]: softmax(similarity / temperature) k."""
        shares = (self.similarity(instances) / temperature).softmax(dim=-1)
        return shares.to(self.weight.dtype) @ self.weight

    def replace(self, weight: Tensor, centroids: Sequence[Tensor]) -> None:
        """Take the prototypes [T, p] of other tasks, and the centroids [any number, p] of each.

        `weight` is a new parameter then.
        """
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self.set_centroids(centroids)

    def set_centroids(self, centroids: Sequence[Tensor]) -> None:
        """Take the centroids [any number, p] of each task."""
        present = [of_task[of_task.any(dim=-1)] for of_task in centroids]
        most = max(map(len, present))
        places = [nn.functional.pad(of_task, (0, 0, 0, most - len(of_task))) for of_task in present]
        self.centroids = torch.stack(places).to(self.weight.device)
