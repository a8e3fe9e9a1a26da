"""Generated adapters of the tasks used last."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from hyperadapters.core import AdapterWeights
from hyperadapters.model.model import HyperAdapterModel


class AdapterCache:
    """Keeps the adapters of tasks, so that the hypernetwork runs once a task; the task used least recently goes first.

    For a model that is not being trained; it notices that tasks were added, fitted or removed, not that parameters
    were changed in place.
    """

    def __init__(self, model: HyperAdapterModel, max_bytes: int) -> None:
        """Args: model: generates; max_bytes: of adapters kept. Those of the last batch are always there besides."""
        self._model, self._max_bytes = model, max_bytes
        self._kept: OrderedDict[int, AdapterWeights] = OrderedDict()
        self._last: tuple[list[int], AdapterWeights] | None = None
        self._made_for: tuple[int, torch.device] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the adapters that are kept now."""
        return sum(_num_bytes(weights) for weights in self._kept.values())

    def __call__(self, task_ids: Tensor) -> AdapterWeights:
        """The adapters [L, U, ...] of the tasks [U]."""
        made_for = (self._model.task_table.revision, task_ids.device)
        if self._made_for != made_for:
            self._kept.clear()
            self._last, self._made_for = None, made_for
        wanted: list[int] = task_ids.tolist()
        if self._last is not None and self._last[0] == wanted:  # the same tasks again and again: nothing to copy
            return self._last[1]
        for task_id in wanted:
            if task_id not in self._kept:  # one by one: made together with others they could differ in the last bit
                self._kept[task_id] = self._model.method.adapters(task_ids.new_tensor([task_id]))
        for task_id in wanted:
            self._kept.move_to_end(task_id)
        weights = AdapterWeights.cat([self._kept[task_id] for task_id in wanted])
        self._last = wanted, weights
        self._shrink()
        return weights

    def _shrink(self) -> None:
        size = self.num_bytes
        while size > self._max_bytes:
            _, dropped = self._kept.popitem(last=False)
            size -= _num_bytes(dropped)


def _num_bytes(weights: AdapterWeights) -> int:
    return sum(tensor.nbytes for tensor in weights.values())
