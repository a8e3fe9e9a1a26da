"""Sampling of batches with rows of several tasks."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

from torch.utils.data import Sampler

Strategy = Literal["proportional", "temperature", "balanced"]

LOOK_AHEAD = 16
"""Number of groups among which one is sought that fits into the rest of a batch."""
WINDOW_ROWS = 16
"""Number of rows of a task that are sorted by length to form pairs."""
WINDOW_BATCHES = 8
"""Number of batches whose pairs are sorted by length. A larger number would reduce padding and the mixing of tasks."""


class MixedTaskBatchSampler(Sampler[list[int]]):
    """Samples batches in which every task has at least two rows, so that the contrastive loss has positives.

    Rows are sampled in pairs of the same task. "proportional" uses every row once in an epoch, in a new random order in
    each epoch, like the released code (where sampling by temperature is commented out). "temperature" and "balanced"
    sample tasks with weights n ** (1 / temperature) and 1, where n is the number of rows of a task, and use the rows of
    each task in turn. An epoch then has as many rows as the data, but may not contain each of them once.

    If a task has an odd number of rows, its last row joins one of its pairs. A task with a single row contributes
    groups of one row. Every epoch has the same, smallest possible number of batches, which have about equal sizes. A
    batch may have one row more than `batch_size` if only groups of three rows remain.

    With `lengths`, the rows of a pair and the pairs of a batch have similar lengths, which reduces padding. The rows of
    an epoch stay the same. Batches of long rows then contain fewer tasks.

    Several processes that train together divide each batch among them: the batches do not depend on their number.
    """

    def __init__(
        self,
        task_ids: Sequence[int],
        batch_size: int,
        strategy: Strategy = "proportional",
        temperature: float = 10.0,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        """Store the settings.

        Args:
            task_ids: Task of each row of the data set.
            batch_size: Number of rows in a batch of all processes together.
            strategy: Sampling of tasks: "proportional" (default), "temperature" or "balanced".
            temperature: Temperature for strategy "temperature". Default: 10.
            seed: Seed of the random order. Default: 0.
            lengths: Number of tokens of each row. Default: batches do not depend on lengths.
            num_replicas: Number of processes that divide each batch. Default: 1.
            rank: Index of this process.
        """
        self.batch_size, self.strategy, self.temperature, self.seed = batch_size, strategy, temperature, seed
        self.lengths, self.num_replicas, self.rank = lengths, num_replicas, rank
        self.epoch = 0
        self._drawn: tuple[int, list[list[int]]] | None = None
        self._rows: dict[int, list[int]] = {}
        for index, task_id in enumerate(task_ids):
            self._rows.setdefault(task_id, []).append(index)

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch whose batches are sampled, which the data loader calls.

        Args:
            epoch: Index of the epoch.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        """Return the part of this process of each batch, a list of rows.

        If a batch has fewer rows than there are processes, the part of some of them is `[-1 - row]`: a row that only
        serves to take part in the computation.
        """
        return map(self._part, self._batches())

    def _part(self, batch: list[int]) -> list[int]:
        start, end = (len(batch) * rank // self.num_replicas for rank in (self.rank, self.rank + 1))
        return batch[start:end] or [-1 - batch[0]]

    def _batches(self) -> list[list[int]]:
        """Return the batches of the epoch. They are stored because the data loader also asks for their number."""
        if self._drawn is None or self._drawn[0] != self.epoch:
            generator = random.Random(f"{self.seed}/{self.epoch}")
            groups = self._groups_once(generator) if self.strategy == "proportional" else self._groups_drawn(generator)
            self._drawn = self.epoch, self._pack(groups, generator)
        return self._drawn[1]

    def _pack(self, groups: list[list[int]], generator: random.Random) -> list[list[int]]:
        if self.lengths is None:
            return _pack(groups, self.batch_size)
        window = WINDOW_BATCHES * max(1, self.batch_size // 2)
        ordered: list[list[int]] = []
        for number, start in enumerate(range(0, len(groups), window)):
            # The direction alternates, so that lengths are similar where one window ends and the next begins.
            ordered += sorted(groups[start : start + window], key=self._longest, reverse=number % 2 == 1)
        batches = _pack(ordered, self.batch_size)
        generator.shuffle(batches)
        return batches

    def _longest(self, group: list[int]) -> int:
        assert self.lengths is not None
        return max(self.lengths[row] for row in group)

    def _shuffled(self, rows: list[int], generator: random.Random) -> list[int]:
        """Return the rows of a task in a new random order; with lengths, consecutive rows have similar lengths."""
        shuffled = generator.sample(rows, len(rows))
        if self.lengths is None:
            return shuffled
        parts = (shuffled[start : start + WINDOW_ROWS] for start in range(0, len(shuffled), WINDOW_ROWS))
        return [row for part in parts for row in sorted(part, key=self.lengths.__getitem__)]

    def _groups_once(self, generator: random.Random) -> list[list[int]]:
        groups: list[list[int]] = []
        for rows in self._rows.values():
            shuffled = self._shuffled(rows, generator)
            pairs = [shuffled[start : start + 2] for start in range(0, len(shuffled), 2)]
            if len(pairs) > 1 and len(pairs[-1]) == 1:
                last = pairs.pop()
                pairs[-1] += last
            groups += pairs
        generator.shuffle(groups)
        return groups

    def _groups_drawn(self, generator: random.Random) -> list[list[int]]:
        exponent = 0.0 if self.strategy == "balanced" else 1.0 / self.temperature
        tasks = list(self._rows)
        weights = [len(self._rows[task]) ** exponent for task in tasks]
        rounds = {task: self._endless(self._rows[task], generator) for task in tasks}
        total = sum(len(rows) for rows in self._rows.values())
        drawn = generator.choices(tasks, weights, k=max(1, total // 2))
        return [_pair(rounds[task], len(self._rows[task])) for task in drawn]

    def _endless(self, rows: list[int], generator: random.Random) -> Iterator[int]:
        while True:
            yield from self._shuffled(rows, generator)


def _pair(rows: Iterator[int], count: int) -> list[int]:
    first, second = next(rows), next(rows)
    if first == second and count > 1:  # the last row of one round is also the first row of the next
        second = next(rows)
    return [first] if first == second else [first, second]


def _pack(groups: list[list[int]], batch_size: int) -> list[list[int]]:
    """Fill batches in order. If the next group does not fit, the first of the following groups that fits is used.

    Sizes are counted in pairs, whose number is the same in every epoch, so that every epoch has the same number of
    batches. The Trainer counts the batches of the first epoch and would end a longer epoch early.
    """
    waiting = deque(group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size))
    full = max(1, batch_size // 2)
    total = sum(_pairs(group, full) for group in waiting)
    number = -(-total // full)
    batches: list[list[int]] = []
    taken = 0
    while waiting:
        batch: list[int] = []
        end = max(taken + 1, (len(batches) + 1) * total // number)
        while waiting and taken < end:
            sizes = (_pairs(group, full) for group in islice(waiting, LOOK_AHEAD))
            place = next((place for place, size in enumerate(sizes) if size <= end - taken), 0)
            taken += _pairs(waiting[place], full)
            batch += waiting[place]
            del waiting[place]
        batches.append(batch)
    return batches


def _pairs(group: list[int], full: int) -> int:
    return min(full, -(-len(group) // 2))
