"""The methods: the parts that each has, and how they give every row of a batch its adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from hyperadapters.backbones.active import BatchState
from hyperadapters.config import Method, ModelConfig
from hyperadapters.core import (
    AdapterTensor,
    AdapterWeights,
    Grouping,
    Hypernetwork,
    InstanceRetriever,
    LearnedAdapters,
    OrthogonalHypernetwork,
    PrototypeTable,
    PrototypicalHypernetwork,
)
from hyperadapters.errors import TaskError, unknown_name
from hyperadapters.model.output import ROUTES, Route

AdapterSource = Callable[[Tensor], AdapterWeights]
Part = Literal["retriever", "prototypes", "hypernetwork", "learned_adapters"]

PARTS: dict[Method, tuple[Part, ...]] = {
    "pha": ("retriever", "prototypes", "hypernetwork"),
    "hyperformer": ("prototypes", "hypernetwork"),
    "hyperdecoder": ("retriever", "hypernetwork"),
    "shared_adapter": ("learned_adapters",),
    "task_adapter": ("learned_adapters",),
}
"""What of a method is trained, besides the heads and the shared adapters of an encoder-decoder's encoder."""


class MethodParts(nn.Module):
    """The parts of a method. `HyperAdapterModel` inherits them, so that they keep their names in checkpoints.

    Attributes:
        adapter_config: method, sizes and preset.
        retriever, prototypes, hypernetwork, learned_adapters: those that `PARTS` names; there are no others.
        own_adapters: of the tasks that were fitted apart from the hypernetwork, by task id as text.
        thresholds: similarity [T] below which an input routed to a task is declined; minus infinity: never.
    """

    retriever: InstanceRetriever
    prototypes: PrototypeTable
    hypernetwork: Hypernetwork
    learned_adapters: LearnedAdapters
    thresholds: Tensor

    def __init__(
        self, config: ModelConfig, num_tasks: int, num_layers: int, hidden_size: int, tensors: Sequence[AdapterTensor]
    ) -> None:
        """Prepare the parts of a method.

        Args:
            config: placed on the backbone.
            num_tasks: T.
            num_layers: L.
            hidden_size: d of the backbone.
            tensors: what an adapter consists of at a site.
        """
        super().__init__()
        self.adapter_config = config
        parts, dim, hidden = PARTS[config.method], config.prototype_dim, config.hidden_dim
        if "retriever" in parts:
            self.retriever = InstanceRetriever(hidden_size, hidden, dim)
        if "prototypes" in parts:
            self.prototypes = PrototypeTable(num_tasks, dim, orthogonal=config.codes == "orthogonal")
        if "hypernetwork" in parts:
            if config.codes == "trunk":
                is_lora = config.form == "lora"
                self.hypernetwork = PrototypicalHypernetwork(
                    num_layers, tensors, dim, hidden, starts_as_backbone=is_lora
                )
            else:
                self.hypernetwork = OrthogonalHypernetwork(num_layers, tensors, dim)
        if "learned_adapters" in parts:
            num_adapters = num_tasks if config.method == "task_adapter" else 1
            self.learned_adapters = LearnedAdapters(num_layers, num_adapters, tensors)
        self.own_adapters = nn.ModuleDict()
        self.register_buffer("thresholds", torch.full((num_tasks,), -torch.inf))
        self._adapter_source: AdapterSource | None = None

    @property
    def can_route(self) -> bool:
        """Whether the method finds the task of an input."""
        return self.adapter_config.method == "pha"

    def check_tasks_can_change(self) -> None:
        """Raise TaskError unless tasks can be added to this method's models, fitted anew, and removed."""
        method = self.adapter_config.method
        if method != "pha":
            raise TaskError(f"method '{method}' keeps the tasks that it was trained with: only 'pha' can change them")

    def retrieve(self, pooled: Tensor) -> Tensor | None:
        """Instance vectors [B, p] of pooled features [B, d]; None for a method without a retriever."""
        return self.retriever(pooled) if "retriever" in PARTS[self.adapter_config.method] else None

    def choose(self, task_ids: Tensor | None, instances: Tensor | None, route: Route) -> tuple[Tensor, BatchState]:
        """The task of each row, the most similar one where none are given, and the adapters for them.

        Args:
            task_ids: [B]; None only for a method that can route.
            instances: result of `retrieve`.
            route: see `HyperAdapterModel.forward`.

        Raises:
            TaskError: there is no such route.
        """
        if route not in ROUTES:
            raise TaskError(unknown_name("route", route, ROUTES))
        if self.adapter_config.method == "hyperdecoder":
            assert task_ids is not None
            return task_ids, _an_adapter_for_each_row(self.hypernetwork(instances))
        if task_ids is None and route == "soft":
            assert instances is not None
            task_ids = self.prototypes.nearest(instances)
            mixtures = self.prototypes.mixture(instances, self.adapter_config.temperature)
            return task_ids, _an_adapter_for_each_row(self._with_own(self.hypernetwork(mixtures), task_ids))
        if task_ids is None:
            assert instances is not None
            task_ids = self.prototypes.nearest(instances)
        distinct, rows = task_ids.unique(return_inverse=True)
        weights, grouping = (self._adapter_source or self.adapters)(distinct), Grouping.of(rows, len(distinct))
        if len(grouping.tasks) > len(distinct):
            weights = weights.tasks(grouping.tasks)
        return task_ids, BatchState(weights, grouping)

    def adapters(self, task_ids: Tensor) -> AdapterWeights:
        """The adapters [L, U, ...] of the tasks [U]: generated, learned, or a task's own.

        Raises:
            TaskError: the method writes an adapter for each input, and none for a task.
        """
        parts, found = PARTS[self.adapter_config.method], None
        if "learned_adapters" in parts:
            found = self.learned_adapters(task_ids)
        elif "prototypes" in parts:
            found = self._with_own(self.hypernetwork(self.prototypes(task_ids)), task_ids)
        if found is None:
            raise TaskError(f"method '{self.adapter_config.method}' has adapters of inputs, not of tasks")
        return found

    def _with_own(self, weights: AdapterWeights, task_ids: Tensor) -> AdapterWeights:
        if not len(self.own_adapters):
            return weights
        keys = [str(task_id) for task_id in task_ids.tolist()]
        if self.own_adapters.keys().isdisjoint(keys):
            return weights
        return AdapterWeights.cat(
            [self.own_adapters[key]() if key in self.own_adapters else weights.task(i) for i, key in enumerate(keys)]
        )

    @contextmanager
    def adapters_from(self, source: AdapterSource) -> Iterator[None]:
        """A context in which the adapters of a batch's distinct tasks come from `source`, a cache for example."""
        before, self._adapter_source = self._adapter_source, source
        try:
            yield
        finally:
            self._adapter_source = before


def _an_adapter_for_each_row(weights: AdapterWeights) -> BatchState:
    """The state of a batch whose rows have adapters [L, B, ...] of their own."""
    rows = torch.arange(weights.num_tasks, device=next(iter(weights.values())).device)
    return BatchState(weights, Grouping.of(rows, len(rows)))
