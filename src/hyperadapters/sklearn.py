"""Estimators with the interface of scikit-learn: a classifier and a regressor of texts and of pairs of texts.

Both train a `HyperAdapterModel` when `fit` is called and keep it in `model_`. A one-dimensional `y` is one task; each
column of a two-dimensional `y` is a task of its own, and all tasks are trained together.
"""

from __future__ import annotations

import random
import tempfile
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

from hyperadapters.config import DataConfig, Recipe, Task, TrainingConfig, parse
from hyperadapters.data.examples import Example, read_fields, read_label, read_target
from hyperadapters.data.sources import Row
from hyperadapters.errors import BackboneError
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.text_heads import fit_text_heads
from hyperadapters.training.trainer import HyperAdapterTrainer, training_arguments

Array = np.ndarray[Any, Any]
Text = str | tuple[str, str]
TrainData = Mapping[str, Sequence[Mapping[str, object]]]

DEFAULT_BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"
TEXT_COLUMNS = ("text", "text_pair")


class _Targets(NamedTuple):
    """The values of `y`, column by column.

    Attributes:
        names: Name of each column, which becomes the name of its task.
        columns: Labels or numbers [N] of each column, whose types may differ.
        is_2d: Whether `y` was two-dimensional; predictions have as many dimensions.
    """

    names: list[str]
    columns: list[Array]
    is_2d: bool


