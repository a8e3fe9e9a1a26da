"""Encoders that PEFT and full fine-tuning train, and the heads above them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from efficiency.experiment import Setting
from efficiency.frozen_states import frozen_copy, upper_layers
from efficiency.training_loop import HEAD_LEARNING_RATE, Learner
from hyperadapters.core import masked_mean
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.heads.task_heads import TaskHeads

Wrap = Callable[[Any], Any]


class Encoder(nn.Module):
    """Gives the mean of the last hidden states of examples [B, d].

    Attributes:
        per_task: numbers that one task more would add, where one encoder serves all tasks.
    """

    per_task = 0

    def forward(self, examples: Sequence[Example]) -> Tensor:
        """Encode a batch."""
        raise NotImplementedError


class UpperEncoder(Encoder):
    """The layers above the cached states, as a method changes them."""

    def __init__(self, setting: Setting, wrap: Wrap) -> None:
        """Args: wrap: puts the method into the layers."""
        super().__init__()
        self._states = setting.states
        self.model = wrap(upper_layers(setting.backbone, setting.first_layer))

    def forward(self, examples: Sequence[Example]) -> Tensor:
        """Encode a batch."""
        hidden, mask = self._states.batch(examples)
        return masked_mean(self.model(inputs_embeds=hidden, attention_mask=mask).last_hidden_state, mask)


class WholeEncoder(Encoder):
    """A copy of the whole backbone, all of it trained."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self._texts = setting.texts
        self.model: Any = copy.deepcopy(setting.backbone).requires_grad_(True)

    def forward(self, examples: Sequence[Example]) -> Tensor:
        """Encode a batch."""
        inputs = self._texts.batch(examples)
        return masked_mean(self.model(**inputs).last_hidden_state, inputs["attention_mask"])


class PromptedEncoder(Encoder):
    """The whole frozen backbone, with PEFT's learned prompts before the texts.

    PEFT makes the prompts; they are put before the word embeddings here, since PEFT's own forward for feature
    extraction hands no task ids on, which multi-task prompts need, and drops the token types of pairs. The mean of the
    last hidden states is over the text alone, as in every arm.
    """

    def __init__(self, setting: Setting, wrap: Wrap) -> None:
        """Args: wrap: makes PEFT's model."""
        super().__init__()
        self._texts = setting.texts
        self.model = wrap(frozen_copy(setting.backbone))
        prompts: Any = self.model.prompt_encoder["default"]
        if hasattr(prompts, "prefix_task_cols"):
            self.per_task = (prompts.prefix_task_cols.numel() + prompts.prefix_task_rows.numel()) // prompts.num_tasks

    def forward(self, examples: Sequence[Example]) -> Tensor:
        """Encode a batch."""
        inputs = self._texts.batch(examples)
        task_ids = torch.tensor([example.task_id for example in examples], device=self._texts.device)
        words = self.model.word_embeddings(inputs["input_ids"])
        prompts = self.model.get_prompt(len(examples), task_ids)
        count = prompts.shape[1]
        mask = inputs["attention_mask"]
        longer = {name: nn.functional.pad(tensor, (count, 0)) for name, tensor in inputs.items() if name != "input_ids"}
        longer["attention_mask"] = nn.functional.pad(mask, (count, 0), value=1)
        output = self.model.base_model(inputs_embeds=torch.cat([prompts, words], dim=1), **longer)
        return masked_mean(output.last_hidden_state[:, count:], mask)


class Network(Learner):
    """An encoder for one task or several, with the library's heads."""

    def __init__(self, encoder: Encoder, tasks: tuple[TaskData, ...], hidden_size: int) -> None:
        """Args: hidden_size: d of the encoder's output."""
        super().__init__()
        self.encoder, self.tasks = encoder, [data.task for data in tasks]
        self.heads = TaskHeads(hidden_size, self.tasks)
        set_target_scales(self.heads, tasks)
        device = next(encoder.parameters()).device
        self.heads.to(device)

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """What the encoder trains, and the heads with a rate of their own."""
        own = [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]
        return [{"params": own, "lr": rate}, {"params": list(self.heads.parameters()), "lr": HEAD_LEARNING_RATE}]

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """Cross-entropy or squared error, the mean over the rows."""
        logits = self.logits(examples)
        labels = torch.tensor([float(example.target or 0) for example in examples], device=logits.device)
        return self.heads.loss(logits, labels, self._task_ids(examples))

    def logits(self, examples: Sequence[Example]) -> Tensor:
        """Of each row under its own task [B, C]."""
        pooled = self.encoder(examples)
        return self.heads(pooled, pooled, self._task_ids(examples))

    def _task_ids(self, examples: Sequence[Example]) -> Tensor:
        return torch.tensor([example.task_id for example in examples], device=self.heads.starts.device)


def set_target_scales(heads: TaskHeads, tasks: Sequence[TaskData]) -> None:
    """Scale the heads of regressions to their training targets."""
    for task_id, data in enumerate(tasks):
        if data.task.kind == "regression":
            heads.set_target_scale(task_id, [float(example.target or 0) for example in data.splits["train"]])


def trainable_numbers(module: nn.Module) -> int:
    """How many numbers a module trains."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
