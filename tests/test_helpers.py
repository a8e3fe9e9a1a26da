"""The helpers of the tests that have something to get wrong."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from fuzzing import changed
from helpers import pairwise


@pytest.mark.parametrize("sizes", [(3,), (2, 3), (12, 2, 3), (3, 4, 3, 2)])
def test_a_pairwise_choice_has_every_pair_and_no_more_than_the_grid(sizes: tuple[int, ...]) -> None:
    axes = [[f"{axis}{value}" for value in range(size)] for axis, size in enumerate(sizes)]
    chosen = pairwise(*axes)
    assert len(chosen) == len(set(chosen))
    assert set(chosen) <= set(product(*axes))
    for first, second in combinations(range(len(axes)), 2):
        assert {(row[first], row[second]) for row in chosen} == set(product(axes[first], axes[second]))


def test_a_pairwise_choice_is_small_where_the_grid_is_large() -> None:
    assert len(pairwise(range(12), range(2), range(3))) == 36  # of 72; fewer have not all pairs of 12 and 3
    assert len(pairwise(range(3), range(4), range(3), range(2))) <= 14  # of 72


def test_altered_values_stay_values_of_json() -> None:
    """An index of a list that was replaced by a mapping is no key of it."""
    assert changed({"a": [1]}, [(("a",), {"b": None}), (("a", 0), 2)]) == {"a": {"b": None}}
    assert changed({"a": [1, 3]}, [(("a", 0), 2), (("a", 5), 2)]) == {"a": [2, 3]}
