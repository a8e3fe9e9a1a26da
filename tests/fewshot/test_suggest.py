"""Which rows of a pool are suggested for labelling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import make_method_model, make_model, make_plus_model, stirred, tiny_tokenizer

from hyperadapters import HyperAdapterModel, Task
from hyperadapters.errors import DataError, NotFiniteError, TaskError
from hyperadapters.fewshot.suggest import STRATEGIES, choose, suggest

POOL = [f"good w{i} bad w{7 * i % 20}" for i in range(20)]
PAIRS = [{"text": f"w{i} good", "text_pair": f"w{i // 2} bad"} for i in range(12)]


@pytest.fixture(scope="module")
def model() -> HyperAdapterModel:
    torch.manual_seed(0)
    return stirred(make_plus_model())


def choose_from(probabilities: torch.Tensor, k: int, strategy: Any, vectors: torch.Tensor | None = None) -> Any:
    def of_rows(rows: Any) -> torch.Tensor:
        assert vectors is not None, "the strategy does not need vectors"
        return vectors[list(rows)]

    return choose(probabilities, of_rows, k, strategy)


def blobs(sizes: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors near the axes of a space, as many near each as given, and the axis of each."""
    owners = torch.tensor([axis for axis, size in enumerate(sizes) for _ in range(size)])
    noise = 0.01 * torch.randn(len(owners), len(sizes), generator=torch.Generator().manual_seed(seed))
    return torch.eye(len(sizes))[owners] + noise, owners


# The strategies


def test_margin_takes_the_rows_whose_two_likeliest_labels_are_closest() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.45, 0.44, 0.11], [0.4, 0.3, 0.3], [0.9, 0.05, 0.05]])
    found = choose_from(probabilities, 3, "margin")
    assert [row for row, _ in found] == [1, 2, 0]
    assert [score for _, score in found] == pytest.approx([0.01, 0.1, 0.2], abs=1e-6)


def test_diversity_takes_one_row_of_each_cluster_the_largest_first() -> None:
    vectors, owners = blobs((5, 9, 2, 7))
    found = choose_from(torch.empty(len(vectors), 0), 4, "diversity", vectors)
    assert [int(owners[row]) for row, _ in found] == [1, 3, 0, 2]
    assert [score for _, score in found] == [9, 7, 5, 2]


def test_diversity_fills_up_if_there_are_fewer_distinct_vectors_than_rows_to_choose() -> None:
    vectors = torch.eye(2)[torch.tensor([0, 0, 0, 1, 1])]
    rows = [row for row, _ in choose_from(torch.empty(5, 0), 5, "diversity", vectors)]
    assert sorted(rows) == [0, 1, 2, 3, 4]
    assert rows[:2] == [0, 3]


def test_diverse_margin_takes_an_uncertain_row_of_each_cluster() -> None:
    vectors, owners = blobs((40, 40, 40))
    place = torch.arange(120) % 40
    certain = place % 4 != 0  # all but ten of each cluster
    likely = torch.where(certain, 0.95, 0.5 + place / 1000)
    found = choose_from(torch.stack([likely, 1 - likely], dim=1), 3, "diverse_margin", vectors)
    assert sorted(int(owners[row]) for row, _ in found) == [0, 1, 2]
    assert not certain[[row for row, _ in found]].any()
    assert [score for _, score in found] == sorted(score for _, score in found)


# Suggestions of a model


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_k_different_rows_are_suggested_and_again_with_the_same_seed(model: HyperAdapterModel, strategy: Any) -> None:
    found = suggest(model, "mood", POOL, 6, strategy, seed=3)
    assert len({one.index for one in found}) == 6
    assert {one.index for one in found} <= set(range(len(POOL)))
    assert found == suggest(model, "mood", POOL, 6, strategy, seed=3)
    assert all(one.reason for one in found)


