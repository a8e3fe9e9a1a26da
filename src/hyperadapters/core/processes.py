"""The losses of a batch that is divided among several processes, equal to those of one process with all of its rows.

Data-parallel training averages the gradients of W processes. The loss of each process is therefore W times its share of
the loss of the whole batch. The rows of the batch may be divided unequally. Only the instance vectors are exchanged.

    mean over rows      a process with n of N rows has W n / N times its own mean
    sum over rows       a process has W times its own sum
    function of all     every process computes it from all instance vectors, of which only its own are differentiable;
    instance vectors    its gradient, not its value, is multiplied by W
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """Combines the losses of the processes that share a batch. This class is for a single process."""

    def mean(self, local_mean: Tensor, count: int | Tensor) -> Tensor:
        """Return the loss of this process for a mean over the whole batch.

        Args:
            local_mean: Mean over the terms of this process, a scalar.
            count: Number of these terms.
        """
        return local_mean

    def sum(self, local_sum: Tensor) -> Tensor:
        """Return the loss of this process for a sum over the whole batch.

        Args:
            local_sum: Sum over the terms of this process, a scalar.
        """
        return local_sum

    def maximum(self, number: int, device: torch.device) -> int:
        """Return the largest of a number of each process.

        Args:
            number: The number of this process.
            device: Device of the other tensors.
        """
        return number

    def rows(self, instances: Tensor, task_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of all processes. Gradients only flow to those of this process.

        Args:
            instances: Instance vectors of this process [B, p].
            task_ids: Task of each row [B].

        Returns:
            Instance vectors and tasks of all processes.
        """
        return instances, task_ids

    def function_of_rows(self, value: Tensor) -> Tensor:
        """Return the loss of this process for a function of the result of `rows`.

        Args:
            value: Value of the function, a scalar that is the same in all processes.
        """
        return value


ONE_PROCESS = Processes()


class DataParallelProcesses(Processes):
    """Combines the losses of all processes of the default group of `torch.distributed`.

    Every process must call the same methods in the same order.
    """

    def __init__(self, has_rows: bool = True) -> None:
        """Store whether the rows of this process are counted.

        Args:
            has_rows: If False, the batch has fewer rows than there are processes, and the row of this process only
                serves to take part in the computation. Its terms are multiplied by zero. Default: True.
        """
        self._has_rows, self._size = has_rows, dist.get_world_size()

    def mean(self, local_mean: Tensor, count: int | Tensor) -> Tensor:
        """Return the loss of this process for a mean over the whole batch.

        The arguments and result are those of `Processes.mean`.
        """
        own = torch.as_tensor(count, device=local_mean.device).clone() * self._has_rows
        total = own.clone()
        dist.all_reduce(total)
        return local_mean * (self._size * own / total.clamp(min=1))

    def sum(self, local_sum: Tensor) -> Tensor:
        """Return the loss of this process for a sum over the whole batch.

        The arguments and result are those of `Processes.sum`.
        """
        return local_sum * (self._size * self._has_rows)

    def maximum(self, number: int, device: torch.device) -> int:
        """Return the largest of a number of each process.

        The arguments and result are those of `Processes.maximum`.
        """
        found = torch.tensor(number, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def rows(self, instances: Tensor, task_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of all processes.

        The arguments and result are those of `Processes.rows`.
        """
        own = len(instances) if self._has_rows else 0
        sizes = [torch.zeros((), dtype=torch.long, device=instances.device) for _ in range(self._size)]
        dist.all_gather(sizes, torch.tensor(own, device=instances.device))
        counts = [int(size) for size in sizes]
        vectors = _gather_padded(instances[:own].detach(), max(counts), self._size)
        ids = _gather_padded(task_ids[:own], max(counts), self._size)
        vectors[dist.get_rank()] = instances
        parts = [vector[:count] for vector, count in zip(vectors, counts, strict=True)]
        return torch.cat(parts), torch.cat([found[:count] for found, count in zip(ids, counts, strict=True)])

    def function_of_rows(self, value: Tensor) -> Tensor:
        """Return the loss of this process for a function of all rows.

        The arguments and result are those of `Processes.function_of_rows`.
        """
        return value + (self._size - 1) * (value - value.detach())


class MicroBatches(Processes):
    """Lets the instance contrast of a micro-batch see the rows of all micro-batches of a training step.

    Gradient accumulation averages the gradients of n micro-batches, as data-parallel training averages those of
    processes. Each micro-batch computes the loss from all instance vectors, of which only its own are differentiable,
    and its gradient is multiplied by n. The others have been computed before, without gradients (Gao et al. 2021,
    "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"). Means over rows and tokens remain those
    of the micro-batches.
    """

    def __init__(self, processes: Processes, others: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Store the rows of the other micro-batches.

        Args:
            processes: Processes that share each micro-batch.
            others: Instance vectors [B, p] and tasks [B] of all processes, for each other micro-batch of the step.
        """
        self._processes, self._others = processes, others

    def mean(self, local_mean: Tensor, count: int | Tensor) -> Tensor:
        """Return the loss of this process for a mean over the micro-batch.

        The arguments and result are those of `Processes.mean`.
        """
        return self._processes.mean(local_mean, count)

    def sum(self, local_sum: Tensor) -> Tensor:
        """Return the loss of this process for a sum over the micro-batch.

        The arguments and result are those of `Processes.sum`.
        """
        return self._processes.sum(local_sum)

    def maximum(self, number: int, device: torch.device) -> int:
        """Return the largest of a number of each process.

        The arguments and result are those of `Processes.maximum`.
        """
        return self._processes.maximum(number, device)

    def rows(self, instances: Tensor, task_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of all processes and micro-batches.

        The arguments and result are those of `Processes.rows`.
        """
        parts = [self._processes.rows(instances, task_ids), *self._others]
        return torch.cat([vectors for vectors, _ in parts]), torch.cat([ids for _, ids in parts])

    def function_of_rows(self, value: Tensor) -> Tensor:
        """Return the loss of this process and micro-batch for a function of all rows.

        The arguments and result are those of `Processes.function_of_rows`.
        """
        own = self._processes.function_of_rows(value)
        return own + len(self._others) * (own - own.detach())


def _gather_padded(values: Tensor, length: int, size: int) -> list[Tensor]:
    """Gather the rows of all processes, with zeros up to the largest number of rows."""
    padded = values.new_zeros(length, *values.shape[1:])
    padded[: len(values)] = values
    found = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(found, padded)
    return found
