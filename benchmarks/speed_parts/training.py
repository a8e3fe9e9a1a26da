"""Training: steps with the states of frozen layers kept, epochs with batches by length, options, growth, memory.

Steps and epochs are those of `recipes/local-glue.yaml`, whose data stand beside the project.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from hyperadapters import HyperAdapterModel
from hyperadapters.backbones.loading import load_backbone
from hyperadapters.config import Recipe, load_recipe
from hyperadapters.core import masked_mean
from hyperadapters.data.loading import load_tasks
from hyperadapters.training.run import rows_by_task, training_arguments
from hyperadapters.training.trainer import Trainer
from speed_parts.fresh_process import in_fresh_process
from speed_parts.models import Setting, make_batch, make_model, make_peft, make_task_ids
from speed_parts.result_rows import Row, ratio, rounded, row
from speed_parts.timing import exponent, interleaved

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "local-glue.yaml"
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bf16": ({"bf16": True}, {}),
    "fused_optimizer": ({"optimizer": "adamw_torch_fused"}, {"optimizer": "adamw_torch"}),
    "sdpa": ({"attention": "sdpa"}, {"attention": "eager"}),
    "gradient_checkpointing": ({"gradient_checkpointing": True}, {}),
}
"""Settings of `training` to compare, with and without an option."""
PER_ROW = {"rows": 128, "tokens": 16, "target_tokens": 8}
"""The batch for which the memory of generating per row is measured."""
SIZES = {
    "tasks": [(64, 18, tasks) for tasks in (1, 2, 4, 8, 16, 32, 64)],
    "batch": [(rows, 18, 8) for rows in (8, 16, 32, 64, 128)],
    "length": [(16, tokens, 8) for tokens in (16, 32, 64, 128, 256)],
}
"""Rows, tokens and tasks of the batches along which one of the three grows."""


class Steps:
    """Training steps as the Trainer makes them, on batches of its own data loader."""

    def __init__(self, preset: str | None, folder: Path, overrides: Sequence[str] = (), **training: Any) -> None:
        recipe = _with(load_recipe(RECIPE, [f"model.preset={preset or 'null'}", *overrides]), training)
        tasks = load_tasks(recipe.tasks, recipe.data, recipe.seed)
        torch.manual_seed(recipe.seed)
        backbone: Any = load_backbone(recipe.backbone)
        if recipe.training.attention is not None:
            backbone.set_attn_implementation(recipe.training.attention)
        described, lengths = [data.task for data in tasks], recipe.data.lengths
        self.model = HyperAdapterModel(backbone, described, recipe.model, recipe.backbone, lengths)
        arguments = training_arguments(recipe, folder)
        self.trainer = Trainer(self.model, rows_by_task(tasks, "train"), args=arguments)
        if recipe.training.gradient_checkpointing:
            self.model.activation_checkpointing_enable()
        self.optimizer = self.trainer.create_optimizer()
        self.model.train()

    def batches(self) -> list[dict[str, Tensor]]:
        """The batches of an epoch."""
        return list(self.trainer.get_train_dataloader())

    def step(self, batch: dict[str, Tensor]) -> None:
        """Loss, gradients and update."""
        with self.trainer.accelerator.autocast():
            loss = self.trainer.compute_loss(self.model, dict(batch))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def epoch(self) -> None:
        """A step on each batch, tokenising included."""
        for batch in self.trainer.get_train_dataloader():
            self.step(batch)


def _with(recipe: Recipe, training: dict[str, Any]) -> Recipe:
    values = {**recipe.training.model_dump(), **training}
    return recipe.model_copy(update={"training": type(recipe.training).model_validate(values)})


class PeftSteps:
    """Training steps of PEFT's LoRA of one task in all layers, with a head on the mean of the hidden states."""

    def __init__(self, setting: Setting) -> None:
        self.model = make_peft(setting, setting.encoder, 1).train()
        self.head = nn.Linear(self.model.config.hidden_size, 2)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW([*trained, *self.head.parameters()], fused=True)

    def step(self, batch: dict[str, Tensor]) -> None:
        """Loss, gradients and update, whatever the rows' tasks are."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        hidden = self.model(**inputs).last_hidden_state
        logits = self.head(masked_mean(hidden, batch["attention_mask"]))
        nn.functional.cross_entropy(logits, (batch["labels"] > 0).long()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def steps(setting: Setting) -> Iterator[Row]:
    """A step on the same rows: states kept, not kept, PEFT's LoRA; the time of all steps of a part of an epoch."""
    with TemporaryDirectory() as folder:
        kept = Steps(setting.preset, Path(folder), prefix_cache="memory")
        anew = Steps(setting.preset, Path(folder), prefix_cache="none")
        peft = PeftSteps(setting)
        batches = kept.batches()[: setting.train_batches]
        for batch in batches:
            kept.step(batch)  # the first epoch fills the cache
        functions = {
            "kept": partial(_all, kept.step, batches),
            "anew": partial(_all, anew.step, batches),
            "peft": partial(_all, peft.step, batches),
        }
        times = interleaved(functions, setting.train_repeats, setting.device, warmup=0)
    shape = {
        "backbone": setting.encoder,
        "rows": kept.trainer.args.per_device_train_batch_size,
        "tokens": [batch["input_ids"].shape[1] for batch in batches],
        "timed_together": f"{len(batches)} steps",
    }
    name = "PEFT LoRA of one task, all layers"
    yield ratio(setting, "train_prefix_cache_vs_peft", times["kept"], times["peft"], name, "lower", **shape)
    yield ratio(setting, "train_without_prefix_cache_vs_peft", times["anew"], times["peft"], name, "lower", **shape)
    other = "frozen layers run in every step"
    yield ratio(setting, "train_prefix_cache_vs_none", times["kept"], times["anew"], other, "lower", **shape)


