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
from hyperadapters.core import BottleneckWeights, OwnBottleneck
from hyperadapters.hosts.heads import Head, TaskHeads

if TYPE_CHECKING:
    from hyperadapters.model import HyperAdapterModel


@dataclass
class TaskParts:
    """The parts of a task.

    Attributes:
        task: what it is.
        prototype: [p].
        keys: [K, p], see `core.PrototypeTable`.
        threshold: similarity below which an input routed to it is declined.
        head: for encoder backbones.
        own_adapter: weights of its own [L, 1, ...]; None where the hypernetwork writes them.
    """

    task: Task
    prototype: Tensor
    keys: Tensor
    threshold: float
    head: Head | None
    own_adapter: BottleneckWeights | None


def task_parts(model: HyperAdapterModel) -> list[TaskParts]:
    """The parts of all tasks, in the order of their ids. The tensors are the model's, not copies."""
    own = {int(key): adapter() for key, adapter in model.own_adapters.items()}
    return [
        TaskParts(
            task=task,
            prototype=model.prototypes.weight[task_id].detach(),
            keys=model.prototypes.keys[task_id],
            threshold=float(model.thresholds[task_id]),
            head=None if model.heads is None else model.heads.head(task_id),
            own_adapter=own.get(task_id),
        )
        for task_id, task in enumerate(model.tasks)
    ]


def set_task_parts(model: HyperAdapterModel, parts: Sequence[TaskParts]) -> None:
    """Give a model other tasks. Parameters of tasks are new ones then, which an optimizer does not know.

    Raises:
        TaskError: the model cannot have these tasks; nothing has changed then.
    """
    tasks = tuple(part.task for part in parts)
    model.check_tasks(tasks)
    with torch.inference_mode(False), torch.no_grad():  # everything is made before anything is changed
        weight, keys = torch.stack([part.prototype for part in parts]), torch.stack([part.keys for part in parts])
        thresholds = model.thresholds.new_tensor([part.threshold for part in parts])
        heads = None if model.heads is None else TaskHeads.of(tasks, [part.head for part in parts if part.head])
        own_adapters = nn.ModuleDict(
            {str(index): OwnBottleneck(part.own_adapter) for index, part in enumerate(parts) if part.own_adapter}
        )
        own_adapters.train(model.training)
        if heads is not None:
            heads.train(model.training)
    model.prototypes.replace(weight, keys)
    model.thresholds, model.heads, model.own_adapters = thresholds, heads, own_adapters
    model.tasks = tasks
    model.revision += 1
