"""Batches of mixed tasks: which rows they hold, how often, and in what company."""

from __future__ import annotations

from collections import Counter

import pytest
from helpers import pairwise
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperadapters.data.sampling import MixedTaskBatchSampler, Strategy

STRATEGIES: tuple[Strategy, ...] = ("proportional", "temperature", "balanced")
no_deadline = settings(deadline=None)
SIZES = st.lists(st.integers(1, 25), min_size=1, max_size=24)


def ids_of(*sizes: int) -> list[int]:
    """Task of each row, for tasks with so many rows."""
    return [task for task, size in enumerate(sizes) for _ in range(size)]


def shares(sampler: MixedTaskBatchSampler, task_ids: list[int], epochs: int) -> dict[int, float]:
    counts: Counter[int] = Counter()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        counts.update(task_ids[row] for batch in sampler for row in batch)
    return {task: count / counts.total() for task, count in sorted(counts.items())}


def lengths_of(task_ids: list[int], grouped: bool) -> list[int] | None:
    """Lengths that differ within a task and between tasks; none where rows are not grouped by length."""
    return [1 + (row * 37) % 50 + 20 * (task % 3) for row, task in enumerate(task_ids)] if grouped else None


@no_deadline
@given(sizes=SIZES, batch_size=st.integers(1, 40), seed=st.integers(0, 3), grouped=st.booleans())
def test_proportional_draws_each_row_once_an_epoch(sizes: list[int], batch_size: int, seed: int, grouped: bool) -> None:
    task_ids = ids_of(*sizes)
    sampler = MixedTaskBatchSampler(task_ids, batch_size, seed=seed, lengths=lengths_of(task_ids, grouped))
    assert sorted(row for batch in sampler for row in batch) == list(range(sum(sizes)))


@no_deadline
@given(
    sizes=SIZES,
    batch_size=st.integers(4, 40),
    strategy=st.sampled_from(STRATEGIES),
    seed=st.integers(0, 3),
    grouped=st.booleans(),
)
def test_only_a_task_of_one_row_is_ever_alone_in_a_batch(
    sizes: list[int], batch_size: int, strategy: Strategy, seed: int, grouped: bool
) -> None:
    task_ids = ids_of(*sizes)
    lengths = lengths_of(task_ids, grouped)
    for batch in MixedTaskBatchSampler(task_ids, batch_size, strategy, seed=seed, lengths=lengths):
        present = Counter(task_ids[row] for row in batch)
        assert all(count >= 2 or sizes[task] == 1 for task, count in present.items())


@no_deadline
@given(sizes=SIZES, batch_size=st.integers(4, 40), strategy=st.sampled_from(STRATEGIES), grouped=st.booleans())
def test_rows_of_a_task_that_has_several_are_different_within_a_pair(
    sizes: list[int], batch_size: int, strategy: Strategy, grouped: bool
) -> None:
    task_ids = ids_of(*sizes)
    for batch in MixedTaskBatchSampler(task_ids, batch_size, strategy, lengths=lengths_of(task_ids, grouped)):
        for task in {task_ids[row] for row in batch}:
            rows = {row for row in batch if task_ids[row] == task}
            assert len(rows) >= 2 or sizes[task] == 1


@no_deadline
@given(sizes=SIZES, batch_size=st.integers(1, 40), strategy=st.sampled_from(STRATEGIES))
def test_no_batch_is_empty_or_larger_than_asked_for(sizes: list[int], batch_size: int, strategy: Strategy) -> None:
    lengths = [len(batch) for batch in MixedTaskBatchSampler(ids_of(*sizes), batch_size, strategy)]
    assert lengths
    assert all(1 <= length <= batch_size + 1 for length in lengths)
    assert sum(length > batch_size for length in lengths) <= sum(size % 2 for size in sizes)


@no_deadline
@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=24),
    batch_size=st.integers(8, 40),
    strategy=st.sampled_from(STRATEGIES),
    grouped=st.booleans(),
)
def test_every_epoch_has_the_same_number_of_batches(
    sizes: list[int], batch_size: int, strategy: Strategy, grouped: bool
) -> None:
    task_ids = ids_of(*sizes)
    sampler = MixedTaskBatchSampler(task_ids, batch_size, strategy, lengths=lengths_of(task_ids, grouped))
    numbers = set()
    for epoch in range(6):
        sampler.set_epoch(epoch)
        numbers.add(len(sampler))
    assert len(numbers) == 1


@pytest.mark.parametrize(
    ("strategy", "sizes", "batch_size", "grouped"),
    pairwise(STRATEGIES, [(40, 60), (41, 61, 7), (3,) * 40, (2, 300)], [4, 5, 8], [False, True]),
)
def test_batches_are_full_or_three_rows_short_at_most(
    strategy: Strategy, sizes: tuple[int, ...], batch_size: int, grouped: bool
) -> None:
    task_ids = ids_of(*sizes)
    sampler = MixedTaskBatchSampler(task_ids, batch_size, strategy, lengths=lengths_of(task_ids, grouped))
    assert min(len(batch) for batch in sampler) >= batch_size - 3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batch_size_one_gives_single_rows(strategy: Strategy) -> None:
    assert {len(batch) for batch in MixedTaskBatchSampler(ids_of(5, 4), 1, strategy)} == {1}


