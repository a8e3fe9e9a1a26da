"""Cache of generated adapters."""

from __future__ import annotations

from collections import Counter, OrderedDict

import torch
from torch import Tensor

from hyperadapters.core import AdapterWeights
from hyperadapters.model.model import HyperAdapterModel


class AdapterCache:
    """Cache of the adapters of tasks, so that the hypernetwork runs once for each task.

    If the cache is full, the adapters that were used least recently are removed. The model must not be trained
    meanwhile: the cache notices when tasks are added, fitted or removed, but not when parameters change in place.

    Attributes:
        hits: Numbers of batches that found the adapter of a task in the cache, by the name of the task.
        misses: Numbers of batches for which the adapter of a task had to be generated, by the name of the task.
    """

    def __init__(self, model: HyperAdapterModel, max_bytes: int) -> None:
        """Create an empty cache.

        Args:
            model: Model that generates the adapters.
            max_bytes: Maximum size of the cached adapters in bytes. Those of the last batch are stored in addition.
        """
        self._model, self._max_bytes = model, max_bytes
        self._kept: OrderedDict[int, AdapterWeights] = OrderedDict()
        self._last: tuple[list[int], AdapterWeights] | None = None
        self._made_for: tuple[int, torch.device] | None = None
        self.hits: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        """Size of the cached adapters in bytes."""
        return sum(_num_bytes(weights) for weights in self._kept.values())

    def __call__(self, task_ids: Tensor) -> AdapterWeights:
        """Return the adapters of tasks.

        Args:
            task_ids: Indices of the tasks [U].

        Returns:
            Weights [L, U, ...].
        """
        made_for = (self._model.task_table.revision, task_ids.device)
        if self._made_for != made_for:
            self._kept.clear()
            self._last, self._made_for = None, made_for
        wanted: list[int] = task_ids.tolist()
        names = [self._model.tasks[task_id].name for task_id in wanted]
        if self._last is not None and self._last[0] == wanted:  # avoids copies if all batches have the same tasks
            self.hits.update(names)
            return self._last[1]
        for task_id, name in zip(wanted, names, strict=True):
            (self.hits if task_id in self._kept else self.misses)[name] += 1
            if task_id not in self._kept:  # one at a time, since the last bit may depend on the tasks of a batch
                self._kept[task_id] = self._model.method.adapters(task_ids.new_tensor([task_id]))
        for task_id in wanted:
            self._kept.move_to_end(task_id)
        weights = AdapterWeights.cat([self._kept[task_id] for task_id in wanted])
        self._last = wanted, weights
        self._shrink()
        return weights

    @torch.inference_mode()
    def erase(self) -> None:
        """Remove all adapters, and overwrite the memory that they occupied."""
        last = [] if self._last is None else [self._last[1]]
        for weights in (*self._kept.values(), *last):
            for tensor in weights.values():
                tensor.zero_()
        self._kept.clear()
        self._last = None

    def _shrink(self) -> None:
        size = self.num_bytes
        while size > self._max_bytes:
            _, dropped = self._kept.popitem(last=False)
            size -= _num_bytes(dropped)


def _num_bytes(weights: AdapterWeights) -> int:
    return sum(tensor.nbytes for tensor in weights.values())
