"""What a training run keeps for its report: which texts, and how declined rows are counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hyperadapters import Task
from hyperadapters.data.examples import Example
from hyperadapters.inference.predictor import Prediction
from hyperadapters.training.details import DECLINE_RATES, MAX_CHARACTERS, decline_rates, logged, points_of

TASKS = [
    Task.classification("colour", ["red", "blue"]),
    Task.multi_label("topics", ["a", "b"]),
    Task.regression("size"),
    Task.text_to_text("summary"),
]
TARGETS = (1, (0, 1), 2.5, "short")


def row_and_prediction(task_id: int, number: int = 0, text: str | None = None) -> tuple[Example, Prediction]:
    example = Example(task_id, text or f"text {number}", "pair" if task_id == 1 else None, TARGETS[task_id])
    target = TARGETS[task_id] if number % 2 else None
    return example, Prediction(None, None, None, None, None, target, (3.0, 4.0))


def texts_of(counts: list[int], max_texts: int) -> list[str]:
    pairs = [row_and_prediction(task_id, n) for task_id, count in enumerate(counts) for n in range(count)]
    rows, predictions = [row for row, _ in pairs], [prediction for _, prediction in pairs]
    return [point.text for point in points_of(TASKS, rows, predictions, [0] * len(rows), max_texts)]


def test_no_texts_are_kept_where_none_are_asked_for() -> None:
    assert texts_of([3, 3, 3, 3], 0) == []


@pytest.mark.parametrize("limit", [1, 3, 4, 20, 1000])
def test_at_most_the_given_number_of_texts_is_kept_evenly_of_each_task(limit: int) -> None:
    found = texts_of([100, 3, 7, 0], limit)
    assert len(found) <= limit
    if limit == 20:
        assert [text for text in found if text.endswith("/ pair")] == [f"text {n} / pair" for n in range(3)]
        first = [int(text.split()[1]) for text in found[:6]]
        assert (first[0], first[-1]) == (0, 99)
    if limit == 1000:
        assert len(found) == 110


def test_targets_and_answers_are_named_and_long_texts_shortened() -> None:
    pairs = [row_and_prediction(task_id, number=task_id) for task_id in range(4)]
    pairs.append(row_and_prediction(0, text="x" * 1000))
    points = points_of(TASKS, [row for row, _ in pairs], [prediction for _, prediction in pairs], [0] * 5, 10)
    assert [point.target for point in points] == ["blue", "blue", "a, b", "2.5", "short"]
    assert [point.answer for point in points] == [None, None, "a, b", None, "short"]
    assert len(points[1].text) == MAX_CHARACTERS
    assert points[0].vector == (0.6, 0.8)


def test_declined_rows_are_those_below_the_conformal_threshold() -> None:
    """Of 99 left-out similarities, k of 100 is the bound of the k-th smallest."""
    calibrating, evaluated = torch.arange(1.0, 100.0), torch.tensor([0.5, 4.5, 19.5, 200.0])
    found = {rate.rate: rate for rate in decline_rates(calibrating, evaluated)}
    assert list(found) == list(DECLINE_RATES)
    assert [found[rate].bound for rate in DECLINE_RATES] == pytest.approx(DECLINE_RATES)
    assert [found[rate].declined for rate in (0.01, 0.05, 0.2)] == [0.25, 0.5, 0.75]
    assert decline_rates(calibrating[:0], evaluated) == decline_rates(calibrating, evaluated[:0]) == ()


def test_values_that_are_not_finite_are_left_out_of_curves() -> None:
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": np.nan}, {"step": 3, "eval_mean": 1.0}, {"step": 4, "loss": 1}]
    curve = logged(log, "loss")
    assert (curve.x, curve.y) == ((1.0, 4.0), (2.0, 1.0))
