"""The interface of a method: it selects the task of each row of a batch and gives the rows their adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hyperadapters.config import ModelConfig
from hyperadapters.core import (
    AdapterTensor,
    AdapterWeights,
    Grouping,
    Hypernetwork,
    OrthogonalHypernetwork,
    PrototypicalHypernetwork,
)
from hyperadapters.errors import TaskError, unknown_name

AdapterSource = Callable[[Tensor], AdapterWeights]
"""Gives the adapters [L, U, ...] of distinct tasks [U], as `Method.adapters` does; a cache, for example."""
Route = Literal["nearest", "soft"]
ROUTES = ("nearest", "soft")


class Selection(NamedTuple):
    """The tasks and the adapters of a batch.

    Attributes:
        task_ids: Task of each row [B].
        weights: Adapters of the groups of rows [L, G, ...].
        grouping: Which rows belong to which group.
    """

    task_ids: Tensor
    weights: AdapterWeights
    grouping: Grouping


class Method(nn.Module, ABC):
    """Where the adapters of a batch come from.

    A new method is a subclass in a file of its own and an entry in `methods.METHODS`. Its parameters are those that a
    checkpoint holds under `method.`.

    Attributes:
        config: Settings of the model, with all defaults resolved.
        can_route: Whether the method finds the task of an input.
        can_change_tasks: Whether tasks can be added, refitted and removed after training.
    """

    can_route: ClassVar[bool] = False
    can_change_tasks: ClassVar[bool] = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._adapter_source: AdapterSource | None = None

    def instance_vectors(self, features: Tensor) -> Tensor | None:
        """Compute instance vectors.

        Args:
            features: Pooled hidden states [B, d].

        Returns:
            [B, p]; None for a method without a retriever.
        """
        return None

    def select(self, task_ids: Tensor | None, instances: Tensor | None, route: Route = "nearest") -> Selection:
        """Select the task of each row and its adapters.

        Args:
            task_ids: Task of each row [B]; None only for a method that can route.
            instances: Result of `instance_vectors` [B, p].
            route: How rows without a task get their adapters: "nearest" uses those of the most similar task, "soft"
                generates them from a mixture of the prototypes, weighted by similarity.

        Raises:
            TaskError: `route` is unknown, or rows have no task and the method cannot route.
        """
        if route not in ROUTES:
            raise TaskError(unknown_name("route", route, ROUTES))
        if task_ids is None:
            self.check_can_route()
        return self._select(task_ids, instances, route)

    @abstractmethod
    def _select(self, task_ids: Tensor | None, instances: Tensor | None, route: Route) -> Selection:
        """`select` with checked arguments."""

    def adapters(self, task_ids: Tensor) -> AdapterWeights:
        """Compute the adapters of tasks.

        Args:
            task_ids: [U].

        Returns:
            Weights [L, U, ...].

        Raises:
            TaskError: If the method generates adapters for inputs, not for tasks.
        """
        raise TaskError(f"method '{self.config.method}' generates adapters for inputs, not for tasks")

    def auxiliary_losses(self, instances: Tensor | None, task_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the losses that a method has besides the task loss.

        Args:
            instances: Instance vectors [B, p].
            task_ids: Task of each row [B].

        Returns:
            Instance-contrastive and prototype-contrastive loss, both scalars; 0 where the method does not have one.
        """
        return torch.zeros((), device=task_ids.device), torch.zeros((), device=task_ids.device)

    def check_can_route(self) -> None:
        """Raise TaskError unless the method finds the task of an input."""
        if not self.can_route:
            raise TaskError(f"method '{self.config.method}' cannot route: give each input its task")

    def check_can_change_tasks(self) -> None:
        """Raise TaskError unless tasks can be added, refitted and removed."""
        if not self.can_change_tasks:
            raise TaskError(
                f"method '{self.config.method}' keeps the tasks that it was trained with: only 'pha' can change them"
            )

    @contextmanager
    def adapters_from(self, source: AdapterSource) -> Iterator[None]:
        """A context in which the adapters of a batch's distinct tasks come from `source`."""
        before, self._adapter_source = self._adapter_source, source
        try:
            yield
        finally:
            self._adapter_source = before

    def _of_tasks(self, task_ids: Tensor) -> Selection:
        """Give each row the adapters of its task, generated once for each distinct task of the batch."""
        distinct, rows = task_ids.unique(return_inverse=True)
        weights, grouping = (self._adapter_source or self.adapters)(distinct), Grouping.of(rows, len(distinct))
        if len(grouping.tasks) > len(distinct):
            weights = weights.tasks(grouping.tasks)
        return Selection(task_ids, weights, grouping)


def select_by_row(task_ids: Tensor, weights: AdapterWeights) -> Selection:
    """Give each row an adapter of its own.

    Args:
        task_ids: Task of each row [B].
        weights: Adapter of each row [L, B, ...].
    """
    rows = torch.arange(weights.num_tasks, device=task_ids.device)
    return Selection(task_ids, weights, Grouping.of(rows, len(rows)))


def make_hypernetwork(config: ModelConfig, num_layers: int, tensors: Sequence[AdapterTensor]) -> Hypernetwork:
    """Make the hypernetwork that the settings describe, with fresh weights.

    Args:
        config: Settings of the model.
        num_layers: Number L of layers with generated adapters.
        tensors: The tensors of an adapter in one layer.
    """
    if config.codes == "orthogonal":
        return OrthogonalHypernetwork(num_layers, tensors, config.prototype_dim)
    return PrototypicalHypernetwork(
        num_layers, tensors, config.prototype_dim, config.hidden_dim, starts_as_backbone=config.form == "lora"
    )
