"""Examples to the tensors of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from hyperadapters.config import Task
from hyperadapters.data.examples import Example

CHUNK_ROWS = 1000


class Collator:
    """Tokenises and pads a list of examples, of one task or mixed.

    The batch holds `input_ids`, `attention_mask` (and what else the tokenizer makes), `task_ids` [B] if every row has
    a task, and `labels` if every row has a target: [B] in float32 for backbones with heads (the index of the label,
    or the number), token ids [B, S] padded with -100 for text-to-text backbones.
    """

    def __init__(
        self,
        tokenizer: Any,
        tasks: Sequence[Task],
        text_to_text: bool,
        max_length: int = 128,
        max_target_length: int = 32,
    ) -> None:
        self.tokenizer, self.tasks, self.text_to_text = tokenizer, tuple(tasks), text_to_text
        self.max_length, self.max_target_length = max_length, max_target_length

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Make the tensors of a batch."""
        batch = self.inputs(examples)
        if all(example.task_id is not None for example in examples):
            batch["task_ids"] = torch.tensor([example.task_id for example in examples], dtype=torch.long)
        if all(example.target is not None and example.task_id is not None for example in examples):
            batch["labels"] = self._labels(examples)
        return batch

    def inputs(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Make the tensors that are read from the texts: `input_ids`, `attention_mask`, what the tokenizer adds."""
        found = self._tokenized(examples, padding=True, padding_side="right", return_tensors="pt")
        names = ("input_ids", "attention_mask") if self.text_to_text else tuple(found)
        return {name: found[name] for name in names}

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Number of tokens of each example's input."""
        parts = (examples[start : start + CHUNK_ROWS] for start in range(0, len(examples), CHUNK_ROWS))
        return [len(tokens) for part in parts for tokens in self._tokenized(part)["input_ids"]]

    def _tokenized(self, examples: Sequence[Example], **options: Any) -> Any:
        texts = [self._prompt(example) if self.text_to_text else _texts(example) for example in examples]
        return self.tokenizer(texts, truncation=True, max_length=self.max_length, **options)

    def _labels(self, examples: Sequence[Example]) -> torch.Tensor:
        if not self.text_to_text:
            return torch.tensor([float(example.target) for example in examples], dtype=torch.float32)  # type: ignore[arg-type]
        targets = self.tokenizer(
            text_target=[target_text(self.tasks[example.task_id], example.target) for example in examples],  # type: ignore[index]
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_target_length,
            return_tensors="pt",
        )
        return targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)

    def _prompt(self, example: Example) -> str:
        template = None if example.task_id is None else self.tasks[example.task_id].template
        if template is not None:
            return template.format(text=example.text, text_pair=example.text_pair)
        return " ".join(text for text in (example.text, example.text_pair) if text is not None)


def _texts(example: Example) -> str | tuple[str, str]:
    return example.text if example.text_pair is None else (example.text, example.text_pair)


def target_text(task: Task, target: int | float | str | None) -> str:
    """What a text-to-text backbone is to write for a target: the label's word, the number, or the text itself."""
    if task.kind == "classification":
        label = task.labels[int(target)]  # type: ignore[arg-type]
        return (task.label_words or {}).get(label, label)
    if task.kind == "regression":
        number = float(target)  # type: ignore[arg-type]
        return str(number if task.step is None else round(round(number / task.step) * task.step, 6))
    return str(target)


def read_answer(task: Task, text: str) -> int | float | str | None:
    """The target that a generated text stands for; None where it is no label's word or no number."""
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
