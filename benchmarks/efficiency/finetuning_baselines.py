"""Methods of other packages: PEFT's, and full fine-tuning, each as one network for all tasks or as one a task.

PEFT's own defaults hold unless they are set here: LoRA in query and value, IA3 in key, value and the dense layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch

from efficiency.baseline_networks import (
    Encoder,
    Network,
    PromptedEncoder,
    UpperEncoder,
    WholeEncoder,
    trainable_numbers,
)
from efficiency.data import alone, rows_of
from efficiency.experiment import FLOAT32_BYTES, Cell, Outcome, Setting, Trained
from efficiency.training_loop import Fit, fit, task_scores
from hyperadapters.data.examples import TaskData
from hyperadapters.errors import MissingPackageError

Make = Callable[[Setting, int], Encoder]
"""Makes an arm's encoder for so many tasks."""

LORA = {"r": 8, "lora_alpha": 16}
PROMPT_TOKENS = 20


def lora(setting: Setting, num_tasks: int) -> Encoder:
    """PEFT's LoRA."""
    return UpperEncoder(setting, partial(_with_peft, "LoraConfig", LORA))


def ia3(setting: Setting, num_tasks: int) -> Encoder:
    """PEFT's IA3."""
    return UpperEncoder(setting, partial(_with_peft, "IA3Config", {}))


def layer_norms(setting: Setting, num_tasks: int) -> Encoder:
    """PEFT's tuning of the layer norms."""
    return UpperEncoder(setting, partial(_with_peft, "LNTuningConfig", {"target_modules": ["LayerNorm"]}))


def prompt(setting: Setting, num_tasks: int) -> Encoder:
    """PEFT's prompt tuning, from words drawn from the vocabulary."""
    settings = {"num_virtual_tokens": PROMPT_TOKENS, "prompt_tuning_init": "SAMPLE_VOCAB"}
    return PromptedEncoder(setting, partial(_with_peft, "PromptTuningConfig", settings))


def multitask_prompt(setting: Setting, num_tasks: int) -> Encoder:
    """PEFT's multi-task prompt tuning: a shared prompt, times one matrix of rank 1 a task.

    Trained on all tasks at once; the original also distils prompts of single tasks, which PEFT does not.
    """
    settings = {"num_virtual_tokens": PROMPT_TOKENS, "num_tasks": num_tasks}
    return PromptedEncoder(setting, partial(_with_peft, "MultitaskPromptTuningConfig", settings))


def everything(setting: Setting, num_tasks: int) -> Encoder:
    """Full fine-tuning."""
    return WholeEncoder(setting)


def train_shared(make: Make, setting: Setting, cell: Cell, rate: float) -> Trained:
    """Train one network on mixed batches of all tasks."""
    budget = setting.budget(cell)
    network, found = _train(make, setting, cell.tasks, budget.steps, budget.batch_size, rate, cell)
    per_task = network.encoder.per_task + trainable_numbers(network.heads) / len(cell.tasks)
    return Trained(
        validation=_mean(found.scores),
        test=lambda: Outcome(_scores(network, cell.tasks)),
        trainable=trainable_numbers(network),
        trainable_per_task=per_task,
        bytes_per_task=FLOAT32_BYTES * per_task,
        steps=found.steps,
        seconds=found.seconds,
    )


def train_alone(make: Make, setting: Setting, cell: Cell, rate: float) -> Trained:
    """Train one network a task, each with its share of the examples and its own best state."""
    budget = setting.budget(cell)
    shares = budget.steps_alone([len(data.splits["train"]) for data in cell.tasks])
    tasks = [(alone(data),) for data in cell.tasks]
    done = [
        _train(make, setting, task, steps, budget.task_batch_size, rate, cell)
        for task, steps in zip(tasks, shares, strict=True)
    ]

    def test() -> Outcome:
        scores: dict[str, float] = {}
        for (network, _), task in zip(done, tasks, strict=True):
            scores.update(_scores(network, task))
        return Outcome(scores)

    trainable = sum(trainable_numbers(network) for network, _ in done)
    return Trained(
        validation=_mean({name: value for _, found in done for name, value in found.scores.items()}),
        test=test,
        trainable=trainable,
        trainable_per_task=trainable / len(tasks),
        bytes_per_task=FLOAT32_BYTES * trainable / len(tasks),
        steps=sum(found.steps for _, found in done),
        seconds=sum(found.seconds for _, found in done),
    )


def _train(
    make: Make, setting: Setting, tasks: tuple[TaskData, ...], steps: int, batch_size: int, rate: float, cell: Cell
) -> tuple[Network, Fit]:
    torch.manual_seed(cell.seed)
    encoder = make(setting, len(tasks)).to(setting.device)
    network = Network(encoder, tasks, setting.hidden_size)
    train, validation = rows_of(tasks, "train"), rows_of(tasks, "validation")
    if isinstance(encoder, UpperEncoder):
        setting.states.prepare([*train, *validation])
    lengths, budget = setting.texts.lengths(train), setting.budget(cell)
    return network, fit(network, train, validation, lengths, budget, steps, batch_size, rate, cell.seed)


def _scores(network: Network, tasks: tuple[TaskData, ...]) -> dict[str, float]:
    rows = rows_of(tasks, "test")
    return task_scores(network.tasks, rows, network.answers(rows))


def _mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def _with_peft(config: str, settings: dict[str, Any], backbone: Any) -> Any:
    """Put a method of PEFT into an encoder.

    Args:
        config: name of PEFT's class for its settings.
        settings: its arguments.
        backbone: changed in place.

    Raises:
        MissingPackageError: peft is not installed.
    """
    try:
        peft = import_module("peft")
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "This arm needs the package 'peft'. Install it with: pip install 'hyperadapters[bench]'"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about a name that peft uses
        warnings.simplefilter("ignore", UserWarning)  # of peft, which checks layer norms for what its others need
        return peft.get_peft_model(backbone, getattr(peft, config)(task_type="FEATURE_EXTRACTION", **settings))
