"""The estimators of `hyperadapters.sklearn`: scikit-learn's own checks, its tools, several tasks, errors."""

from __future__ import annotations

import os
import pickle
import random
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest import SkipTest

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import save_backbone
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import GridSearchCV, KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks
from sklearn.utils.validation import validate_data

from hyperadapters.errors import BackboneError, RecipeError, TaskError
from hyperadapters.sklearn import HyperAdapterClassifier, HyperAdapterRegressor

TEXTS = [f"{mood} {rest}" for rest in ("red", "blue", "w1 w2 red", "w2 blue") for mood in ("good", "bad")]
MOODS = np.array(["up", "down"] * 4)
COLOURS = np.array([1, 1, 0, 0] * 2)
PAIRS = [("good red", "red"), ("good red", "blue"), ("bad blue", "blue"), ("bad blue", "red")] * 2
SAME = [True, False] * 4
SCORES = np.array([2.0, -1.0, 2.5, -1.5] * 2)
BOTH = pd.DataFrame({"mood": MOODS, "colour": COLOURS})


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


class FromNumbers:
    """Reads each row of numbers as a text, a word for each number, since scikit-learn's checks are made of numbers.

    A random backbone makes little of such texts. The tag `poor_score` leaves out the lines of `check_classifiers_train`
    and of `check_regressors_train` that ask for a score; other tests below look at what is learnt.
    """

    def _read_texts(self, X: Any, reset: bool) -> list[str]:  # noqa: N803
        numbers = validate_data(self, X, reset=reset)
        steps = np.clip(np.round(numbers * 4) + 20, 0, 39).astype(int)
        return [" ".join(f"w{step}" for step in row) for row in steps]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()  # type: ignore[misc]
        tags.input_tags.string, tags.input_tags.two_d_array = False, True
        for kind in (tags.classifier_tags, tags.regressor_tags):
            if kind is not None:
                kind.poor_score = True
        return tags


class NumbersClassifier(FromNumbers, HyperAdapterClassifier):
    pass


class NumbersRegressor(FromNumbers, HyperAdapterRegressor):
    pass


SKIPPED_BY_SCIKIT_LEARN = {
    "check_array_api_input": "it is for arrays of numbers on other devices, and runs with SCIPY_ARRAY_API=1 only",
    "check_classifiers_multilabel_output_format_decision_function": "a classifier has predict_proba instead",
}
"""The checks that scikit-learn skips, by name; all others have to pass."""


# The interface does not depend on the preset, and "paper" takes half the time of the default.
@parametrize_with_checks(
    [
        NumbersClassifier(preset="paper", max_steps=1, random_state=0),
        NumbersRegressor(preset="paper", max_steps=1, random_state=0),
    ],
)
def test_checks(estimator: Any, check: partial[None], backbone: str) -> None:
    try:
        check(estimator.set_params(backbone=backbone))
    except SkipTest:
        assert check.func.__name__ in SKIPPED_BY_SCIKIT_LEARN
        raise


@pytest.mark.filterwarnings("ignore:Can't test estimator")
def test_few_checks_apply_to_estimators_of_texts(
    classifier: HyperAdapterClassifier, regressor: HyperAdapterRegressor
) -> None:
    """Of an estimator that reads texts only, scikit-learn checks by itself no more than that it can be cloned."""
    for estimator in (classifier, regressor):
        done = check_estimator(estimator)
        assert {result["check_name"]: result["status"] for result in done} == {"check_estimator_cloneable": "passed"}


# Texts and pairs


def test_texts_in_every_form_are_the_same(classifier: HyperAdapterClassifier) -> None:
    expected = clone(classifier).fit(TEXTS, MOODS)
    assert expected.n_features_in_ == 1
    frame, array = pd.DataFrame({"text": TEXTS}), np.array(TEXTS)
    for texts in (tuple(TEXTS), array, array[:, None], frame["text"], frame):
        found = clone(classifier).fit(texts, MOODS)
        np.testing.assert_array_equal(found.predict_proba(texts), expected.predict_proba(TEXTS))
    assert list(found.feature_names_in_) == ["text"]


def test_pairs_in_every_form_are_the_same(classifier: HyperAdapterClassifier) -> None:
    frame = pd.DataFrame(PAIRS, columns=["text", "text_pair"])
    expected = clone(classifier).fit(PAIRS, SAME)
    assert expected.n_features_in_ == 2
    assert expected.classes_.tolist() == [False, True]
    for pairs in (np.array(PAIRS), frame, frame[["text_pair", "text"]]):
        found = clone(classifier).fit(pairs, SAME)
        np.testing.assert_array_equal(found.predict_proba(pairs), expected.predict_proba(PAIRS))
    assert list(found.feature_names_in_) == ["text", "text_pair"]
    assert expected.model_.tasks[0].fields == ("text", "text_pair")


