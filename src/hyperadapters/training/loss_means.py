"""Means of the losses since the last entry of the log."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hyperadapters.core import Losses, TaskLoss
from hyperadapters.training.sharding import num_processes


class MeanLosses(NamedTuple):
    """Means over some training steps.

    Attributes:
        objective: Mean of the objective and of each of its terms, by the names of `Losses`.
        tasks: Mean task loss of each task that had rows, by its index: over its rows, or over its target tokens.
    """

    objective: dict[str, float]
    tasks: dict[int, float]


class LossMeans:
    """Adds up the losses of training steps as tensors. No value is read from the device before `read`."""

    def __init__(self, num_tasks: int) -> None:
        """Begin without losses.

        Args:
            num_tasks: Number of tasks T.
        """
        self._num_tasks = num_tasks
        self._of_step: list[Tensor] = []
        self._total: Tensor | None = None
        self._number = 0

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of the present step whose losses were added."""
        return len(self._of_step)

    def add(self, losses: Losses, task_loss: TaskLoss, task_ids: Tensor, has_rows: bool = True) -> None:
        """Add the losses of a micro-batch.

        Args:
            losses: Objective and its terms.
            task_loss: Task loss with its sums for each row.
            task_ids: Task of each row [B].
            has_rows: Whether the rows of this process are counted, see `core.DataParallelProcesses`. Default: True.
        """
        terms = torch.stack([term.detach() for term in losses])
        rows = torch.stack([task_loss.row_sums.to(terms), task_loss.row_counts.to(terms)]) * has_rows
        tasks = terms.new_zeros(2, self._num_tasks).index_add_(1, task_ids, rows)
        self._of_step.append(torch.cat([terms, tasks.flatten()]))

    def keep_step(self) -> None:
        """Count the losses of the present step."""
        for found in self._of_step:
            self._total = found if self._total is None else self._total + found
        self._number += len(self._of_step)
        self._of_step.clear()

    def discard_step(self) -> None:
        """Forget the losses of the present step."""
        self._of_step.clear()

    def read(self) -> MeanLosses | None:
        """Return the means over the steps that were kept since the last call, in all processes, or None without steps.

        Each process must call this method.
        """
        if self._total is None:
            return None
        if num_processes() > 1:
            dist.all_reduce(self._total)
        size = len(Losses._fields)
        terms = (self._total[:size] / (self._number * num_processes())).tolist()
        sums, counts = self._total[size:].view(2, self._num_tasks).tolist()
        tasks = {task: sums[task] / counts[task] for task in range(self._num_tasks) if counts[task]}
        self._total, self._number = None, 0
        return MeanLosses(dict(zip(Losses._fields, terms, strict=True)), tasks)
