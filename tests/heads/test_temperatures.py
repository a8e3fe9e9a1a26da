"""Temperatures of heads, and measures of calibration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperadapters.heads.calibration import (
    BINS,
    RISK_POINTS,
    LabelledLogits,
    brier_score,
    calibration_error,
    fit_temperatures,
    reliability,
    risk_coverage,
    with_temperature,
)


def drawn(rows: int, temperature: float, seed: int = 0, labels: int = 3) -> LabelledLogits:
    """Logits whose labels are drawn with their probabilities at a temperature."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, labels, generator=generator, dtype=torch.float64)
    drawn = torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator)
    return LabelledLogits(logits, drawn[:, 0])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_with_which_the_labels_were_drawn_is_found(temperature: float) -> None:
    [found] = fit_temperatures([drawn(4000, temperature)])
    # The estimated logarithm has a standard deviation of a few hundredths.
    assert abs(np.log(found / temperature)) < 0.25


def test_temperatures_leave_each_task_its_own_where_rows_say_so() -> None:
    sharp, soft = fit_temperatures([drawn(2000, 0.5), drawn(2000, 3.0, seed=1)])
    assert sharp < 1 < 2 < soft


def test_a_task_with_few_rows_has_nearly_the_temperature_of_the_others_and_one_without_rows_has_it() -> None:
    many = [drawn(2000, 3.0, seed) for seed in range(3)]
    few = LabelledLogits(torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([0]))
    none = LabelledLogits(torch.empty(0, 3), torch.empty(0, dtype=torch.long))
    *_, of_few, of_none = fit_temperatures([*many, few, none])
    assert abs(np.log(of_none / 3.0)) < 0.25
    assert abs(np.log(of_few / of_none)) < 0.25
    [alone] = fit_temperatures([few])
    assert alone < 1  # with the only row being right, nothing speaks against certainty


def test_no_rows_at_all_give_a_temperature_of_one() -> None:
    none = LabelledLogits(torch.empty(0, 2), torch.empty(0, dtype=torch.long))
    assert fit_temperatures([none, none]) == [1.0, 1.0]
    assert fit_temperatures([]) == []


def test_the_calibration_error_compares_confidence_and_accuracy_by_bins() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    labels = np.array([0, 1, 1, 1])
    # Bin of 0.9: two rows, one of them right; bin of 0.6: two rows, both right.
    assert calibration_error(probabilities, labels) == pytest.approx((abs(1.8 - 1) + abs(1.2 - 2)) / 4)
    assert calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0.0


def test_the_brier_score_is_the_squared_distance_from_the_one_hot_labels() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0]])
    expected = (0.3**2 + 0.2**2 + 0.1**2 + 1 + 1) / 2
    assert brier_score(probabilities, np.array([0, 2])) == pytest.approx(expected)


@given(st.floats(0.1, 10), st.lists(st.floats(-20, 20), min_size=2, max_size=5))
def test_the_inverse_of_a_temperature_undoes_it(temperature: float, logits: list[float]) -> None:
    values = np.array([logits])
    before = np.exp(values) / np.exp(values).sum()
    after = with_temperature(with_temperature(before, temperature), 1 / temperature)
    # Logarithms of up to 60 are multiplied and divided in float64, so the probabilities are off by up to 1e4 eps.
    np.testing.assert_allclose(after, before, rtol=1e5 * np.finfo(np.float64).eps)


def test_probabilities_of_zero_stay_numbers() -> None:
    assert with_temperature(np.array([[1.0, 0.0]]), 0.5).tolist() == [[1.0, 0.0]]
    assert np.isfinite(with_temperature(np.array([[1.0, 0.0]]), 1000.0)).all()


def test_reliability_counts_rows_by_the_probability_of_their_answer() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [1.0, 0.0]])
    found = reliability(probabilities, np.array([0, 1, 1, 0]))
    assert found.shape == (BINS, 3)
    assert {place: row.tolist() for place, row in enumerate(found) if row[0]} == {
        13: [2, 1.8, 1],
        9: [1, 0.6, 1],
        14: [1, 1.0, 1],
    }


def test_risk_and_coverage_answer_the_most_confident_rows_first_and_equal_ones_together() -> None:
    confidences, are_right = np.array([0.5, 0.9, 0.7, 0.7]), np.array([False, True, False, True])
    coverage, risk = risk_coverage(confidences, are_right)
    assert coverage.tolist() == [0.25, 0.75, 1.0]
    assert risk.tolist() == [0, 1 / 3, 0.5]


def test_risk_and_coverage_of_many_rows_have_few_points_that_end_with_all_rows() -> None:
    generator = np.random.default_rng(0)
    confidences = generator.uniform(size=1000)
    are_right = generator.uniform(size=1000) < confidences
    coverage, risk = risk_coverage(confidences, are_right)
    assert len(coverage) == len(risk) == RISK_POINTS
    assert coverage[-1] == 1
    assert risk[-1] == 1 - are_right.mean()
    assert (np.diff(coverage) > 0).all()
    for share, wrong in zip(coverage, risk, strict=True):
        answered = confidences >= np.sort(confidences)[1000 - round(1000 * share)]
        assert wrong == pytest.approx(1 - are_right[answered].mean())
