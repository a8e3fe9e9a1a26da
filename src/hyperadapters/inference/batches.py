"""Batches of inputs of similar length, and the device on which they are computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hyperadapters.data.examples import Example

CHARACTERS_PER_TOKEN = 6
"""Texts with more characters per available token than this are expected to be truncated."""


def batches_by_length(
    examples: Sequence[Example], batch_size: int, separates_texts: bool = False, max_tokens: int | None = None
) -> Iterator[list[int]]:
    """Iterate over batches of examples in the order of the lengths of their texts, which reduces padding.

    Texts that are truncated to the same length are in the order of their tasks, since a batch of fewer tasks is faster.

    Args:
        examples: Examples to batch.
        batch_size: Number of examples in a batch.
        separates_texts: Whether each text of a pair is a sequence of its own, so that the longer one determines the
            length of the pair. Default: False.
        max_tokens: Maximum number of tokens, to which longer texts are truncated. Default: texts are not truncated.

    Yields:
        Indices of the examples of a batch.
    """

    def key(index: int) -> tuple[float, int]:
        example = examples[index]
        return min(_length(example, separates_texts), longest), -1 if example.task_id is None else example.task_id

    longest = float("inf") if max_tokens is None else CHARACTERS_PER_TOKEN * max_tokens
    order = sorted(range(len(examples)), key=key)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _length(example: Example, separates_texts: bool) -> int:
    first, second = len(example.text), len(example.text_pair or "")
    return max(first, second) if separates_texts else first + second


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters.

    Args:
        model: Model with at least one parameter.
    """
    return next(model.parameters()).device


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of a batch on a device.

    Args:
        batch: Tensors by name.
        device: Device to copy them to.
    """
    return {name: tensor.to(device) for name, tensor in batch.items()}


def best_device() -> torch.device:
    """Return the accelerator of this machine if there is one, and the CPU otherwise."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
