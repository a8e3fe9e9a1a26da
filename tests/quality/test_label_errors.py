"""Labels that are probably wrong: the rule by hand, and flipped labels of rows that are easy to tell apart."""

from __future__ import annotations

import numpy as np
import pytest

from hyperadapters.config import Task
from hyperadapters.data.bad_rows import BadRows
from hyperadapters.quality.findings import CheckedRow
from hyperadapters.quality.label_errors import check_label_errors, sample_sizes, suspected_labels
from hyperadapters.quality.rows import CheckedTask


def test_a_row_is_suspected_if_another_label_is_as_probable_as_in_its_own_rows() -> None:
    probabilities = np.array(
        [
            [0.9, 0.1, 0.0],
            [0.7, 0.3, 0.0],  # label 0: mean 0.8, without the row below
            [0.1, 0.8, 0.1],
            [0.1, 0.6, 0.3],  # label 1: mean 0.7
            [0.0, 0.2, 0.8],
            [0.05, 0.85, 0.1],  # label 2: rather 1, 8.5 times as probable
        ]
    )
    labels = np.array([0, 0, 1, 1, 2, 2])
    rows, likely = suspected_labels(probabilities, labels)
    assert (rows.tolist(), likely.tolist()) == ([5], [1])
    probabilities[5] = [0.0, 0.65, 0.35]  # below the mean of label 1
    assert suspected_labels(probabilities, labels)[0].tolist() == []
    probabilities[5] = [0.0, 0.8, 0.2]  # only four times as probable
    assert suspected_labels(probabilities, labels)[0].tolist() == []


def test_the_most_suspicious_row_is_first() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.15, 0.85], [0.01, 0.99], [0.1, 0.9], [0.2, 0.8], [0.0, 1.0]])
    labels = np.array([0, 0, 0, 0, 1, 1, 1])
    rows, _ = suspected_labels(probabilities, labels)
    assert rows.tolist() == [3]
    probabilities[2] = [0.0, 1.0]
    assert suspected_labels(probabilities, labels)[0].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("sizes", "most", "expected"), [([3, 5], 8, [3, 5]), ([300, 100], 40, [30, 10]), ([5], 0, [0])]
)
def test_rows_are_sampled_in_proportion(sizes: list[int], most: int, expected: list[int]) -> None:
    assert sample_sizes(sizes, most) == expected


class Planes:
    """Features of rows "label number": far apart for each label, with noise."""

    def features(self, inputs: list[tuple[str, ...]]) -> np.ndarray:
        generator = np.random.default_rng(0)
        centres = 8 * np.eye(3)[[int(text[0].split()[0]) for text in inputs]]
        return centres + generator.normal(size=centres.shape)


def task(labels: list[int], true: list[int]) -> CheckedTask:
    names = ["a", "b", "c"]
    rows = [
        CheckedRow("mood", "train", (f"{right} {number}",), names[given], f"line {number}")
        for number, (given, right) in enumerate(zip(labels, true, strict=True))
    ]
    return CheckedTask(Task.classification("mood", names), {"train": rows}, BadRows("skip"))


TRUE = [0, 1, 2] * 40


def test_flipped_labels_are_found() -> None:
    given = list(TRUE)
    flipped = [7, 44, 92, 110]
    for row in flipped:
        given[row] = (given[row] + 1) % 3
    [finding], notes = check_label_errors(task(given, TRUE), Planes(), 120, seed=0)
    assert {example.place for example in finding.examples} == {f"line {row}" for row in flipped}
    assert "label c, rather b" in {example.place: example.note for example in finding.examples}["line 7"]
    assert (finding.severity, finding.count, notes) == ("warning", 4, [])


def test_labels_that_cannot_be_predicted_accuse_nobody() -> None:
    given = np.random.default_rng(1).integers(3, size=120).tolist()
    findings, [note] = check_label_errors(task(given, TRUE), Planes(), 120, seed=0)
    assert findings == []
    assert "mood: label errors were not searched, because the frozen encoder predicts the labels too badly" in note


def test_a_sample_is_said() -> None:
    _, [note] = check_label_errors(task(TRUE, TRUE), Planes(), 90, seed=0)
    assert note == "mood: label errors were searched in 90 of 120 rows."


def test_few_rows_are_said() -> None:
    findings, [note] = check_label_errors(task(TRUE[:20], TRUE[:20]), Planes(), 120, seed=0)
    assert findings == []
    assert "needs at least 50 rows of labels with 5 rows or more, found 20." in note
