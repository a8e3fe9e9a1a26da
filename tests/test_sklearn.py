"""The estimators of `hyperadapters.sklearn`: scikit-learn's own checks, its tools, several tasks, errors."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import save_backbone
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks

from hyperadapters.errors import BackboneError, RecipeError, TaskError
from hyperadapters.sklearn import HyperAdapterClassifier, HyperAdapterRegressor

DOCUMENT = Path(__file__).parents[1] / "docs" / "scikit-learn.md"
TEXTS = ["good red", "bad red", "good blue", "bad blue", "good w1", "bad w1", "good w2", "bad w2"]
MOODS = ["up", "down"] * 4
COLOURS = ["red", "red", "blue", "blue"] * 2
PAIRS = [("good red", "red"), ("good red", "blue"), ("bad blue", "blue"), ("bad blue", "red")] * 2
SAME = [1, 0, 1, 0] * 2
SCORES = [2.0, -1.0, 2.5, -1.5, 2.0, -1.0, 2.5, -1.5]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_backbone(tmp_path_factory.mktemp("backbone") / "bert", "bert"))


@pytest.fixture
def classifier(backbone: str) -> HyperAdapterClassifier:
    return HyperAdapterClassifier(backbone, max_steps=2, batch_size=4, random_state=0)


@pytest.fixture
def regressor(backbone: str) -> HyperAdapterRegressor:
    return HyperAdapterRegressor(backbone, max_steps=2, batch_size=4, random_state=0)


# scikit-learn's checks


def numbers_as_words(numbers: np.ndarray[Any, Any]) -> list[str]:
    """Write each row of numbers as a text, a word for each number, so that checks with numbers train on texts."""
    steps = np.clip(np.round(numbers * 4) + 20, 0, 39).astype(int)
    return [" ".join(f"w{step}" for step in row) for row in steps]


def with_words(estimator: BaseEstimator) -> Pipeline:
    """Put the estimator behind a step that accepts the arrays of numbers of which scikit-learn's checks are made."""
    return make_pipeline(FunctionTransformer(numbers_as_words, validate=True), estimator)


EXPECTED_FAILURES: dict[str, str] = {}


@parametrize_with_checks(
    [
        with_words(HyperAdapterClassifier(max_steps=1, random_state=0)),
        with_words(HyperAdapterRegressor(max_steps=1, random_state=0)),
    ],
    expected_failed_checks=lambda estimator: EXPECTED_FAILURES,
    xfail_strict=True,
)
def test_checks_of_scikit_learn(estimator: Pipeline, check: Callable[[Pipeline], None], backbone: str) -> None:
    estimator[-1].set_params(backbone=backbone)
    check(estimator)
