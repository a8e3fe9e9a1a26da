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
    encode: Encode, input_ids: Tensor, attention_mask: Tensor, is_pair: Tensor | bool, compared: bool = True
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
        is_pair: which rows are pairs [B]; or whether all of them are. Then no shape depends on what a tensor holds, so
            that the function can be exported.
        compared: whether the parts that compare the texts of a pair are there.

    Returns:
        [B, F] in float32, see `features_width`.
    """
    if isinstance(is_pair, bool):
        first, second = _of_like_rows(encode, input_ids, attention_mask, is_pair)
    else:
        pooled = _directions(encode, *split_pairs(input_ids, attention_mask, is_pair))
        first, found = pooled[: len(input_ids)], pooled[len(input_ids) :]
        second = torch.zeros_like(first)
        second[is_pair] = found
        is_pair = is_pair[:, None]
    if not compared:
        return first + second
    apart, product = (first - second).abs(), (first * second).sum(dim=1, keepdim=True)
    return torch.cat([first + second, apart * is_pair, product], dim=1)


def _of_like_rows(encode: Encode, input_ids: Tensor, attention_mask: Tensor, is_pair: bool) -> tuple[Tensor, Tensor]:
    """The directions u and v [B, d] of rows that are all pairs, or all single texts, whose v is 0."""
    if not is_pair:
        first = _directions(encode, input_ids, attention_mask)
        return first, torch.zeros_like(first)
    first_mask, second_ids, second_mask = _halves(input_ids, attention_mask)
    ids, mask = torch.cat([input_ids, second_ids]), torch.cat([first_mask, second_mask])
    first, second = _directions(encode, ids, mask).unflatten(0, (2, -1))  # `chunk` cannot be written as ONNX
    return first, second


def _directions(encode: Encode, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Directions of the mean last hidden states [R, d]."""
    return F.normalize(masked_mean(encode(input_ids, attention_mask), attention_mask), dim=-1)


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
    own_first_mask, second_ids, second_mask = _halves(input_ids[is_pair], attention_mask[is_pair])
    first_mask = attention_mask.to(second_mask, copy=True)
    first_mask[is_pair] = own_first_mask
    ids, mask = torch.cat([input_ids, second_ids]), torch.cat([first_mask, second_mask])
    length = int(mask.sum(dim=1).max())
    return ids[:, :length], mask[:, :length]


def _halves(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of pairs [P, S]: the attention mask of the first texts, token ids and attention mask of the second ones."""
    positions, last_position = torch.arange(input_ids.shape[1], device=input_ids.device), input_ids.shape[1] - 1
    ends = attention_mask.sum(dim=1, keepdim=True) - 1
    is_separator = input_ids == input_ids.gather(1, ends)
    first_ends = is_separator.int().argmax(dim=1, keepdim=True)
    starts = first_ends + 1
    # A second separator right after the first, as RoBERTa has it; the very last token is the end of the second text.
    starts = starts + (is_separator.gather(1, starts.clamp(max=last_position)) & (starts < ends)).long()
    sources = starts - 1 + positions
    second_ids = input_ids.gather(1, sources.clamp(max=last_position))
    second_ids[:, 0] = input_ids[:, 0]
    return (positions <= first_ends).long(), second_ids, ((sources <= ends) | (positions == 0)).long()
