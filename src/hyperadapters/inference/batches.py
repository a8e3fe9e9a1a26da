"""Batches of inputs of like length, and where they are computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hyperadapters.data.examples import Example


def batches_by_length(examples: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    """Indices of the examples in batches, shorter texts first, so that little is padded."""
    order = sorted(range(len(examples)), key=lambda index: _length(examples[index]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _length(example: Example) -> int:
    return len(example.text) + len(example.text_pair or "")


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's parameters."""
    return next(model.parameters()).device


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def best_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
