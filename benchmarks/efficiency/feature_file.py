"""A file that keeps the features of texts for later processes: those of all test files take minutes to compute."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from efficiency.code_digest import PACKAGE, digest_of
from efficiency.frozen_states import Key
from hyperadapters.utils.files import make_folder

SOURCES = (PACKAGE / "backbones" / "text_features.py", PACKAGE / "backbones" / "passes.py")
"""What computes features. Those of other code are in another file."""


class FeatureFile:
    """Features [F] by texts, of one backbone and one maximum length."""

    def __init__(self, folder: Path, backbone_name: str, max_length: int) -> None:
        """Nothing is read yet."""
        of_backbone = hashlib.sha256(backbone_name.encode()).hexdigest()[:8]
        self.path = folder / f"features-{of_backbone}-{max_length}-{digest_of(SOURCES)}.pt"

    def read(self) -> dict[Key, Tensor]:
        """What the file has; nothing if there is none."""
        if not self.path.is_file():
            return {}
        found = torch.load(self.path)
        return dict(zip(found["keys"], found["features"].unbind(), strict=True))

    def write(self, known: Mapping[Key, Tensor]) -> None:
        """Replace the file as a whole; of two processes that do this at once the last one wins."""
        make_folder(self.path.parent)
        draft = self.path.with_suffix(f".{os.getpid()}")
        torch.save({"keys": list(known), "features": torch.stack(list(known.values()))}, draft)
        draft.replace(self.path)
