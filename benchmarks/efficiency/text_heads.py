"""Heads that also read frozen text features, which any arm can have: the same features, rows and choice of shares."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from efficiency.frozen_states import Key, Texts, frozen_copy, key_of, missing_from
from efficiency.training_loop import EVAL_BATCH_SIZE, Fit, Learner, task_scores
from hyperadapters import HyperAdapterModel, Task
from hyperadapters.config import Lengths, ModelConfig
from hyperadapters.data.examples import Example, label_examples
from hyperadapters.inference.batches import batches_by_length, device_of, to_device
from hyperadapters.training.text_heads import HeadRows

SETTINGS = {"head_inputs": "adapted_texts", "label_names": True, "token_dropout": 0.3}
"""Those of `ModelConfig` that give a method of this library the heads of the preset `plus`, and its token dropout."""
FROZEN_SETTINGS = {"head_inputs": "pair_features", "label_names": True}
"""Those that give it the heads of the former preset, which read frozen features besides the adapted states."""


class HeadFeatures:
    """What heads that read texts read of each example [F]: computed once in a process and kept on the CPU, by texts."""

    def __init__(self, backbone: nn.Module, texts: Texts) -> None:
        """Nothing is computed yet."""
        config = ModelConfig(method="shared_adapter", head_inputs="pair_features")
        tasks = [Task.classification("any", ["one", "other"])]
        lengths = Lengths(input=texts.max_length)
        self._model = HyperAdapterModel(frozen_copy(backbone), tasks, config, lengths=lengths).eval()
        self._model.tokenizer = texts.tokenizer
        self._known: dict[Key, Tensor] = {}

    @property
    def size(self) -> int:
        """Number F of features."""
        assert self._model.heads is not None
        return self._model.heads.features_size

    @torch.no_grad()
    def prepare(self, examples: Sequence[Example]) -> None:
        """Compute those of which nothing is known yet."""
        missing = missing_from(self._known, examples)
        for rows in batches_by_length(missing, EVAL_BATCH_SIZE):
            batch = [missing[row] for row in rows]
            is_pair = [example.text_pair is not None for example in batch]
            inputs = to_device(self._model.collator.inputs(batch), device_of(self._model))
            found = self._model.head_features(inputs, torch.empty(0), is_pair)
            self._known.update(zip(map(key_of, batch), found.cpu(), strict=True))

    def of(self, examples: Sequence[Example]) -> Tensor:
        """The features of examples [N, F]."""
        self.prepare(examples)
        found = [self._known[key_of(example)] for example in examples]
        return torch.stack(found) if found else torch.empty(0)


class TextHeadsLearner(Learner):
    """A learner whose heads can be made to read texts, too."""

    def set_text_heads(self, fitted_to: HeadRows, validation: HeadRows) -> None:
        """Replace the heads by those that `hyperadapters.train` would fit to the same rows.

        Args:
            fitted_to: of all tasks, with the names of labels.
            validation: with the logits of the present heads.
        """
        raise NotImplementedError


@torch.no_grad()
def fit_text_heads(
    learner: TextHeadsLearner,
    features: HeadFeatures,
    train: Sequence[Example],
    validation: Sequence[Example],
    found: Fit,
    label_names: bool = True,
) -> Fit:
    """Finish the heads of a trained learner as `hyperadapters.train` does, with cached features.

    Args:
        learner: changed in place.
        features: of heads that read texts.
        train, validation: of all its tasks.
        found: of the training.
        label_names: whether the names of labels are rows, too.

    Returns:
        The fit with the scores of the new heads, and with the seconds that they took.
    """
    fitted_to = [*train, *(label_examples(learner.tasks) if label_names else ())]
    features.prepare([*fitted_to, *validation])
    started = time.monotonic()
    logits: dict[int, Tensor] = {}
    learner.eval()
    for rows in batches_by_length(validation, EVAL_BATCH_SIZE):
        logits.update(zip(rows, learner.logits([validation[row] for row in rows]).cpu(), strict=True))
    checked = HeadRows(validation, features.of(validation), [logits[row] for row in range(len(validation))])
    learner.set_text_heads(HeadRows(fitted_to, features.of(fitted_to)), checked)
    scores = task_scores(learner.tasks, validation, learner.answers(validation))
    return replace(found, scores=scores, seconds=found.seconds + time.monotonic() - started)
