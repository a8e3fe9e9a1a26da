"""Cuts and training subsets: seeded, stratified, nested."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperadapters.config import DataConfig, HeldOut, Source, Task, TaskEntry
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.data.loading import load_task, load_tasks, nested_order, subset
from hyperadapters.errors import DataError

MOOD = Task.classification("mood", ["no", "yes"])
SCORE = Task.regression("score")


def rows_of(*counts: int) -> list[Example]:
    """So many rows of label 0, of label 1, ..., one label after the other; the text is the row's number."""
    targets = [label for label, count in enumerate(counts) for _ in range(count)]
    return [Example(0, str(number), None, target) for number, target in enumerate(targets)]


def task_of(*counts: int) -> Task:
    return Task.classification("mood", [f"label{index}" for index in range(len(counts))])


def taken(examples: list[Example], task: Task = MOOD, seed: int = 0, **data: Any) -> list[str]:
    return [example.text for example in subset(examples, task, DataConfig(**data), seed)]


def counts_of(examples: list[Example]) -> dict[Any, int]:
    return dict(Counter(example.target for example in examples))


# Subsets


def test_without_a_size_all_rows_are_kept() -> None:
    assert sorted(taken(rows_of(5, 7)), key=int) == [str(number) for number in range(12)]


@pytest.mark.parametrize("task", [MOOD, SCORE])
def test_smaller_subsets_are_part_of_larger_ones(task: Task) -> None:
    rows = rows_of(30, 50)
    small, middle, large = (set(taken(rows, task, n_train=size)) for size in (10, 20, 50))
    assert (len(small), len(middle), len(large)) == (10, 20, 50)
    assert small < middle < large


def test_fractions_are_nested_and_part_of_all_rows() -> None:
    rows = rows_of(30, 50)
    assert set(taken(rows, fraction=0.1)) < set(taken(rows, fraction=0.5)) < set(taken(rows, fraction=1.0))


@pytest.mark.parametrize(
    ("rows", "fraction", "expected"), [(80, 0.25, 20), (81, 0.25, 21), (80, 1.0, 80), (10, 0.001, 1), (100, 0.07, 7)]
)
def test_fraction_is_rounded_up_to_whole_rows(rows: int, fraction: float, expected: int) -> None:
    assert len(taken(rows_of(rows), SCORE, fraction=fraction)) == expected


def test_size_above_the_number_of_rows_keeps_all() -> None:
    assert len(taken(rows_of(3, 4), n_train=100)) == 7


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_k_per_label_keeps_exactly_so_many_rows_of_each_label(count: int) -> None:
    rows = rows_of(10, 40, 400)
    kept = subset(rows, task_of(10, 40, 400), DataConfig(k_per_label=count), seed=0)
    assert counts_of(kept) == {0: count, 1: count, 2: count}


def test_k_per_label_keeps_all_rows_of_a_label_with_fewer() -> None:
    kept = subset(rows_of(3, 40), MOOD, DataConfig(k_per_label=8), seed=0)
    assert counts_of(kept) == {0: 3, 1: 8}


def test_k_per_label_is_a_number_of_rows_where_there_are_no_labels() -> None:
    assert len(taken(rows_of(40), SCORE, k_per_label=8)) == 8


def test_k_per_label_is_nested() -> None:
    rows = rows_of(30, 50)
    assert set(taken(rows, k_per_label=4)) < set(taken(rows, k_per_label=9))


def test_subset_has_the_labels_in_proportion() -> None:
    kept = subset(rows_of(200, 600), MOOD, DataConfig(n_train=100), seed=0)
    assert counts_of(kept) == {0: 25, 1: 75}


def test_subset_keeps_two_rows_of_a_rare_label() -> None:
    kept = subset(rows_of(3, 997), MOOD, DataConfig(n_train=20), seed=0)
    assert counts_of(kept) == {0: 2, 1: 18}


def test_subset_grows_where_two_rows_of_each_label_need_it() -> None:
    kept = subset(rows_of(20, 20, 1), task_of(20, 20, 1), DataConfig(n_train=2), seed=0)
    assert counts_of(kept) == {0: 2, 1: 2, 2: 1}


def test_same_seed_takes_the_same_rows() -> None:
    assert taken(rows_of(30, 50), seed=3, n_train=10) == taken(rows_of(30, 50), seed=3, n_train=10)


@pytest.mark.parametrize("task", [MOOD, SCORE])
def test_other_seed_takes_other_rows(task: Task) -> None:
    assert set(taken(rows_of(30, 50), task, seed=3, n_train=10)) != set(
        taken(rows_of(30, 50), task, seed=4, n_train=10)
    )


def test_other_task_takes_other_rows() -> None:
    other = Task.regression("other")
    assert taken(rows_of(80), SCORE, n_train=10) != taken(rows_of(80), other, n_train=10)


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=5),
    sizes=st.tuples(st.integers(1, 160), st.integers(1, 160)),
    seed=st.integers(0, 5),
)
def test_subsets_of_any_size_are_nested_and_keep_two_rows_of_each_label(
    counts: list[int], sizes: tuple[int, int], seed: int
) -> None:
    rows, task = rows_of(*counts), task_of(*counts)
    small, large = (subset(rows, task, DataConfig(n_train=size), seed) for size in sorted(sizes))
    assert {example.text for example in small} <= {example.text for example in large}
    least = {label: min(2, count) for label, count in enumerate(counts)}
    found = counts_of(small)
    assert all(found[label] >= count for label, count in least.items())
    assert len(small) == min(max(min(sizes), sum(least.values())), len(rows))


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 20), min_size=2, max_size=4), seed=st.integers(0, 5))
def test_nested_order_names_each_row_once(counts: list[int], seed: int) -> None:
    assert sorted(nested_order(rows_of(*counts), task_of(*counts), seed)) == list(range(sum(counts)))


