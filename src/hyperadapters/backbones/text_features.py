"""Features of the single texts of a batch, which the frozen backbone encodes one by one, without adapters."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadapters.core import masked_mean
from hyperadapters.errors import TaskError

Encode = Callable[[Tensor, Tensor], Tensor]
"""Returns the last hidden states [R, S, d] for token ids and attention mask [R, S]."""


def features_size(hidden_size: int, compared: bool) -> int:
    """Compute the number of features that `text_features` returns.

    Args:
        hidden_size: d, size of the hidden states.
        compared: Whether the features compare the texts of a pair.

    Returns:
        F.
    """
    return 2 * hidden_size + 1 if compared else hidden_size


def text_features(
    encode: Encode,
    input_ids: Tensor,
    attention_mask: Tensor,
    is_pair: Tensor | bool,
    compared: bool = True,
    sequence_ids: Tensor | None = None,
) -> Tensor:
    """Encode each text by itself with the frozen backbone, and compare the texts of a pair.

    With u and v the directions of the mean last hidden states of the first and the second text:

        [u + v, |u - v|, u . v]     for a pair
        [u, 0, 0]                   for a single text

    If a pair is encoded as one sequence, as in cross-encoders, its texts are mixed from the first layer on, and how
    similar they are has to be learned from the few rows of the task. The embeddings of a sentence encoder already show
    it (compare Reimers and Gurevych 2019, Sentence-BERT, whose heads read |u - v| too).

    Args:
        encode: The frozen backbone.
        input_ids: Token ids [B, S], padded on the right.
        attention_mask: 1 for tokens, 0 for padding [B, S].
        is_pair: Which rows are pairs [B], or whether all of them are. With the latter no shape depends on the values
            of a tensor, so that the function can be exported.
        compared: Whether the features compare the texts of a pair. If not, they are u + v.
        sequence_ids: Which text a token belongs to [B, S], see `split_pairs`; needed if there are pairs.

    Returns:
        The features [B, F] in float32; F is that of `features_size`.
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
    """Find out which text of a pair each token belongs to.

    Callers that do not use the library's collator may have token types only. These suffice if each pair has tokens of
    type 1, as with BERT; separators then belong to the text that they end.

    Args:
        attention_mask: 1 for tokens, 0 for padding [B, S].
        is_pair: Which rows are pairs [B], or whether all of them are.
        sequence_ids: The result, if it is known [B, S].
        token_type_ids: Token types [B, S]; None if the backbone has none.

    Returns:
        Sequence ids [B, S], as `split_pairs` takes them; None if there are no pairs.

    Raises:
        TaskError: If there are pairs, and neither tensor tells their texts apart.
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
    """Split the pairs of a batch, so that each text has a row of its own.

    The first text keeps the special tokens before it and at most one after it. The second text keeps those after it,
    and gets the special token at the start of the row, if there is one. Special tokens that are written out in a text
    belong to the text.

    Args:
        input_ids: Token ids [B, S], padded on the right.
        attention_mask: 1 for tokens, 0 for padding [B, S].
        is_pair: Which rows are pairs [B], P of them.
        sequence_ids: 0 for tokens of the first text, 1 for those of the second, -1 for special tokens that the
            tokenizer adds and for padding [B, S].

    Returns:
        Token ids and attention mask [B + P, S'] of the B first texts, followed by the P second ones.
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
