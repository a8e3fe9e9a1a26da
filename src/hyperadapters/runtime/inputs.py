"""Inputs of a runtime: reading them, and making batches of token ids without torch and transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hyperadapters.data.rows import by_column, is_absent, iterate_rows, plain
from hyperadapters.errors import CheckpointError, DataError, TaskError, shown, unknown_name
from hyperadapters.runtime.folder import TOKENIZER_FILE, Array, RuntimeTask, Settings


class Input(NamedTuple):
    """An input whose form has been checked.

    Attributes:
        text: Text, or the first text of a pair.
        text_pair: Second text of a pair, or None.
        task_id: Index of its task; None if the task is to be found.
    """

    text: str
    text_pair: str | None
    task_id: int | None


def read_inputs(inputs: Any, tasks: Sequence[RuntimeTask], task: str | None) -> Iterator[Input]:
    """Return an iterator over inputs. The collection and the task are checked immediately.

    Args:
        inputs: Collection of strings, pairs of strings, or rows with `text` and optionally `text_pair` and `task`, in
            any form that `data.rows.iterate_rows` reads.
        tasks: The tasks of the runtime.
        task: Name of the task of all inputs. If None, inputs have their own task, or none.

    Raises:
        DataError: If an input has another form or no text, or does not fit its task.
        TaskError: If a task is unknown.
    """
    ids = {known.name: task_id for task_id, known in enumerate(tasks)}
    if task is not None and (not isinstance(task, str) or task not in ids):
        raise TaskError(unknown_name("task", str(task), ids))
    rows = iterate_rows(inputs)
    return (_read(f"input {number}", row, tasks, ids, task) for number, row in enumerate(rows, start=1))


def _read(place: str, value: Any, tasks: Sequence[RuntimeTask], ids: Mapping[str, int], task: str | None) -> Input:
    value = plain(by_column(value))
    if isinstance(value, str):
        value = {"text": value}
    elif isinstance(value, (tuple, list)) and len(value) == 2:
        value = {"text": value[0], "text_pair": value[1]}
    if not isinstance(value, Mapping):
        raise DataError(f"{place}: expected a string, a pair of strings or a mapping with 'text', found {shown(value)}")
    name, text, second = (plain(value.get(key)) for key in ("task", "text", "text_pair"))
    name = task if task is not None else None if is_absent(name) else name
    if name is not None and (not isinstance(name, str) or name not in ids):
        raise TaskError(f"{place}: " + unknown_name("task", str(name), ids))
    known = None if name is None else tasks[ids[name]]
    is_pair = not is_absent(second) if known is None else known.is_pair
    if known is not None and not is_pair and not is_absent(second):
        raise DataError(f"{place}: found a text_pair, which task '{known.name}' does not read; remove it")
    return Input(
        _text(place, "text", text),
        _text(place, "text_pair", second) if is_pair else None,
        None if known is None else ids[known.name],
    )


def _text(place: str, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: expected a string in '{field}', found {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # an unpaired surrogate, which JSON can represent
        raise DataError(f"{place}: expected Unicode text in '{field}', found {shown(value)}") from None
    return value


class Tokens(NamedTuple):
    """The tokens of one input.

    Attributes:
        first: Token ids of the input, or of its first text if each text of a pair is a sequence of its own.
        second: Token ids of its second text if this is a sequence of its own; None otherwise.
        types: Token types of `first`; none if each text of a pair is a sequence of its own.
        has_words: Whether it has other tokens than the tokenizer's special ones.
    """

    first: list[int]
    second: list[int] | None
    types: list[int]
    has_words: bool

    @property
    def length(self) -> int:
        """Number of tokens of the longest sequence."""
        return max(len(self.first), len(self.second or ()))


def tokenize(tokenizer: Any, inputs: Sequence[Input], settings: Settings) -> list[Tokens]:
    """Tokenise inputs.

    Args:
        tokenizer: `tokenizers.Tokenizer` that truncates and does not pad.
        inputs: Inputs.
        settings: Settings of the runtime.

    Returns:
        The tokens of each input.

    Raises:
        CheckpointError: If the tokenizer cannot tokenise an input, because the folder is damaged.
    """
    texts = [entry.text if entry.text_pair is None else (entry.text, entry.text_pair) for entry in inputs]
    special = set(settings.special_ids)
    try:
        encodings = tokenizer.encode_batch(texts)
    except Exception as error:  # errors of tokenizers have no class of their own
        raise CheckpointError(f"{TOKENIZER_FILE}: the tokenizer cannot tokenise an input: {error}") from None
    found = []
    for encoding in encodings:
        ids, of_texts = encoding.ids, encoding.sequence_ids
        first, second = ids, None
        if settings.separates_texts and 1 in of_texts:
            first, second = split_pair(ids, of_texts)
        types = [] if settings.separates_texts else encoding.type_ids
        found.append(Tokens(first, second, types, not special.issuperset(ids)))
    return found


def split_pair(ids: list[int], sequence_ids: Sequence[int | None]) -> tuple[list[int], list[int]]:
    """Split the tokens of a pair as `backbones.text_features.split_pairs` does.

    Args:
        ids: Token ids of a pair.
        sequence_ids: 0 for tokens of the first text, 1 for tokens of the second text, of which there is at least one,
            and None for special tokens that the tokenizer adds.

    Returns:
        Token ids of the first and of the second text.
    """
    has_start = sequence_ids[0] is None
    start = sequence_ids.index(1)
    last_of_first = max((place for place, text in enumerate(sequence_ids) if text == 0), default=int(has_start) - 1)
    return ids[: min(last_of_first + 1, start - 1) + 1], [*ids[: int(has_start)], *ids[start:]]


@dataclass(frozen=True)
class Batch:
    """Sequences of B inputs: the first texts of all inputs, followed by the second texts of the P pairs.

    Attributes:
        ids: Token ids [R, S], padded on the right.
        mask: Mask [R, S], 1 for tokens and 0 for padding.
        types: Token types [R, S].
        pair_rows: Inputs that are pairs of two sequences [P].
        num_inputs: Number of inputs B.
    """

    ids: Array
    mask: Array
    types: Array
    pair_rows: Array
    num_inputs: int

    @classmethod
    def of(cls, tokens: Sequence[Tokens], padding_id: int) -> Batch:
        """Make a batch.

        Args:
            tokens: Tokens of the B inputs.
            padding_id: Token id of padding.

        Returns:
            The batch.
        """
        seconds = [(row, entry.second) for row, entry in enumerate(tokens) if entry.second is not None]
        rows = [entry.first for entry in tokens] + [second for _, second in seconds]
        shape = len(rows), max(1, *map(len, rows))
        ids, mask = np.full(shape, padding_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        types = np.zeros(shape, dtype=np.int64)
        for row, sequence in enumerate(rows):
            ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
        for row, entry in enumerate(tokens):
            types[row, : len(entry.types)] = entry.types
        return cls(ids, mask, types, np.array([row for row, _ in seconds], dtype=np.int64), len(tokens))

    @property
    def is_pair(self) -> Array:
        """Whether each input is a pair of two sequences [B]."""
        found = np.zeros(self.num_inputs, dtype=bool)
        found[self.pair_rows] = True
        return found

    @property
    def input_of_sequence(self) -> Array:
        """Input of each sequence [R]."""
        return np.concatenate([np.arange(self.num_inputs), self.pair_rows])