# Cuts


def load(folder: Path, cut: dict[str, tuple[str, float]], rows: int = 40, seed: int = 0, **data: Any) -> TaskData:
    """A task of so many training and ten validation rows, with splits cut out of them."""
    for split, count in (("train", rows), ("validation", 10)):
        lines = [{"text": f"{split}{number}", "label": ("no", "yes")[number % 2]} for number in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = {"train": str(folder / "train.jsonl")}
    if "validation" not in cut:
        paths["validation"] = str(folder / "validation.jsonl")
    cuts = {split: HeldOut(**{"from": origin, "size": size}) for split, (origin, size) in cut.items()}
    source = Source.model_validate({"path": paths, "held_out": cuts})
    return load_task(TaskEntry(name="mood", source=source), 0, DataConfig(**data), seed)


def texts(found: TaskData, split: str) -> set[str]:
    return {example.text for example in found.splits[split]}  # type: ignore[index]


def test_cut_takes_rows_out_of_the_other_split_and_loses_none(tmp_path: Path) -> None:
    found = load(tmp_path, {"test": ("train", 8)})
    assert len(found.splits["test"]) == 8
    assert texts(found, "train").isdisjoint(texts(found, "test"))
    assert texts(found, "train") | texts(found, "test") == {f"train{number}" for number in range(40)}


def test_cut_below_one_is_a_share(tmp_path: Path) -> None:
    found = load(tmp_path, {"test": ("validation", 0.5)})
    assert (len(found.splits["validation"]), len(found.splits["test"])) == (5, 5)


def test_share_of_a_cut_is_rounded_up_to_whole_rows(tmp_path: Path) -> None:
    assert len(load(tmp_path, {"test": ("train", 0.07)}, rows=100).splits["test"]) == 7


def test_one_split_can_be_cut_twice(tmp_path: Path) -> None:
    found = load(tmp_path, {"validation": ("train", 10), "test": ("train", 10)})
    parts = [texts(found, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [20, 10, 10]
    assert len(set.union(*parts)) == 40


def test_cut_can_be_cut_again(tmp_path: Path) -> None:
    found = load(tmp_path, {"validation": ("train", 10), "test": ("validation", 0.5)})
    assert {split: len(rows) for split, rows in found.splits.items()} == {"train": 30, "validation": 5, "test": 5}


def test_cut_depends_on_the_seed_alone(tmp_path: Path) -> None:
    first, again, other = (texts(load(tmp_path, {"test": ("train", 8)}, seed=seed), "test") for seed in (1, 1, 2))
    assert first == again != other


def test_cut_rows_do_not_depend_on_the_size_of_the_training_subset(tmp_path: Path) -> None:
    small, large = (load(tmp_path, {"test": ("train", 8)}, n_train=size) for size in (6, 20))
    assert texts(small, "test") == texts(large, "test")
    assert texts(small, "train") < texts(large, "train")


@pytest.mark.parametrize("size", [40, 41, 0.99])
def test_cut_that_leaves_nothing_is_refused(tmp_path: Path, size: float) -> None:
    with pytest.raises(DataError, match=f"with {size} rows of train held out for test, one of them is empty"):
        load(tmp_path, {"test": ("train", size)})


def test_cut_of_a_split_that_the_source_gives_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": "no"}\n{"text": "b", "label": "yes"}\n')
    source = Source.model_validate(
        {"path": {"train": str(path), "test": str(path)}, "held_out": {"test": {"from": "train", "size": 1}}}
    )
    with pytest.raises(DataError, match="test is in the source and also in held_out; remove one of them"):
        load_task(TaskEntry(name="mood", source=source), 0, DataConfig(), seed=0)


def test_cut_from_a_split_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="validation is to be held out from test, which has no rows"):
        load(tmp_path, {"validation": ("test", 3)})


# Loading


def test_n_validation_bounds_the_validation_rows(tmp_path: Path) -> None:
    found = load(tmp_path, {}, n_validation=4)
    assert counts_of(found.splits["validation"]) == {0: 2, 1: 2}
    assert len(found.splits["train"]) == 40


def test_n_validation_is_nested_and_seeded(tmp_path: Path) -> None:
    small, large = (texts(load(tmp_path, {}, n_validation=size), "validation") for size in (4, 8))
    assert small < large
    assert texts(load(tmp_path, {}, seed=1, n_validation=4), "validation") != small


def test_test_rows_are_never_reduced(tmp_path: Path) -> None:
    found = load(tmp_path, {"test": ("train", 20)}, n_train=4, n_validation=4)
    assert len(found.splits["test"]) == 20


def test_labels_are_those_of_all_training_rows_also_in_a_small_subset(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": str(number), "label": "rare" if number == 0 else f"l{number % 2}"} for number in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = TaskEntry(name="mood", source=Source(path=str(path)))
    found = load_task(entry, 0, DataConfig(n_train=1), seed=0)
    assert found.task.labels == ("l0", "l1", "rare")
    assert counts_of(found.splits["train"]) == {0: 2, 1: 2, 2: 1}


def test_task_ids_are_the_places_of_the_tasks(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": "no"}\n{"text": "b", "label": "yes"}\n')
    entries = [TaskEntry(name=name, source=Source(path=str(path))) for name in ("one", "two")]
    found = load_tasks(entries, DataConfig(), seed=0)
    assert [{example.task_id for example in data.splits["train"]} for data in found] == [{0}, {1}]
