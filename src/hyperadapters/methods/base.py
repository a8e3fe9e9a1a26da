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
    Processes,
    PrototypicalHypernetwork,
)
from hyperadapters.errors import TaskError, unknown_name

AdapterSource = Callable[[Tensor], AdapterWeights]
"""Function that returns the adapters [L, U, ...] of distinct tasks [U], as `Method.adapters` does."""
Route = Literal["nearest", "soft"]
ROUTES = ("nearest", "soft")


class Assignment(NamedTuple):
    """The tasks of a batch, and which adapter each of its rows gets.

    Attributes:
        task_ids: Id of the task of each row [B].
        weights: Adapters [L, U, ...].
        adapters: Adapter of each row [B], as an index from 0 to U - 1. Every adapter has at least one row.
    """

    task_ids: Tensor
    weights: AdapterWeights
    adapters: Tensor


class Selection(NamedTuple):
    """The tasks and the adapters of a batch.

    Attributes:
        task_ids: Id of the task of each row [B].
        weights: Adapters of the groups of sequences [L, G, ...].
        grouping: Assignment of the sequences to groups.
    """

    task_ids: Tensor
    weights: AdapterWeights
    grouping: Grouping


class Method(nn.Module, ABC):
    """Interface of the methods, which select the tasks of the rows of a batch and give the rows their adapters.

    A new method is a subclass in a file of its own, with an entry in `methods.METHODS` and its name in `config.model`.
    A method that can route is a subclass of `PHA`, because routing and new tasks use the prototypes, centroids and
    thresholds of `PHA`. In a checkpoint, the names of the parameters of a method start with `method.`.

    Attributes:
        config: Settings of the model with all defaults resolved.
        can_route: Whether the method can find the task of an input.
        can_change_tasks: Whether tasks can be added, refitted and removed after training.
    """

    can_route: ClassVar[bool] = False
    can_change_tasks: ClassVar[bool] = False

    def __init__(self, config: ModelConfig) -> None:
        """Set up the parts that all methods have in common.

        Args:
            config: Settings of the model with all defaults resolved.
        """
        super().__init__()
        self.config = config
        self._adapter_source: AdapterSource | None = None

    def instance_vectors(self, features: Tensor) -> Tensor | None:
        """Compute instance vectors.

        Args:
            features: Pooled hidden states [B, d].

        Returns:
            Instance vectors [B, p]; None for a method without a retriever.
        """
        return None

    def select(
        self,
        task_ids: Tensor | None,
        instances: Tensor | None,
        route: Route = "nearest",
        rows: Tensor | None = None,
        similarity: Tensor | None = None,
    ) -> Selection:
        """Select the task of each row and its adapters.

        Args:
            task_ids: Id of the task of each row [B]; None to use the most similar tasks.
            instances: Result of `instance_vectors` [B, p].
            route: Adapters of the rows if `task_ids` is None. "nearest" (default) uses those of the most similar task,
                "soft" generates them from a mixture of the prototypes, weighted by similarity.
            rows: Row of each sequence [R] that passes through the backbone, where every row has at least one sequence.
                Default: row i is sequence i.
            similarity: Similarity of each row to each task [B, T]. Default: computed from `instances` if it is needed.

        Returns:
            Tasks of the rows, and adapters of the sequences.

        Raises:
            TaskError: `route` is unknown, or rows have no task and the method cannot route.
        """
        if route not in ROUTES:
            raise TaskError(unknown_name("route", route, ROUTES))
        if task_ids is None:
            self.check_can_route()
        selected, weights, adapters = self._select(task_ids, instances, route, similarity)
        grouping = Grouping.of(adapters if rows is None else adapters[rows], weights.num_tasks)
        if len(grouping.tasks) > weights.num_tasks:
            weights = weights.tasks(grouping.tasks)
        return Selection(selected, weights, grouping)

    @abstractmethod
    def _select(
        self, task_ids: Tensor | None, instances: Tensor | None, route: Route, similarity: Tensor | None
    ) -> Assignment:
        """Select the task and the adapter of each row. The arguments are those of `select`, and have been checked."""

    def adapters(self, task_ids: Tensor) -> AdapterWeights:
        """Compute the adapters of tasks.

        Args:
            task_ids: Ids of the tasks [U].

        Returns:
            Weights [L, U, ...].

        Raises:
            TaskError: If the method generates adapters for inputs, not for tasks.
        """
        raise TaskError(f"method '{self.config.method}' generates adapters for inputs, not for tasks")

    def auxiliary_losses(
        self, instances: Tensor | None, task_ids: Tensor, processes: Processes
    ) -> tuple[Tensor, Tensor]:
        """Compute the losses of the method besides the task loss.

        Args:
            instances: Instance vectors [B, p]; None for a method without a retriever.
            task_ids: Id of the task of each row [B].
            processes: Processes that share the batch.

        Returns:
            Instance-contrastive and prototype-contrastive loss, both scalars. A loss that the method does not have is
            zero.
        """
        return torch.zeros((), device=task_ids.device), torch.zeros((), device=task_ids.device)

    def check_can_route(self) -> None:
        """Check that the method can find the task of an input.

        Raises:
            TaskError: If it cannot.
        """
        if not self.can_route:
            raise TaskError(f"method '{self.config.method}' cannot route: give each input its task")

    def check_can_change_tasks(self) -> None:
        """Check that tasks can be added, refitted and removed after training.

        Raises:
            TaskError: If they cannot.
        """
        if not self.can_change_tasks:
            raise TaskError(
                f"method '{self.config.method}' keeps the tasks that it was trained with: only 'pha' can change them"
            )

    @contextmanager
    def adapters_from(self, source: AdapterSource) -> Iterator[None]:
        """Return a context in which the adapters of the distinct tasks of a batch are computed by another function.

        Args:
            source: Function that replaces `adapters`.
        """
        before, self._adapter_source = self._adapter_source, source
        try:
            yield
        finally:
            self._adapter_source = before

    def _of_tasks(self, task_ids: Tensor) -> Assignment:
        """Give each row the adapters of its task, generated once for each distinct task of the batch."""
        distinct, adapters = task_ids.unique(return_inverse=True)
        return Assignment(task_ids, (self._adapter_source or self.adapters)(distinct), adapters)


def select_by_row(task_ids: Tensor, weights: AdapterWeights) -> Assignment:
    """Give each row an adapter of its own.

    Args:
        task_ids: Id of the task of each row [B].
        weights: Adapter of each row [L, B, ...].

    Returns:
        Assignment of B adapters to one row each.
    """
    return Assignment(task_ids, weights, torch.arange(weights.num_tasks, device=task_ids.device))


def make_hypernetwork(config: ModelConfig, num_layers: int, tensors: Sequence[AdapterTensor]) -> Hypernetwork:
    """Make a hypernetwork with fresh weights.

    Args:
        config: Settings of the model with all defaults resolved.
        num_layers: Number L of layers with generated adapters.
        tensors: Tensors of an adapter in one layer.

    Returns:
        The hypernetwork of the settings `codes` and `common_adapter`.
    """
    hypernetwork: Hypernetwork
    if config.codes == "orthogonal":
        hypernetwork = OrthogonalHypernetwork(num_layers, tensors, config.prototype_dim)
    else:
        hypernetwork = PrototypicalHypernetwork(
            num_layers, tensors, config.prototype_dim, config.hidden_dim, starts_as_backbone=config.form == "lora"
        )
    if config.common_adapter:
        hypernetwork.add_common_adapter(num_layers)
    return hypernetwork
