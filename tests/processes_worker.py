"""What several processes compute, for comparison with one."""

from __future__ import annotations

import os
import random
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from helpers import tiny_backbone, tiny_language_model_tokenizer, tiny_tokenizer
from torch.distributed.tensor import DTensor

from hyperadapters import HyperAdapterModel, Task, Trainer, TrainingArguments, load_recipe, train
from hyperadapters.config import ModelConfig, parse

TASKS = [
    Task.classification("colour", ["blue", "red"]),
    Task.classification("mood", ["bad", "good"], fields=("text", "text_pair")),
    Task.regression("size"),
    Task.classification("rare", ["no", "yes"]),
]
TEXT_TASKS = [task for task in TASKS if task.kind == "classification" and len(task.fields) == 1]
ROWS = 6
GLOBAL_BATCH = 12
CASES: dict[str, dict[str, Any]] = {
    "plus": {"model": {"preset": "plus", "token_dropout": 0.0}},
    "plus-sum": {
        "model": {"preset": "plus", "token_dropout": 0.0},
        "arguments": {"reduction": "sum", "learning_rate": 1e-4},
    },
    "paper-accumulation": {"model": {"preset": "paper"}, "arguments": {"gradient_accumulation_steps": 2}},
    "contrast-of-step": {
        "model": {"preset": "paper"},
        "arguments": {"gradient_accumulation_steps": 2, "contrast_batch": "step"},
    },
    "skipped-step": {"model": {"preset": "paper"}, "arguments": {"skip_nonfinite": 1}, "broken_step": 5},
    "few-rows": {"model": {"preset": "paper"}, "batch": 6, "rows": 1},
    "hyperformer": {"model": {"preset": "paper", "method": "hyperformer"}},
    "t5": {"model": {"preset": "paper"}, "kind": "t5", "arguments": {"label_smoothing_factor": 0.1}},
    "t5-official": {"model": {"preset": "official"}, "kind": "t5"},
    "gpt2": {"model": {"preset": "paper"}, "kind": "gpt2"},
    "sharded-plus": {"model": {"preset": "plus", "token_dropout": 0.0}, "arguments": {"shard_backbone": True}},
    "sharded-t5": {
        "model": {"preset": "paper", "frozen_encoder_layers": 1},
        "kind": "t5",
        "arguments": {"shard_backbone": True, "gradient_accumulation_steps": 2},
    },
    "sharded-lora": {
        "model": {"preset": "paper", "form": "lora", "lora_rank": 2},
        "kind": "gpt2",
        "arguments": {"shard_backbone": True, "activation_checkpointing": True},
    },
}

RESUMED = "paper-accumulation"
LOGGED = ("loss", "grad", "eval", "skipped")
"""Parts of the names of logged values that are compared."""
STEPS, SAVED_STEP = 12, 6
SAVING = {"save_strategy": "steps", "save_steps": SAVED_STEP}


def cases_of(processes: int) -> list[str]:
    """All cases with two processes, and those that differ with more."""
    some = ["plus", "paper-accumulation", "contrast-of-step", "few-rows"]
    return [*CASES] if processes == 2 else some


def data(tasks: list[Task], rows: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Unequal numbers of rows of different lengths, so that processes have unequal parts and lack some tasks."""
    generator = random.Random(seed)

    def text(*words: str) -> str:
        return " ".join([*words, *(f"w{generator.randrange(40)}" for _ in range(generator.randrange(1, 9)))])

    found = {
        "colour": [{"text": text(word), "label": word} for word in ["blue", "red"] * (2 * rows + 1)],
        "mood": [{"text": text(), "text_pair": text(word), "label": word} for word in ["bad", "good"] * rows],
        "size": [{"text": text(*["yes"] * (row % 4)), "label": 10.0 * (row % 4)} for row in range(rows + 1)],
        "rare": [{"text": text(word), "label": word} for word in ["no", "yes"]],
    }
    return {task.name: found[task.name] for task in tasks}


def trained(case: str, processes: int, folder: Path, resume: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Train a model, and return its state, the log and its predictions."""
    options = CASES[case]
    kind, rows = options.get("kind", "bert"), options.get("rows", ROWS)
    tasks = TASKS if kind == "bert" else TEXT_TASKS
    torch.manual_seed(1)
    settings = {"prototype_dim": 8, "hidden_dim": 8, **options["model"]}
    if "form" not in settings:
        settings["adapter_dim"] = 4
    if kind == "bert":
        settings["feature_layer"] = 1
    model = HyperAdapterModel(tiny_backbone(kind), tasks, parse(ModelConfig, settings)).double()
    weight = weakref.ref(next(model.passes.layers[0].parameters()))
    model.tokenizer = tiny_language_model_tokenizer() if kind == "gpt2" else tiny_tokenizer()
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": STEPS,
            "eval_steps": SAVED_STEP,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "prefix_cache": "none",
            **options.get("arguments", {}),
            **changes,
        },
    )
    arguments.per_device_train_batch_size = options.get("batch", GLOBAL_BATCH) // processes
    trainer = Trainer(model, data(tasks, rows, 0), data(tasks, rows, 1), arguments)
    if "broken_step" in options:
        break_gradients(trainer, options["broken_step"])
    trainer.train(str(resume) if resume else None)
    found = trainer.predict(data(tasks, rows, 2))
    return {
        "state": {name: value.clone() for name, value in model.adapter_state_dict().items()},
        "log": [
            {name: value for name, value in row.items() if any(part in name for part in LOGGED)}
            for row in trainer.state.log_history
        ],
        "answers": [row.answer if row.probabilities is None else row.probabilities for row in found.predictions],
        "metrics": found.metrics,
        "held": [local(part).numel() for layer in model.passes.layers for part in layer.parameters()],
        "frees_whole_weights": weight() is None,
    }


def local(weight: torch.Tensor) -> torch.Tensor:
    """Return the part of a weight that this process holds."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def break_gradients(trainer: Trainer, step: int) -> None:
    """Make the gradients of a step infinite, but only in the last process."""

    def in_backward(gradient: torch.Tensor) -> torch.Tensor:
        is_last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        return gradient * torch.inf if is_last and trainer.state.global_step + 1 == step else gradient

    trainer.model.pha.prototypes.weight.register_hook(in_backward)


def train_together(
    rank: int, processes: int, port: int, target: Path, saved: Path, own: Path, recipe: Path, run: Path
) -> None:
    """Train all cases as one of several processes, the first of which writes the results.

    Args:
        rank: Number of this process.
        processes: Number of processes.
        port: Free port on which they meet.
        target: File of the results.
        saved: Folder with checkpoints of one process.
        own: Folder for checkpoints of these processes.
        recipe: Recipe that is trained as well.
        run: Folder for its result.
    """
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    AcceleratorState._reset_state(reset_partial_state=True)  # that of the process of which this one is a copy
    with tempfile.TemporaryDirectory() as folder:
        found = {case: trained(case, processes, Path(folder)) for case in cases_of(processes)}
        found["resumed"] = trained(RESUMED, processes, Path(folder), saved / f"checkpoint-{SAVED_STEP}")
        trained(RESUMED, processes, own, **SAVING)
        train(load_recipe(recipe), run)
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, {case: result["state"] for case, result in found.items()})
        if dist.get_rank() == 0:
            torch.save({"found": found, "states": states}, target)
        dist.barrier()
    dist.destroy_process_group()
