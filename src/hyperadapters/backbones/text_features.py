"""The texts of a batch by themselves, as the frozen backbone sees them: unchanged by adapters and each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadapters.core import masked_mean
from hyperadapters.errors import TaskError

Encode = Callable[[Tensor, Tensor], Tensor]
"""Last hidden states [R, S, d] of token ids and attention mask [R, S]."""


def features_size(hidden_size: int, compared: bool) -> int:
    """Size F of `text_features` for hidden states of size d."""
    return 2 * hidden_size + 1 if compared else hidden_size


def text_features(
    encode: Encode,
    input_ids: Tensor,
    attention_mask: Tensor,
    is_pair: Tensor | bool,
    compared: bool = True,
    sequence_ids: Tensor | None = None,
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
        sequence_ids: see `split_pairs`; needed where there are pairs.

    Returns:
        [B, F] in float32, see `features_size`.
    """
    if isinstance(is_pair, bool):
        first, second = _of_like_rows(encode, input_ids, attention_mask, is_pair, sequence_ids)
    elif sequence_ids is None:  # no pairs
        first = _directions(encode, input_ids, attention_mask)
        second, is_pair = torch.zeros_like(first), is_pair[:, None]
    else:
        pooled = _directions(encode, *split_pairs(input_ids, attention_mask, is_pair, sequence_ids))
        first, found = pooled[: len(input_ids)], pooled[len(input_ids) :]
        second = torch.zeros_like(first)
        second[is_pair] = found
        is_pair = is_pair[:, None]
    if not compared:
        return first + second
    apart, product = (first - second).abs(), (first * second).sum(dim=1, keepdim=True)
    return torch.cat([first + second, apart * is_pair, product], dim=1)


def _of_like_rows(
    encode: Encode, input_ids: Tensor, attention_mask: Tensor, is_pair: bool, sequence_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The directions u and v [B, d] of rows that are all pairs, or all single texts, whose v is 0."""
    if not is_pair:
        first = _directions(encode, input_ids, attention_mask)
        return first, torch.zeros_like(first)
    assert sequence_ids is not None
    first_mask, second_ids, second_mask = _halves(input_ids, attention_mask, sequence_ids)
    ids, mask = torch.cat([input_ids, second_ids]), torch.cat([first_mask, second_mask])
    first, second = _directions(encode, ids, mask).unflatten(0, (2, -1))  # `chunk` cannot be written as ONNX
    return first, second


def _directions(encode: Encode, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Directions of the mean last hidden states [R, d]."""
    return F.normalize(masked_mean(encode(input_ids, attention_mask), attention_mask), dim=-1)


def sequence_ids_of(
    attention_mask: Tensor, is_pair: Tensor | bool, sequence_ids: Tensor | None, token_type_ids: Tensor | None
) -> Tensor | None:
    """Which text of a pair each token belongs to, as `split_pairs` takes it; None where there are no pairs.

    A caller that tokenises without the library's collator may give token types alone. They serve where each pair has
    tokens of type 1, as on BERT; its first token and its separators then belong to the text that they are beside.

    Raises:
        TaskError: there are pairs, and neither tensor tells their texts apart.
    """
    has_pairs = is_pair if isinstance(is_pair, bool) else bool(is_pair.any())
    if not has_pairs or sequence_ids is not None:
        return sequence_ids if has_pairs else None
    is_told = token_type_ids is not None
    if token_type_ids is not None and not torch.compiler.is_exporting():
        has_second = ((token_type_ids == 1) & attention_mask.bool()).any(dim=1)
        is_told = bool((has_second if isinstance(is_pair, bool) else has_second[is_pair]).all())
    if token_type_ids is None or not is_told:
        raise TaskError(
            "the head of a task of pairs reads each text by itself: expected sequence_ids [B, S], or token_type_ids "
            "with a 1 for the tokens of each second text, found "
            + ("neither" if token_type_ids is None else "token_type_ids without a 1 in a row")
            + "; make the batch with model.collator, or pass sequence_ids: 0 for the first text, 1 for the second, "
            "-1 for special tokens and padding (BatchEncoding.sequence_ids of a fast tokenizer)"
        )
    starts_text = torch.arange(attention_mask.shape[1], device=attention_mask.device) > 0
    return token_type_ids.masked_fill(~(attention_mask.bool() & starts_text), -1)


def split_pairs(
    input_ids: Tensor, attention_mask: Tensor, is_pair: Tensor, sequence_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Make each text of a batch a row of its own.

    The first text keeps the special tokens around it, of which one at most follows it; the second text keeps those
    after it, and gets the special token that starts the row, if one does. Special tokens that are spelt in a text are
    part of the text.

    Args:
        input_ids, attention_mask: [B, S], padded on the right.
        is_pair: which rows are pairs [B], P of them.
        sequence_ids: 0 for tokens of the first text, 1 for those of the second, -1 for special tokens that the
            tokenizer adds and for padding [B, S].

    Returns:
        Token ids and attention mask [B + P, S'] of the B first texts, then the P second ones.
    """
    own_first_mask, second_ids, second_mask = _halves(
        input_ids[is_pair], attention_mask[is_pair], sequence_ids[is_pair]
    )
    first_mask = attention_mask.to(second_mask, copy=True)
    first_mask[is_pair] = own_first_mask
    ids, mask = torch.cat([input_ids, second_ids]), torch.cat([first_mask, second_mask])
    length = int(mask.sum(dim=1).max())
    return ids[:, :length], mask[:, :length]


def _halves(input_ids: Tensor, attention_mask: Tensor, sequence_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of pairs [P, S]: the attention mask of the first texts, token ids and attention mask of the second ones."""
    positions, last_position = torch.arange(input_ids.shape[1], device=input_ids.device), input_ids.shape[1] - 1
    ends = attention_mask.sum(dim=1, keepdim=True) - 1
    has_start = (sequence_ids[:, :1] == -1).long()
    is_second = sequence_ids == 1
    # Where the second text is empty, the last token stands for it.
    starts = torch.where(is_second, positions, ends).amin(dim=1, keepdim=True)
    last_of_first = torch.where(sequence_ids == 0, positions, has_start - 1).amax(dim=1, keepdim=True)
    has_second = is_second.any(dim=1, keepdim=True)
    first_ends = torch.where(has_second, torch.minimum(last_of_first + 1, starts - 1), last_of_first + 1)
    first_ends = torch.minimum(first_ends, ends)
    starts = torch.where(has_second, starts, torch.maximum(starts, first_ends + 1))
    sources = starts - has_start + positions
    second_ids = input_ids.gather(1, sources.clamp(min=0, max=last_position))
    is_start = (positions == 0) & (has_start == 1)
    second_ids = torch.where(is_start, input_ids[:, :1], second_ids)
    return (positions <= first_ends).long(), second_ids, ((sources <= ends) | (positions == 0)).long()
