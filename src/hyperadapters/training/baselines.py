"""What any method has to beat: the majority class, and a linear probe on the frozen features."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hyperadapters.config import Split
from hyperadapters.core import masked_mean
from hyperadapters.data.collate import Collator
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.model import HyperAdapterModel
from hyperadapters.training.metrics import score

PROBE_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 1e1)


def majority(data: TaskData) -> dict[str, float]:
    """Test scores of answering with the commonest training target (their mean, for a regression)."""
    targets = [example.target for example in data.splits["train"]]
    if data.task.kind == "regression":
        answer: Any = float(np.mean([float(target) for target in targets if target is not None]))
    else:
        answer = Counter(targets).most_common(1)[0][0]
    test = [example.target for example in data.splits["test"]]
    return score(data.task, test, [answer] * len(test))


def linear_probe(model: HyperAdapterModel, data: TaskData, collator: Collator) -> dict[str, float]:
    """Test scores of a logistic (or ridge) regression on the mean of the bare backbone's last hidden states.

    Features are standardised; the strength of the regularisation is the one of `PROBE_STRENGTHS` with the best score
    on the validation rows (1.0 without any). For encoder backbones.
    """
    features = {split: frozen_features(model, rows, collator) for split, rows in data.splits.items()}
    targets = {split: np.array([example.target for example in rows]) for split, rows in data.splits.items()}

    def fit(strength: float) -> Any:
        regressor = (
            Ridge(1.0 / strength) if data.task.kind == "regression" else LogisticRegression(C=strength, max_iter=2000)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return make_pipeline(StandardScaler(), regressor).fit(features["train"], targets["train"])

    def scores(probe: Any, split: Split) -> dict[str, float]:
        return score(data.task, targets[split].tolist(), probe.predict(features[split]).tolist())

    if "validation" not in features:
        return scores(fit(1.0), "test")
    probes = [fit(strength) for strength in PROBE_STRENGTHS]
    best = max(probes, key=lambda probe: scores(probe, "validation")[data.task.main_metric])
    return scores(best, "test")


@torch.inference_mode()
def frozen_features(
    model: HyperAdapterModel, examples: Sequence[Example], collator: Collator, batch_size: int = 64
) -> np.ndarray[Any, Any]:
    """Mean over tokens of the bare backbone's last hidden states, [examples, d]."""
    features = []
    device = next(model.parameters()).device
    model.eval()
    for start in range(0, len(examples), batch_size):
        batch = {name: t.to(device) for name, t in collator(examples[start : start + batch_size]).items()}
        for name in ("task_ids", "labels"):
            batch.pop(name, None)
        with model.adapters_disabled():
            hidden = model.backbone(**batch).last_hidden_state
        features.append(masked_mean(hidden, batch["attention_mask"]).cpu().numpy())
    return np.concatenate(features)
