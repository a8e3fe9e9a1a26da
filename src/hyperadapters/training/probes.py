"""Baselines: the majority class, and a linear probe on the features of the frozen backbone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.pipeline import Pipeline

from hyperadapters.backbones.passes import backbone_inputs
from hyperadapters.config import Split
from hyperadapters.core import masked_mean
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.data.targets import multi_hot
from hyperadapters.heads.regression import STANDARDIZED_STRENGTHS, standardized_regression
from hyperadapters.inference.batches import batches_by_length, device_of, to_device
from hyperadapters.inference.finite import check_answers
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.metrics import score


def majority(data: TaskData) -> dict[str, float]:
    """Score a constant prediction on the test rows of a task.

    Args:
        data: Task with training and test rows.

    Returns:
        The value of each metric of the task, if the most frequent training label (or set of labels), or the mean of the
        training targets of a regression task, is predicted for each test row.
    """
    targets: list[Any] = [example.target for example in data.splits["train"]]
    if data.task.kind == "regression":
        answer = float(np.mean([float(target) for target in targets if target is not None]))
    else:
        answer = Counter(targets).most_common(1)[0][0]
    test = [example.target for example in data.splits["test"]]
    return score(data.task, test, [answer] * len(test))


def linear_probe(model: HyperAdapterModel, data: TaskData) -> dict[str, float]:
    """Score a linear probe on the test rows of a task.

    The probe is a logistic or ridge regression on the standardised features of `frozen_features`, or an independent
    logistic regression for each label of a multi-label task. The inverse of its penalty is the one of
    `STANDARDIZED_STRENGTHS` with the best score on the validation rows, or 1 without any. If all training rows have the
    same label, the probe predicts that label.

    Args:
        model: Model of an encoder backbone; its adapters are disabled.
        data: Task with training and test rows, and optionally validation rows.

    Returns:
        The value of each metric of the task on the test rows.

    Raises:
        NotFiniteError: If the features of an example are not finite.
    """
    features = {split: frozen_features(model, rows) for split, rows in data.splits.items()}
    targets: dict[Split, list[Any]] = {
        split: [example.target for example in rows] for split, rows in data.splits.items()
    }
    size = len(data.task.labels)
    is_multi_label = data.task.is_multi_label
    known = np.array([multi_hot(row, size) for row in targets["train"]] if is_multi_label else targets["train"])

    def fit(strength: float) -> Pipeline:
        return standardized_regression(features["train"], known, strength, data.task.kind == "regression")

    def scores(probe: Pipeline, split: Split) -> dict[str, float]:
        found = probe.predict(features[split])
        answers = [tuple(np.flatnonzero(row).tolist()) for row in found] if is_multi_label else found.tolist()
        return score(data.task, targets[split], answers)

    if "validation" not in features:
        return scores(fit(1.0), "test")
    probes = [fit(strength) for strength in STANDARDIZED_STRENGTHS]
    best = max(probes, key=lambda probe: scores(probe, "validation")[data.task.main_metric])
    return scores(best, "test")


@torch.inference_mode()
def frozen_features(
    model: HyperAdapterModel, examples: Sequence[Example], batch_size: int = 64
) -> np.ndarray[Any, Any]:
    """Compute the mean over tokens of the last hidden states of the backbone without adapters.

    Args:
        model: Model of an encoder backbone. It is put into evaluation mode.
        examples: N examples to compute features of.
        batch_size: Number of examples in a forward pass.

    Returns:
        Features of shape [N, d], in float32.

    Raises:
        NotFiniteError: If the features of an example are not finite.
    """
    features: dict[int, torch.Tensor] = {}
    collator = model.collator
    model.eval()
    for rows in batches_by_length(examples, batch_size):
        batch = to_device(collator.inputs([examples[row] for row in rows]), device_of(model))
        with model.adapters_disabled():
            hidden = model.backbone(**backbone_inputs(batch)).last_hidden_state
        pooled, numbers = masked_mean(hidden, batch["attention_mask"]).cpu(), [row + 1 for row in rows]
        what = "the output of the frozen backbone"
        check_answers(model, pooled.isfinite().all(dim=1), [examples[row] for row in rows], numbers, what)
        features.update(zip(rows, pooled, strict=True))
    return torch.stack([features[row] for row in range(len(examples))]).numpy()