def test_random_rows_depend_on_the_seed_only(model: HyperAdapterModel) -> None:
    first, again, other = (suggest(model, "mood", POOL, 8, "random", seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert {one.score for one in first} == {None}


def test_margins_are_those_of_the_predictions(model: HyperAdapterModel) -> None:
    probabilities = torch.from_numpy(model.predict_proba(POOL, "mood")).sort(dim=1, descending=True).values
    margins = probabilities[:, 0] - probabilities[:, 1]
    found = suggest(model, "mood", POOL, len(POOL), "margin")
    assert [one.score for one in found] == pytest.approx([float(margins[one.index]) for one in found], abs=1e-5)
    assert [one.score for one in found] == sorted(one.score for one in found if one.score is not None)


def test_the_reason_names_the_two_labels(model: HyperAdapterModel) -> None:
    [found] = suggest(model, "mood", POOL, 1, "margin")
    likely = model.predict_proba([POOL[found.index]], "mood")[0].max()
    assert f"({likely:.2f})" in found.reason
    assert "good" in found.reason
    assert "bad" in found.reason


def test_rows_are_suggested_for_pairs_and_for_regression_tasks(model: HyperAdapterModel) -> None:
    assert len(suggest(model, "same", PAIRS, 4)) == 4
    assert len(suggest(model, "size", POOL, 4)) == 4
    assert suggest(model, "size", POOL, 4) == suggest(model, "size", POOL, 4, "diversity")
    assert len(suggest(model, "size", POOL, 4, "random")) == 4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_duplicates_are_suggested_once_and_rows_without_words_never(model: HyperAdapterModel, strategy: Any) -> None:
    pool = ["good w1", "", "bad w2", " GOOD  w1", "?!", "   ", "Bad w2", "good w3"]
    found = suggest(model, "mood", pool, 8, strategy)  # more than there are: all of them
    assert sorted(one.index for one in found) == [0, 2, 7]


def test_pairs_are_duplicates_only_if_both_texts_are_equal(model: HyperAdapterModel) -> None:
    pool = [("w1", "w2"), ("w2", "w1"), ("w1", "w2"), ("w1", "w3"), ("w1", "...")]
    assert sorted(one.index for one in suggest(model, "same", pool, 5)) == [0, 1, 3]


@pytest.mark.parametrize("method", ["hyperformer", "hyperdecoder"])
def test_methods_without_prototypes_suggest_rows_too(method: str) -> None:
    model = make_method_model("bert", method)
    model.tokenizer = tiny_tokenizer()
    for strategy in STRATEGIES:
        assert len(suggest(model, "mood", POOL, 3, strategy)) == 3


def test_the_model_does_not_change(model: HyperAdapterModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    suggest(model, "mood", POOL, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# What is refused


@pytest.mark.parametrize(("task", "kind"), [("size", "regression"), ("topics", "multi-label")])
@pytest.mark.parametrize("strategy", ["margin", "diverse_margin"])
def test_only_labels_that_exclude_each_other_have_a_margin(task: str, kind: str, strategy: Any) -> None:
    model = make_plus_model([Task.regression("size"), Task.multi_label("topics", ["good", "red"])])
    with pytest.raises(TaskError, match=rf"task '{task}' is a {kind} task.*use 'diversity'"):
        suggest(model, task, POOL, 3, strategy)
    assert len(suggest(model, task, POOL, 3)) == 3


def test_labels_that_do_not_exclude_each_other_are_suggested_by_diversity() -> None:
    several = stirred(make_plus_model([Task.multi_label("topics", ["a"])]))
    assert suggest(several, "topics", POOL, 4) == suggest(several, "topics", POOL, 4, "diversity")
    with pytest.raises(TaskError, match=r"task 'topics' is a multi-label task.*use 'diversity'"):
        suggest(several, "topics", POOL, 4, "margin")


def test_a_backbone_that_writes_is_refused() -> None:
    with pytest.raises(TaskError, match="expected an encoder with task heads, found a backbone that generates text"):
        suggest(make_model("t5"), "mood", POOL, 3)


@pytest.mark.parametrize(
    ("task", "pool", "options", "error", "message"),
    [
        ("moods", POOL, {}, TaskError, "Unknown task 'moods'.*mood"),
        ("mood", POOL, {"strategy": "margins"}, TaskError, "Unknown strategy 'margins'.*margin"),
        ("mood", POOL, {"k": 0}, DataError, "k: expected an integer of 1 or more"),
        ("mood", POOL, {"seed": -1}, DataError, "seed"),
        ("mood", [], {}, DataError, "pool: expected at least one row with words, found none"),
        ("mood", ["", "..."], {}, DataError, "pool: expected at least one row with words, found none"),
        ("mood", ["good", 3], {}, DataError, "input 2: expected a string"),
        ("mood", PAIRS, {}, DataError, "found a text_pair, which task 'mood' does not read"),
        ("same", POOL, {}, DataError, "text_pair"),
    ],
)
def test_what_is_wrong_is_named(
    model: HyperAdapterModel, task: str, pool: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        suggest(model, task, pool, **options)


def test_values_that_are_not_finite_are_an_error() -> None:
    model = stirred(make_plus_model())
    with torch.no_grad():
        model.heads.bias.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(NotFiniteError, match="not a finite number"):
        suggest(model, "mood", POOL, 3)
