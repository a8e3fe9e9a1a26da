"""Rows of a batch put together by task, so that the weights of a task multiply all its rows at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grouping:
    """G groups of c places for the B rows of a batch; all rows of a group have the same task.

    One batched product over the groups then serves every task, on any device, without a copy of a task's weights for
    each of its rows. A task with more rows than a group has places takes several groups.

    Attributes:
        tasks: the task of each group [G], as an index into the batch's distinct tasks.
        num_rows: B.
        rows: the row at each place [G c]; a place that is left over repeats some row. None: row i is at place i.
        places: the place of each row [B]; None as for `rows`.
    """

    tasks: Tensor
    num_rows: int
    rows: Tensor | None = None
    places: Tensor | None = None

    @classmethod
    def of(cls, tasks: Tensor, num_tasks: int) -> Grouping:
        """Group the rows whose tasks are given [B], each an index below `num_tasks`; every task must have a row.

        With as many places in a group as a task has rows on average, there are fewer than 2 `num_tasks` groups, and
        their places are fewer than 3 B: neither many short tasks nor one long one cost much.
        """
        num_rows = len(tasks)
        if num_tasks == 1:
            return cls(tasks.new_zeros(1), num_rows)
        size = -(-num_rows // num_tasks)
        counts = tasks.bincount(minlength=num_tasks)
        groups_of_task = (counts + size - 1) // size
        ordered, rows_in_order = tasks.sort(stable=True)
        rank = torch.arange(num_rows, device=tasks.device) - (counts.cumsum(0) - counts)[ordered]
        first_group = groups_of_task.cumsum(0) - groups_of_task
        places_in_order = first_group[ordered] * size + rank
        group_tasks = torch.arange(num_tasks, device=tasks.device).repeat_interleave(groups_of_task)
        rows = tasks.new_zeros(len(group_tasks) * size)
        rows[places_in_order] = rows_in_order
        places = torch.empty_like(tasks)
        places[rows_in_order] = places_in_order
        return cls(group_tasks, num_rows, rows, places)

    def gather(self, inputs: Tensor) -> Tensor:
        """Put inputs [n B, S, d] into their places [G, c n S, d]; n rows next to each other count as one row.

        Raises:
            RuntimeError: the number of rows is no multiple of B.
        """
        if len(inputs) % self.num_rows:
            raise RuntimeError(
                f"{len(inputs)} rows reached the adapters of a batch of {self.num_rows}; expected a multiple"
            )
        wide = inputs.reshape(self.num_rows, -1, inputs.shape[-1])
        # index_select and not inputs[rows]: the gradient of the latter adds up in an order that varies from run to run.
        placed = wide if self.rows is None else wide.index_select(0, self.rows)
        return placed.reshape(len(self.tasks), -1, inputs.shape[-1])

    def scatter(self, outputs: Tensor, like: Tensor) -> Tensor:
        """Undo `gather`: outputs [G, c n S, d] in the order and shape of the inputs, `like` [n B, S, d]."""
        if self.places is None:
            return outputs.reshape(like.shape)
        rows_of_groups = outputs.reshape(-1, like.numel() // self.num_rows)
        return rows_of_groups.index_select(0, self.places).reshape(like.shape)
