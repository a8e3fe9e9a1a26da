"""Collation of examples to the tensors of a batch, and conversion between targets and texts."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from hyperadapters.config import BackboneKind, Task
from hyperadapters.data.examples import Example
from hyperadapters.errors import BackboneError, TaskError

CHUNK_ROWS = 1000
SHOWN_CHARACTERS = 40
logger = logging.getLogger(__name__)


class Collator:
    """Tokenises and pads examples of one or several tasks.

    The batch contains `input_ids` [B, S], `attention_mask` [B, S] and further outputs of the tokenizer. If every row
    has a task it also contains `task_ids` [B], and if every row has a target, `labels`: label indices or numbers [B] in
    float32 for encoders, and token ids [B, T] padded with -100 for encoder-decoders.

    For encoders with tasks of text pairs, `sequence_ids` [B, S] are 0 for tokens of the first text, 1 for tokens of the
    second text, and -1 for special tokens and padding. They require a fast tokenizer. Without them the model uses
    `token_type_ids`, or raises an error if there are none.

    For decoders, a row with a target consists of the input, a line feed, the target and the end-of-text token. `labels`
    [B, S] are -100 except for the target and the end-of-text token, and `prompt_mask` [B, S] is 1 before the target.
    """

    def __init__(
        self,
        tokenizer: Any,
        tasks: Sequence[Task],
        kind: BackboneKind,
        max_length: int = 128,
        max_target_length: int = 32,
        num_embeddings: int | None = None,
    ) -> None:
        """Store the settings.

        Args:
            tokenizer: Tokenizer of the backbone.
            tasks: Tasks in the order of their ids.
            kind: Kind of the backbone.
            max_length: Maximum number of tokens of an input; longer inputs are truncated. Default: 128.
            max_target_length: Maximum number of tokens of a target text; longer ones are truncated. Default: 32.
            num_embeddings: Number of token embeddings of the backbone, which limits token ids. Default: no check.

        Raises:
            BackboneError: If the tokenizer of a decoder has no end-of-text token.
        """
        self.tokenizer, self.tasks, self.kind = tokenizer, tuple(tasks), kind
        self.max_length, self.max_target_length, self.num_embeddings = max_length, max_target_length, num_embeddings
        if kind == "decoder":
            if tokenizer.eos_token_id is None:
                raise BackboneError(
                    "the tokenizer has no eos_token, which ends the answers of a language model; set it"
                )
            self._new_line: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"]

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Return the tensors of a batch, with task ids and labels if all examples have them.

        Args:
            examples: Rows of the batch.
        """
        has_tasks = all(example.task_id is not None for example in examples)
        has_targets = has_tasks and all(example.target is not None for example in examples)
        if self.kind == "decoder" and has_targets:
            batch = self._with_answers(examples)
        else:
            batch = self.inputs(examples)
            if has_targets:
                batch["labels"] = self._labels(examples)
        if has_tasks:
            batch["task_ids"] = torch.tensor([example.task_id for example in examples], dtype=torch.long)
        return batch

    def inputs(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Return the tensors of a batch without task ids and labels.

        Args:
            examples: Rows of the batch.
        """
        if self.kind == "decoder":
            return self._padded(self._prompts(examples))
        found = self._tokenized(examples, padding=True, padding_side="right", return_tensors="pt")
        self._check_ids(found["input_ids"])
        names = ("input_ids", "attention_mask") if self.kind == "encoder-decoder" else tuple(found)
        batch = {name: found[name] for name in names}
        has_pairs = any(task.is_pair for task in self.tasks) or any(e.text_pair is not None for e in examples)
        if self.kind == "encoder" and has_pairs and self.tokenizer.is_fast:
            rows = [[-1 if text is None else text for text in found.sequence_ids(row)] for row in range(len(examples))]
            batch["sequence_ids"] = torch.tensor(rows, dtype=torch.long)
        return batch

    def lengths(self, examples: Sequence[Example], with_targets: bool = False) -> list[int]:
        """Return the number of tokens of each example.

        Args:
            examples: Examples to measure.
            with_targets: If True, the tokens of the target are included for a decoder, which reads them in the same
                sequence. Default: False.
        """
        parts = [examples[start : start + CHUNK_ROWS] for start in range(0, len(examples), CHUNK_ROWS)]
        if self.kind != "decoder":
            return [len(tokens) for part in parts for tokens in self._tokenized(part)["input_ids"]]
        lengths = [len(tokens) for part in parts for tokens in self._prompts(part)]
        if not with_targets:
            return lengths
        answers = [len(tokens) for part in parts for tokens in self._answers(part)]
        return [prompt + answer for prompt, answer in zip(lengths, answers, strict=True)]

    def check_targets(self, task: Task, examples: Sequence[Example]) -> None:
        """Check that a text-to-text backbone can generate the targets of a task and that they are parsed correctly.

        The targets of text-to-text tasks may be truncated. A warning is logged if the tokenizer has no tokens for
        parts of them.

        Args:
            task: Task, whose labels are checked if it is a classification task.
            examples: Examples of the task, whose targets are checked if it is a regression or text-to-text task.

        Raises:
            TaskError: If the tokenizer loses a part of a label or number, or `max_target_length` truncates it, or if a
                text contains a special token, which is removed from generated texts.
        """
        if self.kind == "encoder":
            return
        if task.kind == "text-to-text":
            self._check_texts(task, examples)
            return
        is_label = task.kind == "classification"
        targets = range(len(task.labels)) if is_label else {example.target for example in examples}
        words = list(dict.fromkeys(target_text(task, target) for target in targets))
        texts = self.tokenizer.batch_decode(self._word_ids(words), skip_special_tokens=True) if words else []
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
        unwritable = []
        for start in range(0, len(examples), CHUNK_ROWS):
            part = examples[start : start + CHUNK_ROWS]
            texts = [target_text(task, example.target) for example in part]
            option = {"text": texts} if self.kind == "decoder" else {"text_target": texts}
            rows = self.tokenizer(**option, add_special_tokens=False)["input_ids"]
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
        if unwritable:
            logger.warning(
                f"task '{task.name}': {len(unwritable)} of {len(examples)} target texts have parts for which the "
                f"tokenizer has no tokens, so that generated texts lack them; the first is {_shortened(unwritable[0])}"
            )

    def _word_ids(self, words: list[str]) -> list[list[int]]:
        """Return the token ids of target texts, truncated as in training."""
        if self.kind == "decoder":
            options = {"truncation": True, "max_length": self.max_target_length - 1, "add_special_tokens": False}
            found = self.tokenizer(words, **options)
        else:
            found = self.tokenizer(text_target=words, truncation=True, max_length=self.max_target_length)
        ids: list[list[int]] = found["input_ids"]
        return ids

    def _tokenized(self, examples: Sequence[Example], **options: Any) -> Any:
        texts = [_texts(example) if self.kind == "encoder" else self._prompt(example) for example in examples]
        return self._truncated(texts, self.max_length, **options)

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

    def _prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """Return the token ids of the prompts of a decoder."""
        texts, room = [self._prompt(example) for example in examples], self.max_length - len(self._new_line)
        found = self._truncated(texts, room)["input_ids"]
        return [tokens + self._new_line for tokens in found]

    def _answers(self, examples: Sequence[Example]) -> list[list[int]]:
        """Return the token ids of the targets of a decoder, with the end-of-text token."""
        texts = [target_text(self.tasks[example.task_id], example.target) for example in examples]  # type: ignore[index]
        options = {"truncation": True, "max_length": self.max_target_length - 1, "add_special_tokens": False}
        return [[*tokens, self.tokenizer.eos_token_id] for tokens in self.tokenizer(texts, **options)["input_ids"]]

    def _with_answers(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
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

    def _labels(self, examples: Sequence[Example]) -> torch.Tensor:
        if self.kind == "encoder":
            return torch.tensor([float(example.target) for example in examples], dtype=torch.float32)  # type: ignore[arg-type]
        targets = self.tokenizer(
            text_target=[target_text(self.tasks[example.task_id], example.target) for example in examples],  # type: ignore[index]
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_target_length,
            return_tensors="pt",
        )
        self._check_ids(targets["input_ids"])
        return targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)

    def _check_ids(self, ids: torch.Tensor) -> None:
        """Raise BackboneError if the backbone has no embedding for a token id, which would be out of range."""
        if self.num_embeddings is None or not ids.numel() or (largest := int(ids.max())) < self.num_embeddings:
            return
        raise BackboneError(
            f"the token '{self.tokenizer.convert_ids_to_tokens(largest)}' of the tokenizer has id {largest}, but the "
            f"backbone only has embeddings for ids below {self.num_embeddings}; use the backbone's own tokenizer, or "
            "call backbone.resize_token_embeddings(len(tokenizer)) before creating the model"
        )

    def _prompt(self, example: Example) -> str:
        template = None if example.task_id is None else self.tasks[example.task_id].template
        if template is not None:
            return template.format(text=example.text, text_pair=example.text_pair)
        return " ".join(text for text in (example.text, example.text_pair) if text is not None)


def _as_pair(text: str | tuple[str, str]) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def _shortened(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")


def _texts(example: Example) -> str | tuple[str, str]:
    return example.text if example.text_pair is None else (example.text, example.text_pair)


def target_text(task: Task, target: int | float | str | None) -> str:
    """Return the text that a text-to-text backbone is trained to generate for a target.

    Args:
        task: Task of the target.
        target: Index of a label, number, or text, depending on the kind of the task.
    """
    if task.kind == "classification":
        label = task.labels[int(target)]  # type: ignore[arg-type]
        return (task.verbalizer or {}).get(label, label)
    if task.kind == "regression":
        number = float(target)  # type: ignore[arg-type]
        return str(number if task.step is None else round(round(number / task.step) * task.step, 6))
    return str(target)


def read_answer(task: Task, text: str) -> int | float | str | None:
    """Return the target that corresponds to a generated text, the inverse of `target_text`.

    Args:
        task: Task of the text.
        text: Generated text.

    Returns:
        Index of the label, number, or text, depending on the kind of the task. None if the text is not that of a label
        or not a number.
    """
    text = text.strip()
    if task.kind == "classification":
        words = [target_text(task, index).strip() for index in range(len(task.labels))]
        return words.index(text) if text in words else None
    if task.kind == "regression":
        try:
            number = float(text)
        except ValueError:
            return None
        return number if math.isfinite(number) else None
    return text
