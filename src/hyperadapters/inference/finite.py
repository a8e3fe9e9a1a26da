"""What is reported when a model computes values that are not finite numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from hyperadapters.backbones.devices import named_weights
from hyperadapters.data.examples import Example
from hyperadapters.errors import NotFiniteError
from hyperadapters.model.model import HyperAdapterModel

SHOWN_CHARACTERS = 40


class FiniteLogits(LogitsProcessor):
    """Notes for which rows a generation computes usable logits; the logits stay as they are.

    Attributes:
        usable: whether no logit so far was NaN or plus infinity [B]; None before the first token.
    """

    usable: Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Look at the logits [B, V] of the next token."""
        found = has_usable_logits(scores)
        self.usable = found if self.usable is None else self.usable & found
        return scores


def has_usable_logits(logits: Tensor) -> Tensor:
    """Whether no logit of a row [B, ...] is NaN or plus infinity [B]; minus infinity stands for a label that is not."""
    return ~(logits.isnan() | logits.isposinf()).flatten(1).any(dim=1)


def check_answers(
    model: HyperAdapterModel, usable: Tensor, examples: Sequence[Example], numbers: Sequence[int], what: str
) -> None:
    """Check that a model could answer inputs.

    Args:
        model: for the likely cause.
        usable: whether the values of each input are finite [B].
        examples: the inputs [B].
        numbers: of the inputs, counted from 1 [B].
        what: that is to be finite, for the message.

    Raises:
        NotFiniteError: names the first input whose values are not, and the likely cause.
    """
    if bool(usable.all()):
        return
    number, example = min(
        (number, example)
        for number, example, is_usable in zip(numbers, _texts(examples), usable.tolist(), strict=True)
        if not is_usable
    )
    raise NotFiniteError(f"input {number} ({example}): {what} is not a finite number; {likely_cause(model)}")


def _texts(examples: Sequence[Example]) -> list[str]:
    return [shown(example) for example in examples]


def shown(example: Example) -> str:
    """The beginning of an example's text, for a message."""
    text = example.text
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")


def likely_cause(model: HyperAdapterModel) -> str:
    """Why a model computes values that are not finite, and what to do."""
    if not _is_finite(model.backbone):
        return "the weights of the backbone are not finite: load it anew, in bfloat16 or float32"
    if not all(
        value.isfinite().all() for name, value in model.adapter_state_dict().items() if name != "method.thresholds"
    ):
        return "the trained weights are not finite, because training diverged: train with a lower learning rate"
    if any(parameter.dtype == torch.float16 for parameter in model.backbone.parameters()):
        return (
            "the backbone computes in float16, which ends at 65,504: load it with dtype='bfloat16' or dtype='float32' "
            "(in a recipe, backbone_dtype)"
        )
    return "the values grow too large, mostly because training diverged: train with a lower learning rate"


def _is_finite(module: nn.Module) -> bool:
    return all(bool(value.isfinite().all()) for _, value in named_weights(module) if value.is_floating_point())
