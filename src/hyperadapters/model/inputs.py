"""Checks of the arguments of a forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import get_args

import torch
from torch import Tensor

from hyperadapters.config import BackboneKind, Task
from hyperadapters.core import Reduction
from hyperadapters.errors import TaskError, unknown_name


def prepare_inputs(
    kind: BackboneKind,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    sequence_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """Check and collect the inputs that a backbone and its heads read.

    Args:
        kind: Kind of the backbone.
        input_ids: Token ids [B, S].
        attention_mask: Mask [B, S], 1 for tokens and 0 for padding. Default: there is no padding.
        token_type_ids: Token type ids [B, S] of encoders. They are omitted for other backbones.
        prompt_mask: Mask [B, S] of the tokens that the retriever of a decoder reads.
        sequence_ids: Number of the text of each token [B, S], for encoders. They are omitted for other backbones.

    Returns:
        Inputs [B, S] by name, including an attention mask.

    Raises:
        TaskError: If `input_ids` are not token ids [B, S], or another input has another shape.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "prompt_mask": prompt_mask}
    if kind == "encoder":
        inputs.update(token_type_ids=token_type_ids, sequence_ids=sequence_ids)
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    _check_inputs(given)
    given.setdefault("attention_mask", torch.ones_like(input_ids))
    if prompt_mask is not None:
        given["prompt_mask"] = prompt_mask * given["attention_mask"]
    return given


def mask_tokens(inputs: Mapping[str, Tensor], probability: float) -> dict[str, Tensor]:
    """Mask tokens at random, except for the first token of each sequence.

    Args:
        inputs: Inputs [B, S] by name, including an attention mask.
        probability: Probability with which a token is masked.

    Returns:
        The inputs with another attention mask.
    """
    mask = inputs["attention_mask"]
    is_kept = (torch.rand(mask.shape, device=mask.device) >= probability) | (mask.cumsum(dim=1) == 1)
    return {**inputs, "attention_mask": mask * is_kept}


def _check_inputs(inputs: Mapping[str, Tensor]) -> None:
    """Raise TaskError unless `input_ids` are integers [B, S], and all other inputs are tensors of their shape."""
    ids = inputs["input_ids"]
    is_tensor = isinstance(ids, Tensor)
    if not is_tensor or ids.dtype not in (torch.long, torch.int) or ids.ndim != 2 or ids.shape[1] == 0:
        found = f"{ids.dtype} of shape {tuple(ids.shape)}" if is_tensor else f"a {type(ids).__name__}"
        raise TaskError(f"input_ids: expected token ids of shape [rows, tokens], found {found}")
    for name, tensor in inputs.items():
        if not isinstance(tensor, Tensor) or tensor.shape != ids.shape:
            found = str(tuple(tensor.shape)) if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise TaskError(f"{name}: expected the shape {tuple(ids.shape)} of input_ids, found {found}")


def check_task_ids(task_ids: Tensor | None, rows: int, num_tasks: int, has_labels: bool) -> None:
    """Check the task ids of a batch.

    Args:
        task_ids: Id of the task of each row [B]; None if they are to be routed.
        rows: Number B of rows.
        num_tasks: Number of tasks of the model.
        has_labels: Whether there are labels.

    Raises:
        TaskError: If there are no rows; if there are labels but no task ids; or if the task ids have another shape or
            type or are out of range.
    """
    if rows == 0:
        raise TaskError("expected at least one row in the batch, found none")
    if task_ids is None:
        if has_labels:
            raise TaskError("labels need task_ids: the loss is not computed for routed rows, whose tasks may be wrong")
        return
    if not isinstance(task_ids, Tensor) or task_ids.dtype != torch.long or task_ids.shape != (rows,):
        found = f"{task_ids.dtype} of shape {tuple(task_ids.shape)}" if isinstance(task_ids, Tensor) else repr(task_ids)
        raise TaskError(f"task_ids: expected a LongTensor of shape ({rows},), one task for each row; found {found}")
    low, high = int(task_ids.min()), int(task_ids.max())
    if low < 0 or high >= num_tasks:
        raise TaskError(
            f"task_ids: expected 0 to {num_tasks - 1} ({num_tasks} tasks), found {low if low < 0 else high}"
        )