# Learning


def test_a_classifier_learns_labels_of_every_type(classifier: HyperAdapterClassifier) -> None:
    for labels in (MOODS, COLOURS + 9, COLOURS.astype(float), COLOURS.astype(bool), pd.Series(MOODS, dtype="category")):
        found = classifier.fit(TEXTS, labels)
        predictions = found.predict(TEXTS)
        assert predictions.dtype == np.asarray(labels).dtype
        assert predictions.tolist() == list(labels)
        assert found.classes_.tolist() == sorted(set(labels))
        assert found.score(TEXTS, labels) == 1.0


def test_classes_are_in_numerical_order(classifier: HyperAdapterClassifier) -> None:
    labels = np.where(COLOURS == 1, 10, 9)
    found = classifier.fit(TEXTS, labels)
    assert found.classes_.tolist() == [9, 10]
    assert found.model_.tasks[0].labels == ("9", "10")
    probabilities = found.predict_proba(TEXTS)
    np.testing.assert_array_equal(found.classes_[probabilities.argmax(axis=1)], labels)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=10 * np.finfo(float).eps)


def test_a_regressor_learns_numbers(regressor: HyperAdapterRegressor) -> None:
    found = regressor.fit(TEXTS, SCORES)
    predictions = found.predict(TEXTS)
    assert predictions.shape == SCORES.shape
    assert found.score(TEXTS, SCORES) == r2_score(SCORES, predictions)
    assert found.score(TEXTS, SCORES) > 0.9


def test_more_training_changes_the_model(classifier: HyperAdapterClassifier) -> None:
    """Every parameter of the training has an effect."""
    expected = clone(classifier).fit(TEXTS, MOODS).predict_proba(TEXTS)
    changes: list[dict[str, Any]] = [
        {"max_steps": 3}, {"max_steps": None, "num_train_epochs": 3}, {"learning_rate": 1e-2}, {"batch_size": 8},
        {"random_state": 1}, {"preset": "paper"}, {"max_length": 4},
    ]  # fmt: skip
    for change in changes:
        found = clone(classifier).set_params(**change).fit(TEXTS, MOODS)
        assert not np.allclose(found.predict_proba(TEXTS), expected, atol=1e-6), change


# Several tasks


def test_a_classifier_of_several_tasks(classifier: HyperAdapterClassifier) -> None:
    found = classifier.fit(TEXTS, BOTH)
    assert [task.name for task in found.model_.tasks] == ["mood", "colour"]
    assert [classes.tolist() for classes in found.classes_] == [["down", "up"], [0, 1]]
    predictions = found.predict(TEXTS)
    assert predictions.dtype == object
    assert predictions.tolist() == BOTH.to_numpy().tolist()
    assert found.score(TEXTS, BOTH) == found.score(TEXTS, predictions) == 1.0
    probabilities = found.predict_proba(TEXTS)
    assert [one.shape for one in probabilities] == [(8, 2), (8, 2)]
    np.testing.assert_array_equal(found.classes_[1][probabilities[1].argmax(axis=1)], COLOURS)


def test_the_score_of_several_tasks_counts_rows_with_all_labels_right(classifier: HyperAdapterClassifier) -> None:
    labels = np.column_stack([COLOURS, 1 - COLOURS])
    found = classifier.fit(TEXTS, labels)
    assert found.predict(TEXTS).dtype == labels.dtype
    wrong = labels.copy()
    wrong[0, 0], wrong[1, 1], wrong[1, 0] = 1 - wrong[0, 0], 1 - wrong[1, 1], 1 - wrong[1, 0]
    assert found.score(TEXTS, labels) == 1.0
    assert found.score(TEXTS, wrong) == accuracy_score(wrong, found.predict(TEXTS)) == 0.75
    assert found.score(TEXTS, wrong, sample_weight=[1] + [0] * 7) == 0.0
    with pytest.raises(ValueError, match=r"y: expected labels of 2 task\(s\), as in fit, found 1 column\(s\)"):
        found.score(TEXTS, COLOURS)


