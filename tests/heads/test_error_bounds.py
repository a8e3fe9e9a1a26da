"""Bounds on the share of wrong answers above a confidence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from hyperadapters.heads.calibration import FAILURE_RATE, confidence_for, error_bounds
from hyperadapters.heads.task_heads import ERROR_LEVELS


def test_the_limits_are_those_of_clopper_and_pearson() -> None:
    confidences = np.linspace(0.5, 0.99, 80, dtype=np.float32)
    are_right = np.arange(80) % 4 > 0
    levels, limits = error_bounds(confidences, are_right).numpy().astype(float)
    assert (np.diff(levels) < 0).all()
    for level, limit in zip(levels, limits, strict=True):
        answered = confidences > level
        wrong = int((answered & ~are_right).sum())
        # With the limit as the error, so few wrong answers or fewer are as unlikely as allowed. A limit is float32.
        chance = binom.cdf(wrong, answered.sum(), limit)
        assert chance == pytest.approx(FAILURE_RATE / ERROR_LEVELS, rel=1e-3)
    assert [(confidences > level).sum() for level in levels] == list(range(10, 81, 10))


def test_more_certain_answers_that_are_right_have_lower_limits() -> None:
    confidences = np.linspace(0, 1, 400, dtype=np.float32)
    bounds = error_bounds(confidences, confidences > 0.5)
    assert bounds[1, 3] < 0.03 < 0.4 < bounds[1, 7]
    assert confidence_for(bounds, 0.03) == pytest.approx(0.5, abs=0.01)
    assert confidence_for(bounds, 0.9) == 0.0
    assert confidence_for(bounds, 0.001) == math.inf


def test_few_rows_support_little_and_equal_confidences_nothing_above_them() -> None:
    assert confidence_for(error_bounds(np.array([0.9]), np.array([True])), 0.5) == math.inf
    equal = error_bounds(np.full(100, 0.7), np.full(100, True))
    assert equal[1, :-1].tolist() == [1.0] * (ERROR_LEVELS - 1)
    assert equal[1, -1] < 0.05
    wrong = error_bounds(np.linspace(0.1, 0.9, 50), np.full(50, False))
    assert torch.equal(wrong[1], torch.ones(ERROR_LEVELS))


def test_all_limits_hold_together_as_often_as_promised() -> None:
    """The error at confidence c is 1 - c, so above c it is (1 - c) / 2; 400 draws with a fixed seed."""
    generator = np.random.default_rng(0)
    failures = 0
    for _ in range(400):
        confidences = generator.random(200)
        found = error_bounds(confidences, generator.random(200) < confidences).double()
        failures += bool((found[1] < (1 - found[0]) / 2).any())
    assert failures / 400 <= FAILURE_RATE  # four standard deviations above would be 0.16; the union is conservative
