"""The methods of this library: adapters a task or shared, hypernetworks, PHA and its ablations.

They are trained by the loop that trains all other arms too, not by `hyperadapters.Trainer`: all arms have to share
their batches, schedule, evaluations and early stopping, and all read the states and features of one frozen backbone
that were computed once, whereas a Trainer computes those of its own model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from efficiency import text_heads
from efficiency.baseline_networks import set_target_scales, trainable_numbers
from efficiency.data import rows_of
from efficiency.experiment import Cell, Outcome, Setting, Trained
from efficiency.frozen_states import frozen_copy
from efficiency.text_heads import TextHeadsLearner
from efficiency.training_loop import EVAL_BATCH_SIZE, HEAD_LEARNING_RATE, Fit, fit, task_scores
from hyperadapters import HyperAdapterModel
from hyperadapters.backbones.passes import FrozenOutput
from hyperadapters.backbones.text_features import mean_of_texts
from hyperadapters.checkpoints.format import stored_state
from hyperadapters.config import Lengths, ModelConfig, parse
from hyperadapters.core import masked_mean
from hyperadapters.data.examples import Example
from hyperadapters.heads.trained_heads import fit_related_heads
from hyperadapters.inference.batches import batches_by_length
from hyperadapters.methods.base import Selection
from hyperadapters.model.output import HyperAdapterOutput
from hyperadapters.training.optimizers import learning_rates, training_phases
from hyperadapters.training.text_heads import (
    ADAPTER_FACTORS,
    FittedHeads,
    HeadRows,
    choose_heads,
    regression_examples,
    set_text_heads,
    task_rows,
)

ADAPTER_DIM = 32
RETRIEVER_LEARNING_RATE = 3e-3
"""Of a retriever that only the contrastive losses train, as in the recipes."""
HeadFit = Literal["chosen", "related", "own", "trained", "frozen"]
COUNTED_BY_TASK = ("method.prototypes.", "heads.")
"""Parts of which every task has its share."""


def train_own(
    settings: dict[str, Any],
    setting: Setting,
    cell: Cell,
    rate: float,
    heads: HeadFit = "chosen",
    phases: bool = True,
) -> Trained:
    """Train a `HyperAdapterModel`.

    Args:
        settings: of `ModelConfig`, on top of those that all arms of this library share.
        setting: the backbone, the cached states below `first_layer`, and the budgets.
        cell: the tasks with their rows, and the seed.
        rate: learning rate of what has no rate of its own.
        heads: how heads that read adapted texts are fitted after training: "chosen" as `plus` does, "related" without
            the choice between adapted and frozen features, "own" each to the rows of its task alone, "trained" not at
            all, "frozen" to frozen features.
        phases: whether a common adapter is trained before the rest of the hypernetwork, or with it in all steps.
    """
    torch.manual_seed(cell.seed)
    learner = OwnLearner(settings, setting, cell, phases)
    found = _fit(learner, setting, cell, setting.budget(cell).steps, rate)
    return _trained(learner, cell, _finish(learner, setting, cell, found, heads))


def train_shared_then_task(settings: dict[str, Any], setting: Setting, cell: Cell, rate: float) -> Trained:
    """Train an adapter for all tasks for half of the steps, and copies of it, one a task, for the other half.

    The arguments are those of `train_own`; the settings are without the method.
    """
    torch.manual_seed(cell.seed)
    steps = setting.budget(cell).steps
    shared = OwnLearner({**settings, "method": "shared_adapter"}, setting, cell)
    before = _fit(shared, setting, cell, -(-steps // 2), rate)
    learner = OwnLearner({**settings, "method": "task_adapter"}, setting, cell)
    learner.start_from(shared)
    after = _fit(learner, setting, cell, max(1, steps // 2), rate)
    found = replace(after, steps=before.steps + after.steps, seconds=before.seconds + after.seconds)
    return _trained(learner, cell, _finish(learner, setting, cell, found))


def train_heads_alone(setting: Setting, cell: Cell, rate: float | None) -> Trained:
    """Heads on what the frozen backbone makes of each text: those of `plus` without any adapter."""
    learner = OwnLearner({"method": "shared_adapter", **text_heads.SETTINGS}, setting, cell)
    for adapter in learner.model.method.parameters():
        adapter.data.zero_()
    found = _finish(learner, setting, cell, Fit({}, steps=0, seconds=0.0), "frozen")
    trained = trainable_numbers(learner.model.heads)
    return replace(
        _trained(learner, cell, found),
        trainable=trained,
        trainable_per_task=trained / len(cell.tasks),
        bytes_per_task=learner.bytes_of(("heads.",)) / len(cell.tasks),
    )


def _fit(learner: OwnLearner, setting: Setting, cell: Cell, steps: int, rate: float) -> Fit:
    train, validation = rows_of(cell.tasks, "train"), rows_of(cell.tasks, "validation")
    if not learner.model.adapter_config.separates_texts:
        setting.states.prepare([*train, *validation])
    lengths, budget = setting.texts.lengths(train), setting.budget(cell)
    return fit(learner, train, validation, lengths, budget, steps, budget.batch_size, rate, cell.seed)


def _finish(learner: OwnLearner, setting: Setting, cell: Cell, found: Fit, heads: HeadFit = "chosen") -> Fit:
    """Fit heads that read texts, where the learner has such heads."""
    config = learner.model.adapter_config
    if config.head_inputs == "adapted" or heads == "trained":
        return found
    train, validation = rows_of(cell.tasks, "train"), rows_of(cell.tasks, "validation")
    if config.separates_texts:
        started = time.monotonic()
        if heads == "chosen":
            learner.choose_heads(train, validation)
        else:
            learner.fit_heads(train, heads)
        scores = task_scores(learner.tasks, validation, learner.answers(validation))
        return replace(found, scores=scores, seconds=found.seconds + time.monotonic() - started)
    return text_heads.fit_text_heads(
        learner, setting.head_features, train, validation, found, label_names=config.label_names
    )


def _trained(learner: OwnLearner, cell: Cell, found: Fit) -> Trained:
    test = rows_of(cell.tasks, "test")
    return Trained(
        validation=sum(found.scores.values()) / len(found.scores),
        test=lambda: Outcome(task_scores(learner.tasks, test, learner.answers(test)), learner.routing_accuracy(test)),
        trainable=trainable_numbers(learner),
        trainable_per_task=learner.numbers_by_task / len(cell.tasks),
        bytes_per_task=learner.bytes_by_task / len(cell.tasks),
        steps=found.steps,
        seconds=found.seconds,
        model=learner.model,
    )


class OwnLearner(TextHeadsLearner):
    """A model of this library, fed with cached states."""

    def __init__(self, settings: dict[str, Any], setting: Setting, cell: Cell, phases: bool = True) -> None:
        """Args: as `train_own`."""
        super().__init__()
        self._phases = phases
        self.tasks = [data.task for data in cell.tasks]
        shared = {"feature_layer": setting.first_layer}
        if settings.get("form") != "lora":
            shared["adapter_dim"] = ADAPTER_DIM
        config = parse(ModelConfig, {**shared, **settings})
        lengths = Lengths(input=setting.max_length)
        self.model = HyperAdapterModel(frozen_copy(setting.backbone), self.tasks, config, lengths=lengths)
        self.model.tokenizer = setting.texts.tokenizer
        assert self.model.heads is not None
        set_target_scales(self.model.heads, cell.tasks)
        self._texts, self._states, self._head_features = setting.texts, setting.states, setting.head_features
        self._reads_texts = False
        self._factors = [1.0] * len(self.tasks)

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
        config = self.model.adapter_config
        heads = HEAD_LEARNING_RATE if config.head_inputs == "adapted" else None
        retriever = RETRIEVER_LEARNING_RATE if self.model.method.can_route else None
        rates = learning_rates(config, rate, heads, retriever)
        phases = training_phases(config) if self._phases else {"": (0.0, 1.0)}
        groups = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                own_rate = next(rate for prefix, rate in rates.items() if name.startswith(prefix))
                phase = next(phase for prefix, phase in phases.items() if name.startswith(prefix))
                groups.append({"params": [parameter], "lr": own_rate, "phase": phase})
        return groups

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """The objective."""
        labels = torch.tensor([float(example.target or 0) for example in examples], device=self._texts.device)
        loss: Tensor | None = self._run(examples, self._frozen(examples), labels).loss
        assert loss is not None
        return loss

    def logits(self, examples: Sequence[Example]) -> Tensor:
        """Of each row under its own task [B, C]."""
        factors = torch.tensor([self._factors[example.task_id or 0] for example in examples])
        parts = []
        for factor in factors.unique().tolist():
            rows = (factors == factor).nonzero()[:, 0]
            batch = [examples[row] for row in rows.tolist()]
            with self._with_factor(factor):
                parts.append((rows, self._run(batch, self._frozen(batch)).logits))
        if len(parts) == 1:
            return parts[0][1]
        logits = parts[0][1].new_zeros(len(examples), max(part.shape[1] for _, part in parts))
        for rows, part in parts:
            logits[rows, : part.shape[1]] = part
        return logits

    @torch.no_grad()
    def start_from(self, shared: OwnLearner) -> None:
        """Begin with the heads and the adapter of another learner, which has one for all tasks."""
        mine, theirs = (learner.model.method.learned_adapters for learner in (self, shared))
        for name, parameter in mine.named_parameters():
            parameter.copy_(theirs.get_parameter(name).expand_as(parameter))
        self.model.heads.load_state_dict(shared.model.heads.state_dict())

    @torch.no_grad()
    def head_rows(self, examples: Sequence[Example]) -> HeadRows:
        """What the heads read of examples, with the adapters of their tasks."""
        found: dict[int, Tensor] = {}
        self.eval()
        for rows in batches_by_length(examples, EVAL_BATCH_SIZE):
            batch = [examples[row] for row in rows]
            inputs = self._texts.batch_with_texts(batch), self._task_ids(batch)
            found.update(
                zip(rows, self.model.head_inputs(*inputs, frozen_output=self._frozen(batch)).cpu(), strict=True)
            )
        features = [found[row] for row in range(len(examples))]
        return HeadRows(examples, torch.stack(features) if features else torch.empty(0))

    def fit_heads(self, train: Sequence[Example], fit: HeadFit = "related") -> None:
        """Replace heads that read texts without a choice between adapted and frozen features; see `train_own`."""
        of_tasks = task_rows(self.tasks, self.head_rows(regression_examples(self.model, train)))
        groups = [[rows] for rows in of_tasks] if fit == "own" else [of_tasks]
        heads = [head for group in groups for head in fit_related_heads(group, frozen=fit == "frozen")]
        self._factors = [1.0] * len(self.tasks)
        self.model.task_table.set_heads([head.rounded() for head in heads])

    def choose_heads(self, train: Sequence[Example], validation: Sequence[Example]) -> None:
        """Replace heads that read adapted texts by those that `plus` fits after training, with the same choice."""
        examples = regression_examples(self.model, train)
        candidates = []
        for factor in ADAPTER_FACTORS:
            with self._with_factor(factor):
                rows = self.head_rows(examples), self.head_rows(validation)
            candidates.append(FittedHeads.fit(self.tasks, *rows, frozen=factor == 0))
        chosen = choose_heads(self.tasks, candidates)
        heads = [candidates[index].heads[task_id] for task_id, index in enumerate(chosen)]
        self._factors = [ADAPTER_FACTORS[index] for index in chosen]
        self.model.task_table.set_heads([head.rounded() for head in heads])

    @contextmanager
    def _with_factor(self, factor: float) -> Iterator[None]:
        """Multiply the outputs of all adapters, of whatever method, by a factor."""
        method = self.model.method
        select = method.select

        def scaled(*arguments: Any, **options: Any) -> Selection:
            selected = select(*arguments, **options)
            return selected._replace(weights=selected.weights.scaled(factor))

        method.select = scaled
        try:
            yield
        finally:
            del method.select

    def set_text_heads(self, fitted_to: HeadRows, validation: HeadRows) -> None:
        """Replace the heads."""
        set_text_heads(self.model, fitted_to, validation)
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

    def _run(
        self, examples: Sequence[Example], frozen: FrozenOutput, labels: Tensor | None = None
    ) -> HyperAdapterOutput:
        inputs, task_ids = self._texts.batch_with_texts(examples), self._task_ids(examples)
        output: HyperAdapterOutput = self.model(**inputs, task_ids=task_ids, labels=labels, frozen_output=frozen)
        return output

    def _frozen(self, examples: Sequence[Example]) -> FrozenOutput:
        if self.model.adapter_config.separates_texts:
            sequences = self.model.sequences(self._texts.batch_with_texts(examples))
            hidden = self._states.of_sequences(examples, sequences)
            return FrozenOutput(hidden, mean_of_texts(masked_mean(hidden, sequences["attention_mask"]), sequences))
        hidden, mask = self._states.batch(examples)
        features = self._head_features.of(examples).to(hidden.device) if self._reads_texts else None
        return FrozenOutput(hidden, masked_mean(hidden, mask), features)

    def _task_ids(self, examples: Sequence[Example]) -> Tensor:
        return torch.tensor([example.task_id for example in examples], device=self._texts.device)
