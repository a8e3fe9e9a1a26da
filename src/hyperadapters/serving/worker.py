"""The process in which tasks are fitted, so that predictions are not stalled.

The worker has a model of its own. It changes one task, and writes all tasks to the folder in one step. If another
process has changed the folder meanwhile, the fitted task is added to the tasks that are there now.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

from hyperadapters.checkpoints.card import read_scores, write_card
from hyperadapters.checkpoints.format import save_model
from hyperadapters.config import Task
from hyperadapters.errors import ConflictError, HyperAdaptersError, OutputError, TaskError
from hyperadapters.inference.batches import best_device
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.model.tasks import TaskState
from hyperadapters.serving.served_model import refresh, task_digests

ATTEMPTS = 100
"""Number of times that a change is written anew because another process has changed the folder meanwhile."""
NICENESS = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """A change of one task.

    Attributes:
        action: What is to be done.
        name: Name of the task.
        task: Definition of a new task.
        examples: Examples of a task that is fitted.
        options: Further arguments of `add_task` or `refit_task`.
        threshold: New threshold of routing; None to decline no input.
    """

    action: Literal["add", "refit", "remove", "set_threshold"]
    name: str
    task: Task | None = None
    examples: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    threshold: float | None = None


Report = dict[str, Any] | None


def run_worker(folder: Path, connection: Connection) -> None:
    """Make the changes that arrive through a connection, until it is closed.

    Args:
        folder: Folder of the checkpoint.
        connection: Connection through which `Change` objects come, and pairs are sent: ("stage", name of the stage),
            ("storing", digest of the task that will be stored), ("done", report of the fit) or ("failed", message).
    """
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends this process when it is stopped itself
    torch.set_num_threads(1)
    logging.getLogger("torchao").setLevel(logging.ERROR)
    threading.Thread(target=_end_with_server, daemon=True).start()
    try:
        editor = FolderEditor(folder)
        while True:
            try:
                change = connection.recv()
            except EOFError:
                return
            try:
                connection.send(("done", editor.change(change, lambda *message: connection.send(message))))
            except HyperAdaptersError as error:
                connection.send(("failed", str(error)))
    except BrokenPipeError:  # the server has ended
        return


def _end_with_server() -> None:
    """End this process when the server has ended, also in the middle of a fit."""
    server = multiprocessing.parent_process()
    if server is not None:
        server.join()
        os._exit(1)


class FolderEditor:
    """A model whose tasks can be changed together with those of the folder that it was loaded from."""

    def __init__(self, folder: Path) -> None:
        """Load the model.

        Args:
            folder: Folder of the checkpoint.

        Raises:
            CheckpointError: If the checkpoint is missing or damaged, or belongs to another backbone.
        """
        self._folder = folder
        self._model = HyperAdapterModel.from_pretrained(folder).to(best_device())
        self._known: str | None = None

    def change(self, change: Change, tell: Callable[[str, str], None]) -> Report:
        """Change one task in the folder.

        Args:
            change: The change.
            tell: Function that is called with "stage" and the name of each stage, and with "storing" and the digest of
                the task before it is stored, "" for a task that is removed.

        Returns:
            Report of the fit; None if nothing was fitted.

        Raises:
            ConflictError: If other processes change the folder all the time. Another error is raised if the change is
                not possible. The folder has not been changed then.
        """
        report, fitted, version = None, None, None
        for _ in range(ATTEMPTS):
            tell("stage", "reading the tasks")
            base = refresh(self._model, self._folder, self._known)
            self._known = None  # until the model and the folder agree again
            try:
                if fitted is not None:
                    _insert(self._model, change, fitted, version)
                elif change.action in ("add", "refit"):
                    tell("stage", "fitting")
                    version = self._model.task_table.versions.get(change.name)
                    report = _fit(self._model, change)
                    fitted = _copied(self._model.task_table.states()[self._model.task_id(change.name)])
                else:
                    _edit(self._model, change)
                tell("stage", "saving")
                tell("storing", task_digests(self._model).get(change.name, ""))
                self._known = save_model(self._model, self._folder, replaces=base)
            except ConflictError:
                continue
            try:
                write_card(self._model, self._folder, str(self._folder), scores=read_scores(self._folder))
            except OutputError as error:  # the change has been stored
                logger.warning("the model card is outdated: %s", error)
            return report
        raise ConflictError(f"{self._folder}: other processes change the tasks all the time; try again later")


def _fit(model: HyperAdapterModel, change: Change) -> Report:
    """Add or refit the task."""
    if change.action == "add":
        assert change.task is not None
        found = model.add_task(change.task, change.examples, **change.options)
    else:
        found = model.refit_task(change.name, change.examples, **change.options)
    return {
        "examples": found.examples,
        "fit": found.fit,
        "init": found.init,
        "nearest_task": found.neighbours[0].task if found.neighbours else None,
        "similarity": found.neighbours[0].similarity if found.neighbours else None,
        "adapter_scale": found.adapter_scale,
        "name_weight": found.name_weight,
        "steps": found.steps,
        "stopping": found.stopping,
        "seconds": round(found.seconds, 3),
    }


def _insert(model: HyperAdapterModel, change: Change, fitted: TaskState, version: int | None) -> None:
    """Add or replace a task that has been fitted already, when it had a version or did not exist."""
    states = model.task_table.states()
    if model.task_table.versions.get(change.name) != version:
        raise TaskError(
            f"task '{change.name}' was added, changed or removed by another process meanwhile; send the change again "
            "if it is still wanted"
        )
    position = len(states) if change.action == "add" else model.task_id(change.name)
    states[position : position + 1] = [fitted]
    model.task_table.replace(states, changed=(change.name,))


def _edit(model: HyperAdapterModel, change: Change) -> None:
    """Remove a task, or set its threshold."""
    if change.action == "remove":
        model.remove_task(change.name)
        return
    states = model.task_table.states()
    states[model.task_id(change.name)].threshold = -inf if change.threshold is None else change.threshold
    model.task_table.replace(states, changed=(change.name,))


def _copied(state: TaskState) -> TaskState:
    """Copy the state of a task, because its tensors are overwritten when the folder is read again."""
    copied: TaskState = copy.deepcopy(state)
    return copied