def check_labels(
    labels: Tensor,
    input_ids: Tensor,
    task_ids: Tensor,
    tasks: Sequence[Task],
    kind: BackboneKind,
    num_embeddings: int | None,
) -> None:
    """Check the labels of a batch.

    Args:
        labels: Labels of the rows; see `HyperAdapterModel.forward`.
        input_ids: Token ids [B, S].
        task_ids: Id of the task of each row [B].
        tasks: Tasks of the model in the order of their ids.
        kind: Kind of the backbone.
        num_embeddings: Number of token ids for which the backbone has embeddings; None if it is unknown.

    Raises:
        TaskError: If the labels have another shape or type, or one is out of range.
    """
    rows, text_to_text = len(input_ids), kind != "encoder"
    used = [] if text_to_text else [tasks[task_id] for task_id in task_ids.tolist()]
    size = max((len(task.labels) for task in used if task.is_multi_label), default=0)
    shape = f"({rows}, {size})" if size else f"({rows},)"
    expected = f"token ids of shape ({rows}, T), T at least 1" if text_to_text else f"a tensor of shape {shape}"
    found = f"shape {tuple(labels.shape)}, {labels.dtype}" if isinstance(labels, Tensor) else repr(labels)
    fits = isinstance(labels, Tensor) and labels.shape[:1] == (rows,)
    fits = fits and (labels.ndim == 2 if text_to_text else labels.shape[1:] == ((size,) if size else ()))
    if not fits or 0 in labels.shape or labels.dtype == torch.bool or (text_to_text and labels.is_floating_point()):
        raise TaskError(f"labels: expected {expected}, found {found}")
    if not text_to_text:
        _check_label_values(labels, used)
        return
    if kind == "decoder" and labels.shape != input_ids.shape:
        raise TaskError(
            f"labels: expected the shape {tuple(input_ids.shape)} of input_ids, which contain the input and the "
            f"answer, with -100 for tokens that are not part of the answer; found {tuple(labels.shape)}"
        )
    check_token_ids("labels", labels, num_embeddings)


def _check_label_values(labels: Tensor, tasks: Sequence[Task]) -> None:
    """Raise TaskError unless each row [B] or [B, C] has labels of its task."""
    for row, (values, task) in enumerate(zip(labels.reshape(len(labels), -1).tolist(), tasks, strict=True)):
        if task.is_multi_label:
            size = len(task.labels)
            if {*values[:size]} <= {0.0, 1.0} and not any(values[size:]):
                continue
            raise TaskError(
                f"labels[{row}]: expected {size} zeros and ones, followed by zeros, for task '{task.name}', "
                f"found {values}"
            )
        label = values[0]
        is_index = 0 <= label < len(task.labels) and label == int(label)
        if not (isfinite(label) if task.kind == "regression" else is_index):
            expected = "a finite number" if task.kind == "regression" else f"an index from 0 to {len(task.labels) - 1}"
            raise TaskError(f"labels[{row}]: expected {expected} for task '{task.name}', found {label}")


def check_token_ids(name: str, ids: Tensor, num_embeddings: int | None) -> None:
    """Check that a backbone has embeddings for token ids.

    Args:
        name: Name of the argument: "input_ids" or "labels", which may also be -100.
        ids: Token ids [B, S].
        num_embeddings: Number of token ids for which the backbone has embeddings; None if it is unknown.

    Raises:
        TaskError: If an id is out of range.
    """
    wrong = ids < 0 if num_embeddings is None else (ids < 0) | (ids >= num_embeddings)
    if name == "labels":
        wrong &= ids != -100
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        below = "" if num_embeddings is None else f" to {num_embeddings - 1}, which the backbone has embeddings for"
        ignored = "-100 or " if name == "labels" else ""
        raise TaskError(f"{name}[{row}, {place}]: expected {ignored}a token id from 0{below}; found {ids[row, place]}")


def check_loss_settings(label_smoothing: float, reduction: str) -> None:
    """Check the settings of the task loss.

    Args:
        label_smoothing: Share of the target distribution that is uniform, from 0 to 1.
        reduction: "mean" or "sum".

    Raises:
        TaskError: If one of them has another value.
    """
    if not isinstance(label_smoothing, (int, float)) or not 0 <= label_smoothing <= 1:
        raise TaskError(f"label_smoothing: expected a number from 0 to 1, found {label_smoothing!r}")
    if reduction not in get_args(Reduction):
        raise TaskError(unknown_name("reduction", str(reduction), get_args(Reduction)))


def before_labels(labels: Tensor) -> Tensor:
    """Return a mask [B, S] that is 1 for the tokens before the first label of each row and 0 for the others.

    Args:
        labels: Token ids [B, S], -100 except for the answer.
    """
    return ((labels != -100).cumsum(dim=1) == 0).long()
