"""Running a model over examples, in mixed batches, with tasks given or routed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from hyperadapters.config import Task
from hyperadapters.data.collate import Collator, read_answer
from hyperadapters.data.examples import Example
from hyperadapters.model import HyperAdapterModel

CHUNK_BATCHES = 32


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one example.

    Attributes:
        task_id: the task it was answered under: the given one, or the one routed to.
        answer: index of the label, number, or text; None when a generated text is no label's word or no number.
        probabilities: of the task's labels, for classification heads; else None.
        text: what a text-to-text backbone wrote; else None.
        nearest: task of the prototype nearest to the example, whatever task was given.
        instance: instance vector, p numbers.
    """

    task_id: int
    answer: int | float | str | None
    probabilities: tuple[float, ...] | None
    text: str | None
    nearest: int
    instance: tuple[float, ...]


def answer_name(task: Task, answer: int | float | str | None) -> str | float | None:
    """The answer as a user sees it: the label's name, the number or the text."""
    return task.labels[int(answer)] if task.kind == "classification" and answer is not None else answer


def best_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def predict(
    model: HyperAdapterModel,
    examples: Iterable[Example],
    collator: Collator,
    batch_size: int = 64,
) -> Iterator[Prediction]:
    """Answer examples in their order, those without a task under the nearest prototype's.

    Args:
        model: put into evaluation mode for the time of the call.
        examples: any number; they are taken in chunks, and batched by length within a chunk.
        collator: makes the batches.
        batch_size: rows of a batch.
    """
    remaining = iter(examples)
    while chunk := list(islice(remaining, batch_size * CHUNK_BATCHES)):
        yield from _predict_chunk(model, chunk, collator, batch_size)


def _predict_chunk(
    model: HyperAdapterModel, examples: Sequence[Example], collator: Collator, batch_size: int
) -> list[Prediction]:
    predictions: dict[int, Prediction] = {}
    order = sorted(range(len(examples)), key=lambda index: _sort_key(examples[index]))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for routed in (False, True):
            rows = [index for index in order if (examples[index].task_id is None) == routed]
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                batch = {name: tensor.to(device) for name, tensor in collator([examples[i] for i in part]).items()}
                batch.pop("labels", None)
                predictions.update(zip(part, _predict_batch(model, batch, collator), strict=True))
    finally:
        model.train(was_training)
    return [predictions[index] for index in range(len(examples))]


def _sort_key(example: Example) -> int:
    return len(example.text) + len(example.text_pair or "")


@torch.inference_mode()
def _predict_batch(model: HyperAdapterModel, batch: dict[str, Any], collator: Collator) -> list[Prediction]:
    texts: list[str] | None = None
    probabilities: list[list[float]] = []
    values: list[list[float]] = []
    if model.text_to_text:
        batch.pop("token_type_ids", None)
        instances = model.instances(batch["input_ids"], batch["attention_mask"])
        task_ids = batch.setdefault("task_ids", model.prototypes.nearest(instances))
        tokens = model.generate(**batch, max_new_tokens=collator.max_target_length, do_sample=False)
        texts = collator.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    else:
        output = model(**batch)
        instances, task_ids = output.instances, output.task_ids
        values = output.logits.tolist()
        probabilities = output.logits.softmax(dim=-1).tolist()
    nearest = model.prototypes.nearest(instances).tolist()
    predictions = []
    for row, task_id in enumerate(task_ids.tolist()):
        task = model.tasks[task_id]
        answer: int | float | str | None
        likely = None
        if texts is not None:
            answer = read_answer(task, texts[row])
        elif task.kind == "regression":
            answer = values[row][0]
        else:
            likely = tuple(probabilities[row][: len(task.labels)])
            answer = likely.index(max(likely))
        predictions.append(
            Prediction(
                task_id=task_id,
                answer=answer,
                probabilities=likely,
                text=texts[row] if texts is not None else None,
                nearest=nearest[row],
                instance=tuple(instances[row].tolist()),
            )
        )
    return predictions
