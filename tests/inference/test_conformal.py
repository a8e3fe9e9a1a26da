"""Thresholds with a guarantee for finite samples."""

from __future__ import annotations

import math

import pytest
import torch

from hyperadapters.inference.conformal import conformal_threshold, rejecting_threshold

RATES = [0.0, 0.01, 0.05, 0.1, 0.3, 0.9]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("count", [1, 5, 19, 20, 99, 100])
def test_of_all_places_of_a_further_input_at_most_the_bound_lies_below_the_threshold(count: int, rate: float) -> None:
    """An exchangeable input is as likely at any of the N + 1 places between the others, so all of them are tried."""
    values = torch.arange(1.0, count + 2)
    below = 0
    for place in range(count + 1):
        others = torch.cat([values[:place], values[place + 1 :]])
        threshold, bound = conformal_threshold(others[torch.randperm(count)], rate)
        below += int(float(values[place]) < threshold)
    assert below / (count + 1) <= bound + 1e-12
    assert bound <= max(rate, 1 / (count + 1)) + 1e-12
    assert below / (count + 1) > bound - 1.5 / (count + 1)  # no lower than it has to be


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("count", [1, 5, 19, 20, 99, 100])
def test_at_most_the_given_share_of_places_exceeds_a_rejecting_threshold(count: int, rate: float) -> None:
    values = torch.arange(1.0, count + 2)
    above = 0
    for place in range(count + 1):
        others = torch.cat([values[:place], values[place + 1 :]])
        above += int(float(values[place]) > rejecting_threshold(others[torch.randperm(count)], rate))
    assert above / (count + 1) <= rate + 1e-12


def test_too_few_inputs_show_nothing_about_foreign_ones() -> None:
    assert rejecting_threshold(torch.arange(18.0), 0.05) == math.inf
    assert rejecting_threshold(torch.arange(19.0), 0.05) == 18.0
    assert rejecting_threshold(torch.empty(0), 0.5) == math.inf
