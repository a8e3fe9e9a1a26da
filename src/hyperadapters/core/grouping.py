"""Grouping the rows of a batch by task, so that the weights of a task are multiplied by all its rows at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grouping:
    """An assignment of the B rows of a batch to G groups of c slots, where all rows of a group have the same task.

    One batched matrix product over the groups then computes the adapters of all tasks, without a copy of a task's
    weights for each of its rows. A task with more than c rows has several groups.

    Attributes:
        tasks: Task of each group [G], as an index into the distinct tasks of the batch.
        num_rows: Number of rows B.
        rows: Row in each slot [G c], or None if row i is in slot i. Padding slots repeat a row of the same task.
        slots: Slot of each row [B], or None if row i is in slot i.
    """

    tasks: Tensor
    num_rows: int
    rows: Tensor | None = None
    slots: Tensor | None = None

    @classmethod
    def of(cls, tasks: Tensor, num_tasks: int) -> Grouping:
        """Group rows by their tasks.

        The number c of slots in a group is the mean number of rows of a task, rounded up. There are then fewer than
        2 T groups and fewer than 3 B slots, however unequal the tasks are.

        Args:
            tasks: Task of each row [B], as an index from 0 to T - 1. Every task must have at least one row.
            num_tasks: Number of distinct tasks T.

        Returns:
            The grouping of the rows.
        """
        num_rows = tasks.shape[0]  # not `len`, which would make the number a constant of an exported graph
        if num_tasks == 1:
            return cls(tasks.new_zeros(1), num_rows)
        size = -(-num_rows // num_tasks)
        counts = tasks.bincount(minlength=num_tasks)
        groups_of_task = (counts + size - 1) // size
        ordered, rows_in_order = tasks.sort(stable=True)
        rank = torch.arange(num_rows, device=tasks.device) - (counts.cumsum(0) - counts)[ordered]
        first_group = groups_of_task.cumsum(0) - groups_of_task
        slots_in_order = first_group[ordered] * size + rank
        group_tasks = torch.arange(num_tasks, device=tasks.device).repeat_interleave(groups_of_task)
        first_row = rows_in_order[counts.cumsum(0) - counts]
        rows = first_row[group_tasks].repeat_interleave(size)
        rows[slots_in_order] = rows_in_order
        slots = torch.empty_like(tasks)
        slots[rows_in_order] = slots_in_order
        return cls(group_tasks, num_rows, rows, slots)

    def gather(self, inputs: Tensor) -> Tensor:
        """Copy the rows of a batch into their slots.

        Args:
            inputs: Inputs [n B, S, d], where n consecutive rows belong to the same row of the batch, as those of the
                beams of a beam search do.

        Returns:
            Inputs by group [G, c n S, d].

        Raises:
            RuntimeError: If the number of rows is not a multiple of B.
        """
        if inputs.shape[0] % self.num_rows:
            raise RuntimeError(
                f"expected a multiple of {self.num_rows} rows, the size of the batch, as inputs of its adapters; "
                f"found {inputs.shape[0]}"
            )
        wide = inputs.reshape(self.num_rows, -1, inputs.shape[-1])
        placed = wide if self.rows is None or self.slots is None else _gather(wide, self.rows, self.slots)
        return placed.reshape(self.tasks.shape[0], -1, inputs.shape[-1])

    def scatter(self, outputs: Tensor, like: Tensor) -> Tensor:
        """Copy the rows in the slots back into the order of the batch, the inverse of `gather`.

        Args:
            outputs: Outputs by group [G, c n S, o].
            like: The inputs [n B, S, d] that were given to `gather`.

        Returns:
            Outputs [n B, S, o].
        """
        shape = *like.shape[:-1], outputs.shape[-1]
        if self.rows is None or self.slots is None:
            return outputs.reshape(shape)
        in_slots = outputs.reshape(self.rows.shape[0], -1, outputs.shape[-1])
        return _scatter(in_slots, self.slots).reshape(shape)


# PyTorch computes the gradient of an index with scattered additions. These are several times slower than copies, and
# their order, so the result of `x[rows]`, varies from run to run. Here every row has exactly one slot, so that the
# gradient needs no additions but only copies.


class _Gather(torch.autograd.Function):
    """`batch[rows]`, whose gradient is that of each row's own slot, because padding slots are never read."""

    @staticmethod
    def forward(ctx: Any, batch: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return batch.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return gradient.index_select(0, slots), None, None


class _Scatter(torch.autograd.Function):
    """`in_slots[slots]`, whose gradient is zero for padding slots."""

    @staticmethod
    def forward(ctx: Any, in_slots: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.num_slots = len(in_slots)
        return in_slots.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        filled = gradient.new_zeros(ctx.num_slots, *gradient.shape[1:])
        return filled.index_copy_(0, slots, gradient), None


_gather: Callable[[Tensor, Tensor, Tensor], Tensor] = _Gather.apply
_scatter: Callable[[Tensor, Tensor], Tensor] = _Scatter.apply