@no_deadline
@given(sizes=SIZES, batch_size=st.integers(1, 40), strategy=st.sampled_from(STRATEGIES), epoch=st.integers(0, 3))
def test_length_is_the_number_of_batches(sizes: list[int], batch_size: int, strategy: Strategy, epoch: int) -> None:
    sampler = MixedTaskBatchSampler(ids_of(*sizes), batch_size, strategy)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(list(sampler))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_same_seed_and_epoch_repeat_the_batches(strategy: Strategy) -> None:
    first, again = (MixedTaskBatchSampler(ids_of(20, 30), 8, strategy, seed=5) for _ in range(2))
    again.set_epoch(3)
    list(again)
    again.set_epoch(0)
    assert list(first) == list(first) == list(again)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_epoch_has_other_batches(strategy: Strategy) -> None:
    sampler = MixedTaskBatchSampler(ids_of(20, 30), 8, strategy)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_seed_has_other_batches(strategy: Strategy) -> None:
    first, other = (list(MixedTaskBatchSampler(ids_of(20, 30), 8, strategy, seed=seed)) for seed in (0, 1))
    assert first != other


def test_batches_mix_the_tasks() -> None:
    task_ids = ids_of(40, 40, 40)
    batches = [{task_ids[row] for row in batch} for batch in MixedTaskBatchSampler(task_ids, 16)]
    assert any(len(tasks) > 1 for tasks in batches)
    assert {task for tasks in batches[: len(batches) // 2] for task in tasks} == {0, 1, 2}


def test_balanced_draws_all_tasks_alike() -> None:
    task_ids = ids_of(20, 200, 1780)
    found = shares(MixedTaskBatchSampler(task_ids, 32, "balanced"), task_ids, epochs=100)
    assert found == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1 / 3}, abs=0.02)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
def test_temperature_draws_tasks_by_a_root_of_their_size(temperature: float) -> None:
    task_ids = ids_of(100, 400, 1500)
    weights = [size ** (1 / temperature) for size in (100, 400, 1500)]
    expected = {task: weight / sum(weights) for task, weight in enumerate(weights)}
    found = shares(MixedTaskBatchSampler(task_ids, 32, "temperature", temperature), task_ids, epochs=100)
    assert found == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("strategy", ["temperature", "balanced"])
def test_drawn_tasks_go_through_all_their_rows_in_rounds(strategy: Strategy) -> None:
    counts = Counter(row for batch in MixedTaskBatchSampler(ids_of(10, 390), 20, strategy) for row in batch)
    of_small_task = [counts[row] for row in range(10)]
    assert min(of_small_task) >= 1
    assert max(of_small_task) - min(of_small_task) <= 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_epoch_has_as_many_rows_as_the_data(strategy: Strategy) -> None:
    assert sum(len(batch) for batch in MixedTaskBatchSampler(ids_of(20, 30), 8, strategy)) == 50


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_of_like_length_share_a_batch_and_every_task_keeps_its_share(strategy: Strategy) -> None:
    task_ids = ids_of(400, 200, 200, 100)
    lengths = lengths_of(task_ids, True)
    assert lengths is not None
    plain = MixedTaskBatchSampler(task_ids, 16, strategy, seed=1)
    grouped = MixedTaskBatchSampler(task_ids, 16, strategy, seed=1, lengths=lengths)

    def padded(sampler: MixedTaskBatchSampler) -> int:
        return sum(len(batch) * max(lengths[row] for row in batch) for batch in sampler)

    assert padded(grouped) < 0.7 * padded(plain)
    assert shares(grouped, task_ids, 20) == pytest.approx(shares(plain, task_ids, 20), abs=0.02)
    tasks_of_batches = [len({task_ids[row] for row in batch}) for batch in grouped]
    assert sum(tasks_of_batches) / len(tasks_of_batches) > 2


def test_batches_by_length_are_drawn_anew_for_each_epoch_and_the_same_for_each_seed() -> None:
    task_ids = ids_of(60, 40)
    lengths = lengths_of(task_ids, True)

    def batches(seed: int, epoch: int) -> list[list[int]]:
        sampler = MixedTaskBatchSampler(task_ids, 8, seed=seed, lengths=lengths)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(0, 0) == batches(0, 0)
    assert {frozenset(batch) for batch in batches(0, 0)} != {frozenset(batch) for batch in batches(0, 1)}
    assert batches(0, 0) != batches(1, 0)
    order = [max(lengths[row] for row in batch) for batch in batches(0, 0)]  # type: ignore[index]
    assert order != sorted(order)
