"""The separate texts of a batch, and the features that compare the texts of a pair.

`text_features` encodes the texts with the frozen backbone, in a second pass. `separate_texts` makes each text a
sequence of the batch itself, so that one pass with adapters encodes it, and `compare_texts` computes the same features
from its result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadapters.core import masked_mean
from hyperadapters.errors import TaskError

Encode = Callable[[Tensor, Tensor], Tensor]
"""Function that returns the last hidden states [R, S, d] for token ids and attention mask [R, S]."""


def features_size(hidden_size: int, compared: bool) -> int:
    """Return the number of features F that `text_features` computes for a row.

    Args:
        hidden_size: Size d of the hidden states.
        compared: Whether the features compare the texts of a pair.
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
    """Encode each text separately with the frozen backbone, and compare the texts of a pair.

    With u and v as the mean last hidden states of the first and the second text, normalised to length 1:

        [u + v, |u - v|, u . v]     for a pair
        [u, 0, 0]                   for a single text

    If a pair is encoded as one sequence, as in cross-encoders, its texts are mixed from the first layer on, and their
    similarity has to be learned from the few rows of the task. The embeddings of a sentence encoder already represent
    it (compare Reimers and Gurevych 2019, Sentence-BERT, whose heads also read |u - v|).

    Args:
        encode: Function that runs the frozen backbone.
        input_ids: Token ids [B, S], padded on the right.
        attention_mask: Mask [B, S], 1 for tokens and 0 for padding.
        is_pair: Whether each row is a pair, as a boolean mask [B], or one value for all rows. With one value, no shape
            depends on the values of a tensor, so the function can be exported.
        compared: Whether the features compare the texts of a pair. If False, they are u + v. Default: True.
        sequence_ids: Number of the text of each token [B, S], see `split_pairs`; required if there are pairs.

    Returns:
        Features [B, F] in float32, where F is the result of `features_size`.
    """
    if isinstance(is_pair, bool):
        first, second = _of_like_rows(encode, input_ids, attention_mask, is_pair, sequence_ids)
    elif sequence_ids is None:  # There are no pairs.
        first = _directions(encode, input_ids, attention_mask)
        second, is_pair = torch.zeros_like(first), is_pair[:, None]
    else:
        pooled = _directions(encode, *split_pairs(input_ids, attention_mask, is_pair, sequence_ids))
        first, found = pooled[: len(input_ids)], pooled[len(input_ids) :]
        second = torch.zeros_like(first)
        second[is_pair] = found
        is_pair = is_pair[:, None]
    return _compare(first, second, is_pair) if compared else first + second


def _compare(first: Tensor, second: Tensor, is_pair: Tensor | bool) -> Tensor:
    """Compute [u + v, |u - v|, u . v] from u and v [B, d], where |u - v| is 0 for rows that are not pairs."""
    apart, product = (first - second).abs(), (first * second).sum(dim=1, keepdim=True)
    return torch.cat([first + second, apart * is_pair, product], dim=1)


