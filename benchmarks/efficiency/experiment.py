"""What all arms are given, and what each of them gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from efficiency.data import MAX_LENGTHS, Size, Suite, load
from efficiency.frozen_states import Key, States, Texts
from efficiency.text_heads import HeadFeatures
from efficiency.training_loop import BUDGETS, Budget
from hyperadapters import HyperAdapterModel
from hyperadapters.backbones.loading import load_backbone, load_tokenizer
from hyperadapters.data.examples import TaskData

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass
class Setting:
    """What the cells of a process share.

    Attributes:
        data: folder of the tasks.
        suite: whose tasks are learned.
        backbone_name: on the Hub, or a folder.
        device: "cpu" or "cuda".
        first_layer: number of layers, from below, that no arm changes that puts adapters into layers.
        budgets: by training size, for a model of `training_loop.TASKS_OF_BUDGETS` tasks.
        max_length: tokens of an input.
        load: gives the tasks of a folder and suite at a size, drawn by a seed.
        features: of the linear probe [d], by text; filled as they are needed.
    """

    data: Path
    suite: Suite = "main"
    backbone_name: str = MINILM
    device: str = "cpu"
    first_layer: int = 3
    budgets: Mapping[Size, Budget] = field(default_factory=lambda: BUDGETS)
    max_length: int = MAX_LENGTHS["main"]
    load: Callable[[Path, Suite, Size, int], tuple[TaskData, ...]] = load
    features: dict[Key, np.ndarray[Any, Any]] = field(default_factory=dict)

    def budget(self, cell: Cell) -> Budget:
        """How long an arm trains on a cell."""
        return self.budgets[cell.n].for_tasks(len(cell.tasks))

    @cached_property
    def backbone(self) -> nn.Module:
        """The frozen encoder, in evaluation mode; arms work on copies."""
        return load_backbone(self.backbone_name).to(self.device).requires_grad_(False)

    @property
    def hidden_size(self) -> int:
        """Size d of the backbone's hidden states."""
        config: Any = self.backbone.config
        return int(config.hidden_size)

    @cached_property
    def texts(self) -> Texts:
        """Tokens of all examples."""
        return Texts(load_tokenizer(self.backbone_name), self.max_length, self.device)

    @cached_property
    def states(self) -> States:
        """Hidden states below the adapted layers."""
        return States(self.backbone, self.texts, self.first_layer)

    @cached_property
    def head_features(self) -> HeadFeatures:
        """What heads that read texts read of examples."""
        return HeadFeatures(self.backbone, self.texts)


@dataclass(frozen=True)
class Cell:
    """What an arm is to be trained on.

    Attributes:
        n: training rows a task.
        seed: of data, initial weights, batches and dropout.
        tasks: with their rows; the task ids of the examples count them.
    """

    n: Size
    seed: int
    tasks: tuple[TaskData, ...]


class Outcome(NamedTuple):
    """Scores of the test rows by task name, times 100; share of them nearest to their own task, if the arm routes."""

    scores: dict[str, float]
    routing_accuracy: float | None = None


FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Trained:
    """A trained arm.

    Attributes:
        validation: mean over tasks of the main metric on the validation rows, times 100.
        test: reads the test rows; called once, and only of the arm that was chosen.
        trainable: numbers that were trained in all.
        trainable_per_task: of these, those that one task more would add, its head included; the mean over the tasks.
        bytes_per_task: what is stored for them.
        steps: of the optimizer; the sum over tasks that are trained alone.
        seconds: of the training, without what is read and cached before it.
        model: of this library, for an arm that is one.
    """

    validation: float
    test: Callable[[], Outcome]
    trainable: int
    trainable_per_task: float
    bytes_per_task: float
    steps: int
    seconds: float
    model: HyperAdapterModel | None = None
