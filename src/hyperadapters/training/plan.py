"""A plan of the memory that one process of a training needs, made before anything is trained.

The model of the recipe is built without weights, and one training step is carried out with the largest batch that the
training will draw, in a `MemoryTrace`, where floating-point tensors have sizes but no values. What autograd keeps for
the backward pass is therefore counted and not estimated: it follows from the code of the backbone, the method, the
attention implementation, the type of autocast and the checkpoints, and a formula for each architecture would have to
repeat all of it. No weight is read, so a plan can be made for a backbone that is larger than the memory. The rows are
read and tokenised as the training does, because the lengths of the texts decide how large the largest batch is.

What the trace does not see are the libraries themselves, a constant (`LIBRARIES`) that is measured, and memory that the
kernels and the allocator of the system keep for themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperadapters.backbones.loading import backbone_without_weights
from hyperadapters.config import Recipe
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.data.loading import load_tasks
from hyperadapters.data.sampling import MixedTaskBatchSampler
from hyperadapters.data.stored_rows import StoredRows, joined
from hyperadapters.errors import RecipeError, check_int
from hyperadapters.inference.batches import batches_by_length, best_device, to_device
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.memory_trace import MemoryTrace
from hyperadapters.training.prefix_cache import GIB, FrozenPrefix, choose_place, size_of_states
from hyperadapters.training.run import (
    check_settings,
    examples_of,
    model_of,
    rows_by_task,
    rows_of_process,
    training_arguments,
)
from hyperadapters.training.trainer import MODEL_INPUTS

LIBRARIES = 577 * 2**20
"""Memory of a process on a CPU before it has a model: Python, PyTorch, transformers and what they import. It was
measured with torch 2.13 and transformers 5.23 (`benchmarks/plan_check.py`) and differs between versions."""
EPOCHS = 3
"""Number of epochs whose batches are looked at. The largest batch differs little between epochs."""
OPTIMIZER_STATES = 2
"""AdamW keeps the means of the gradient and of its square."""
BYTES_OF_STORED_ROW = 300
"""Memory for a row that is in a file: its places in the file and in orders of rows, what the sampler draws of it, and
the part of the file that is mapped into memory. `make torture` measures it for short texts, with everything else that
grows with the rows."""

LIBRARIES_PART, BACKBONE, TRAINED, GRADIENTS = "libraries", "backbone", "trained parameters", "gradients"
OPTIMIZER, ACTIVATIONS, TEMPORARY = "optimizer", "activations for the backward pass", "temporary tensors"
STATES, ROWS = "states of frozen layers", "rows of the data"

_SIZES = "the sizes of the model (adapter_dim or lora_rank, hidden_dim, prototype_dim)"
ADVICE = {
    BACKBONE: "set backbone_dtype to bfloat16, or choose a smaller backbone",
    TRAINED: f"lower {_SIZES}",
    GRADIENTS: f"lower {_SIZES}",
    OPTIMIZER: f"lower {_SIZES}",
    ACTIVATIONS: (
        "lower training.batch_size and raise training.gradient_accumulation_steps, lower data.max_length, raise "
        "model.feature_layer, or set training.gradient_checkpointing"
    ),
    TEMPORARY: "lower training.batch_size, training.eval_batch_size or data.max_length",
    STATES: "set training.prefix_cache to file or none, or training.prefix_cache_dtype to float16",
    ROWS: "lower data.n_train",
}
"""What lowers each part. Nothing in a recipe lowers the memory of the libraries."""


@dataclass(frozen=True)
class MemoryPlan:
    """Memory that each process of a training needs.

    Attributes:
        parts: Bytes of each part by its name.
        file_bytes: Size of the file with the states of the frozen layers, which all processes of a machine share.
        device: Type of the device whose memory is planned, such as "cpu" or "cuda".
        processes: Number of processes.
        rows: Number of rows of the largest batch of a process.
        tokens: Number of tokens to which these rows are padded.
        backbone_parameters: Number of parameters of the backbone.
        trained_parameters: Number of trained parameters.
    """

    parts: dict[str, int]
    file_bytes: int
    device: str
    processes: int
    rows: int
    tokens: int
    backbone_parameters: int
    trained_parameters: int

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return sum(self.parts.values())

    @property
    def advice(self) -> str:
        """The largest part that a recipe can change, and what lowers it."""
        largest = max(ADVICE, key=lambda name: self.parts[name])
        return f"{largest} ({self.parts[largest] / self.total:.0%} of the total). To lower it, {ADVICE[largest]}"


class _Step(NamedTuple):
    """Bytes beyond the model: what is kept for the backward pass, and the peak of the whole step."""

    activations: int
    peak: int


def plan_memory(recipe: Recipe, processes: int = 1, folder: str | Path = ".") -> MemoryPlan:
    """Plan the memory of a training. Nothing is trained or written, and no weights are read.

    Args:
        recipe: Recipe of the training.
        processes: Number of processes that train together. Default: 1.
        folder: Folder whose free disk space decides between a file and no file if `prefix_cache` is "auto". Default:
            the current folder.

    Returns:
        The plan for one of the processes, that with the largest batch.

    Raises:
        RecipeError: If a setting has no effect, the batch size is not a multiple of the number of processes, or there
            are no training rows.
        HyperAdaptersError: If the recipe, the data or the backbone are invalid in another way.
    """
    check_int("processes", processes, 1, RecipeError)
    rows_of_process(recipe.training, processes)
    tasks = load_tasks(recipe.tasks, recipe.data, recipe.seed)
    trace = MemoryTrace()
    with trace, best_device():
        model = _untrained_model(recipe, tasks)
    check_settings(recipe, training_arguments(recipe, folder), model, bool(rows_by_task(tasks, "validation")))
    examples = examples_of(tasks, "train")
    lengths = model.collator.lengths(examples, with_targets=True)
    rows = _largest_batch(recipe, examples, lengths, processes)
    batch = to_device(model.collator([examples[row] for row in rows]), model.device)
    evaluated = joined(examples_of(tasks, split) for split in ("validation", "test")) or examples
    with trace:
        step = _train(trace, model, recipe, rows, batch, lengths)
        evaluation = _evaluate(trace, model, evaluated, recipe.training.eval_batch_size)
    in_memory, in_file = _size_of_kept_states(model, recipe, lengths, tasks, processes, Path(folder))
    trained = model.num_trainable_parameters()
    gradients = 4 * trained * (1 if processes == 1 else 2)  # DDP has buckets of the size of all gradients
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    parts = {
        LIBRARIES_PART: LIBRARIES if model.device.type == "cpu" else 0,
        BACKBONE: _num_bytes((*frozen, *model.buffers())) - _size_of_other_parts(model, recipe, processes),
        TRAINED: 4 * trained,
        GRADIENTS: gradients,
        OPTIMIZER: 4 * OPTIMIZER_STATES * trained,
        ACTIVATIONS: step.activations,
        TEMPORARY: max(0, max(step.peak, evaluation) - step.activations - 4 * trained),
        STATES: in_memory if model.device.type == "cpu" else 0,
        ROWS: _size_of_rows(tasks) if model.device.type == "cpu" else 0,
    }
    batch_rows, tokens = batch["input_ids"].shape
    backbone_parameters = sum(parameter.numel() for parameter in frozen)
    return MemoryPlan(parts, in_file, model.device.type, processes, batch_rows, tokens, backbone_parameters, trained)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _size_of_other_parts(model: HyperAdapterModel, recipe: Recipe, processes: int) -> int:
    """Return the bytes of the backbone that other processes hold, while one layer is gathered."""
    if not recipe.training.shard_backbone or processes == 1:
        return 0
    layers = [_num_bytes(layer.parameters()) for layer in model.passes.layers]
    return max(0, sum(layers) * (processes - 1) // processes - max(layers))


def _untrained_model(recipe: Recipe, tasks: Sequence[TaskData]) -> HyperAdapterModel:
    """Make the model of a recipe as `run.train` does, but without weights."""
    model = model_of(recipe, tasks, backbone_without_weights)
    if recipe.training.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def _largest_batch(recipe: Recipe, examples: Sequence[Example], lengths: list[int], processes: int) -> list[int]:
    """Return the rows of the batch of one process with the most tokens, padding included."""
    training, data = recipe.training, recipe.data
    if not examples:
        raise RecipeError("tasks: expected training rows, found none; add a train split")
    largest: list[int] = []
    for process in range(processes):
        sampler = MixedTaskBatchSampler(
            [example.task_id or 0 for example in examples],
            training.batch_size,
            data.sampling,
            data.temperature,
            recipe.seed,
            lengths if data.group_by_length else None,
            processes,
            process,
        )
        left = None if training.max_steps is None else training.max_steps * training.gradient_accumulation_steps
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            largest = max([largest, *islice(sampler, left)], key=lambda rows: _padded_tokens(rows, lengths))
            left = None if left is None else max(0, left - len(sampler))
    return [max(row, -1 - row) for row in largest]  # a part without rows repeats one, as -1 - row


def _padded_tokens(rows: Sequence[int], lengths: Sequence[int]) -> int:
    return len(rows) * max((lengths[max(row, -1 - row)] for row in rows), default=0)


def _train(
    trace: MemoryTrace,
    model: HyperAdapterModel,
    recipe: Recipe,
    rows: list[int],
    batch: dict[str, Tensor],
    lengths: list[int],
) -> _Step:
    """Carry out a training step without an optimizer, as `Trainer.training_step` does."""
    training = recipe.training
    model.train()
    trace.restart()
    before, activations = trace.live, 0
    half = torch.bfloat16 if training.bf16 else torch.float16
    for _ in range(min(2, training.gradient_accumulation_steps)):  # the second batch finds the gradients of the first
        start = trace.live
        with torch.autocast(model.device.type, half, enabled=training.bf16 or training.fp16):
            loss = _loss(model, recipe, rows, batch, lengths)
        activations = max(activations, trace.live - start)
        loss.backward()
        del loss
    return _Step(activations, trace.peak - before)


def _loss(
    model: HyperAdapterModel, recipe: Recipe, rows: list[int], batch: dict[str, Tensor], lengths: list[int]
) -> Any:
    frozen = None
    if model.has_frozen_layers:
        states = FrozenPrefix(model, lengths, "none")
        frozen = states(rows, {name: batch[name] for name in MODEL_INPUTS if name in batch})
    training = recipe.training
    output = model(
        **batch, frozen_output=frozen, label_smoothing=training.label_smoothing, reduction=training.reduction
    )
    return output.loss


@torch.no_grad()
def _evaluate(trace: MemoryTrace, model: HyperAdapterModel, examples: Sequence[Example], batch_size: int) -> int:
    """Answer the longest batch of an evaluation; a generated text only as far as its first token.

    Returns:
        Peak of the bytes beyond the model.
    """
    model.zero_grad()
    model.eval()
    trace.restart()
    before = trace.live
    *_, longest = batches_by_length(examples, batch_size, model.adapter_config.separates_texts)
    chosen = [examples[row] for row in longest]
    inputs: dict[str, Any] = to_device(model.collator.inputs(chosen), model.device)
    task_ids = torch.tensor([example.task_id for example in chosen], device=model.device)
    if model.text_to_text:
        trace.condition = True  # all answers have ended after the first token
        model.generate(**inputs, task_ids=task_ids, max_new_tokens=1, do_sample=False)
    else:
        model(**inputs, task_ids=task_ids)
    return trace.peak - before


def _size_of_kept_states(
    model: HyperAdapterModel,
    recipe: Recipe,
    train_lengths: list[int],
    tasks: Sequence[TaskData],
    processes: int,
    folder: Path,
) -> tuple[int, int]:
    """Return the bytes of the states of frozen layers in memory and in files, as `Trainer` places them."""
    if not model.has_frozen_layers:
        return 0, 0
    training, found = recipe.training, {"memory": 0, "file": 0, "none": 0}
    wanted = "none" if training.shard_backbone and processes > 1 else training.prefix_cache
    validation = examples_of(tasks, "validation") if model.kind != "decoder" else []
    for lengths in (train_lengths, model.collator.lengths(validation)):
        size = size_of_states(model, lengths, training.prefix_cache_dtype)
        room = max(0.0, training.prefix_cache_gb - found["memory"] / GIB)
        found[choose_place(wanted, size, room, folder, processes)] += size
    return found["memory"], found["file"]


def _size_of_rows(tasks: Sequence[TaskData]) -> int:
    """Return the bytes of the examples and their texts. Tokens are made for each batch anew."""
    return sum(_size_of_examples(rows) for data in tasks for rows in data.splits.values())


def _size_of_examples(examples: Sequence[Example]) -> int:
    if isinstance(examples, StoredRows):
        return BYTES_OF_STORED_ROW * len(examples)
    texts = [text for example in examples for text in (example.text, example.text_pair) if text is not None]
    return sum(map(sys.getsizeof, examples)) + sum(map(sys.getsizeof, texts))
