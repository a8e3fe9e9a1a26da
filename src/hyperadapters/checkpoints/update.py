"""Bringing the tasks of a loaded model up to date with its checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from hyperadapters.checkpoints.format import read_checkpoint, set_state, stored_digest
from hyperadapters.config import Task
from hyperadapters.errors import CheckpointError, TaskError
from hyperadapters.heads.task_heads import Head, head_size
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.model.tasks import TaskState


def update_model(model: HyperAdapterModel, folder: Path, known: str | None = None) -> str:
    """Bring the tasks of a model up to date with a checkpoint that was written after they were changed elsewhere.

    Batches of other threads see either all tasks of before or all of the checkpoint. Tasks that are not changed give
    the same outputs bit for bit. If an error is raised, the model has not changed.

    Args:
        model: Model that was loaded from an earlier state of the checkpoint.
        folder: Folder of the checkpoint.
        known: Digest of the checkpoint that the model agrees with, for which nothing is done. Default: none.

    Returns:
        Digest of the checkpoint; see `save_model`.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged, or of a model with other settings or another backbone.
    """
    if known is not None and stored_digest(folder) == known:
        return known
    config, state = read_checkpoint(folder)
    if config.model != model.adapter_config or not config.backbone.is_of(model):
        raise CheckpointError(f"{folder}: is of a model with other settings or another backbone; load it anew")
    with model.lock:
        table = model.task_table
        states, before = table.states(), (table.revision, table.versions, table.renamed)
        try:
            table.replace([_blank(model, task) for task in config.tasks])
            set_state(model, config, state)
        except (KeyError, ValueError, RuntimeError, TaskError) as error:
            table.replace(states)
            table.restore(*before)
            raise CheckpointError(f"{folder}: the weights do not fit the model: {error}") from None
    assert config.weights is not None
    return config.weights.sha256


def _blank(model: HyperAdapterModel, task: Task) -> TaskState:
    """Return a state without any effect for a task whose values are set afterwards."""
    prototypes, heads = model.pha.prototypes, model.heads
    head = None
    if heads is not None:
        size = head_size(task)
        head = Head(heads.weight.new_zeros(size, heads.hidden_size), heads.bias.new_zeros(size))
    densities = model.pha.densities
    return TaskState(
        task=task,
        prototype=torch.zeros_like(prototypes.weight[0]),
        centroids=torch.zeros_like(prototypes.centroids[0]),
        threshold=-math.inf,
        density=torch.empty(0) if densities is None else densities.means.new_zeros(densities.means.shape[1] + 1),
        head=head,
        own_adapter=None,
    )