def test_a_regressor_of_several_tasks(regressor: HyperAdapterRegressor) -> None:
    numbers = pd.DataFrame({"score": SCORES, "tenfold": 10 * SCORES + 100})
    found = regressor.fit(TEXTS, numbers)
    assert [task.name for task in found.model_.tasks] == ["score", "tenfold"]
    assert found.predict(TEXTS).shape == (8, 2)
    assert found.score(TEXTS, numbers) > 0.9


def test_names_of_tasks(classifier: HyperAdapterClassifier) -> None:
    def names(y: Any) -> list[str]:
        return [task.name for task in clone(classifier).fit(TEXTS, y).model_.tasks]

    assert names(MOODS) == ["y"]
    assert names(pd.Series(MOODS, name="mood")) == ["mood"]
    assert names(np.column_stack([MOODS, MOODS])) == ["y0", "y1"]
    assert classifier.fit(TEXTS, MOODS[:, None]).predict(TEXTS).shape == (8, 1)


# The tools of scikit-learn


def test_grid_search_in_a_pipeline(classifier: HyperAdapterClassifier) -> None:
    lower = FunctionTransformer(lambda texts: [text.lower() for text in texts])
    grid = {"hyperadapterclassifier__max_steps": np.arange(1, 3), "hyperadapterclassifier__max_length": np.array([16])}
    search = GridSearchCV(make_pipeline(lower, classifier), grid, cv=2, scoring="roc_auc")
    found = search.fit([text.upper() for text in TEXTS], MOODS)
    assert found.best_score_ > 0.5
    assert found.predict(TEXTS).tolist() == MOODS.tolist()


def test_cross_validation_of_several_tasks(classifier: HyperAdapterClassifier) -> None:
    labels = np.column_stack([COLOURS, COLOURS])
    predictions = cross_val_predict(classifier, pd.DataFrame({"text": TEXTS}), labels, cv=2)
    assert predictions.shape == labels.shape


def test_grid_search_over_tasks_of_different_types_needs_a_splitter(classifier: HyperAdapterClassifier) -> None:
    """With a number of folds scikit-learn sorts the values of `y` itself, which it cannot do with texts and numbers."""
    search = GridSearchCV(classifier, {"max_steps": [1, 2]}, cv=KFold(2))
    assert search.fit(TEXTS, BOTH).predict(TEXTS).shape == BOTH.shape


def test_pickling_keeps_what_was_fitted(classifier: HyperAdapterClassifier, regressor: HyperAdapterRegressor) -> None:
    for estimator, y in ((classifier, BOTH), (regressor, SCORES)):
        again = pickle.loads(pickle.dumps(estimator.fit(TEXTS, y)))
        np.testing.assert_array_equal(again.predict(TEXTS), estimator.predict(TEXTS))


def test_a_clone_is_not_fitted(classifier: HyperAdapterClassifier) -> None:
    parameters = classifier.get_params()
    again = clone(classifier.fit(TEXTS, MOODS))
    assert again.get_params() == classifier.get_params() == parameters
    for ask in (again.predict, again.predict_proba, lambda texts: again.score(texts, MOODS)):
        with pytest.raises(NotFittedError):
            ask(TEXTS)


# What a fit leaves behind


def test_a_fit_that_fails_leaves_no_model(classifier: HyperAdapterClassifier) -> None:
    classifier.fit(TEXTS, MOODS)
    with pytest.raises(RecipeError):
        classifier.set_params(max_length=1000).fit(TEXTS, COLOURS)
    with pytest.raises(NotFittedError):
        classifier.predict(TEXTS)


def test_the_same_random_state_gives_the_same_model(classifier: HyperAdapterClassifier) -> None:
    expected = clone(classifier).fit(TEXTS, MOODS).predict_proba(TEXTS)
    for used in (0, np.random.RandomState(0)):
        torch.rand(3)
        found = clone(classifier).set_params(random_state=used).fit(TEXTS, MOODS)
        np.testing.assert_array_equal(found.predict_proba(TEXTS), expected)


def test_without_a_random_state_numpy_decides(classifier: HyperAdapterClassifier) -> None:
    def fit() -> Any:
        return clone(classifier).set_params(random_state=None).fit(TEXTS, MOODS).predict_proba(TEXTS)

    np.random.seed(7)
    first, second = fit(), fit()
    np.random.seed(7)
    np.testing.assert_array_equal(fit(), first)
    assert not np.array_equal(first, second)


def test_global_random_numbers_go_on(classifier: HyperAdapterClassifier) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.random(), float(torch.rand(()))

    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = draw(), draw()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    first = draw()
    classifier.fit(TEXTS, MOODS)
    assert (first, draw()) == expected


