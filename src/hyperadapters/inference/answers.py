"""Answers of a model to one batch: from task heads, or generated as text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessorList

from hyperadapters.backbones.passes import FrozenOutput
from hyperadapters.inference.finite import FiniteLogits, has_usable_logits
from hyperadapters.methods.base import Route
from hyperadapters.model.model import HyperAdapterModel


class Answers(NamedTuple):
    """Answers to a batch.

    Attributes:
        outputs: The generated text of each row, or the logits of its head.
        task_ids: The tasks that were used [B].
        instances: Instance vectors [B, p]; None for a method without a retriever.
        similarity: Similarity to each task [B, T]; None for a method that cannot route.
        is_finite: Whether the values from which a row was answered are finite [B].
    """

    outputs: Sequence[str | list[float]]
    task_ids: Tensor
    instances: Tensor | None
    similarity: Tensor | None
    is_finite: Tensor


def answer_batch(
    model: HyperAdapterModel,
    batch: dict[str, Tensor],
    task_ids: Tensor | None,
    route: Route,
    frozen_output: FrozenOutput | None = None,
) -> Answers:
    """Answer a batch with the heads of a model, or with generated texts if its backbone has no heads.

    Args:
        model: Model in evaluation mode.
        batch: Inputs of the model [B, S].
        task_ids: Task of each row [B]; None if they are routed.
        route: See `HyperAdapterModel.forward`.
        frozen_output: Output of the frozen layers for the batch, if it has been computed before.

    Returns:
        The answers in the order of the rows.
    """
    if model.text_to_text:
        return _generated(model, batch, task_ids, route, frozen_output)
    output = model(**batch, task_ids=task_ids, route=route, frozen_output=frozen_output)
    is_finite = has_usable_logits(output.logits) & output.logits[:, 0].isfinite()
    return Answers(output.logits.float().tolist(), output.task_ids, output.instances, output.similarity, is_finite)


class TaskAnswers(NamedTuple):
    """Answers of K tasks to each row of a batch.

    Attributes:
        logits: Logits of each task for each row [K, B, C]; those that a task does not have are minus infinity.
        instances: Instance vectors [B, p]; None for a method without a retriever.
        similarity: Similarity to each task of the model [B, T]; None for a method that cannot route.
        is_finite: Whether the values from which a row was answered are finite [B].
    """

    logits: Tensor
    instances: Tensor | None
    similarity: Tensor | None
    is_finite: Tensor


def can_share_layers(model: HyperAdapterModel) -> bool:
    """Return whether several tasks can be answered from one pass of the same inputs through the lower layers.

    This is the case if no task changes the input with a template, and if there are layers below all adapters.

    Args:
        model: Model to examine.
    """
    return model.heads is not None and model.has_frozen_layers


def answer_tasks(model: HyperAdapterModel, batch: dict[str, Tensor], task_ids: Tensor, max_rows: int) -> TaskAnswers:
    """Answer K tasks for each row of a batch, with one pass through the layers below the adapters.

    The layers above run with the rows of several tasks in a batch.

    Args:
        model: Model in evaluation mode for which `can_share_layers` is true.
        batch: Inputs of the model [B, S], either all single texts or all pairs.
        task_ids: Ids of the tasks [K], all of them for such inputs.
        max_rows: Maximum number of rows in a batch of the upper layers, unless B is larger.

    Returns:
        The answers.
    """
    assert model.heads is not None
    rows = len(batch["input_ids"])
    frozen = model.forward_frozen_layers(**batch)
    assert frozen.pooled is not None
    features = model.read_features(batch, frozen.pooled, task_ids[:1].expand(rows))
    logits = []
    for some in task_ids.split(max(1, max_rows // rows)):
        inputs = {name: tensor.repeat(len(some), 1) for name, tensor in batch.items()}
        of_rows = some.repeat_interleave(rows)
        read = model.head_inputs(inputs, of_rows, frozen_output=_repeated(frozen, rows, len(some)))
        of_tasks = model.heads(read, features.repeat(len(some), 1), of_rows).float()
        logits.append(of_tasks.view(len(some), rows, -1))
    widest = max(part.shape[-1] for part in logits)
    together = torch.cat([F.pad(part, (0, widest - part.shape[-1]), value=-torch.inf) for part in logits])
    is_finite = (has_usable_logits(together.flatten(0, 1)) & together.flatten(0, 1)[:, 0].isfinite()).view(-1, rows)
    similarity = model.task_similarity(batch, frozen) if model.method.can_route else None
    return TaskAnswers(together, model.method.instance_vectors(frozen.pooled), similarity, is_finite.all(dim=0))


def _repeated(frozen: FrozenOutput, rows: int, times: int) -> FrozenOutput:
    """Repeat the output for B rows. With pairs of separate texts, all first texts precede the second ones."""
    hidden = torch.cat([part.repeat(times, 1, 1) for part in frozen.hidden.split(rows)])
    return FrozenOutput(hidden, None if frozen.pooled is None else frozen.pooled.repeat(times, 1))


def _generated(
    model: HyperAdapterModel,
    batch: dict[str, Tensor],
    task_ids: Tensor | None,
    route: Route,
    frozen_output: FrozenOutput | None,
) -> Answers:
    is_decoder = model.kind == "decoder"
    lower_output = None
    if not is_decoder or frozen_output is not None:
        lower_output = model.forward_lower_layers(**batch, frozen_output=frozen_output)
    finite, ends = FiniteLogits(), _end_tokens(model)
    options: dict[str, Any] = {"eos_token_id": ends} if is_decoder else {}
    tokens, used, instances, similarity = model.generate_with_tasks(
        **batch,
        task_ids=task_ids,
        lower_output=lower_output,
        route=route,
        max_new_tokens=model.lengths.target,
        do_sample=False,
        logits_processor=LogitsProcessorList([finite]),
        **options,
    )
    # The output of an encoder-decoder begins with the decoder's start token, which may also be an end token.
    start = batch["input_ids"].shape[1] if is_decoder else 1
    answers = [list(takewhile(lambda token: token not in ends, row)) for row in tokens[:, start:].tolist()]
    texts: list[str | list[float]] = model.tokenizer.batch_decode(answers, skip_special_tokens=True)
    assert finite.usable is not None
    return Answers(texts, used, instances, similarity, finite.usable)


def _end_tokens(model: HyperAdapterModel) -> list[int]:
    """Token ids that end a generated text: the one used in the training of decoders, and the backbone's own."""
    own = getattr(model.backbone.generation_config, "eos_token_id", None)
    own = [] if own is None else torch.as_tensor(own).flatten().tolist()
    trained = [model.tokenizer.eos_token_id] if model.kind == "decoder" else []
    return list(dict.fromkeys([*trained, *own]))
