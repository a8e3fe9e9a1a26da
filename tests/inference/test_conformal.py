"""Thresholds with a guarantee for finite samples."""

from __future__ import annotations

import math

import pytest
import torch

from hyperadapters.inference.conformal import conformal_threshold, rejecting_threshold

RATES = [0.0, 0.01, 0.05, 0.1, 0.3, 0.9]
COUNTS = [1, 5, 19, 20, 99, 100]


def places(count: int) -> list[tuple[float, torch.Tensor]]:
    """Each of N + 1 numbers with the others in any order: an exchangeable input is as likely at any of these places."""
    values = torch.arange(1.0, count + 2)
    others = [torch.cat([values[:place], values[place + 1 :]])[torch.randperm(count)] for place in range(count + 1)]
    return list(zip(values.tolist(), others, strict=True))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("count", COUNTS)
def test_of_all_places_of_a_further_input_at_most_the_bound_lies_below_the_threshold(count: int, rate: float) -> None:
    found = [(value, *conformal_threshold(others, rate)) for value, others in places(count)]
    share = sum(value < threshold for value, threshold, _ in found) / (count + 1)
    [bound] = {bound for _, _, bound in found}
    assert bound - 1.5 / (count + 1) < share <= bound + 1e-12  # no lower than it has to be
    assert bound <= max(rate, 1 / (count + 1)) + 1e-12


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("count", COUNTS)
def test_at_most_the_given_share_of_places_exceeds_a_rejecting_threshold(count: int, rate: float) -> None:
    share = sum(value > rejecting_threshold(others, rate) for value, others in places(count)) / (count + 1)
    assert share <= rate + 1e-12


def test_too_few_inputs_show_nothing_about_foreign_ones() -> None:
    assert rejecting_threshold(torch.arange(18.0), 0.05) == math.inf
    assert rejecting_threshold(torch.arange(19.0), 0.05) == 18.0
    assert rejecting_threshold(torch.empty(0), 0.5) == math.inf