def _all(step: Callable[[dict[str, Tensor]], None], batches: Sequence[dict[str, Tensor]]) -> None:
    for batch in batches:
        step(batch)


def epochs(setting: Setting) -> Iterator[Row]:
    """An epoch with batches by length, relative to one with plainly shuffled batches; states of frozen layers kept."""
    with TemporaryDirectory() as folder:
        size = f"data.n_train={setting.epoch_rows}"
        grouped = Steps(setting.preset, Path(folder), [size, "data.group_by_length=true"])
        shuffled = Steps(setting.preset, Path(folder), [size, "data.group_by_length=false"])
        functions = {"grouped": grouped.epoch, "shuffled": shuffled.epoch}
        repeats = max(setting.train_repeats // 2, 2)
        times = interleaved(functions, repeats, setting.device, warmup=1)  # the first epoch fills the cache
        padded = [_positions(trained.batches()) for trained in (grouped, shuffled)]
        mixed = [_tasks_of_batches(trained.batches()) for trained in (grouped, shuffled)]
    details = {"backbone": setting.encoder, "rows": len(grouped.trainer.train_dataset), "positions": padded}
    details["mean_tasks_of_a_batch"] = [rounded(value) for value in mixed]
    other = "batches shuffled"
    yield ratio(setting, "epoch_bucketed_vs_shuffled", times["grouped"], times["shuffled"], other, "lower", **details)


def _positions(batches: Sequence[dict[str, Tensor]]) -> int:
    return sum(batch["input_ids"].numel() for batch in batches)


def _tasks_of_batches(batches: Sequence[dict[str, Tensor]]) -> float:
    return sum(len(batch["task_ids"].unique()) for batch in batches) / len(batches)


def options(setting: Setting) -> Iterator[Row]:
    """Time of steps with an option, relative to those without it; and compiled, which is no option."""
    with TemporaryDirectory() as folder:
        base = {"prefix_cache": "memory"}
        for name, (with_it, without) in OPTIONS.items():
            ours, other = (Steps(setting.preset, Path(folder), **base, **chosen) for chosen in (with_it, without))
            yield _compared(setting, f"option_{name}", ours, other)
        compiled, other = (Steps(setting.preset, Path(folder), **base) for _ in range(2))
        started = time.perf_counter()
        _compile(compiled.model)
        _all(compiled.step, compiled.batches()[1:3])  # two lengths, after which it is compiled for all
        seconds = rounded(time.perf_counter() - started)
        yield _compared(setting, "compile_vs_eager", compiled, other, seconds_to_compile=seconds)


def _compared(setting: Setting, figure: str, ours: Steps, other: Steps, **details: Any) -> Row:
    by_length = sorted(ours.batches(), key=lambda batch: batch["input_ids"].shape[1])
    batches = by_length[len(by_length) // 2 :][:3]
    functions = {"with": partial(_all, ours.step, batches), "without": partial(_all, other.step, batches)}
    times = interleaved(functions, setting.train_repeats, setting.device, warmup=1)
    shape = {"backbone": setting.encoder, "tokens": [batch["input_ids"].shape[1] for batch in batches]}
    shape["timed_together"] = f"{len(batches)} steps"
    return ratio(setting, figure, times["with"], times["without"], "without it", "lower", **shape, **details)


def _compile(model: HyperAdapterModel) -> None:
    """Compile what lies between the adapters: these read a state that differs from batch to batch."""
    backbone: Any = model.backbone
    for layer in backbone.encoder.layer[model.adapter_config.feature_layer :]:
        layer.attention.compile(dynamic=True)
        layer.intermediate.compile(dynamic=True)


def growth(setting: Setting) -> Iterator[Row]:
    """Exponents of the time of a training step against the tasks, rows and tokens of its batch."""
    model = make_model(setting, setting.encoder, 64).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for place, (name, sizes) in zip((2, 0, 1), SIZES.items(), strict=True):
        functions = {str(size): partial(_step, model, optimizer, setting, size) for size in sizes}
        times = interleaved(functions, max(setting.train_repeats // 2, 2), setting.device, warmup=1)
        grown, found = [size[place] for size in sizes], [times[str(size)].ms for size in sizes]
        details = {
            "points": [[size, rounded(time)] for size, time in zip(grown, found, strict=True)],
            "rows_tokens_tasks": [list(size) for size in sizes],
            "backbone": setting.encoder,
        }
        yield row(setting, f"exponent_train_{name}", exponent(grown, found), "lower", **details)


def _step(
    model: HyperAdapterModel, optimizer: torch.optim.Optimizer, setting: Setting, size: tuple[int, int, int]
) -> None:
    rows, tokens, tasks = size
    task_ids = make_task_ids(setting, rows, tasks)
    labels = torch.zeros(rows, device=setting.device)
    model(**make_batch(setting, rows, tokens), task_ids=task_ids, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def memory(setting: Setting) -> Iterator[Row]:
    """Peak memory saved by generating once a task, in units of the weights that generating per row would write.

    The per-row side is the same model with a task for each row of the batch.
    """
    tasks, rows = 8, PER_ROW["rows"]
    ours, per_row = (in_fresh_process("train", "t5-base", number, *PER_ROW.values()) for number in (tasks, rows))
    saved = per_row["peak_mb"] - ours["peak_mb"]
    details = {
        "backbone": "t5-base",
        "tasks": tasks,
        **PER_ROW,
        "peak_mb": rounded(ours["peak_mb"]),
        "per_row_peak_mb": rounded(per_row["peak_mb"]),
        "per_row_weights_mb": rounded(per_row["weights_mb"]),
    }
    yield row(setting, "per_row_memory_saved", saved / per_row["weights_mb"], "higher", **details)
