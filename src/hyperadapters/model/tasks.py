"""What belongs to one task alone, and a model's tasks as a list of such parts.

Tasks come and go by changing the list. Everything that tasks share (retriever, hypernetwork, shared adapters) is out of
reach here, and a task's parts are copied as they are, so the other tasks' outputs stay the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hyperadapters.config import Task
from hyperadapters.core import AdapterWeights, OwnAdapter
from hyperadapters.heads.task_heads import Head, TaskHeads

if TYPE_CHECKING:
    from hyperadapters.model.model import HyperAdapterModel


@dataclass
class TaskParts:
    """The parts of a task.

    Attributes:
        task: what it is.
        prototype: [p].
        centroids: [any number, p], see `core.PrototypeTable`.
        threshold: similarity below which an input routed to it is declined.
        head: for encoder backbones.
        own_adapter: weights of its own [L, 1, ...]; None where the hypernetwork writes them.
    """

    task: Task
    prototype: Tensor
    centroids: Tensor
    threshold: float
    head: Head | None
    own_adapter: AdapterWeights | None


def task_parts(model: HyperAdapterModel) -> list[TaskParts]:
    """The parts of all tasks, in the order of their ids. The tensors are the model's, not copies."""
    own = {int(key): adapter() for key, adapter in model.own_adapters.items()}
    parts = zip(
        model.tasks,
        model.prototypes.weight.detach().unbind(),
        model.prototypes.centroids.unbind(),
        model.thresholds.tolist(),
        [None] * len(model.tasks) if model.heads is None else model.heads.unpack(),
        map(own.get, range(len(model.tasks))),
        strict=True,
    )
    return [TaskParts(*values) for values in parts]


def set_task_parts(model: HyperAdapterModel, parts: Sequence[TaskParts]) -> None:
    """Give a model other tasks. Parameters of tasks are new ones then, which an optimizer does not know.

    Raises:
        TaskError: the model cannot have these tasks; nothing has changed then.
    """
    tasks = tuple(part.task for part in parts)
    model.check_tasks(tasks)
    with torch.inference_mode(False), torch.no_grad():  # everything is made before anything is changed
        weight = torch.stack([part.prototype for part in parts])
        thresholds = model.thresholds.new_tensor([part.threshold for part in parts])
        heads = [part.head for part in parts if part.head]
        new_heads = (
            None
            if model.heads is None
            else TaskHeads.of(tasks, heads, model.heads.hidden_size, model.heads.features_size)
        )
        own_adapters = nn.ModuleDict(
            {str(index): OwnAdapter(part.own_adapter) for index, part in enumerate(parts) if part.own_adapter}
        )
        own_adapters.train(model.training)
        if new_heads is not None:
            new_heads.train(model.training)
        model.prototypes.replace(weight, [part.centroids for part in parts])
    model.thresholds, model.heads, model.own_adapters = thresholds, new_heads, own_adapters
    model.tasks = tasks
    model.renamed = {name: old for name, old in model.renamed.items() if name in {task.name for task in tasks}}
    model.revision += 1
