"""The one training loop of all arms: equal budgets, one schedule, one rule for stopping and for the state that is kept.

AdamW without weight decay, linear warm-up and decay, gradients clipped; the state with the best mean validation score
is kept, and training stops when several evaluations in a row bring no better one. A parameter group may have a phase of
its own, in which it passes through the whole schedule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from efficiency.data import Size
from hyperadapters.config import Task
from hyperadapters.data.examples import Example
from hyperadapters.data.sampling import MixedTaskBatchSampler
from hyperadapters.inference.batches import batches_by_length
from hyperadapters.training.metrics import score
from hyperadapters.training.optimizers import phased_schedule

HEAD_LEARNING_RATE = 3e-3
"""Of the heads, in every arm but those whose heads read directions (`optimizers.DIRECTIONS_LEARNING_RATE`)."""
WARMUP_STEPS = 50
MAX_GRAD_NORM = 1.0
EVAL_BATCH_SIZE = 128


@dataclass(frozen=True)
class Budget:
    """How long an arm trains at a size.

    Attributes:
        steps: of `batch_size` rows, at most.
        batch_size: rows of a mixed batch.
        task_batch_size: rows of a batch where each task is trained alone, so that few examples make enough steps.
        evaluations: on the validation rows, evenly spread over the steps.
        patience: evaluations without a better score after which training stops.
    """

    steps: int
    batch_size: int = 32
    task_batch_size: int = 8
    evaluations: int = 5
    patience: int = 3

    def steps_alone(self, sizes: Sequence[int]) -> list[int]:
        """Steps of each task where all are trained alone: the same examples in all, shared out by their rows.

        Args:
            sizes: training rows of each task.

        Returns:
            Steps of `task_batch_size` rows, at least one a task.
        """
        total = self.steps * self.batch_size // self.task_batch_size
        ends = [total * sum(sizes[: place + 1]) // sum(sizes) for place in range(len(sizes))]
        return [max(1, end - start) for start, end in zip([0, *ends], ends, strict=False)]

    def for_tasks(self, num_tasks: int) -> Budget:
        """The budget of a model of so many tasks: steps in proportion to the root of their number.

        More tasks have more rows to read, but they also share what they learn.
        """
        return replace(self, steps=max(1, round(self.steps * math.sqrt(num_tasks / TASKS_OF_BUDGETS))))


TASKS_OF_BUDGETS = 12
"""Number of tasks for which `BUDGETS` holds, that of the suite `main`."""
BUDGETS: dict[Size, Budget] = {
    16: Budget(250),
    32: Budget(250),
    100: Budget(250),
    500: Budget(800),
    "all": Budget(2500),
}


class Learner(nn.Module):
    """What the loop trains: an arm's network, on examples of the tasks that its examples' task ids count.

    Attributes:
        tasks: by task id.
    """

    tasks: Sequence[Task]

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer, with `rate` where the arm's own learning rate belongs."""
        raise NotImplementedError

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """What is minimised, for a batch."""
        raise NotImplementedError

    def logits(self, examples: Sequence[Example]) -> Tensor:
        """Logits as `TaskHeads.forward` gives them [B, C]."""
        raise NotImplementedError

    @torch.no_grad()
    def answers(self, examples: Sequence[Example]) -> list[int | float]:
        """The label index or number of each example, without dropout."""
        self.eval()
        found: dict[int, int | float] = {}
        for rows in batches_by_length(examples, EVAL_BATCH_SIZE):
            logits = self.logits([examples[row] for row in rows])
            labels, numbers = logits.argmax(dim=1).tolist(), logits[:, 0].tolist()
            for row, label, number in zip(rows, labels, numbers, strict=True):
                is_regression = self.tasks[examples[row].task_id or 0].kind == "regression"
                found[row] = number if is_regression else label
        return [found[row] for row in range(len(examples))]


@dataclass(frozen=True)
class Fit:
    """A finished training.

    Attributes:
        scores: of the kept state on the validation rows, by task name, times 100.
        steps: made until it stopped.
        seconds: with the evaluations on the validation rows.
    """

    scores: dict[str, float]
    steps: int
    seconds: float


def fit(
    learner: Learner,
    train: Sequence[Example],
    validation: Sequence[Example],
    lengths: Sequence[int],
    budget: Budget,
    steps: int,
    batch_size: int,
    rate: float,
    seed: int,
) -> Fit:
    """Train, and leave the learner in its best state.

    Args:
        learner: trained in place.
        train, validation: of all its tasks.
        lengths: tokens of the training examples.
        budget: evaluations and patience.
        steps: at most.
        batch_size: rows of a step.
        rate: learning rate of what is not a head.
        seed: of the batches; what else is random is torch's.
    """
    started = time.monotonic()
    optimizer = torch.optim.AdamW(learner.groups(rate), weight_decay=0.0)
    schedule = phased_schedule(optimizer, lambda step: _share_of_rate(step, steps), steps)
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    batches = _batches([example.task_id or 0 for example in train], lengths, batch_size, seed)
    every = -(-steps // budget.evaluations)
    best, worse, step = -float("inf"), 0, 0
    scores: dict[str, float] = {}
    kept: list[Tensor] = []
    while step < steps and worse < budget.patience:
        learner.train()
        learner.loss([train[row] for row in next(batches)]).backward()
        nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        if step % every and step < steps:
            continue
        found = task_scores(learner.tasks, validation, learner.answers(validation))
        mean = sum(found.values()) / len(found)
        if mean > best:
            best, scores, worse = mean, found, 0
            kept = [parameter.detach().clone() for parameter in trained]
        else:
            worse += 1
    with torch.no_grad():
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    return Fit(scores, step, time.monotonic() - started)


def task_scores(tasks: Sequence[Task], examples: Sequence[Example], answers: Sequence[int | float]) -> dict[str, float]:
    """Main metric of each task that has examples, times 100."""
    found = {}
    for task_id, task in enumerate(tasks):
        rows = [row for row, example in enumerate(examples) if example.task_id == task_id]
        if rows:
            targets = [examples[row].target for row in rows]
            found[task.name] = 100 * score(task, targets, [answers[row] for row in rows])[task.main_metric]
    return found


def _share_of_rate(step: int, steps: int) -> float:
    """Linear up over the first steps, then linear down to nothing."""
    warmup = min(WARMUP_STEPS, steps // 10)
    return (step + 1) / (warmup + 1) if step < warmup else (steps - step) / max(1, steps - warmup)


def _batches(task_ids: Sequence[int], lengths: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    sampler = MixedTaskBatchSampler(task_ids, size, seed=seed, lengths=lengths)
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from sampler
        epoch += 1
