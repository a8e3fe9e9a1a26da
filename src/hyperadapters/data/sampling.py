"""Batches of mixed tasks."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

from torch.utils.data import Sampler

Strategy = Literal["proportional", "temperature", "balanced"]

LOOK_AHEAD = 16
WINDOW_ROWS = 16
"""Rows of a task among which those of like length are paired."""
WINDOW_BATCHES = 8
"""Batches among which rows of like length are brought together: more would pad less and mix less."""


class MixedTaskBatchSampler(Sampler[list[int]]):
    """Draws batches in which each task present has at least two rows, so that the contrast has positives.

    Rows are drawn in pairs of one task. "proportional" goes through every row once an epoch, in an order drawn anew
    for each epoch (as the released code does, whose sampler by temperature is commented out). "temperature" and
    "balanced" draw tasks with probability n ** (1 / temperature) and 1, and go through the rows of each task in
    rounds; an epoch then has as many rows as the data, but not each of them once.

    A task's last row of an odd number joins one of its pairs; a task of one row stands alone. Every epoch has the same
    number of batches, as few as hold its pairs, and all about equally full; one may have a row more than `batch_size`
    where only groups of three are left.

    With `lengths`, rows of like length come together, so that little is padded: both rows of a pair, and the pairs of a
    batch. Which rows an epoch holds is not changed, only which of them share a batch. Batches of long rows then come
    from fewer tasks.
    """

    def __init__(
        self,
        task_ids: Sequence[int],
        batch_size: int,
        strategy: Strategy = "proportional",
        temperature: float = 10.0,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Args: task_ids: task of each row of the data set; lengths: tokens of each row; the rest as above."""
        self.batch_size, self.strategy, self.temperature, self.seed = batch_size, strategy, temperature, seed
        self.lengths = lengths
        self.epoch = 0
        self._drawn: tuple[int, list[list[int]]] | None = None
        self._rows: dict[int, list[int]] = {}
        for index, task_id in enumerate(task_ids):
            self._rows.setdefault(task_id, []).append(index)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches are drawn; called by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches())

    def _batches(self) -> list[list[int]]:
        """The batches of the epoch; kept until another epoch is asked for, since the loader asks for their number."""
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
            # Up and down in turn, so that rows of like length meet where one window ends and the next begins.
            ordered += sorted(groups[start : start + window], key=self._longest, reverse=number % 2 == 1)
        batches = _pack(ordered, self.batch_size)
        generator.shuffle(batches)
        return batches

    def _longest(self, group: list[int]) -> int:
        assert self.lengths is not None
        return max(self.lengths[row] for row in group)

    def _shuffled(self, rows: list[int], generator: random.Random) -> list[int]:
        """The rows of a task in a new order; with lengths, rows next to each other are of like length."""
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
    if first == second and count > 1:  # the last of one round and the first of the next
        second = next(rows)
    return [first] if first == second else [first, second]


def _pack(groups: list[list[int]], batch_size: int) -> list[list[int]]:
    """Fill batches in order; where the next group does not fit, take one of those after it that does.

    Counted in pairs, of which every epoch has as many, so that every epoch has as many batches, all about equally full:
    the Trainer counts the batches of the first epoch and would cut a longer one short.
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
