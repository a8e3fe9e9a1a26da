"""Collation of examples to the tensors of a batch."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch.nn.utils.rnn import pad_sequence

from hyperadapters.config import BackboneKind, Task
from hyperadapters.data.examples import Example
from hyperadapters.data.targets import multi_hot, read_answer, target_text
from hyperadapters.errors import BackboneError, TaskError

CHUNK_ROWS = 1000
CHARACTERS_PER_TOKEN = 8
"""Texts are only tokenised up to this number of characters for each available token, if that is known to suffice."""
SHOWN_CHARACTERS = 40
logger = logging.getLogger(__name__)


class Collator(ABC):
    """Tokenises and pads examples of one or several tasks.

    The batch contains `input_ids` [B, S], `attention_mask` [B, S] and further outputs of the tokenizer. If every row
    has a task it also contains `task_ids` [B], and if every row has a target, `labels`. `make_collator` makes the
    collator of a kind of backbone.
    """

    def __init__(
        self,
        tokenizer: Any,
        tasks: Sequence[Task],
        max_length: int = 128,
        max_target_length: int = 32,
        num_embeddings: int | None = None,
    ) -> None:
        """Store the settings. The arguments are those of `make_collator`."""
        self.tokenizer, self.tasks = tokenizer, tuple(tasks)
        self.max_length, self.max_target_length, self.num_embeddings = max_length, max_target_length, num_embeddings

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Return the tensors of a batch, with task ids and labels if all examples have them.

        Args:
            examples: Rows of the batch.
        """
        has_tasks = all(example.task_id is not None for example in examples)
        has_targets = has_tasks and all(example.target is not None for example in examples)
        batch = self._with_labels(examples) if has_targets else self.inputs(examples)
        if has_tasks:
            batch["task_ids"] = torch.tensor([example.task_id for example in examples], dtype=torch.long)
        return batch

    @abstractmethod
    def inputs(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Return the tensors of a batch without task ids and labels.

        Args:
            examples: Rows of the batch.
        """

    @abstractmethod
    def _with_labels(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Return the tensors of a batch whose rows have tasks and targets, with `labels`."""

    def lengths(self, examples: Sequence[Example], with_targets: bool = False) -> list[int]:
        """Return the number of tokens of each example.

        Args:
            examples: Examples to measure.
            with_targets: If True, the tokens of the target are included for a decoder, which reads them in the same
                sequence. Default: False.
        """
        return [len(tokens) for part in _chunks(examples) for tokens in self._tokenized(part)["input_ids"]]

    @abstractmethod
    def _tokenized(self, examples: Sequence[Example], **options: Any) -> Any:
        """Return the inputs of examples, tokenised and truncated."""

    @abstractmethod
    def check_targets(self, task: Task, examples: Sequence[Example]) -> None:
        """Check that a text-to-text backbone can generate the targets of a task and that they are parsed correctly.

        The targets of text-to-text tasks may be truncated. A warning is logged if they are, or if the tokenizer has no
        tokens for parts of them. Encoders have heads instead, and nothing is checked.

        Args:
            task: Task, whose labels are checked if it is a classification task.
            examples: Examples of the task, whose targets are checked if it is a regression or text-to-text task.

        Raises:
            TaskError: If the tokenizer loses a part of a label or number, or `max_target_length` truncates it, or if a
                text contains a special token, which is removed from generated texts.
        """

    def _truncated(self, texts: Sequence[str | tuple[str, str]], length: int, **options: Any) -> Any:
        """Return texts tokenised and truncated to a number of tokens, with a warning for the first truncated text."""
        found = self.tokenizer(texts, truncation=True, max_length=length, **options)
        noticed = self.tokenizer.deprecation_warnings  # tokenizers of transformers record their own warnings here
        if f"truncated to {length}" not in noticed and self._has_truncated(texts, found, length):
            noticed[f"truncated to {length}"] = True
            logger.warning(
                f"a text has more than {self.max_length} tokens and is truncated, as all longer texts are; to read "
                "more of them, create the model with a larger max_length (in a recipe: data.max_length), up to the "
                "maximum length of the backbone"
            )
        return found

    def _has_truncated(self, texts: Sequence[str | tuple[str, str]], found: Any, length: int) -> bool:
        if found.encodings is not None:
            return any(encoding.overflowing for encoding in found.encodings)
        # A slow tokenizer does not report truncation, so that texts of maximum length are tokenised without it.
        longest = [text for text, ids in zip(texts, found["input_ids"], strict=True) if len(ids) == length]
        options = {"truncation": False, "verbose": False}
        return any(len(self.tokenizer(*_as_pair(text), **options)["input_ids"]) > length for text in longest)

    def _check_ids(self, ids: torch.Tensor) -> None:
        """Raise BackboneError if the backbone has no embedding for a token id, which would be out of range."""
        if self.num_embeddings is None or not ids.numel() or (largest := int(ids.max())) < self.num_embeddings:
            return
        raise BackboneError(
            f"the token '{self.tokenizer.convert_ids_to_tokens(largest)}' of the tokenizer has id {largest}, but the "
            f"backbone only has embeddings for ids below {self.num_embeddings}; use the backbone's own tokenizer, or "
            "call backbone.resize_token_embeddings(len(tokenizer)) before creating the model"
        )


class EncoderCollator(Collator):
    """The collator of encoders.

    `labels` [B] in float32 are indices of labels, or numbers. In a batch with rows of multi-label tasks, they have the
    shape [B, C], with C the largest number of labels of these tasks: such a row contains 1 for each of its labels and 0
    for the others, and a row of another task contains its label or number, followed by zeros.

    If there are tasks of text pairs, `sequence_ids` [B, S] are 0 for tokens of the first text, 1 for tokens of the
    second text, and -1 for special tokens and padding. They require a fast tokenizer. Without them the model uses
    `token_type_ids`, or raises an error if there are none.
    """

    def inputs(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Return the tensors of a batch without task ids and labels. The arguments are those of `Collator.inputs`."""
        found = self._tokenized(examples, padding=True, padding_side="right")
        batch = {name: torch.tensor(rows) for name, rows in found.items()}  # faster than return_tensors="pt"
        self._check_ids(batch["input_ids"])
        has_pairs = any(task.is_pair for task in self.tasks) or any(e.text_pair is not None for e in examples)
        if has_pairs and self.tokenizer.is_fast:
            rows = [[-1 if text is None else text for text in found.sequence_ids(row)] for row in range(len(examples))]
            batch["sequence_ids"] = torch.tensor(rows, dtype=torch.long)
        return batch

    def _with_labels(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        return {**self.inputs(examples), "labels": self._labels(examples)}

    def _labels(self, examples: Sequence[Example]) -> torch.Tensor:
        tasks = [self.tasks[example.task_id] for example in examples if example.task_id is not None]
        size = max((len(task.labels) for task in tasks if task.is_multi_label), default=0)
        targets: list[Any] = [example.target for example in examples]
        if not size:
            return torch.tensor([float(target) for target in targets], dtype=torch.float32)
        rows = [
            multi_hot(target, size) if task.is_multi_label else [float(target), *[0.0] * (size - 1)]
            for task, target in zip(tasks, targets, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float32)

    def _tokenized(self, examples: Sequence[Example], **options: Any) -> Any:
        texts = [e.text if e.text_pair is None else (e.text, e.text_pair) for e in examples]
        if not _splits_at_spaces(self.tokenizer):
            return self._truncated(texts, self.max_length, **options)
        # The tokens after the maximum length do not affect those before it, so that a long text need not be tokenised
        # as a whole.
        cut = [_cut(text, CHARACTERS_PER_TOKEN * self.max_length) if isinstance(text, str) else text for text in texts]
        found = self._truncated(cut, self.max_length, **options)
        is_whole = [kept is text for kept, text in zip(cut, texts, strict=True)]
        if all(whole or row.overflowing for whole, row in zip(is_whole, found.encodings, strict=True)):
            return found
        return self._truncated(texts, self.max_length, **options)

    def check_targets(self, task: Task, examples: Sequence[Example]) -> None:
        """Accept all targets, since heads and not a tokenizer give the answers of encoders.

        The arguments are those of `Collator.check_targets`.
        """


class _TextToTextCollator(Collator):
    """What the collators of backbones that generate text have in common."""

    def _tokenized(self, examples: Sequence[Example], **options: Any) -> Any:
        return self._truncated([self._prompt(example) for example in examples], self.max_length, **options)

    def _prompt(self, example: Example) -> str:
        template = None if example.task_id is None else self.tasks[example.task_id].template
        if template is not None:
            return template.format(text=example.text, text_pair=example.text_pair)
        return " ".join(text for text in (example.text, example.text_pair) if text is not None)

    def _target_texts(self, examples: Sequence[Example]) -> list[str]:
        return [target_text(self.tasks[example.task_id], example.target) for example in examples]  # type: ignore[index]

    @property
    @abstractmethod
    def _target_room(self) -> int:
        """Maximum number of tokens of a target text without its end."""

    @abstractmethod
    def _target_ids(self, texts: list[str], **options: Any) -> Any:
        """Return target texts, tokenised as in training."""

    def check_targets(self, task: Task, examples: Sequence[Example]) -> None:
        """Check that the backbone can generate the targets of a task.

        The arguments and errors are those of `Collator.check_targets`.
        """
        if task.kind == "text-to-text":
            self._check_texts(task, examples)
            return
        is_label = task.kind == "classification"
        targets = range(len(task.labels)) if is_label else {example.target for example in examples}
        words = list(dict.fromkeys(target_text(task, target) for target in targets))
        ids = self._target_ids(words)["input_ids"] if words else []
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        wrong = [
            f"{word!r} (read back as {text.strip()!r})"
            for word, text in zip(words, texts, strict=True)
            if (answer := read_answer(task, text)) is None or answer != read_answer(task, word)
        ]
        if wrong:
            what, advice = ("labels", "set a verbalizer") if is_label else ("numbers", "set a larger step")
            raise TaskError(
                f"task '{task.name}': expected {what} that the tokenizer can write, found {', '.join(wrong[:10])}; "
                f"{advice}, or raise max_target_length if they are too long"
            )

    def _check_texts(self, task: Task, examples: Sequence[Example]) -> None:
        """Check the targets of a text-to-text task as `check_targets` describes."""
        unknown, ends = self.tokenizer.unk_token_id, (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        special = {*self.tokenizer.all_special_ids} - ({unknown} - {*ends})
        unwritable, too_long = [], []
        for part in _chunks(examples):
            texts = [target_text(task, example.target) for example in part]
            rows = self._target_ids(texts, add_special_tokens=False, truncation=False, max_length=None)["input_ids"]
            for example, text, tokens in zip(part, texts, rows, strict=True):
                if found := special.intersection(tokens):
                    token = self.tokenizer.convert_ids_to_tokens(min(found))
                    raise TaskError(
                        f"task '{task.name}': expected target texts without special tokens of the tokenizer, found "
                        f"{token!r} in {_shortened(text)}, the target of {_shortened(example.text)}: it would be "
                        "missing in the generated text, or end it; remove it from the target"
                    )
                if unknown in tokens:
                    unwritable.append(text)
                if len(tokens) > self._target_room:
                    too_long.append(text)
        if unwritable:
            logger.warning(
                f"task '{task.name}': {len(unwritable)} of {len(examples)} target texts have parts for which the "
                f"tokenizer has no tokens, so that generated texts lack them; the first is {_shortened(unwritable[0])}"
            )
        if too_long:
            logger.warning(
                f"task '{task.name}': {len(too_long)} of {len(examples)} target texts have more than "
                f"{self.max_target_length} tokens and are truncated, and generated texts end there as well; the first "
                f"is {_shortened(too_long[0])}; create the model with a larger max_target_length (in a recipe: "
                "data.max_target_length) to keep them whole"
            )


class EncoderDecoderCollator(_TextToTextCollator):
    """The collator of encoder-decoders. `labels` [B, T] are the token ids of the targets, padded with -100."""

    def inputs(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Return the tensors of a batch without task ids and labels. The arguments are those of `Collator.inputs`."""
        found = self._tokenized(examples, padding=True, padding_side="right", return_tensors="pt")
        self._check_ids(found["input_ids"])
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def _with_labels(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        batch, options = self.inputs(examples), {"padding": True, "padding_side": "right", "return_tensors": "pt"}
        targets = self._target_ids(self._target_texts(examples), **options)
        self._check_ids(targets["input_ids"])
        return {**batch, "labels": targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)}

    @property
    def _target_room(self) -> int:
        return self.max_target_length - int(self.tokenizer.num_special_tokens_to_add())

    def _target_ids(self, texts: list[str], **options: Any) -> Any:
        return self.tokenizer(
            text_target=texts, **{"truncation": True, "max_length": self.max_target_length, **options}
        )


class DecoderCollator(_TextToTextCollator):
    """The collator of decoders.

    A row with a target consists of the input, a line feed, the target and the end-of-text token. `labels` [B, S] are
    -100 except for the target and the end-of-text token, and `prompt_mask` [B, S] is 1 before the target.
    """

    def __init__(self, tokenizer: Any, tasks: Sequence[Task], *args: Any, **options: Any) -> None:
        """Store the settings. The arguments are those of `make_collator`.

        Raises:
            BackboneError: If the tokenizer has no end-of-text token.
        """
        super().__init__(tokenizer, tasks, *args, **options)
        if tokenizer.eos_token_id is None:
            raise BackboneError("the tokenizer has no eos_token, which ends the answers of a language model; set it")
        self._new_line: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"]

    def inputs(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Return the tensors of a batch without task ids and labels. The arguments are those of `Collator.inputs`."""
        return self._padded(self._prompts(examples))

    def lengths(self, examples: Sequence[Example], with_targets: bool = False) -> list[int]:
        """Return the number of tokens of each example. The arguments are those of `Collator.lengths`."""
        lengths = [len(tokens) for part in _chunks(examples) for tokens in self._prompts(part)]
        if not with_targets:
            return lengths
        answers = [len(tokens) for part in _chunks(examples) for tokens in self._answers(part)]
        return [prompt + answer for prompt, answer in zip(lengths, answers, strict=True)]

    def _prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        texts, room = [self._prompt(example) for example in examples], self.max_length - len(self._new_line)
        return [tokens + self._new_line for tokens in self._truncated(texts, room)["input_ids"]]

    def _answers(self, examples: Sequence[Example]) -> list[list[int]]:
        """Return the token ids of the targets, with the end-of-text token."""
        found = self._target_ids(self._target_texts(examples))["input_ids"]
        return [[*tokens, self.tokenizer.eos_token_id] for tokens in found]

    @property
    def _target_room(self) -> int:
        return self.max_target_length - 1

    def _target_ids(self, texts: list[str], **options: Any) -> Any:
        own = {"truncation": True, "max_length": self._target_room, "add_special_tokens": False}
        return self.tokenizer(texts, **{**own, **options})

    def _with_labels(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        prompts, answers = self._prompts(examples), self._answers(examples)
        batch = self._padded([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
        starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]
        batch["prompt_mask"] = (torch.arange(batch["input_ids"].shape[1]) < starts).long()
        is_answer = batch["attention_mask"].bool() & ~batch["prompt_mask"].bool()
        batch["labels"] = batch["input_ids"].masked_fill(~is_answer, -100)
        return batch

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Return token ids padded on the right, and their mask. Many language models have no padding token."""
        padding = self.tokenizer.pad_token_id
        padding = self.tokenizer.eos_token_id if padding is None else padding
        ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, padding)
        self._check_ids(ids)
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True, 0)
        return {"input_ids": ids, "attention_mask": mask}


def make_collator(
    kind: BackboneKind,
    tokenizer: Any,
    tasks: Sequence[Task],
    max_length: int = 128,
    max_target_length: int = 32,
    num_embeddings: int | None = None,
) -> Collator:
    """Make the collator of a kind of backbone.

    Args:
        kind: Kind of the backbone.
        tokenizer: Tokenizer of the backbone.
        tasks: Tasks in the order of their ids.
        max_length: Maximum number of tokens of an input; longer inputs are truncated. Default: 128.
        max_target_length: Maximum number of tokens of a target text; longer ones are truncated. Default: 32.
        num_embeddings: Number of token embeddings of the backbone, which limits token ids. Default: no check.

    Returns:
        Collator for examples of these tasks.
    """
    collators = {
        "encoder": EncoderCollator,
        "encoder-decoder": EncoderDecoderCollator,
        "decoder": DecoderCollator,
    }
    return collators[kind](tokenizer, tasks, max_length, max_target_length, num_embeddings)


def _chunks(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), CHUNK_ROWS):
        yield examples[start : start + CHUNK_ROWS]


def _splits_at_spaces(tokenizer: Any) -> bool:
    """Return whether a tokenizer handles the words before a space independently of those after it, as BERT's does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_word_piece = isinstance(getattr(backend, "pre_tokenizer", None), BertPreTokenizer)
    return is_word_piece and tokenizer.truncation_side == "right"


def _cut(text: str, length: int) -> str:
    """Return a text up to the first space after a number of characters; the same object if there is no such space."""
    end = text.find(" ", length)
    return text if end < 0 else text[:end]


def _as_pair(text: str | tuple[str, str]) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def _shortened(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")