def test_a_fit_prints_and_leaves_nothing(
    classifier: HyperAdapterClassifier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, temporary = tmp_path / "work", tmp_path / "temporary"
    folder.mkdir(), temporary.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    capfd.readouterr()
    classifier.fit(TEXTS, MOODS).predict(TEXTS)
    assert capfd.readouterr() == ("", "")
    assert os.listdir(folder) == os.listdir(temporary) == []
    classifier.set_params(verbose=True, max_steps=50).fit(TEXTS, MOODS)
    assert re.search(r"step \d+/\d+: loss", capfd.readouterr().err)


# Errors


def test_errors_of_texts(classifier: HyperAdapterClassifier) -> None:
    frame = pd.DataFrame({"text": TEXTS, "label": MOODS})
    for texts, message in (
        (
            "good",
            r"X: expected at least one text \[N\] or pair of texts \[N, 2\], found str of shape \(\); pass a list",
        ),
        ([], r"found list of shape \(0,\)"),
        (np.eye(3), r"found ndarray of shape \(3, 3\)"),
        ([1.5, 2.5], r"X, row 0: expected a text, found 1.5 of type float; pass texts, or turn"),
        (["good", None], "X, row 1: expected a text, found None of type NoneType"),
        (["good", ("good", "red")], "X, row 1: expected a text, found .* of type tuple"),
        (pd.Series(["good", np.nan]), "X, row 1: expected a text, found nan"),
        (
            frame,
            r"X: expected a DataFrame with the column 'text' and, .* found the columns \['text', 'label'\]; select",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            classifier.fit(texts, MOODS)


def test_errors_of_labels(classifier: HyperAdapterClassifier) -> None:
    mixed = np.array(["a", 1] * 4, dtype=object)
    for labels, message in (
        (None, "HyperAdapterClassifier requires y to be passed, but the target y is None"),
        (MOODS[:3], r"inconsistent numbers of samples: \[8, 3\]"),
        (SCORES, "Unknown label type: continuous"),
        (["up"] * 8, "y, task 'y': expected labels of at least two classes, found one class, 'up'; add rows"),
        (BOTH.assign(colour=1), "y, task 'colour': expected labels of at least two classes, found one class, 1"),
        (mixed, "y: expected labels that are all texts or all numbers, found int, str; convert"),
        (np.where(MOODS == "up", None, "down"), "y: expected labels that are all .* found NoneType, str"),
        ([0.0, np.nan] * 4, "Input y contains NaN"),
        (np.zeros((8, 2, 2)), "Found array with dim 3"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier.fit(TEXTS, labels)


def test_errors_of_numbers(regressor: HyperAdapterRegressor) -> None:
    for numbers, message in (
        (None, "HyperAdapterRegressor requires y to be passed, but the target y is None"),
        (MOODS, "could not convert string to float"),
        ([np.inf] * 8, "Input y contains infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            regressor.fit(TEXTS, numbers)


def test_pairs_are_expected_where_there_were_pairs(classifier: HyperAdapterClassifier) -> None:
    message = "X has 2 features, but HyperAdapterClassifier is expecting 1 features as input"
    with pytest.raises(ValueError, match=message):
        classifier.fit(TEXTS, MOODS).predict(PAIRS)
    with pytest.raises(ValueError, match="X has 1 features, but HyperAdapterClassifier is expecting 2 features"):
        classifier.fit(PAIRS, SAME).predict(TEXTS)


def test_errors_of_parameters(classifier: HyperAdapterClassifier, t5_folder: Path, tmp_path: Path) -> None:
    errors: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"preset": "plsu"}, RecipeError, "preset: .* Did you mean 'plus'?"),
        ({"max_length": 1000}, RecipeError, "the backbone takes at most 80 tokens, found 1000; lower it"),
        ({"learning_rate": -1.0}, RecipeError, "learning_rate"),
        ({"backbone": str(tmp_path / "nowhere")}, BackboneError, "nowhere"),
        (
            {"backbone": t5_folder},
            BackboneError,
            "needs an encoder such as BERT, found .* an encoder-decoder .* choose",
        ),
    ]
    for change, error, message in errors:
        with pytest.raises(error, match=message):
            clone(classifier).set_params(**change).fit(TEXTS, MOODS)
    with pytest.raises(TaskError, match="must not contain path separators"):
        classifier.fit(TEXTS, pd.Series(MOODS, name="good/bad"))
