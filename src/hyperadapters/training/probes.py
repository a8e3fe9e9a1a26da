"""What any method has to beat: the majority class, and a linear probe on the frozen features."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, StratifiedKFold, StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from hyperadapters.backbones.passes import backbone_inputs
from hyperadapters.config import Split
from hyperadapters.core import masked_mean
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.inference.batches import batches_by_length, device_of, to_device
from hyperadapters.inference.finite import check_answers
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.metrics import score

PROBE_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 1e1)
FEW_SHOT_STRENGTHS = (0.1, 1.0, 10.0, 100.0)
MANY_ROWS = 1000
"""Above which one look at left-out rows is enough to choose a regularisation."""
MANY_LOGITS = 5_000_000
"""Rows times labels above which the regularisation is not chosen but fixed, since each fit takes long."""


def majority(data: TaskData) -> dict[str, float]:
    """Test scores of answering with the commonest training target (their mean, for a regression)."""
    targets = [example.target for example in data.splits["train"]]
    if data.task.kind == "regression":
        answer: Any = float(np.mean([float(target) for target in targets if target is not None]))
    else:
        answer = Counter(targets).most_common(1)[0][0]
    test = [example.target for example in data.splits["test"]]
    return score(data.task, test, [answer] * len(test))


def linear_probe(model: HyperAdapterModel, data: TaskData) -> dict[str, float]:
    """Test scores of a logistic (or ridge) regression on the mean of the bare backbone's last hidden states.

    Features are standardised; the strength of the regularisation is the one of `PROBE_STRENGTHS` with the best score
    on the validation rows (1.0 without any). Training rows of one label give that label. For encoder backbones.
    """
    features = {split: frozen_features(model, rows) for split, rows in data.splits.items()}
    targets = {split: np.array([example.target for example in rows]) for split, rows in data.splits.items()}

    def fit(strength: float) -> Any:
        if data.task.kind == "regression":
            regressor: Any = Ridge(1.0 / strength)
        elif len(set(targets["train"].tolist())) == 1:
            regressor = DummyClassifier()
        else:
            regressor = LogisticRegression(C=strength, max_iter=2000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.simplefilter("ignore", UserWarning)  # many labels with few rows each are expected here
            return make_pipeline(StandardScaler(), regressor).fit(features["train"], targets["train"])

    def scores(probe: Any, split: Split) -> dict[str, float]:
        return score(data.task, targets[split].tolist(), probe.predict(features[split]).tolist())

    if "validation" not in features:
        return scores(fit(1.0), "test")
    probes = [fit(strength) for strength in PROBE_STRENGTHS]
    best = max(probes, key=lambda probe: scores(probe, "validation")[data.task.main_metric])
    return scores(best, "test")


def few_shot_probe(features: np.ndarray[Any, Any], labels: Sequence[int], inputs: np.ndarray[Any, Any]) -> list[int]:
    """Labels of inputs [M, d] by a logistic regression on a few examples [N, d], all features scaled to length 1.

    The regularisation is the one of `FEW_SHOT_STRENGTHS` with the lowest log loss in cross-validation over the examples
    (four folds, or as many as the rarest label has rows), 10 where a label has one row only. Examples of one label
    give that label.
    """
    if len(set(labels)) == 1:
        return [labels[0]] * len(inputs)
    answers: list[int] = logistic_regression(normalize(features), labels).predict(normalize(inputs)).tolist()
    return answers


def logistic_regression(inputs: np.ndarray[Any, Any], labels: Sequence[int]) -> LogisticRegression:
    """A logistic regression on inputs [N, d]; how its regularisation is chosen: see `few_shot_probe`.

    With more than `MANY_ROWS` rows it is chosen on a quarter of them, once; above `MANY_LOGITS` it is 10.

    Raises:
        ValueError: there is one label only.
    """
    counts = Counter(labels)
    folds = min(4, min(counts.values()))
    plain = LogisticRegression(C=10.0, max_iter=2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", UserWarning)  # many labels with few rows each are expected here
        if folds < 2 or len(labels) * len(counts) > MANY_LOGITS:
            return plain.fit(inputs, labels)
        cv: Any = StratifiedKFold(folds, shuffle=True, random_state=0)
        if len(labels) > MANY_ROWS:
            cv = [_one_split(np.asarray(labels), folds)]
        search = GridSearchCV(plain, {"C": FEW_SHOT_STRENGTHS}, scoring="neg_log_loss", cv=cv)
        found: LogisticRegression = search.fit(inputs, labels).best_estimator_
    return found


def _one_split(labels: np.ndarray[Any, Any], folds: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Rows to fit to and rows to check on, both with all labels: a quarter is left out, or else the first of folds.

    A quarter lacks a label where labels are many or one is rare; each of the folds has a row of each label.
    """
    num_labels = len(np.unique(labels))
    if len(labels) >= 4 * num_labels:
        quarter = StratifiedShuffleSplit(1, test_size=0.25, random_state=0)
        kept, left_out = next(quarter.split(labels, labels))
        if len(np.unique(labels[kept])) == len(np.unique(labels[left_out])) == num_labels:
            return kept, left_out
    kept, left_out = next(StratifiedKFold(folds, shuffle=True, random_state=0).split(labels, labels))
    return kept, left_out


@torch.inference_mode()
def frozen_features(
    model: HyperAdapterModel, examples: Sequence[Example], batch_size: int = 64
) -> np.ndarray[Any, Any]:
    """Mean over tokens of the bare backbone's last hidden states, [examples, d].

    Raises:
        NotFiniteError: those of an example are not finite.
    """
    features: dict[int, torch.Tensor] = {}
    collator = model.collator
    model.eval()
    for rows in batches_by_length(examples, batch_size):
        batch = to_device(collator.inputs([examples[row] for row in rows]), device_of(model))
        with model.adapters_disabled():
            hidden = model.backbone(**backbone_inputs(batch)).last_hidden_state
        pooled, numbers = masked_mean(hidden, batch["attention_mask"]).cpu(), [row + 1 for row in rows]
        what = "what the frozen backbone computes"
        check_answers(model, pooled.isfinite().all(dim=1), [examples[row] for row in rows], numbers, what)
        features.update(zip(rows, pooled, strict=True))
    return torch.stack([features[row] for row in range(len(examples))]).numpy()
