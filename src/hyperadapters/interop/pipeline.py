"""A task of a model as a pipeline of transformers for text classification."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TextClassificationPipeline
from transformers.modeling_outputs import SequenceClassifierOutput

from hyperadapters.backbones.passes import evaluating
from hyperadapters.data.examples import Example
from hyperadapters.errors import BackboneError, DataError, TaskError
from hyperadapters.heads.unfitted import warn_of_unfitted_heads
from hyperadapters.inference.inputs import input_reader
from hyperadapters.interop.task_files import classifier_config
from hyperadapters.model.model import HyperAdapterModel


class TaskModel(nn.Module):
    """One task of a model, with the interface of a sequence classifier of transformers.

    Attributes:
        model: The model, which is shared and not copied.
        config: Configuration with the labels of the task.
        input_modalities: What the model reads, for the description of the pipeline.
    """

    input_modalities = "text"

    def __init__(self, model: HyperAdapterModel, task: str) -> None:
        """Store the model.

        Args:
            model: Model on an encoder backbone.
            task: Name of the task.

        Raises:
            TaskError: If the task is unknown, or the backbone generates text.
            BackboneError: If the backbone is not a model of transformers.
        """
        super().__init__()
        if model.heads is None:
            raise TaskError(
                f"task '{task}': expected an encoder with task heads, found a backbone that generates text; use predict"
            )
        self.model, self.task = model, model.tasks[model.task_id(task)]
        self.config = classifier_config(model, model.task_id(task))
        if self.config is None:
            raise BackboneError(
                f"expected a transformers model, found {type(model.backbone).__name__}, which has no configuration "
                "that a pipeline could read; use predict"
            )

    @property
    def device(self) -> torch.device:
        """Device on which the model computes."""
        return self.model.device

    def can_generate(self) -> bool:
        """Return False: the task has a head and does not generate text."""
        return False

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> SequenceClassifierOutput:
        """Compute the logits of a batch.

        Args:
            input_ids: Token ids [B, S], padded on the right.
            attention_mask: Mask [B, S], 1 for tokens and 0 for padding.
            **inputs: Further inputs that the collator of the model makes, each [B, S]. Their padding has no effect.

        Returns:
            Output with the logits [B, C].
        """
        if "sequence_ids" in inputs:
            inputs["sequence_ids"] = inputs["sequence_ids"].masked_fill(attention_mask == 0, -1)
        with self.model.lock, evaluating(self.model):
            # The id of the task changes if another task is removed.
            task_ids = torch.full((len(input_ids),), self.model.task_id(self.task.name), device=input_ids.device)
            output = self.model(input_ids=input_ids, attention_mask=attention_mask, task_ids=task_ids, **inputs)
        return SequenceClassifierOutput(logits=output.logits[:, : self.config.num_labels])


class TaskPipeline(TextClassificationPipeline):
    """A pipeline of transformers whose inputs are tokenised and checked as the model does."""

    def check_model_type(self, supported_models: Any) -> None:
        """Accept the model, which has the interface but not the class of a sequence classifier.

        Args:
            supported_models: Classes of transformers, which are not used.
        """

    def preprocess(self, inputs: Any, **options: Any) -> dict[str, Tensor]:
        """Tokenise one input.

        Args:
            inputs: A text, or a mapping with `text` and, for a task of pairs, `text_pair`.
            **options: Options of the tokenizer, which are refused, because the model determines them.

        Returns:
            Tensors of a batch with one row.

        Raises:
            DataError: If there are options, or the input does not fit the task.
        """
        if options:
            raise DataError(
                f"{', '.join(options)}: the model truncates and pads texts itself; remove these options of the "
                "tokenizer, and set max_length when the model is made"
            )
        if not isinstance(inputs, (str, Mapping)):
            raise DataError(f"expected a text or a mapping with text and text_pair, found {type(inputs).__name__}")
        of_task: TaskModel = self.model
        example: Example = input_reader((of_task.task,), of_task.task.name)(inputs, 1)
        return of_task.model.collator.inputs([example])


def to_pipeline(model: HyperAdapterModel, task: str, **options: Any) -> TaskPipeline:
    """Return a task of a model as a pipeline of transformers.

    The pipeline is called as `pipeline("text-classification")` is: with a text, a mapping with `text` and `text_pair`,
    or a list of these, and with `top_k` and `batch_size`. The number that a regression predicts is the score of a label
    with the name of the task. The model is shared: if the task is fitted again, the pipeline gives the new answers.

    Args:
        model: Model on an encoder backbone.
        task: Name of a task. Of a multi-label task, the pipeline gives probabilities and applies no thresholds.
        **options: Further arguments of `TextClassificationPipeline`, such as `top_k` and `batch_size`.

    Returns:
        The pipeline.

    Raises:
        TaskError: If the task is unknown, or the backbone generates text.
        BackboneError: If the backbone is not a model of transformers, or the tokenizer cannot be loaded.
    """
    of_task = TaskModel(model, task)
    warn_of_unfitted_heads(model.heads, model.tasks)
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.padding_side = "right"
    return TaskPipeline(model=of_task, tokenizer=tokenizer, device=model.device, **options)
