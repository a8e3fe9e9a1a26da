"""The linear probe of the library, with the features of all cells kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from efficiency.experiment import FLOAT32_BYTES, Cell, Outcome, Setting, Trained
from efficiency.frozen_states import frozen_copy, key_of, missing_from
from hyperadapters import HyperAdapterModel
from hyperadapters.config import Lengths, Split
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.heads.regression import STANDARDIZED_STRENGTHS, standardized_regression
from hyperadapters.training.metrics import score
from hyperadapters.training.probes import frozen_features

Features = np.ndarray[Any, Any]


def features_of(setting: Setting, cell: Cell, examples: Sequence[Example]) -> Features:
    """The library's frozen features of examples [examples, d], computed for those that have none yet."""
    missing = missing_from(setting.features, examples)
    if missing:
        model = HyperAdapterModel(
            frozen_copy(setting.backbone),
            [data.task for data in cell.tasks],
            backbone_name=setting.backbone_name,
            lengths=Lengths(input=setting.max_length),
        )
        setting.features.update(zip(map(key_of, missing), frozen_features(model, missing), strict=True))
    return np.stack([setting.features[key_of(example)] for example in examples])


def train_probe(setting: Setting, cell: Cell, rate: float | None) -> Trained:
    """Fit the probe of each task; it has no learning rate."""
    features = partial(features_of, setting, cell)
    seconds, probes, best = 0.0, [], []
    for data in cell.tasks:
        train, validation = features(data.splits["train"]), features(data.splits["validation"])
        started = time.monotonic()
        found = [fit_probe(data, train, strength) for strength in STANDARDIZED_STRENGTHS]
        scores = [_score(data, probe, "validation", validation) for probe in found]
        best.append(max(scores))
        probes.append(found[scores.index(max(scores))])
        seconds += time.monotonic() - started

    def test() -> Outcome:
        pairs = zip(cell.tasks, probes, strict=True)
        return Outcome({data.task.name: _score(data, p, "test", features(data.splits["test"])) for data, p in pairs})

    trainable = sum(probe[-1].coef_.size + np.size(probe[-1].intercept_) for probe in probes)
    return Trained(
        validation=sum(best) / len(best),
        test=test,
        trainable=trainable,
        trainable_per_task=trainable / len(probes),
        bytes_per_task=FLOAT32_BYTES * trainable / len(probes),
        steps=0,
        seconds=seconds,
    )


def fit_probe(data: TaskData, features: Features, strength: float) -> Any:
    """Fit as `hyperadapters.training.probes.linear_probe` does, on features [N, d] of the training rows."""
    targets = np.array([example.target for example in data.splits["train"]])
    return standardized_regression(features, targets, strength, data.task.kind == "regression")


def _score(data: TaskData, probe: Any, split: Split, features: Features) -> float:
    targets = [example.target for example in data.splits[split]]
    return 100 * score(data.task, targets, probe.predict(features).tolist())[data.task.main_metric]
