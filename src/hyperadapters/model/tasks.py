"""The tasks of a model and everything that belongs to one of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hyperadapters.backbones.architectures import ResolvedArchitecture
from hyperadapters.backbones.checks import check_tasks
from hyperadapters.config import Task, parse
from hyperadapters.core import AdapterWeights, OwnAdapter
from hyperadapters.errors import TaskError, unknown_name
from hyperadapters.heads.task_heads import DEFAULT_THRESHOLD, Head, TaskHeads
from hyperadapters.methods import PHA, Method


@dataclass
class TaskState:
    """Everything that belongs to one task only.

    Attributes:
        task: Definition of the task.
        prototype: Prototype [p].
        centroids: Routing centroids [K, p], where K may be 0; see `core.PrototypeTable`.
        threshold: Similarity below which an input routed to the task is declined.
        density: Mean [r] and number of texts of the task's density, of shape [r + 1]; empty if the model has no
            densities. See `core.TaskDensities`.
        head: Head of the task; None for text-to-text backbones.
        own_adapter: Weights [L, 1, ...] of an adapter of its own; None if the hypernetwork generates the adapter.
        adapter_scale: Factor of the outputs of the generated adapter. Default: 1.
    """

    task: Task
    prototype: Tensor
    centroids: Tensor
    threshold: float
    density: Tensor
    head: Head | None
    own_adapter: AdapterWeights | None
    adapter_scale: float = 1.0


class TaskTable:
    """The tasks of a model in the order of their ids.

    Tasks are changed in this class only. It does not access the parts that all tasks share (retriever, hypernetwork and
    shared adapters), and it copies the states of the other tasks without a change, so that their outputs stay the same
    bit for bit.

    Attributes:
        tasks: Definitions of the tasks.
        renamed: Name under which each renamed task was trained, by its present name.
        revision: Number of changes so far, which a checkpoint contains. Values that were derived from the tasks at
            another revision are outdated.
        versions: Revision at which each task was last changed, by name. A name that is used again never gets an earlier
            version.
    """

    def __init__(
        self, tasks: Sequence[Task], architecture: ResolvedArchitecture, method: Method, heads: TaskHeads | None
    ) -> None:
        """Make a table of the tasks, whose states are held by other parts of the model.

        Args:
            tasks: Checked tasks in the order of their ids.
            architecture: Architecture of the backbone, which determines the tasks that the model can have.
            method: Method with the prototypes, routing centroids, thresholds and own adapters of the tasks.
            heads: Heads of the tasks; None for text-to-text backbones.
        """
        self.tasks = tuple(tasks)
        self.renamed: dict[str, str] = {}
        self.revision = 0
        self.versions = dict.fromkeys((task.name for task in tasks), 0)
        self._architecture, self._method, self._heads = architecture, method, heads
        self._reads_features: tuple[int, bool] | None = None
        self._read_pairs: tuple[tuple[int, torch.device], Tensor] | None = None

    def __len__(self) -> int:
        """Return the number of tasks."""
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        """Iterate over the tasks."""
        return iter(self.tasks)

    def id_of(self, name: str) -> int:
        """Return the id of a task.

        Args:
            name: Name of the task.

        Raises:
            TaskError: If there is no task of this name.
        """
        names = [task.name for task in self.tasks]
        if name not in names:
            raise TaskError(unknown_name("task", name, names))
        return names.index(name)

    def check(self, tasks: Sequence[Task]) -> None:
        """Check that the model can have tasks.

        Args:
            tasks: All tasks that the model is to have, in the order of their ids.

        Raises:
            TaskError: If there is no task, two have the same name, or one does not fit the backbone.
        """
        check_tasks(tasks, self._architecture)

    def changed(self, names: Collection[str] | None = None) -> None:
        """Increase the revision, and give it to changed tasks. Call this after every change of the state of a task.

        Args:
            names: Names of the tasks that have changed. Default: all tasks.
        """
        self.revision += 1
        self.versions = {
            task.name: self.revision if names is None or task.name in names else self.versions.get(task.name, 0)
            for task in self.tasks
        }

    def restore(self, revision: int, versions: Mapping[str, int], renamed: Mapping[str, str]) -> None:
        """Set what a checkpoint says of the changes so far, after its tasks have been set.

        Args:
            revision: Number of changes.
            versions: Revision at which each task was last changed, by name; 0 for tasks that are missing.
            renamed: Name under which each renamed task was trained, by its present name.
        """
        self.revision, self.renamed = revision, dict(renamed)
        self.versions = {task.name: versions.get(task.name, 0) for task in self.tasks}
        self._reads_features = self._read_pairs = None  # the revision need not differ from that of other tasks

    @property
    def head_features_are_read(self) -> bool:
        """Whether any head has weights other than zero for features of the frozen backbone."""
        if self._heads is None:
            return False
        if self._reads_features is None or self._reads_features[0] != self.revision:
            self._reads_features = self.revision, self._heads.reads_features
        return self._reads_features[1]

    def read_pairs(self, device: torch.device) -> Tensor:
        """Return whether each task reads pairs of texts [T].

        Args:
            device: Device of the result.
        """
        if self._read_pairs is None or self._read_pairs[0] != (self.revision, device):
            of_tasks = torch.tensor([task.is_pair for task in self.tasks], device=device)
            self._read_pairs = (self.revision, device), of_tasks
        return self._read_pairs[1]

    def states(self) -> list[TaskState]:
        """Return the states of all tasks in the order of their ids. Tensors are not copied."""
        pha = self._pha
        own = {int(key): adapter() for key, adapter in pha.own_adapters.items()}
        columns = zip(
            self.tasks,
            pha.prototypes.weight.detach().unbind(),
            self._centroids(),
            pha.thresholds.tolist(),
            self._densities(),
            [None] * len(self) if self._heads is None else self._heads.unpack(),
            map(own.get, range(len(self))),
            pha.adapter_scales.tolist(),
            strict=True,
        )
        return [TaskState(*values) for values in columns]

    def replace(self, states: Sequence[TaskState], changed: Collection[str] | None = None) -> None:
        """Replace all tasks. If an error is raised, the model has not changed.

        The parameters of the tasks are new objects afterwards, which an existing optimizer does not update.

        Args:
            states: States of the new tasks in the order of their ids.
            changed: Names of the tasks whose state differs from the present one. Default: all tasks.

        Raises:
            TaskError: If the model cannot have these tasks.
        """
        pha, tasks = self._pha, tuple(state.task for state in states)
        self.check(tasks)
        with torch.inference_mode(False), torch.no_grad():  # everything is made before anything is changed
            weight = torch.stack([state.prototype for state in states])
            thresholds = pha.thresholds.new_tensor([state.threshold for state in states])
            scales = pha.adapter_scales.new_tensor([state.adapter_scale for state in states])
            own_adapters = nn.ModuleDict(
                {str(index): OwnAdapter(state.own_adapter) for index, state in enumerate(states) if state.own_adapter}
            )
            own_adapters.train(pha.training)
            if self._heads is not None:
                self._heads.replace(tasks, [state.head for state in states if state.head])
            pha.prototypes.replace(weight, [state.centroids for state in states])
            if pha.densities is not None:
                rows = torch.stack([state.density for state in states])
                pha.densities.replace(rows[:, :-1], rows[:, -1])
        pha.thresholds, pha.adapter_scales, pha.own_adapters = thresholds, scales, own_adapters
        self.tasks = tasks
        names = {task.name for task in tasks}
        self.renamed = {name: before for name, before in self.renamed.items() if name in names}
        self.changed(changed)

    def _centroids(self) -> Sequence[Tensor]:
        """Return the centroids of each task without the rows of zeros that pad the table."""
        centroids = self._pha.prototypes.centroids
        counts = centroids.any(dim=-1).sum(dim=1).tolist()  # centroids come first, see `PrototypeTable.set_centroids`
        return [of_task[:count] for of_task, count in zip(centroids.unbind(), counts, strict=True)]

    def _densities(self) -> Sequence[Tensor]:
        """Return the mean and the number of texts of each task's density."""
        densities = self._pha.densities
        if densities is None:
            return [torch.empty(0)] * len(self)
        return torch.cat([densities.means, densities.counts[:, None]], dim=1).unbind()

    def remove(self, name: str) -> None:
        """Remove a task. The ids of the following tasks decrease by one, and their outputs stay the same bit for bit.

        Args:
            name: Name of the task.

        Raises:
            TaskError: If the task is unknown or the only one, or the tasks of the method cannot change.
        """
        self._method.check_can_change_tasks()
        task_id = self.id_of(name)
        if len(self) == 1:
            raise TaskError(f"'{name}' is the only task, and a model needs one: add another before removing it")
        states = self.states()
        del states[task_id]
        self.replace(states, changed=())

    def rename(self, name: str, new_name: str) -> None:
        """Give a task another name, and keep the name under which it was trained in `renamed`.

        Args:
            name: Present name of the task.
            new_name: New name of the task.

        Raises:
            TaskError: If the task is unknown, or the new name is invalid or that of another task.
        """
        task_id = self.id_of(name)
        renamed = parse(Task, {**self.tasks[task_id].model_dump(), "name": new_name}, TaskError)
        tasks = (*self.tasks[:task_id], renamed, *self.tasks[task_id + 1 :])
        self.check(tasks)
        self.tasks = tasks
        if (trained_name := self.renamed.pop(name, name)) != new_name:
            self.renamed[new_name] = trained_name
        self.changed((new_name,))

    def set_heads(self, heads: Sequence[Head]) -> None:
        """Replace the heads of all tasks.

        Args:
            heads: Heads in the order of the task ids.

        Raises:
            ValueError: If a head has another number of logits than its task.
        """
        assert self._heads is not None
        self._heads.replace(self.tasks, heads)
        self.changed()

    def set_calibration(self, temperatures: Tensor, error_bounds: Tensor, thresholds: Tensor) -> None:
        """Replace the calibration of all heads; see `heads.task_heads.TaskHeads`.

        Args:
            temperatures: Divisors of the logits [T].
            error_bounds: Confidences and upper limits of the error [T, 2, J].
            thresholds: Probabilities above which labels of multi-label tasks are answers [N].
        """
        assert self._heads is not None
        self._heads.temperature.copy_(temperatures)
        self._heads.error_bounds.copy_(error_bounds)
        self._heads.thresholds.copy_(thresholds)
        self.changed()

    def reset_calibration(self) -> None:
        """Set all temperatures to 1 and all thresholds to one half, and forget all error bounds."""
        assert self._heads is not None
        temperature, bounds = torch.ones_like(self._heads.temperature), torch.ones_like(self._heads.error_bounds)
        self.set_calibration(temperature, bounds, torch.full_like(self._heads.thresholds, DEFAULT_THRESHOLD))

    def set_centroids(self, centroids: Sequence[Tensor]) -> None:
        """Replace the routing centroids of all tasks.

        Args:
            centroids: Centroids [K_t, p] of each task in the order of the ids, where K_t may be 0.
        """
        self._pha.prototypes.set_centroids(centroids)
        self.changed()

    def reset_adapter_scales(self) -> None:
        """Give the generated adapters of all tasks their full effect, so that all tasks are trained alike."""
        self._pha.adapter_scales.fill_(1.0)
        self.changed()

    def fit_densities(self, features: Tensor, owners: Tensor, weights: Tensor, counts: Tensor) -> None:
        """Fit the densities of all tasks' texts.

        Args:
            features: Features of N texts [N, n, d]; see `core.TaskDensities.fit`.
            owners: Task of each text [N].
            weights: Weight of each text [N].
            counts: Number of independent texts of each task [T].
        """
        assert self._pha.densities is not None
        self._pha.densities.fit(features, owners, weights, counts)
        self.changed()

    def set_thresholds(self, thresholds: Tensor) -> None:
        """Replace the routing thresholds of all tasks.

        Args:
            thresholds: Similarities [T] below which an input routed to a task is declined.
        """
        self._pha.thresholds.copy_(thresholds)
        self.changed()

    @property
    def _pha(self) -> PHA:
        self._method.check_can_change_tasks()
        assert isinstance(self._method, PHA)
        return self._method
