"""What a new task is learned by from a few examples without prototypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from efficiency import finetuning_baselines
from efficiency.baseline_networks import Network
from efficiency.experiment import Cell, Setting
from efficiency.library_methods import OwnLearner
from efficiency.text_heads import SETTINGS
from efficiency.training_loop import Budget, Learner, fit
from hyperadapters import HyperAdapterModel, Task
from hyperadapters.data.examples import Example, TaskData, label_examples
from hyperadapters.heads.regression import few_shot_probe
from hyperadapters.inference.batches import batches_by_length, to_device

LORA_BUDGET = Budget(steps=80, evaluations=1)
"""As many steps of 8 rows as a task of twelve has by itself with 100 rows; the last state."""
LORA_RATE = 3e-3


def probe_texts(
    setting: Setting, task: Task, few: Sequence[Example], inputs: Sequence[Example], seed: int, label_names: bool
) -> list[int]:
    """Answers to inputs by a logistic regression on what heads that read texts read.

    Args:
        setting: gives the features.
        task: of the examples.
        few: to learn from.
        inputs: to answer.
        seed: of nothing here.
        label_names: whether the names of labels are examples, too.
    """
    rows = [*few, *(label_examples([task]) if label_names else ())]
    features, of_inputs = (
        np.stack([found.numpy() for found in setting.head_features.of(part)]) for part in (rows, inputs)
    )
    return few_shot_probe(features, [int(row.target or 0) for row in rows], of_inputs)


def probe_shared(model: HyperAdapterModel, few: Sequence[Example], inputs: Sequence[Example]) -> list[int]:
    """Answers to inputs by a logistic regression on what heads read with the one adapter of all tasks.

    Args:
        model: a model of other tasks with the same kind of input.
        few: to learn from.
        inputs: to answer.
    """
    features, of_inputs = (_adapted_features(model, part) for part in (few, inputs))
    return few_shot_probe(features, [int(row.target or 0) for row in few], of_inputs)


@torch.no_grad()
def _adapted_features(model: HyperAdapterModel, examples: Sequence[Example]) -> np.ndarray[Any, Any]:
    found: dict[int, np.ndarray[Any, Any]] = {}
    for rows in batches_by_length(examples, 64, separates_texts=True):
        inputs = to_device(model.collator.inputs([examples[row] for row in rows]), model.device)
        task_ids = torch.zeros(len(rows), dtype=torch.long, device=model.device)
        found |= zip(rows, model.head_inputs(inputs, task_ids).cpu().numpy(), strict=True)
    return np.stack([found[row] for row in range(len(examples))])


def lora(
    setting: Setting, task: Task, few: Sequence[Example], inputs: Sequence[Example], seed: int
) -> list[int | float]:
    """Answers to inputs by PEFT's LoRA with a plain head; the arguments are those of `probe_texts`."""
    few, inputs = _numbered(few), _numbered(inputs)
    torch.manual_seed(seed)
    data = (TaskData(task, {"train": few}),)
    network = Network(finetuning_baselines.lora(setting, 1), data, setting.hidden_size)
    _fit(setting, network, few, seed)
    return network.answers(inputs)


def lora_texts(
    setting: Setting, task: Task, few: Sequence[Example], inputs: Sequence[Example], seed: int
) -> list[int | float]:
    """Answers to inputs by a LoRA with the head of `plus`; the arguments are those of `probe_texts`."""
    few, inputs = _numbered(few), _numbered(inputs)
    torch.manual_seed(seed)
    cell = Cell(len(few), seed, (TaskData(task, {"train": few}),))
    learner = OwnLearner({"method": "shared_adapter", "form": "lora", **SETTINGS}, setting, cell)
    _fit(setting, learner, few, seed)
    learner.fit_heads(few)
    return learner.answers(inputs)


def _numbered(examples: Sequence[Example]) -> list[Example]:
    return [replace(example, task_id=0) for example in examples]


def _fit(setting: Setting, learner: Learner, few: list[Example], seed: int) -> None:
    lengths, budget = setting.texts.lengths(few), LORA_BUDGET
    fit(learner, few, few, lengths, budget, budget.steps, budget.task_batch_size, LORA_RATE, seed)


BASELINES = {
    "probe_texts": partial(probe_texts, label_names=False),
    "probe_names": partial(probe_texts, label_names=True),
    "lora_texts": lora_texts,
}
"""Each gives its answers to inputs."""
SHARED = ("adapter_shared_texts", "lora_shared_texts")
"""Arms with one adapter for all tasks, which `probe_shared` takes for new ones."""
