"""Training figures on random token ids, for backbones without a tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hyperadapters import HyperAdapterModel
from hyperadapters.core import masked_mean
from hyperadapters.data.sampling import MixedTaskBatchSampler
from hyperadapters.training.prefix_cache import FrozenPrefix
from speed_parts.models import Setting, make_batch, make_model, make_peft, make_task_ids
from speed_parts.rows import Row, ratio, rounded, row
from speed_parts.timing import interleaved

TASKS = 12
ROWS_OF_TASK = 64
LONGEST = 128


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def steps(setting: Setting) -> Iterator[Row]:
    """A step on the same rows: states of frozen layers kept, not kept, and PEFT's LoRA of one task in all layers."""
    tokens = setting.tokens[-1]
    batch = make_batch(setting, setting.rows, tokens)
    labels = torch.zeros(setting.rows, device=setting.device)
    told = {**batch, "task_ids": make_task_ids(setting, setting.rows, 8), "labels": labels}
    model = make_model(setting, setting.encoder, 8).train()
    optimizer = torch.optim.AdamW(_trained(model), fused=True)
    prefix = FrozenPrefix(model, [tokens] * setting.rows, "memory")
    peft = make_peft(setting, setting.encoder, 1).train()
    head = nn.Linear(peft.config.hidden_size, 3, device=setting.device)
    peft_optimizer = torch.optim.AdamW([*_trained(peft), *head.parameters()], fused=True)

    def peft_step() -> None:
        pooled = masked_mean(peft(**batch).last_hidden_state, batch["attention_mask"])
        _update(nn.functional.cross_entropy(head(pooled), labels.long()), peft_optimizer)

    functions: dict[str, Callable[[], Any]] = {
        "kept": lambda: _update(model(**told, frozen_output=prefix(range(setting.rows), batch)).loss, optimizer),
        "anew": lambda: _update(model(**told).loss, optimizer),
        "peft": peft_step,
    }
    times = interleaved(functions, setting.repeats, setting.device)
    shape = {"backbone": setting.encoder, "rows": setting.rows, "tokens": tokens, "tasks": 8}
    name = "PEFT LoRA of one task, all layers"
    yield ratio(setting, "train_prefix_cache_vs_peft", times["kept"], times["peft"], name, "lower", **shape)
    yield ratio(setting, "train_without_prefix_cache_vs_peft", times["anew"], times["peft"], name, "lower", **shape)


def epochs(setting: Setting) -> Iterator[Row]:
    """An epoch with batches by length, relative to shuffled ones, on tasks from short to long texts."""
    generator = random.Random(0)
    task_ids = [task for task in range(TASKS) for _ in range(ROWS_OF_TASK)]
    lengths = [_length(generator, task) for task in task_ids]
    model = make_model(setting, setting.encoder, TASKS).train()
    optimizer = torch.optim.AdamW(_trained(model), fused=True)

    def epoch(lengths_of_rows: list[int] | None) -> None:
        for batch in MixedTaskBatchSampler(task_ids, setting.rows, lengths=lengths_of_rows):
            inputs = make_batch(setting, len(batch), max(lengths[index] for index in batch))
            ids = torch.tensor([task_ids[index] for index in batch], device=setting.device)
            labels = torch.zeros(len(batch), device=setting.device)
            _update(model(**inputs, task_ids=ids, labels=labels).loss, optimizer)

    functions = {"grouped": partial(epoch, lengths), "shuffled": partial(epoch, None)}
    times = interleaved(functions, max(setting.repeats // 6, 2), setting.device, warmup=1)
    shape = {"backbone": setting.encoder, "rows": len(task_ids), "mean_length": rounded(sum(lengths) / len(lengths))}
    other = "batches shuffled"
    yield ratio(setting, "epoch_bucketed_vs_shuffled", times["grouped"], times["shuffled"], other, "lower", **shape)


def _length(generator: random.Random, task: int) -> int:
    """Tokens of a row: the tasks' means go from 10 to 100, their rows vary by a half."""
    mean = 10 * 10 ** (task / (TASKS - 1))
    return min(LONGEST, max(4, round(generator.gauss(mean, 0.5 * mean))))


def memory(setting: Setting) -> Iterator[Row]:
    """Peak memory of the GPU saved by generating once a task, in units of the weights generated per row."""
    if not setting.device.startswith("cuda"):
        return
    rows, tasks = 128, 8
    peaks = {}
    for generated in (tasks, rows):
        model = make_model(setting, setting.text_to_text, generated).train()
        batch = make_batch(setting, rows, setting.tokens[0])
        labels = make_batch(setting, rows, 8)["input_ids"]
        told = {**batch, "task_ids": make_task_ids(setting, rows, generated), "labels": labels}
        peaks[generated], weights_mb = _peak(model, told)
        del model
        torch.cuda.empty_cache()
    details = {"backbone": setting.text_to_text, "rows": rows, "tasks": tasks}
    sizes = {"peak_mb": rounded(peaks[tasks]), "per_row_peak_mb": rounded(peaks[rows])}
    saved = (peaks[rows] - peaks[tasks]) / weights_mb
    yield row(setting, "per_row_memory_saved", saved, "higher", **details, **sizes, per_row_weights_mb=weights_mb)


def _peak(model: HyperAdapterModel, told: dict[str, Tensor]) -> tuple[float, float]:
    with torch.no_grad():
        weights_mb = sum(tensor.nbytes for tensor in model.method.adapters(told["task_ids"].unique()).values()) / 1e6
    torch.cuda.reset_peak_memory_stats()
    model(**told).loss.backward()
    return torch.cuda.max_memory_allocated() / 1e6, rounded(weights_mb)
