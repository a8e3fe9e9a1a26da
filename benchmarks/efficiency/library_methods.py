"""The methods of this library: adapters a task or shared, hypernetworks, PHA and its ablations.

They are trained by the loop that trains all other arms too, not by `hyperadapters.Trainer`: all arms have to share
their batches, schedule, evaluations and early stopping, and all read the states and features of one frozen backbone
that were computed once, whereas a Trainer computes those of its own model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from efficiency.baseline_networks import set_target_scales, trainable_numbers
from efficiency.data import rows_of
from efficiency.experiment import Cell, Outcome, Setting, Trained
from efficiency.frozen_states import frozen_copy, key_of, missing_from
from efficiency.training_loop import EVAL_BATCH_SIZE, HEAD_LEARNING_RATE, Learner, fit, task_scores
from hyperadapters import HyperAdapterModel
from hyperadapters.backbones.passes import FrozenOutput
from hyperadapters.checkpoints.format import stored_state
from hyperadapters.config import Lengths, ModelConfig, parse
from hyperadapters.core import masked_mean
from hyperadapters.data.examples import Example
from hyperadapters.inference.batches import batches_by_length
from hyperadapters.model.output import HyperAdapterOutput
from hyperadapters.training.text_heads import HeadRows, regression_examples, set_text_heads
from hyperadapters.training.trainer import DIRECTIONS_LEARNING_RATE

ADAPTER_DIM = 32
RETRIEVER_LEARNING_RATE = 3e-3
"""Of a retriever that only the contrastive losses train, as in the recipes."""
COUNTED_BY_TASK = ("method.prototypes.", "heads.")
"""Parts of which every task has its share."""


def train_own(settings: dict[str, Any], setting: Setting, cell: Cell, rate: float) -> Trained:
    """Train a `HyperAdapterModel`.

    Args:
        settings: of `ModelConfig`, on top of those that all arms of this library share.
        setting: the backbone, the cached states below `first_layer`, and the budgets.
        cell: the tasks with their rows, and the seed.
        rate: learning rate of what is neither head nor retriever.
    """
    torch.manual_seed(cell.seed)
    learner = OwnLearner(settings, setting, cell)
    train, validation, test = (rows_of(cell.tasks, split) for split in ("train", "validation", "test"))
    setting.states.prepare([*train, *validation])
    lengths, budget = setting.texts.lengths(train), setting.budget(cell)
    found = fit(learner, train, validation, lengths, budget, budget.steps, budget.batch_size, rate, cell.seed)
    scores, seconds = found.scores, found.seconds
    if learner.model.adapter_config.head_inputs != "adapted":
        learner.prepare_features([*train, *validation])
        started = time.monotonic()
        learner.fit_text_heads(train, validation)
        scores = task_scores(learner.tasks, validation, learner.answers(validation))
        seconds += time.monotonic() - started
    return Trained(
        validation=sum(scores.values()) / len(scores),
        test=lambda: Outcome(task_scores(learner.tasks, test, learner.answers(test)), learner.routing_accuracy(test)),
        trainable=trainable_numbers(learner),
        trainable_per_task=learner.numbers_by_task / len(cell.tasks),
        bytes_per_task=learner.bytes_by_task / len(cell.tasks),
        steps=found.steps,
        seconds=seconds,
    )


def train_text_heads(setting: Setting, cell: Cell, rate: float | None) -> Trained:
    """What `plus` is without adapters: regressions on what the frozen backbone makes of the texts."""
    learner = OwnLearner({"preset": "plus"}, setting, cell)
    assert learner.model.heads is not None
    learner.model.heads.wide_weight.data.zero_()
    train, validation, test = (rows_of(cell.tasks, split) for split in ("train", "validation", "test"))
    learner.prepare_features([*train, *validation])
    started = time.monotonic()
    learner.fit_text_heads(train, validation)
    seconds = time.monotonic() - started
    scores = task_scores(learner.tasks, validation, learner.answers(validation))
    trained = trainable_numbers(learner.model.heads)
    return Trained(
        validation=sum(scores.values()) / len(scores),
        test=lambda: Outcome(task_scores(learner.tasks, test, learner.answers(test))),
        trainable=trained,
        trainable_per_task=trained / len(cell.tasks),
        bytes_per_task=learner.bytes_of(("heads.",)) / len(cell.tasks),
        steps=0,
        seconds=seconds,
    )


class OwnLearner(Learner):
    """A model of this library, fed with cached states."""

    def __init__(self, settings: dict[str, Any], setting: Setting, cell: Cell) -> None:
        """Args: as `train_own`."""
        super().__init__()
        self.tasks = [data.task for data in cell.tasks]
        shared = {"adapter_dim": ADAPTER_DIM, "feature_layer": setting.first_layer}
        config = parse(ModelConfig, {**shared, **settings})
        lengths = Lengths(input=setting.max_length)
        self.model = HyperAdapterModel(frozen_copy(setting.backbone), self.tasks, config, lengths=lengths)
        assert self.model.heads is not None
        set_target_scales(self.model.heads, cell.tasks)
        self._texts, self._states, self._head_features = setting.texts, setting.states, setting.head_features
        self._reads_texts = False

    @property
    def numbers_by_task(self) -> int:
        """Trained numbers that belong to one task each, in all."""
        named = self.model.named_parameters()
        return sum(p.numel() for name, p in named if p.requires_grad and name.startswith(self._counted_by_task))

    @property
    def bytes_by_task(self) -> int:
        """What a checkpoint has for each task by itself, in all."""
        return self.bytes_of(self._counted_by_task)

    def bytes_of(self, parts: Sequence[str]) -> int:
        """What a checkpoint has for some parts of the model."""
        stored = stored_state(self.model).items()
        return sum(tensor.nbytes for name, tensor in stored if name.startswith(tuple(parts)))

    @property
    def _counted_by_task(self) -> tuple[str, ...]:
        alone = self.model.adapter_config.method == "task_adapter"
        return (*COUNTED_BY_TASK, "method.learned_adapters.") if alone else COUNTED_BY_TASK

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Heads and a retriever that only contrasts have rates of their own."""
        wide = self.model.adapter_config.head_inputs != "adapted"
        rates = {"heads.": DIRECTIONS_LEARNING_RATE if wide else HEAD_LEARNING_RATE}
        if self.model.method.can_route:
            rates["method.retriever."] = RETRIEVER_LEARNING_RATE
        groups = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                own_rate = next((rate for prefix, rate in rates.items() if name.startswith(prefix)), rate)
                groups.append({"params": [parameter], "lr": own_rate})
        return groups

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """The objective."""
        labels = torch.tensor([float(example.target or 0) for example in examples], device=self._texts.device)
        loss: Tensor | None = self._run(examples, labels).loss
        assert loss is not None
        return loss

    def logits(self, examples: Sequence[Example]) -> Tensor:
        """Of each row under its own task [B, C]."""
        return self._run(examples).logits

    @torch.no_grad()
    def fit_text_heads(self, train: Sequence[Example], validation: Sequence[Example]) -> None:
        """Finish the heads as `hyperadapters.train` does, with cached features."""
        logits: dict[int, Tensor] = {}
        self.eval()
        for rows in batches_by_length(validation, EVAL_BATCH_SIZE):
            logits.update(zip(rows, self.logits([validation[row] for row in rows]).cpu(), strict=True))
        checked = HeadRows(validation, self._features(validation), [logits[row] for row in range(len(validation))])
        fitted_to = regression_examples(self.model, train)
        set_text_heads(self.model, HeadRows(fitted_to, self._features(fitted_to)), checked)
        self._reads_texts = True

    @torch.no_grad()
    def routing_accuracy(self, examples: Sequence[Example]) -> float | None:
        """Share of examples whose instance vector is nearest to their own task's prototype."""
        if not self.model.method.can_route:
            return None
        hits = 0
        for rows in batches_by_length(examples, EVAL_BATCH_SIZE):
            batch = [examples[row] for row in rows]
            nearest = self.model.method.prototypes.nearest(self.model.method.retriever(self._frozen(batch).pooled))
            hits += int((nearest == self._task_ids(batch)).sum())
        return hits / len(examples)

    def _run(self, examples: Sequence[Example], labels: Tensor | None = None) -> HyperAdapterOutput:
        inputs, task_ids = self._texts.batch(examples), self._task_ids(examples)
        output: HyperAdapterOutput = self.model(
            **inputs, task_ids=task_ids, labels=labels, frozen_output=self._frozen(examples)
        )
        return output

    def _frozen(self, examples: Sequence[Example]) -> FrozenOutput:
        hidden, mask = self._states.batch(examples)
        features = torch.stack(self._features(examples)).to(hidden.device) if self._reads_texts else None
        return FrozenOutput(hidden, masked_mean(hidden, mask), features)

    def _features(self, examples: Sequence[Example]) -> list[Tensor]:
        """What heads that read texts read of each example [F]; computed once for all arms."""
        self.prepare_features(examples)
        return [self._head_features[key_of(example)] for example in examples]

    @torch.no_grad()
    def prepare_features(self, examples: Sequence[Example]) -> None:
        """Compute what heads that read texts read, for those examples of which it is not known yet."""
        missing = missing_from(self._head_features, examples)
        for rows in batches_by_length(missing, EVAL_BATCH_SIZE):
            batch = [missing[row] for row in rows]
            is_pair = [example.text_pair is not None for example in batch]
            found = self.model.head_features(self._texts.batch(batch), torch.empty(0), is_pair)
            self._head_features.update(zip(map(key_of, batch), found.cpu(), strict=True))

    def _task_ids(self, examples: Sequence[Example]) -> Tensor:
        return torch.tensor([example.task_id for example in examples], device=self._texts.device)
