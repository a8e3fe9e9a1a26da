"""Estimators with the interface of scikit-learn: a classifier and a regressor of texts and of pairs of texts.

`fit` trains a `HyperAdapterModel` and keeps it in `model_`. A one-dimensional `y` is one task. Each column of a
two-dimensional `y` is a task of its own, and all tasks are trained together in the one model.

The estimators pass the checks of `sklearn.utils.estimator_checks` once numbers are written as words;
docs/scikit-learn.md names the few checks that do not apply, with the reasons.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_array, check_consistent_length, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from transformers import set_seed

from hyperadapters.config import DEFAULT_BACKBONE, Task, TrainingConfig, parse
from hyperadapters.data.examples import read_label
from hyperadapters.data.rows import plain
from hyperadapters.data.sources import Row
from hyperadapters.errors import BackboneError
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.arguments import TrainingArguments
from hyperadapters.training.trainer import Trainer

Array = np.ndarray[Any, Any]
Text = str | tuple[str, str]
TrainData = Mapping[str, Sequence[Mapping[str, object]]]

TEXT_COLUMNS: tuple[Literal["text"], Literal["text_pair"]] = ("text", "text_pair")
LARGEST_SEED = 2**31 - 1


class _Targets(NamedTuple):
    """The values of `y`, column by column.

    Attributes:
        names: Name of each column, which becomes the name of its task.
        columns: Labels or numbers [N] of each column; the types of two columns may differ.
        is_2d: Whether `y` has two dimensions. Predictions then have two as well.
    """

    names: list[str]
    columns: list[Array]
    is_2d: bool


class _HyperAdapterEstimator(BaseEstimator, ABC):
    """What the classifier and the regressor have in common."""

    model_: HyperAdapterModel
    n_features_in_: int
    _y_is_2d: bool

    def __init__(
        self,
        backbone: str | Path = DEFAULT_BACKBONE,
        *,
        preset: Literal["paper", "plus"] | None = None,
        max_length: int | None = None,
        num_train_epochs: float = 10.0,
        max_steps: int | None = None,
        batch_size: int = 32,
        learning_rate: float | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        """Keep the parameters; `fit` checks them.

        Args:
            backbone: Name on the Hugging Face Hub, or a folder, of an encoder such as BERT or a sentence encoder.
            preset: Preset of the method, see `ModelConfig`; default: "plus".
            max_length: Maximum number of tokens of an input, longer texts are truncated; default: 128, or fewer where
                the backbone has fewer positions.
            num_train_epochs: Number of passes over the training rows.
            max_steps: Number of training steps, which takes precedence over `num_train_epochs`; default: None.
            batch_size: Number of rows in a batch, in training and in prediction.
            learning_rate: Learning rate of all parts without a rate of their own, which with preset "plus" is the
                adapter that all tasks share; default: None, which is 1e-3 with preset "plus" and 3e-4 otherwise (see
                `training.optimizers.learning_rates`).
            random_state: Seed of initial weights, dropout and the order of rows. The same integer gives the same model
                again on the same machine. None draws a seed from NumPy's global generator.
            verbose: If True, show the progress and the losses of the training.
        """
        self.backbone = backbone
        self.preset = preset
        self.max_length = max_length
        self.num_train_epochs = num_train_epochs
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803
        """Train a new model, whatever was fitted before.

        Args:
            X: N texts (a list, a Series, or an array [N] or [N, 1]) or N pairs of texts (a list of pairs, or an array
                [N, 2]); or a DataFrame with the column `text` and, for pairs, the column `text_pair`.
            y: Targets [N] of one task; or a DataFrame or an array [N, T] with a column for each of T tasks. A task has
                the name of its Series or column. Without a name it is "y", in an array "y0", "y1" and so on.

        Returns:
            The estimator itself.

        Raises:
            ValueError: `X` does not hold texts, `y` does not hold targets for this estimator, or their lengths differ.
            BackboneError: The backbone cannot be loaded, or is not an encoder.
            RecipeError: A parameter has an impossible value.
            TaskError: The name of a column cannot be the name of a task.
            NotFiniteError: The training diverged.
        """
        if hasattr(self, "model_"):
            del self.model_  # a fit that fails leaves no model of other texts or targets
        self._training_settings()  # a wrong one is found before the backbone is loaded
        texts = self._read_texts(X, reset=True)
        targets = self._read_targets(y)
        check_consistent_length(texts, *targets.columns)
        fields = TEXT_COLUMNS[:1] if isinstance(texts[0], str) else TEXT_COLUMNS
        tasks = self._make_tasks(targets, fields)
        rows = [dict(zip(fields, [text] if isinstance(text, str) else text, strict=True)) for text in texts]
        train_data = {
            task.name: [{**row, "label": label} for row, label in zip(rows, column.tolist(), strict=True)]
            for task, column in zip(tasks, targets.columns, strict=True)
        }
        self._y_is_2d = targets.is_2d
        seed = int(check_random_state(self.random_state).randint(LARGEST_SEED))
        with _seeded(seed):
            self.model_ = self._make_model(tasks)
            self._train(train_data, seed)
        return self

    def _read_texts(self, X: Any, reset: bool) -> list[Text]:  # noqa: N803
        """Check the texts and, unless `reset`, that they are pairs if and only if those of `fit` were."""
        table = _text_table(X)
        validate_data(self, table, reset=reset, skip_check_array=True)
        rows = np.asarray(table, dtype=object).tolist()
        for number, row in enumerate(rows):
            for text in row:
                if not isinstance(text, str):
                    raise ValueError(
                        f"X, row {number}: expected a text, found {text!r} of type {type(text).__name__}; pass texts, "
                        "or turn other values into texts in an earlier step of a pipeline"
                    )
        return [row[0] if len(row) == 1 else (row[0], row[1]) for row in rows]

    def _read_targets(self, y: Any) -> _Targets:
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        is_frame = hasattr(y, "iloc") and y.ndim == 2  # whose columns may have different types
        array = y if is_frame else check_array(y, ensure_2d=False, dtype=None, input_name="y")
        if array.ndim == 1:
            name = getattr(y, "name", None)
            return _Targets(["y" if name is None else str(name)], [self._check_target(array)], False)
        columns = [array.iloc[:, index] if is_frame else array[:, index] for index in range(array.shape[1])]
        names = [str(name) for name in y.columns] if is_frame else [f"y{index}" for index in range(len(columns))]
        return _Targets(names, [self._check_target(column) for column in columns], True)

    @abstractmethod
    def _check_target(self, column: Any) -> Array:
        """Return a column of `y` as an array, or raise a ValueError."""

    @abstractmethod
    def _make_tasks(self, targets: _Targets, fields: Sequence[str]) -> list[Task]:
        """Return the tasks of the columns of `y`."""

    def _make_model(self, tasks: Sequence[Task]) -> HyperAdapterModel:
        name = str(self.backbone)
        model = HyperAdapterModel.from_backbone(name, tasks, self.preset, max_length=plain(self.max_length))
        if model.text_to_text:
            raise BackboneError(
                f"backbone: {type(self).__name__} needs an encoder such as BERT, found '{name}', which is an "
                f"{model.kind} and generates its answers as text; choose an encoder, or use hyperadapters.Trainer"
            )
        return model

    def _train(self, train_data: TrainData, seed: int) -> None:
        settings = self._training_settings()
        arguments = TrainingArguments(
            max_steps=settings.max_steps or -1,
            num_train_epochs=settings.num_train_epochs or 1.0,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            seed=seed,
            progress="auto" if self.verbose else "none",
        )
        Trainer(self.model_, train_data, args=arguments).train()

    def _training_settings(self) -> TrainingConfig:
        """Check the parameters of the training; those that a search has drawn may be scalars of NumPy."""
        length = "num_train_epochs" if self.max_steps is None else "max_steps"
        values = {name: plain(getattr(self, name)) for name in (length, "batch_size", "learning_rate")}
        return parse(TrainingConfig, values, where=type(self).__name__)


class HyperAdapterClassifier(ClassifierMixin, _HyperAdapterEstimator):
    """A classifier of texts, or of pairs of texts, for one task or for several tasks that share one model.

    With several tasks `predict` returns a column for each task, and `classes_` and the result of `predict_proba` are
    lists with an array for each task, as those of `sklearn.multioutput.MultiOutputClassifier` are.

    Attributes:
        model_: The trained model.
        classes_: Sorted labels [C] of the task, or a list of such arrays.
        n_features_in_: 1 for texts, 2 for pairs of texts.
        feature_names_in_: Names of the columns, if `X` was a DataFrame.
    """

    classes_: Any

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    def predict(self, X: Any) -> Array:  # noqa: N803
        """Predict the most probable label of each text.

        Args:
            X: Texts or pairs of texts, see `fit`.

        Returns:
            Labels [N], or [N, T] if `y` had two dimensions.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: `X` does not hold texts, or holds pairs where `fit` had single texts or vice versa.
        """
        probabilities = self.predict_proba(X)
        if not self._y_is_2d:
            return self.classes_[probabilities.argmax(axis=1)]
        return np.column_stack([c[p.argmax(axis=1)] for c, p in zip(self.classes_, probabilities, strict=True)])

    def predict_proba(self, X: Any) -> Any:  # noqa: N803
        """Predict the probability of each label.

        Args:
            X: Texts or pairs of texts, see `fit`.

        Returns:
            Probabilities [N, C] in the order of `classes_`, or a list of T such arrays if `y` had two dimensions.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: See `predict`.
        """
        check_is_fitted(self, "model_")
        texts = self._read_texts(X, reset=False)
        probabilities = [self._probabilities(texts, task.name) for task in self.model_.tasks]
        return probabilities if self._y_is_2d else probabilities[0]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:  # noqa: N803
        """Compute the accuracy: the share of texts whose label, or whose labels of all tasks, are predicted.

        Args:
            X: Texts or pairs of texts, see `fit`.
            y: True labels [N] or [N, T].
            sample_weight: Weights of the texts [N]; default: equal weights.

        Returns:
            The accuracy.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: See `fit`.
        """
        targets, predictions = self._read_targets(y), self.predict(X)
        columns = predictions.T if self._y_is_2d else [predictions]
        if len(targets.columns) != len(columns):
            raise ValueError(
                f"y: expected labels of {len(columns)} task(s), as in fit, found {len(targets.columns)} column(s)"
            )
        hits = [found == true for found, true in zip(columns, targets.columns, strict=True)]
        return float(np.average(np.all(hits, axis=0), weights=sample_weight))

    def _probabilities(self, texts: list[Text], task: str) -> Array:
        found = self.model_.predict_proba(texts, task, self.batch_size).astype(np.float64)
        return found / found.sum(axis=1, keepdims=True)  # those in float32 add up to 1 only as far as float32 goes

    def _check_target(self, column: Any) -> Array:
        values: Array = check_array(column, ensure_2d=False, dtype=None, input_name="y")
        if values.dtype == object:
            values = _of_one_type(values)
        check_classification_targets(values)
        return values

    def _make_tasks(self, targets: _Targets, fields: Sequence[str]) -> list[Task]:
        classes = [_classes(name, column) for name, column in zip(targets.names, targets.columns, strict=True)]
        self.classes_ = classes if targets.is_2d else classes[0]
        labels = [[read_label(Row({"label": label}, "y")) for label in found.tolist()] for found in classes]
        named = zip(targets.names, labels, strict=True)
        return [Task.classification(name, found, fields=fields) for name, found in named]


class HyperAdapterRegressor(RegressorMixin, _HyperAdapterEstimator):
    """A regressor of texts, or of pairs of texts, for one task or for several tasks that share one model.

    Attributes:
        model_: The trained model.
        n_features_in_: 1 for texts, 2 for pairs of texts.
        feature_names_in_: Names of the columns, if `X` was a DataFrame.
    """

    def predict(self, X: Any) -> Array:  # noqa: N803
        """Predict the number of each text.

        Args:
            X: Texts or pairs of texts, see `fit`.

        Returns:
            Numbers [N], or [N, T] if `y` had two dimensions.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: `X` does not hold texts, or holds pairs where `fit` had single texts or vice versa.
        """
        check_is_fitted(self, "model_")
        texts = self._read_texts(X, reset=False)
        columns = [self._numbers(texts, task.name) for task in self.model_.tasks]
        return np.column_stack(columns) if self._y_is_2d else columns[0]

    def _numbers(self, texts: list[Text], task: str) -> Array:
        return np.array([found.target for found in self.model_.predict(texts, task, self.batch_size)], dtype=np.float64)

    def _check_target(self, column: Any) -> Array:
        values: Array = check_array(column, ensure_2d=False, dtype=np.float64, input_name="y")
        return values

    def _make_tasks(self, targets: _Targets, fields: Sequence[str]) -> list[Task]:
        return [Task.regression(name, fields=fields) for name in targets.names]


def _text_table(X: Any) -> Any:  # noqa: N803
    """Return texts as a table with one column, or two for pairs: a DataFrame, or an array of objects."""
    if hasattr(X, "columns"):
        found = [str(name) for name in X.columns]
        wanted = list(TEXT_COLUMNS[: len(found)])
        if sorted(found) != wanted:
            raise ValueError(
                f"X: expected a DataFrame with the column 'text' and, for pairs, 'text_pair', found the columns {found}"
                "; select and rename columns, or pass one column as a Series"
            )
        return X[wanted]
    array = np.asarray(X, dtype=object)
    if array.ndim == 1 and len(array):
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] not in (1, 2):
        raise ValueError(
            f"X: expected at least one text [N] or pair of texts [N, 2], found {type(X).__name__} of shape "
            f"{array.shape}; pass a list of texts, or a list of pairs"
        )
    return array


def _of_one_type(labels: Array) -> Array:
    """Return labels that stand in an array of objects as texts or as numbers."""
    found = labels.tolist()
    if all(isinstance(label, str) for label in found):
        return labels
    if all(isinstance(label, (bool, int, float)) for label in found):
        return np.array(found)
    types = sorted({type(label).__name__ for label in found})
    raise ValueError(
        f"y: expected labels that are all texts or all numbers, found {', '.join(types)}; convert them to one type"
    )


def _classes(name: str, column: Array) -> Array:
    """Return the sorted labels of a column of `y`."""
    classes: Array = np.unique(column)
    if len(classes) < 2:
        raise ValueError(
            f"y, task '{name}': expected labels of at least two classes, found one class, {classes.tolist()[0]!r}; add "
            "rows with another label"
        )
    return classes


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Enter a context whose random numbers follow from a seed; after it the global generators go on as before."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
        try:
            set_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
