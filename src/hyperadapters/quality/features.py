"""Features of texts from a frozen encoder, from which the check for label errors predicts labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hyperadapters.backbones.loading import load_backbone, load_tokenizer
from hyperadapters.backbones.passes import pool
from hyperadapters.inference.batches import best_device, to_device
from hyperadapters.quality.duplicates import Input
from hyperadapters.utils.progress import show_progress

BATCH = 64
"""Number of texts that are encoded together."""

Array = np.ndarray[Any, Any]


class TextEncoder:
    """Computes the mean last hidden states of texts with a frozen encoder, normalised to length 1."""

    def __init__(self, backbone: str, max_length: int) -> None:
        """Load the encoder.

        Args:
            backbone: Name of the encoder on the Hub, or its folder.
            max_length: Maximum number of tokens of a text; longer ones are truncated.

        Raises:
            BackboneError: If it cannot be loaded.
        """
        self._device = best_device()
        self._model = load_backbone(backbone).to(self._device)
        self._tokenizer = load_tokenizer(backbone)
        self._max_length = min(max_length, self._tokenizer.model_max_length)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Array:
        """Encode texts.

        Args:
            texts: N texts.

        Returns:
            Features of shape [N, d] in float32.
        """
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        starts = range(0, len(order), BATCH)
        found: dict[int, Array] = {}
        for start in show_progress(starts, "features", len(starts)):
            places = order[start : start + BATCH]
            batch = self._tokenizer(
                [texts[place] for place in places],
                padding=True,
                truncation=True,
                max_length=self._max_length,
                return_tensors="pt",
            )
            inputs = to_device(batch, self._device)
            pooled = F.normalize(pool(self._model(**inputs), inputs).float(), dim=-1).cpu().numpy()
            found.update(zip(places, pooled, strict=True))
        return np.stack([found[place] for place in range(len(texts))])

    def features(self, inputs: Sequence[Input]) -> Array:
        """Compute features of inputs, which compare the texts of a pair (see `backbones.text_features`).

        They are centred and scaled to a mean square of 1, so that a penalty means the same for all encoders.

        Args:
            inputs: Texts of N inputs, which are all single texts or all pairs.

        Returns:
            Features of shape [N, d], or [N, 2 d + 1] for pairs.
        """
        distinct = {text: place for place, text in enumerate(dict.fromkeys(text for texts in inputs for text in texts))}
        encoded = self(list(distinct))
        first, *rest = (encoded[[distinct[text] for text in texts]] for texts in zip(*inputs, strict=True))
        features = first
        if rest:
            second = rest[0]
            product = (first * second).sum(axis=1, keepdims=True)
            features = np.hstack([first + second, np.abs(first - second), product])
        features = features - features.mean(axis=0)
        scale = np.sqrt(np.square(features).sum(axis=1).mean())
        return features / scale if scale > 0 else features
