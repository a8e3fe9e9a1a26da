"""Detection of values that are not finite numbers, and error messages with the likely cause."""

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
    """Records for which rows all logits of a generation are usable, without changing the logits.

    Attributes:
        usable: Whether no logit so far was NaN or plus infinity [B]; None before the first token.
    """

    usable: Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the logits of the next token unchanged after examining them.

        Args:
            input_ids: Token ids so far [B, S].
            scores: Logits of the next token [B, V].
        """
        found = has_usable_logits(scores)
        self.usable = found if self.usable is None else self.usable & found
        return scores


def has_usable_logits(logits: Tensor) -> Tensor:
    """Return for each row whether no logit is NaN or plus infinity. Minus infinity is valid as padding of labels.

    Args:
        logits: Logits [B, ...].

    Returns:
        Booleans [B].
    """
    return ~(logits.isnan() | logits.isposinf()).flatten(1).any(dim=1)


def check_answers(
    model: HyperAdapterModel, usable: Tensor, examples: Sequence[Example], numbers: Sequence[int], what: str
) -> None:
    """Check that the values that a model computed for inputs are finite.

    Args:
        model: Model, which is examined for the likely cause.
        usable: Whether the values of each input are finite [B].
        examples: The B inputs.
        numbers: Numbers of the inputs for the message, counted from 1.
        what: Description of the values for the message.

    Raises:
        NotFiniteError: If the values of an input are not finite. The message names the first such input and the likely
            cause.
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
    """Return the beginning of an example's text for a message.

    Args:
        example: Example to show.
    """
    text = example.text
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")


def likely_cause(model: HyperAdapterModel) -> str:
    """Return the likely reason why a model computes values that are not finite, with advice.

    Args:
        model: Model to examine.
    """
    if not _is_finite(model.backbone):
        return "the weights of the backbone are not finite; load it again in bfloat16 or float32"
    if not all(
        value.isfinite().all() for name, value in model.adapter_state_dict().items() if name != "method.thresholds"
    ):
        return "the trained weights are not finite, because training diverged; train with a lower learning rate"
    if any(parameter.dtype == torch.float16 for parameter in model.backbone.parameters()):
        return (
            "the backbone computes in float16, whose largest number is 65,504; load it with dtype='bfloat16' or "
            "dtype='float32' (in a recipe, backbone_dtype)"
        )
    return "the values are too large, usually because training diverged; train with a lower learning rate"


def _is_finite(module: nn.Module) -> bool:
    return all(bool(value.isfinite().all()) for _, value in named_weights(module) if value.is_floating_point())
