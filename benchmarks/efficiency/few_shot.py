"""What a new task is learned by from a few examples without a model of other tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from efficiency import text_heads
from efficiency.experiment import Cell, Setting
from efficiency.library_methods import OwnLearner
from efficiency.training_loop import Budget, fit
from hyperadapters import Task
from hyperadapters.data.examples import Example, TaskData, label_examples
from hyperadapters.heads.regression import few_shot_probe
from hyperadapters.training.text_heads import regression_examples, set_adapted_heads

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


def lora_texts(
    setting: Setting, task: Task, few: Sequence[Example], inputs: Sequence[Example], seed: int
) -> list[int | float]:
    """Answers to inputs by a LoRA of the task with the heads of `plus`; the arguments are those of `probe_texts`."""
    few, inputs = ([replace(example, task_id=0) for example in rows] for rows in (few, inputs))
    torch.manual_seed(seed)
    cell = Cell(len(few), seed, (TaskData(task, {"train": few, "validation": few}),))
    learner = OwnLearner({"method": "task_adapter", "form": "lora", **text_heads.SETTINGS}, setting, cell)
    lengths, budget = setting.texts.lengths(few), LORA_BUDGET
    fit(learner, few, few, lengths, budget, budget.steps, budget.task_batch_size, LORA_RATE, seed)
    set_adapted_heads(learner.model, learner.head_rows(regression_examples(learner.model, few)))
    return learner.answers(inputs)


BASELINES = {
    "probe_texts": partial(probe_texts, label_names=False),
    "probe_names": partial(probe_texts, label_names=True),
    "lora_texts": lora_texts,
}
"""Each gives its answers to inputs."""
