"""Rows of a batch put together by task, so that the weights of a task multiply all its rows at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
        rows: the row at each place [G c]; what is left over repeats a row of the same task. None: row i is at place i.
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
        num_rows = tasks.shape[0]  # not `len`, which would fix the number in an exported graph
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
        first_row = rows_in_order[counts.cumsum(0) - counts]
        rows = first_row[group_tasks].repeat_interleave(size)
        rows[places_in_order] = rows_in_order
        places = torch.empty_like(tasks)
        places[rows_in_order] = places_in_order
        return cls(group_tasks, num_rows, rows, places)

    def gather(self, inputs: Tensor) -> Tensor:
        """Put inputs [n B, S, d] into their places [G, c n S, d]; n rows next to each other count as one row.

        Raises:
            RuntimeError: the number of rows is no multiple of B.
        """
        if inputs.shape[0] % self.num_rows:
            raise RuntimeError(
                f"{inputs.shape[0]} rows reached the adapters of a batch of {self.num_rows}; expected a multiple"
            )
        wide = inputs.reshape(self.num_rows, -1, inputs.shape[-1])
        placed = wide if self.rows is None or self.places is None else _gather(wide, self.rows, self.places)
        return placed.reshape(len(self.tasks), -1, inputs.shape[-1])

    def scatter(self, outputs: Tensor, like: Tensor) -> Tensor:
        """Undo `gather`: outputs [G, c n S, o] in the order and shape of the inputs, `like` [n B, S, any width]."""
        shape = *like.shape[:-1], outputs.shape[-1]
        if self.rows is None or self.places is None:
            return outputs.reshape(shape)
        in_places = outputs.reshape(len(self.rows), -1, outputs.shape[-1])
        return _scatter(in_places, self.places).reshape(shape)


# Torch's own gradient of an index adds up with scattered writes: several times slower than the copies it stands for,
# and for `x[rows]` in an order that varies from run to run. Here every row has one place, so copies are enough.


class _Gather(torch.autograd.Function):
    """`rows_of_batch[rows]`. Each row counts once in the gradient, by its place: places left over are never read."""

    @staticmethod
    def forward(ctx: Any, batch: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return batch.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


class _Scatter(torch.autograd.Function):
    """`in_places[places]`; the gradient of places left over is zero."""

    @staticmethod
    def forward(ctx: Any, in_places: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.num_places = len(in_places)
        return in_places.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        filled = gradient.new_zeros(ctx.num_places, *gradient.shape[1:])
        return filled.index_copy_(0, places, gradient), None


_gather: Callable[[Tensor, Tensor, Tensor], Tensor] = _Gather.apply
_scatter: Callable[[Tensor, Tensor], Tensor] = _Scatter.apply