class _HyperAdapterEstimator(BaseEstimator):
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
        learning_rate: float = 1e-4,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.backbone = backbone
        self.preset = preset
        self.max_length = max_length
        self.num_train_epochs = num_train_epochs
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

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
            y: The targets [N] of one task, or a DataFrame or an array [N, T] with a column for each of T tasks. A
                task has the name of its column or Series; without names they are "y", or "y0", "y1" and so on.

        Returns:
            The estimator itself.

        Raises:
            ValueError: `X` holds something else than texts, `y` holds no targets of this kind, or their lengths differ.
            BackboneError: The backbone cannot be loaded, or is not an encoder.
            RecipeError: A parameter has a value that is not possible.
            TaskError: The name of a column cannot be the name of a task.
        """
        texts = self._read_texts(X, reset=True)
        targets = self._read_targets(y)
        check_consistent_length(texts, *targets.columns)
        fields = TEXT_COLUMNS[: self.n_features_in_]
        tasks = [
            self._make_task(name, column, fields) for name, column in zip(targets.names, targets.columns, strict=True)
        ]
        train_data = {
            task.name: [{**_as_row(text), "label": label} for text, label in zip(texts, column.tolist(), strict=True)]
            for task, column in zip(tasks, targets.columns, strict=True)
        }
        self._y_is_2d = targets.is_2d
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
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
                        "or turn the values into texts in an earlier step of a pipeline"
                    )
        return [tuple(row) if len(row) == 2 else row[0] for row in rows]

    def _read_targets(self, y: Any) -> _Targets:
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        is_frame = hasattr(y, "iloc") and y.ndim == 2
        array = y if is_frame else check_array(y, ensure_2d=False, dtype=None, input_name="y")
        if array.ndim == 1:
            name = getattr(y, "name", None)
            return _Targets(["y" if name is None else str(name)], [self._check_target(array)], False)
        columns = [array.iloc[:, index] if is_frame else array[:, index] for index in range(array.shape[1])]
        names = [str(name) for name in y.columns] if is_frame else [f"y{index}" for index in range(len(columns))]
        return _Targets(names, [self._check_target(column) for column in columns], True)

    def _check_target(self, column: Any) -> Array:
        raise NotImplementedError

    def _make_task(self, name: str, column: Array, fields: tuple[str, ...]) -> Task:
        raise NotImplementedError

    def _make_model(self, tasks: Sequence[Task]) -> HyperAdapterModel:
        name = str(self.backbone)
        model = HyperAdapterModel.from_backbone(name, tasks, self.preset, max_length=self.max_length)
        if model.text_to_text:
            raise BackboneError(
                f"{type(self).__name__}: expected an encoder as backbone, such as BERT, found '{name}', a {model.kind} "
                "that writes its answers; train it with hyperadapters.Trainer"
            )
        return model

    def _train(self, train_data: TrainData, seed: int) -> None:
        model = self.model_
        examples = [
            Example(model.task_id(name), *read_fields(Row(row, name), task), read_target(Row(row, name), task))
            for task, (name, rows) in zip(model.tasks, train_data.items(), strict=True)
            for row in rows
        ]
        assert model.heads is not None
        for task_id, task in enumerate(model.tasks):
            if task.kind == "regression":
                targets = [float(example.target or 0) for example in examples if example.task_id == task_id]
                model.heads.set_target_scale(task_id, targets)
        length = {"max_steps": self.max_steps} if self.max_steps else {"num_train_epochs": self.num_train_epochs}
        values = {"batch_size": self.batch_size, "learning_rate": self.learning_rate, "eval_steps": 10**9, **length}
        training = parse(TrainingConfig, values)
        recipe = Recipe.model_construct(
            backbone=str(self.backbone), seed=seed, model=model.adapter_config, data=DataConfig(), training=training
        )
        with tempfile.TemporaryDirectory() as folder:
            arguments = training_arguments(recipe, Path(folder), has_validation=False)
            HyperAdapterTrainer(model, recipe, examples, [], arguments).train()
        if model.adapter_config.head_inputs != "adapted":
            fit_text_heads(model, examples, [])
        model.eval()

    def _task_names(self) -> list[str]:
        return [task.name for task in self.model_.tasks]


class HyperAdapterClassifier(ClassifierMixin, _HyperAdapterEstimator):
    """A classifier."""

    classes_: Array | list[Array]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803
        super().fit(X, y)
        classes = [np.unique(column) for column in self._read_targets(y).columns]
        self.classes_ = classes if self._y_is_2d else classes[0]
        return self

    def predict(self, X: Any) -> Array:  # noqa: N803
        probabilities = self.predict_proba(X)
        if not self._y_is_2d:
            return self.classes_[probabilities.argmax(axis=1)]
        return _stack([c[p.argmax(axis=1)] for c, p in zip(self.classes_, probabilities, strict=True)])

    def predict_proba(self, X: Any) -> Array | list[Array]:  # noqa: N803
        check_is_fitted(self)
        texts = self._read_texts(X, reset=False)
        found = [self.model_.predict_proba(texts, name) for name in self._task_names()]
        return found if self._y_is_2d else found[0]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:  # noqa: N803
        if np.ndim(y) < 2:
            return super().score(X, y, sample_weight)
        predictions, columns = self.predict(X), self._read_targets(y).columns
        hits = [predictions[:, index] == column for index, column in enumerate(columns)]
        return float(np.average(np.all(hits, axis=0), weights=sample_weight))

    def _check_target(self, column: Any) -> Array:
        values: Array = check_array(column, ensure_2d=False, dtype=None, input_name="y")
        check_classification_targets(values)
        return values

    def _make_task(self, name: str, column: Array, fields: tuple[str, ...]) -> Task:
        classes = np.unique(column)
        if len(classes) < 2:
            raise ValueError(
                f"y, task '{name}': expected labels of at least two classes, found one class, {classes.tolist()[0]!r}; "
                "add rows with another label"
            )
        labels = [read_label(Row({"label": label}, "y")) for label in classes.tolist()]
        return Task.classification(name, labels, fields=fields)


class HyperAdapterRegressor(RegressorMixin, _HyperAdapterEstimator):
    """A regressor."""

    def predict(self, X: Any) -> Array:  # noqa: N803
        check_is_fitted(self)
        texts = self._read_texts(X, reset=False)
        columns = [[found.target for found in self.model_.predict(texts, name)] for name in self._task_names()]
        numbers = np.array(columns, dtype=np.float64).T
        return numbers if self._y_is_2d else numbers[:, 0]

    def _check_target(self, column: Any) -> Array:
        values: Array = check_array(column, ensure_2d=False, dtype=np.float64, input_name="y")
        return values

    def _make_task(self, name: str, column: Array, fields: tuple[str, ...]) -> Task:
        return Task.regression(name, fields=fields)


def _text_table(X: Any) -> Any:  # noqa: N803
    """Texts as a table with one column, or two for pairs: a DataFrame, or an array of objects."""
    if hasattr(X, "columns"):
        found = [str(name) for name in X.columns]
        wanted = [name for name in TEXT_COLUMNS if name in found]
        if sorted(found) != sorted(wanted) or "text" not in wanted:
            raise ValueError(
                f"X: expected a DataFrame with the column 'text' and, for pairs, 'text_pair', found the columns {found}; "
                "select and rename them, or pass one column as a Series"
            )
        return X[wanted]
    array = np.asarray(X, dtype=object)
    if array.ndim == 1 and len(array):
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] not in (1, 2):
        raise ValueError(
            f"X: expected texts [N] or pairs of texts [N, 2], found {type(X).__name__} of shape {array.shape}; put texts "
            "into a list, and pairs into a list of tuples"
        )
    return array


def _as_row(text: Text) -> dict[str, object]:
    return {"text": text} if isinstance(text, str) else dict(zip(TEXT_COLUMNS, text, strict=True))


def _stack(columns: Sequence[Array]) -> Array:
    """Columns as one array; texts and numbers together as objects, since NumPy would turn the numbers into texts."""
    are_numbers = {column.dtype.kind in "biuf" for column in columns}
    return np.column_stack([column.astype(object) for column in columns] if len(are_numbers) > 1 else columns)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A context whose random numbers follow from a seed; outside of it the global generators go on as before."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
        try:
            set_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
