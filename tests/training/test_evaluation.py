"""What `evaluate` refuses to score."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import save_backbone

from hyperadapters.config import Task
from hyperadapters.data.examples import Example
from hyperadapters.errors import DataError
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.evaluation import evaluate

MOOD = Task.classification("mood", ["bad", "good"], metrics=["accuracy", "macro_f1", "matthews_correlation"])
SIZE = Task.regression("size")


@pytest.fixture
def model(tmp_path: Path) -> HyperAdapterModel:
    return HyperAdapterModel.from_backbone(
        str(save_backbone(tmp_path / "bert")), [MOOD, SIZE], preset="paper", adapter_dim=4
    ).eval()


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "expected at least one example, found none"),
        ([Example(0, "red", None, 1), Example(0, "red")], "example 2 has no target"),
        ([Example(None, "red", None, 1)], "example 1 has no task_id"),
    ],
)
def test_examples_that_cannot_be_scored_are_refused(
    model: HyperAdapterModel, examples: list[Example], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(model, examples)


def test_one_example_of_one_task_is_scored(model: HyperAdapterModel) -> None:
    found = evaluate(model, [Example(1, "red", None, 2.0)])
    assert found.tasks == {"size": {"pearson": 0.0}}
    assert found.mean == 0.0
