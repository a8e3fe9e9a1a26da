"""The texts of a batch by themselves, as the frozen backbone sees them: unchanged by adapters and each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadapters.core import masked_mean

Encode = Callable[[Tensor, Tensor], Tensor]
"""Last hidden states [R, S, d] of token ids and attention mask [R, S]."""


def features_width(width: int, compared: bool) -> int:
    """Size F of `text_features` for hidden states of size d."""
    return 2 * width + 1 if compared else width


def text_features(
    encode: Encode, input_ids: Tensor, attention_mask: Tensor, is_pair: Tensor, compared: bool = True
) -> Tensor:
    """What the frozen backbone makes of each text by itself, and how like the texts of a pair are.

    With u and v the directions of the mean last hidden states of the first and the second text:

        [u + v, |u - v|, u . v]     for a pair
        [u, 0, 0]                   for a single text

    A pair that is read as one text, as cross-encoders do, mixes its texts from the first layer on. How alike they are
    then has to be learned from the task's few rows; an encoder of sentences already knows it of the texts by themselves
    (compare Reimers and Gurevych 2019, Sentence-BERT, whose heads read |u - v| too).

    Args:
        encode: the frozen backbone.
        input_ids, attention_mask: [B, S], padded on the right.
        is_pair: which rows are pairs [B].
        compared: whether the parts that compare the texts of a pair are there.

    Returns:
        [B, F] in float32, see `features_width`.
    """
    ids, mask = split_pairs(input_ids, attention_mask, is_pair)
    pooled = F.normalize(masked_mean(encode(ids, mask), mask), dim=-1)
    first, found = pooled[: len(input_ids)], pooled[len(input_ids) :]
    second = torch.zeros_like(first)
    second[is_pair] = found
    if not compared:
        return first + second
    apart, product = (first - second).abs(), (first * second).sum(dim=1, keepdim=True)
    return torch.cat([first + second, apart * is_pair[:, None], product], dim=1)


def split_pairs(input_ids: Tensor, attention_mask: Tensor, is_pair: Tensor) -> tuple[Tensor, Tensor]:
    """Make each text of a batch a row of its own.

    Rows are read as encoders have them: a first token, a text, a separator, and for a pair perhaps another separator,
    the second text and a separator. Each text gets the first token and keeps the separator after it.

    Args:
        input_ids, attention_mask: [B, S], padded on the right.
        is_pair: which rows are pairs [B], P of them.

    Returns:
        Token ids and attention mask [B + P, S'] of the B first texts, then the P second ones.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = attention_mask.sum(dim=1, keepdim=True) - 1
    is_separator = input_ids == input_ids.gather(1, last)
    first_end = torch.where(is_pair[:, None], is_separator.int().argmax(dim=1, keepdim=True), last)
    first_mask = (positions <= first_end).long()
    starts, ends = first_end[is_pair] + 1, last[is_pair]
    own, own_separators = input_ids[is_pair], is_separator[is_pair]
    # A second separator right after the first, as RoBERTa has it; the very last token is the end of the second text.
    starts = starts + (own_separators.gather(1, starts.clamp(max=input_ids.shape[1] - 1)) & (starts < ends)).long()
    sources = starts - 1 + positions
    second_ids = own.gather(1, sources.clamp(max=input_ids.shape[1] - 1))
    second_ids[:, 0] = own[:, 0]
    second_mask = ((sources <= ends) | (positions == 0)).long()
    ids, mask = torch.cat([input_ids, second_ids]), torch.cat([first_mask, second_mask])
    length = int(mask.sum(dim=1).max())
    return ids[:, :length], mask[:, :length]
