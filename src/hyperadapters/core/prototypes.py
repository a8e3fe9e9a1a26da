"""The prototypes, one learned vector per task, and the similarity of instance vectors to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cosine_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Compute the cosine similarity of every row of one matrix to every row of another, also under autocast.

    Args:
        first: Vectors [M, p].
        second: Vectors [N, p].

    Returns:
        Similarities [M, N] in float32. A zero vector has similarity 0 to every vector.
    """
    with torch.autocast(first.device.type, enabled=False):
        return F.normalize(first.float(), dim=-1) @ F.normalize(second.float(), dim=-1).T


def most_similar(similarity: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest similarities of each row in descending order.

    Args:
        similarity: Similarities [B, T].
        count: Number of similarities to return, at least 1; at most T are returned.

    Returns:
        Similarities [B, C] and their columns [B, C]. If several are largest, the first one comes first.
    """
    nearest = similarity.argmax(dim=1, keepdim=True)  # `topk` may return any of the largest ones
    others = similarity.scatter(1, nearest, -torch.inf).topk(min(count, similarity.shape[1]) - 1, dim=1)
    values = torch.cat([similarity.gather(1, nearest), others.values], dim=1)
    return values, torch.cat([nearest, others.indices], dim=1)


class PrototypeTable(nn.Module):
    """T learned prototypes of size p, of which row t belongs to task t (Zhao et al. 2023, section 3).

    They are the only parameters of the method whose number grows with the number of tasks.

    A task may also have routing centroids. Inputs are then compared to these instead of the prototype: to several
    centroids if the inputs of the task form several clusters, or to one if the prototype was copied from another task.
    The adapters of the task are always generated from its prototype.

    Attributes:
        weight: Prototypes [T, p].
        centroids: Routing centroids [T, K, p], where K is the largest number of centroids of a task, initially 0. A row
            of zeros is padding.
    """

    centroids: Tensor

    def __init__(self, num_tasks: int, dim: int = 64, orthogonal: bool = False) -> None:
        """Initialise the prototypes at random.

        Args:
            num_tasks: Number of tasks T.
            dim: Size p of a prototype. Default: 64.
            orthogonal: If True, the prototypes of each block of p are orthogonal to each other and have length sqrt(p).
                If False (default), they are drawn from a standard normal distribution, as in the released code.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_tasks, dim))
        if orthogonal:
            with torch.no_grad():
                for start in range(0, num_tasks, dim):  # at most p vectors of size p are orthogonal to each other
                    nn.init.orthogonal_(self.weight[start : start + dim], gain=dim**0.5)
        self.register_buffer("centroids", torch.zeros(num_tasks, 0, dim))

    def forward(self, task_ids: Tensor) -> Tensor:
        """Return the prototypes of tasks.

        Args:
            task_ids: Indices of the tasks [U].

        Returns:
            Prototypes [U, p].

        Raises:
            IndexError: If an index is out of range (raised by PyTorch).
        """
        return self.weight[task_ids]

    def similarity(self, instances: Tensor) -> Tensor:
        """Compute the cosine similarity of instance vectors to each task.

        Args:
            instances: Instance vectors [B, p].

        Returns:
            Similarities [B, T] in float32: to the nearest centroid of a task that has centroids, and to the prototype
            of any other task.
        """
        similarity = cosine_similarity(instances, self.weight)
        present = self.centroids.any(dim=-1)
        tasks = present.any(dim=-1).nonzero()[:, 0]
        if not len(tasks):
            return similarity
        centroids = self.centroids[tasks].flatten(0, 1)
        to_centroids = cosine_similarity(instances, centroids).view(len(instances), len(tasks), -1)
        return similarity.index_copy(1, tasks, to_centroids.masked_fill(~present[tasks], -torch.inf).amax(dim=-1))

    def nearest(self, instances: Tensor) -> Tensor:
        """Return the task that is most similar to each instance vector.

        Args:
            instances: Instance vectors [B, p].

        Returns:
            Indices of the tasks [B]. Among equally similar tasks the one with the lowest index is chosen.
        """
        return self.similarity(instances).argmax(dim=-1)

    def mixture(self, instances: Tensor, temperature: float = 0.1) -> Tensor:
        """Compute a weighted mean of the prototypes for each instance vector, softmax(similarity / temperature) k.

        Args:
            instances: Instance vectors [B, p].
            temperature: Temperature of the softmax. Default: 0.1.

        Returns:
            Mixed prototypes [B, p].
        """
        shares = (self.similarity(instances) / temperature).softmax(dim=-1)
        return shares.to(self.weight.dtype) @ self.weight

    def replace(self, weight: Tensor, centroids: Sequence[Tensor]) -> None:
        """Replace all prototypes, whose number may change, and all centroids. `weight` becomes a new parameter.

        Args:
            weight: Prototypes [T, p].
            centroids: Centroids [K_t, p] of each of the T tasks, where K_t may be 0.
        """
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self.set_centroids(centroids)

    def set_centroids(self, centroids: Sequence[Tensor]) -> None:
        """Replace the routing centroids of all tasks.

        Args:
            centroids: Centroids [K_t, p] of each of the T tasks, where K_t may be 0. Rows of zeros are removed.
        """
        present = [of_task[of_task.any(dim=-1)] for of_task in centroids]
        most = max(map(len, present))
        padded = [nn.functional.pad(of_task, (0, 0, 0, most - len(of_task))) for of_task in present]
        self.centroids = torch.stack(padded).to(self.weight.device)