def _of_like_rows(
    encode: Encode, input_ids: Tensor, attention_mask: Tensor, is_pair: bool, sequence_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute u and v [B, d] for rows that are all pairs, or all single texts, for which v is 0."""
    if not is_pair:
        first = _directions(encode, input_ids, attention_mask)
        return first, torch.zeros_like(first)
    assert sequence_ids is not None
    first_mask, second_ids, second_mask = _halves(input_ids, attention_mask, sequence_ids)
    ids, mask = torch.cat([input_ids, second_ids]), torch.cat([first_mask, second_mask])
    first, second = _directions(encode, ids, mask).unflatten(0, (2, -1))  # `chunk` cannot be exported to ONNX
    return first, second


def _directions(encode: Encode, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Compute the mean last hidden states [R, d], normalised to length 1."""
    return F.normalize(masked_mean(encode(input_ids, attention_mask), attention_mask), dim=-1)


def sequence_ids_of(
    attention_mask: Tensor, is_pair: Tensor | bool, sequence_ids: Tensor | None, token_type_ids: Tensor | None
) -> Tensor | None:
    """Determine the text of a pair to which each token belongs.

    A batch that was not made by the collator of this library may have token types only. These are sufficient if each
    pair has tokens of type 1, as with BERT. Separators then belong to the text that they end.

    Args:
        attention_mask: Mask [B, S], 1 for tokens and 0 for padding.
        is_pair: Whether each row is a pair, as a boolean mask [B], or one value for all rows.
        sequence_ids: Sequence ids [B, S], if they are already known.
        token_type_ids: Token type ids [B, S]; None if the backbone has none.

    Returns:
        Sequence ids [B, S], as required by `split_pairs`; None if there are no pairs.

    Raises:
        TaskError: If there are pairs, and neither tensor distinguishes their texts.
    """
    has_pairs = is_pair if isinstance(is_pair, bool) else bool(is_pair.any())
    if not has_pairs or sequence_ids is not None:
        return sequence_ids if has_pairs else None
    is_distinguished = token_type_ids is not None
    if token_type_ids is not None and not torch.compiler.is_exporting():
        has_second = ((token_type_ids == 1) & attention_mask.bool()).any(dim=1)
        is_distinguished = bool((has_second if isinstance(is_pair, bool) else has_second[is_pair]).all())
    if token_type_ids is None or not is_distinguished:
        raise TaskError(
            "the head of a task of pairs reads each text separately: expected sequence_ids [B, S], or token_type_ids "
            "with a 1 for the tokens of each second text, found "
            + ("neither" if token_type_ids is None else "token_type_ids without a 1 in a row")
            + "; make the batch with model.collator, or pass sequence_ids: 0 for the first text, 1 for the second, "
            "-1 for special tokens and padding (BatchEncoding.sequence_ids of a fast tokenizer)"
        )
    return _from_types(token_type_ids, attention_mask)


def _from_types(token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the sequence ids [B, S] for token types. Separators belong to the text that they end."""
    starts_text = torch.arange(attention_mask.shape[1], device=attention_mask.device) > 0
    return token_type_ids.masked_fill(~(attention_mask.bool() & starts_text), -1)


def split_pairs(
    input_ids: Tensor, attention_mask: Tensor, is_pair: Tensor, sequence_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Split the pairs of a batch, so that each text has its own row.

    The first text keeps the special tokens before it and at most one special token after it. The second text keeps the
    special tokens after it, and gets the special token at the start of the row if there is one. Special tokens that are
    spelled out in a text belong to the text.

    Args:
        input_ids: Token ids [B, S], padded on the right.
        attention_mask: Mask [B, S], 1 for tokens and 0 for padding.
        is_pair: Boolean mask [B] of the P rows that are pairs.
        sequence_ids: Number of the text of each token [B, S]: 0 for tokens of the first text, 1 for tokens of the
            second text, and -1 for special tokens that the tokenizer adds and for padding.

    Returns:
        Token ids and attention mask, each [B + P, S'], of the B first texts followed by the P second texts.
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
    """Return the attention mask of the first texts, and token ids and attention mask of the second, each [P, S]."""
    positions, last_position = torch.arange(input_ids.shape[1], device=input_ids.device), input_ids.shape[1] - 1
    ends = attention_mask.sum(dim=1, keepdim=True) - 1
    has_start = (sequence_ids[:, :1] == -1).long()
    is_second = sequence_ids == 1
    # If the second text is empty, the last token represents it.
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


# Texts as sequences of the batch


def separate_texts(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make each text of a batch a sequence of its own.

    A row is a pair if one of its tokens has sequence id 1. If there are no sequence ids, a token before the last one
    must have token type 1; the last token is a separator, and the only one of this type if the second text is empty.
    Token types are omitted from the result, because each sequence has one text only.

    If torch exports the function, no shape may depend on the values of a tensor. Every row then has a second sequence
    if there are sequence ids or token types, and those of single texts have no effect.

    Args:
        inputs: `input_ids` and `attention_mask`, padded on the right, and `sequence_ids` (see `split_pairs`) or
            `token_type_ids` if they are known, each [B, S].

    Returns:
        `input_ids` and `attention_mask` [R, S'] of the B first texts followed by the second texts of the P pairs. If
        there are pairs, also `is_pair` [B] as numbers 0 and 1, and `pair_rows` [P], the rows of the pairs. The latter
        is missing if every row has a second sequence because of an export.
    """
    input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
    single, sequence_ids = {"input_ids": input_ids, "attention_mask": attention_mask}, inputs.get("sequence_ids")
    if sequence_ids is None and "token_type_ids" in inputs:
        is_last = attention_mask.cumsum(dim=1) == attention_mask.sum(dim=1, keepdim=True)
        sequence_ids = _from_types(inputs["token_type_ids"], attention_mask).masked_fill(is_last, -1)
    if sequence_ids is None:
        return single
    is_pair = (sequence_ids == 1).any(dim=1)
    if torch.compiler.is_exporting():
        return _two_texts_each(input_ids, attention_mask, sequence_ids, is_pair)
    pair_rows = is_pair.nonzero()[:, 0]
    if not len(pair_rows):
        return single
    ids, mask = split_pairs(input_ids, attention_mask, is_pair, sequence_ids)
    return {"input_ids": ids, "attention_mask": mask, "is_pair": is_pair.float(), "pair_rows": pair_rows}


def _two_texts_each(
    input_ids: Tensor, attention_mask: Tensor, sequence_ids: Tensor, is_pair: Tensor
) -> dict[str, Tensor]:
    """Return the B first texts followed by B second texts, which are to be ignored for rows that are not pairs."""
    first_mask, second_ids, second_mask = _halves(input_ids, attention_mask, sequence_ids)
    first_mask = torch.where(is_pair[:, None], first_mask, attention_mask)
    ids, mask = torch.cat([input_ids, second_ids]), torch.cat([first_mask, second_mask])
    return {"input_ids": ids, "attention_mask": mask, "is_pair": is_pair.float()}


def sequence_rows(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Return the row of each sequence [R], or None if row i is sequence i.

    Args:
        inputs: Result of `separate_texts`, or inputs whose rows have one sequence each.
    """
    if "pair_rows" not in inputs:
        return None
    first_rows = torch.arange(len(inputs["is_pair"]), device=inputs["is_pair"].device)
    return torch.cat([first_rows, inputs["pair_rows"]])


def mean_of_texts(pooled: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Compute the mean of the pooled hidden states of the texts of each row.

    Args:
        pooled: Pooled hidden states of each sequence [R, d], in float32.
        inputs: Result of `separate_texts`, or inputs whose rows have one sequence each.

    Returns:
        Means [B, d].
    """
    if "is_pair" not in inputs:
        return pooled
    first, second = _first_and_second(pooled, inputs)
    return (first + second) / (1 + inputs["is_pair"])[:, None]


def compare_texts(pooled: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Compute the features of `text_features` from the pooled last hidden states of texts that are encoded already.

    Args:
        pooled: Pooled last hidden states of each sequence [R, d], in float32.
        inputs: Result of `separate_texts`, or inputs whose rows have one sequence each.

    Returns:
        Features [B, F]; see `text_features`.
    """
    directions = F.normalize(pooled, dim=-1)
    if "is_pair" not in inputs:
        return F.pad(directions, (0, features_size(pooled.shape[1], compared=True) - pooled.shape[1]))
    return _compare(*_first_and_second(directions, inputs), inputs["is_pair"][:, None])


def _first_and_second(values: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the values [B, d] of the first and of the second text of each row, the latter 0 for single texts."""
    is_pair = inputs["is_pair"]
    if "pair_rows" not in inputs:
        first, second = values.unflatten(0, (2, -1))  # `chunk` cannot be exported to ONNX
        return first, second * is_pair[:, None]
    first, found = values[: len(is_pair)], values[len(is_pair) :]
    return first, torch.zeros_like(first).index_copy(0, inputs["pair_rows"], found)
