"""A training run that reads a recipe and writes its results to a folder."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from torch import nn
from transformers import set_seed

from hyperadapters.backbones.loading import load_backbone
from hyperadapters.checkpoints.card import scores_in
from hyperadapters.checkpoints.details_file import DETAILS_FILE
from hyperadapters.checkpoints.format import is_checkpoint, remove_checkpoint
from hyperadapters.config import METRICS_FILE, RECIPE_FILE, Recipe, Split, TrainingConfig, load_recipe, resolve_paths
from hyperadapters.config.model import Dtype, ModuleNames
from hyperadapters.config.reading import load_yaml
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.data.loading import load_task, load_tasks
from hyperadapters.data.stored_rows import joined
from hyperadapters.errors import CheckpointError, DataError, OutputError, RecipeError
from hyperadapters.inference.batches import best_device
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.arguments import NAMED_AS_IN_RECIPES, TrainingArguments, settings_without_effect
from hyperadapters.training.details import details_of
from hyperadapters.training.evaluation import Evaluation, evaluate
from hyperadapters.training.interruption import Interruption
from hyperadapters.training.metrics import check_packages
from hyperadapters.training.prefix_cache import FrozenPrefix
from hyperadapters.training.sharding import num_processes, process_index, wait_for_all
from hyperadapters.training.states import last_checkpoint, trainer_checkpoints
from hyperadapters.training.trainer import Trainer
from hyperadapters.training.views import View
from hyperadapters.training.wandb_run import own_wandb_run
from hyperadapters.utils.files import check_folder, locked, making_folder, write_atomically

LOGS_FOLDER = "runs"
"""Name of the folder to which `transformers.Trainer` writes logs."""


@dataclass(frozen=True)
class Run:
    """Results of a finished training run.

    Attributes:
        model: Trained model.
        tasks: Tasks and their examples.
        evaluations: Scores of each split that has rows.
        metrics: Contents of `metrics.json`.
    """

    model: HyperAdapterModel
    tasks: list[TaskData]
    evaluations: dict[Split, Evaluation]
    metrics: dict[str, Any]


def train(
    recipe: Recipe, output: str | Path, resume: bool = False, overwrite: bool = False, progress: View = "auto"
) -> Run:
    """Train a model, evaluate its best state on the validation and test rows, and write the results to a folder.

    If several processes call this function together (see docs/scaling.md), the first of them writes all files.

    The folder contains the checkpoint and its model card, `metrics.json`, `details.json` for reports (see
    `checkpoints.details_file`), `resolved_recipe.yaml` and the logs that the recipe specifies. Until the run ends it
    also contains the checkpoints of `transformers.Trainer`. At the end, routing is calibrated if the method can route
    (see `inference.routing.calibrate`). The recipe, the data and the backbone are checked before any file is written.
    For a resumed run, `seconds` in the metrics is the time since it was resumed.

    Args:
        recipe: Recipe of the run.
        output: Folder to write to.
        resume: Whether to continue from the last complete checkpoint in the folder, or from the beginning if there is
            none. Default: False.
        overwrite: Whether to remove the files of an earlier run from the folder. Default: False.
        progress: What is shown during the training; see `TrainingArguments`. Default: "auto".

    Returns:
        Model, data and scores of the run.

    Raises:
        RecipeError: If the recipe has a section `sweep`.
        OutputError: If the folder contains a run and neither `resume` nor `overwrite` is True, or if it contains other
            files.
        InterruptionError: If the process gets SIGINT or SIGTERM. The state is saved, and the run can be resumed.
        OutOfMemoryError: If a batch needs more memory than the device has.
        NotFiniteError: If training diverges, or an output of the trained model is not finite. The run is then not
            finished: there is no `metrics.json` and no checkpoint of its result.
        HyperAdaptersError: If the recipe, the data or the backbone are invalid.
    """
    if recipe.sweep is not None:
        raise RecipeError("sweep: is for `hyperadapters sweep`; use that command, or remove this section")
    output = Path(output)
    is_writer = PartialState(**({} if torch.accelerator.is_available() else {"cpu": True})).is_main_process
    if is_writer:
        check_output(output, resume, overwrite)
        if resume:
            _check_same_recipe(recipe, output)
    wait_for_all()
    tasks = load_tasks(recipe.tasks, recipe.data, recipe.seed)
    set_seed(recipe.seed)
    model = model_of(recipe, tasks, load_backbone)
    train_rows, validation_rows = rows_by_task(tasks, "train"), rows_by_task(tasks, "validation")
    arguments = training_arguments(recipe, output, progress)
    check_settings(recipe, arguments, model, bool(validation_rows))

    started = time.monotonic()
    interruption = Interruption()
    with ExitStack() as stack:
        with making_folder(output) if is_writer else nullcontext():
            if is_writer:
                stack.enter_context(locked(output, wait=False))
            trainer = Trainer(model, train_rows, validation_rows, arguments, [interruption])  # also checks the labels
            if is_writer:
                if overwrite:
                    remove_run(output)
                write_atomically(output / RECIPE_FILE, recipe_text(recipe).encode())
        wait_for_all()
        with interruption.watching(), own_wandb_run(recipe.training.report_to):
            trainer.train(resume_from_checkpoint=last_checkpoint(output) if resume else None)
        if interruption.signal is not None:
            raise interruption.error(trainer.state.global_step, output)
        return _finished(recipe, model, tasks, trainer, output, time.monotonic() - started)


def model_of(
    recipe: Recipe,
    tasks: Sequence[TaskData],
    load: Callable[[str, ModuleNames | None, Dtype | None], nn.Module],
) -> HyperAdapterModel:
    """Make the untrained model of a recipe.

    Args:
        recipe: The recipe.
        tasks: Its tasks with their examples.
        load: Function that returns the backbone by its name, the names of its modules and its data type.

    Returns:
        The model, with the attention of the recipe.

    Raises:
        RecipeError: If the attention of the recipe cannot be used.
        HyperAdaptersError: If the backbone is missing or not supported, or cannot have these tasks or settings.
    """
    model = HyperAdapterModel(
        load(recipe.backbone, recipe.model.modules, recipe.backbone_dtype),
        [data.task for data in tasks],
        recipe.model,
        backbone_name=recipe.backbone,
        lengths=recipe.data.lengths,
    )
    if recipe.training.attention is not None:
        _use_attention(model.backbone, recipe.training.attention)
    return model


def _finished(
    recipe: Recipe, model: HyperAdapterModel, tasks: list[TaskData], trainer: Trainer, output: Path, seconds: float
) -> Run:
    """Evaluate a trained model, add the described tasks to it, and write the results."""
    started = time.monotonic()
    prefixes: dict[Split, FrozenPrefix] = {}
    if trainer.validation_prefix is not None:
        prefixes["validation"] = trainer.validation_prefix
    evaluations = evaluate_splits(model, tasks, recipe.training.eval_batch_size, prefixes=prefixes)
    metrics = metrics_of(evaluations, model.num_trainable_parameters(), seconds)
    if skipped := {data.task.name: data.num_skipped for data in tasks if data.num_skipped}:
        metrics["skipped_rows"] = skipped
    durations = _durations(trainer, seconds, time.monotonic() - started)
    state, max_texts = trainer.state, recipe.data.report_texts
    details = details_of(model, tasks, evaluations, state.log_history, state.best_global_step, durations, max_texts)
    for task in recipe.described_tasks:
        model.add_task(task, seed=recipe.seed)
    if process_index() == 0:
        model.save_pretrained(output, scores=scores_in(metrics))
        write_atomically(output / RECIPE_FILE, recipe_text(recipe).encode())  # the folder may have been removed
        write_atomically(output / DETAILS_FILE, details.model_dump_json().encode())
        write_atomically(output / METRICS_FILE, (json.dumps(metrics, indent=2, allow_nan=False) + "\n").encode())
        _remove_checkpoints(output)
    wait_for_all()
    return Run(model, tasks, evaluations, metrics)


def _durations(trainer: Trainer, training: float, evaluation: float) -> dict[str, float]:
    """Return the duration of each part of a run in seconds."""
    steps = next(entry["train_runtime"] for entry in reversed(trainer.state.log_history) if "train_runtime" in entry)
    return {
        "training steps": steps - trainer.evaluation_seconds,
        "evaluations during training": trainer.evaluation_seconds,
        "heads and calibration": training - steps,
        "final evaluation": evaluation,
    }


def load_run(folder: Path) -> tuple[HyperAdapterModel, Recipe]:
    """Load the model and the recipe of a finished run.

    Args:
        folder: Folder of the run.

    Returns:
        The model, on an accelerator if there is one, and the recipe.

    Raises:
        CheckpointError: If the folder does not contain a finished run.
    """
    model = HyperAdapterModel.from_pretrained(folder)
    if not (folder / RECIPE_FILE).is_file():
        raise CheckpointError(
            f"{folder}: expected a file {RECIPE_FILE} beside the checkpoint, found none; was it made by `train`?"
        )
    return model.to(best_device()), load_recipe(folder / RECIPE_FILE)


def load_run_tasks(model: HyperAdapterModel, recipe: Recipe) -> list[TaskData]:
    """Read the data of a run again, for the tasks of the recipe that the model still has under the same names.

    Renamed tasks are omitted, and so are tasks that now have the former name of a renamed task.

    Args:
        model: Model of the run.
        recipe: Recipe of the run.

    Returns:
        Tasks and their examples.

    Raises:
        DataError: If the task that the recipe and the data describe differs from the task of the model, for example in
            its labels, or if the model has none of the tasks of the recipe.
    """
    changed = {*model.task_table.renamed, *model.task_table.renamed.values()}
    ids = {task.name: task_id for task_id, task in enumerate(model.tasks) if task.name not in changed}
    kept = [entry for entry in recipe.tasks if entry.name in ids]
    tasks = [load_task(entry, ids[entry.name], recipe.data, recipe.seed) for entry in kept]
    for data in tasks:
        if data.task != model.tasks[ids[data.task.name]]:
            raise DataError(
                f"task '{data.task.name}': the task described by the recipe and its data differs from that of the "
                "checkpoint"
            )
    if not tasks:
        raise DataError("the model has none of the tasks that its recipe describes")
    return tasks


def training_arguments(recipe: Recipe, folder: str | Path, progress: View = "auto") -> TrainingArguments:
    """Return the settings of a `Trainer` for a recipe.

    Args:
        recipe: Recipe whose `training`, `seed` and sampling of the data are used.
        folder: Folder for checkpoints and logs.
        progress: What is shown during the training; see `TrainingArguments`. Default: "auto".

    Raises:
        RecipeError: If the batch size is not a multiple of the number of processes, a logger is unknown, or the device
            does not support the floating-point type.
        MissingPackageError: If the package of a logger is not installed.
    """
    training, data = recipe.training, recipe.data
    rows = rows_of_process(training, num_processes())
    try:
        return TrainingArguments(
            output_dir=str(folder),
            max_steps=training.max_steps or -1,
            num_train_epochs=training.num_train_epochs or 1.0,
            per_device_train_batch_size=rows,
            auto_find_batch_size=training.auto_batch,
            per_device_eval_batch_size=training.eval_batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            weight_decay=training.weight_decay,
            warmup_steps=training.warmup_steps,
            max_grad_norm=training.max_grad_norm,
            label_smoothing_factor=training.label_smoothing,
            eval_steps=training.eval_steps,
            save_strategy="steps",
            save_steps=training.eval_steps,
            logging_steps=training.logging_steps,
            report_to=list(training.report_to) or "none",
            seed=recipe.seed,
            bf16=training.bf16,
            fp16=training.fp16,
            optim=training.optimizer,
            activation_checkpointing=training.gradient_checkpointing,
            sampling=data.sampling,
            sampling_temperature=data.temperature,
            group_by_length=data.group_by_length,
            progress=progress,
            **{name: getattr(training, name) for name in NAMED_AS_IN_RECIPES},
        )
    except (ValueError, RuntimeError) as error:
        raise RecipeError(f"training: {error}") from error


def rows_of_process(training: TrainingConfig, processes: int) -> int:
    """Return the number of rows that each process has of a batch.

    Args:
        training: Settings of the training.
        processes: Number of processes that train together.

    Raises:
        RecipeError: If the batch size is not a multiple of the number of processes, or is to be found automatically.
    """
    if training.auto_batch and processes > 1:
        raise RecipeError(
            "training.auto_batch: only for one process, because all of them need the same size; remove it"
        )
    if training.batch_size % processes:
        raise RecipeError(
            f"training.batch_size: expected a multiple of the number of processes, which divide each batch; found "
            f"{training.batch_size} for {processes} processes"
        )
    return training.batch_size // processes


def rows_by_task(tasks: Sequence[TaskData], split: Split) -> dict[str, Sequence[Example]]:
    """Return the examples of one split by the name of their task. Tasks without examples are omitted.

    Args:
        tasks: Tasks and their examples.
        split: Name of the split.
    """
    return {data.task.name: data.splits[split] for data in tasks if data.splits.get(split)}


def examples_of(tasks: Sequence[TaskData], split: Split) -> Sequence[Example]:
    """Return the examples of all tasks in one split, ordered by task.

    Args:
        tasks: Tasks and their examples.
        split: Name of the split.
    """
    return joined(data.splits.get(split, []) for data in tasks)


def evaluate_splits(
    model: HyperAdapterModel,
    tasks: Sequence[TaskData],
    batch_size: int,
    splits: Sequence[Split] = ("validation", "test"),
    prefixes: Mapping[Split, FrozenPrefix] | None = None,
) -> dict[Split, Evaluation]:
    """Evaluate a model on each split that has rows.

    Args:
        model: Model to evaluate.
        tasks: Tasks and their examples.
        batch_size: Number of rows in a batch.
        splits: Names of the splits. Default: validation and test.
        prefixes: States of frozen layers by split, if they have been computed before.

    Returns:
        Scores by split.
    """
    found = {split: examples_of(tasks, split) for split in splits}
    prefixes = prefixes or {}
    return {split: evaluate(model, rows, batch_size, prefixes.get(split)) for split, rows in found.items() if rows}


def metrics_of(evaluations: dict[Split, Evaluation], trainable_parameters: int, seconds: float) -> dict[str, Any]:
    """Return the contents of `metrics.json`.

    Args:
        evaluations: Scores by split. The routing accuracy is that of the last split, usually test.
        trainable_parameters: Number of trained parameters.
        seconds: Duration of the training in seconds.
    """
    names = dict.fromkeys(name for result in evaluations.values() for name in result.tasks)
    last = list(evaluations.values())[-1:]
    return {
        "tasks": {
            name: {split: result.tasks[name] for split, result in evaluations.items() if name in result.tasks}
            for name in names
        },
        "calibration": {
            name: {
                split: asdict(found) for split, result in evaluations.items() if (found := result.calibration.get(name))
            }
            for name in dict.fromkeys(name for result in evaluations.values() for name in result.calibration)
        },
        "mean": {split: result.mean for split, result in evaluations.items()},
        "routing_accuracy": last[0].routing_accuracy if last else None,
        "trainable_parameters": trainable_parameters,
        "seconds": round(seconds, 1),
    }


def check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Check that a run may be written to a folder.

    Args:
        output: The folder.
        resume: Whether a run in the folder is to be resumed.
        overwrite: Whether a run in the folder is to be removed.

    Raises:
        OutputError: If both are True, the folder contains a run and neither is True, there is no unfinished run to
            resume, or the folder contains other files.
    """
    if resume and overwrite:
        raise OutputError("--resume and --overwrite exclude each other: one continues a run, the other removes it")
    check_folder(output)
    holds_run = is_run(output)
    if output.is_dir() and any(output.iterdir()) and not holds_run:
        raise OutputError(f"{output}: expected an empty or new folder, or the folder of a run; found other files in it")
    if holds_run and not (resume or overwrite):
        raise OutputError(
            f"{output}: already contains a run; use --overwrite to replace it, or train --resume to continue it"
        )
    if resume and not holds_run:
        raise OutputError(f"{output}: nothing to resume: there is no run in it")
    if resume and (output / METRICS_FILE).is_file():
        raise OutputError(f"{output}: nothing to resume: the run has finished; use --overwrite to replace it")


def is_run(folder: Path) -> bool:
    """Return whether a folder contains a run, finished or not.

    Args:
        folder: The folder.
    """
    return is_checkpoint(folder) or (folder / RECIPE_FILE).is_file()


def remove_run(folder: Path) -> None:
    """Remove the files of a run, including its logs. Other files in the folder are kept.

    Args:
        folder: Folder of the run.
    """
    _remove_checkpoints(folder)
    shutil.rmtree(folder / LOGS_FOLDER, ignore_errors=True)
    remove_checkpoint(folder)
    for name in (METRICS_FILE, DETAILS_FILE, RECIPE_FILE):
        (folder / name).unlink(missing_ok=True)


def _remove_checkpoints(folder: Path) -> None:
    for path in trainer_checkpoints(folder):
        shutil.rmtree(path, ignore_errors=True)


def _check_same_recipe(recipe: Recipe, output: Path) -> None:
    path = output / RECIPE_FILE
    now = load_yaml(recipe_text(recipe))
    try:
        before = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise OutputError(f"{path}: cannot be read: {error}; restore it, or use --overwrite") from None
    if not isinstance(before, dict):
        raise OutputError(f"{path}: expected a recipe, found {type(before).__name__}; restore it, or use --overwrite")
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise OutputError(
            f"{output}: the run was started with another recipe, which differs in {', '.join(changed)}; "
            "resume it with the same recipe, or use --overwrite"
        )


def recipe_text(recipe: Recipe) -> str:
    """Return a recipe in YAML, with absolute paths and without settings that have their defaults.

    Args:
        recipe: The recipe.
    """
    values = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    for task, entry in zip(values["tasks"], recipe.tasks, strict=True):
        if entry.catalogue is not None:  # a default may differ from the value in the catalogue
            task |= entry.model_dump(mode="json", by_alias=True)
    if "model" in values:  # a default may differ from the value of the preset
        values["model"] = recipe.model.model_dump(mode="json", exclude_unset=True)
    resolve_paths(values, Path.cwd())
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def check_settings(
    recipe: Recipe, arguments: TrainingArguments, model: HyperAdapterModel, has_validation: bool
) -> None:
    """Check that the settings of a recipe have an effect on its backbone and data.

    Args:
        recipe: The recipe.
        arguments: Settings of the `Trainer` for the recipe.
        model: Model of the recipe.
        has_validation: Whether there are validation rows.

    Raises:
        RecipeError: If a setting has no effect, or the model cannot have tasks without examples.
        MissingPackageError: If the package of a metric is not installed.
    """
    if recipe.described_tasks and not (model.adapter_config.separates_texts and model.method.can_change_tasks):
        raise RecipeError(
            "described_tasks: expected method 'pha' and head_inputs 'adapted_texts', as the preset 'plus' has them; "
            "remove described_tasks, or change model"
        )
    useless = [
        (f"training.{name}", reason) for name, reason in settings_without_effect(arguments, model, has_validation)
    ]
    if recipe.data.n_validation is not None and not has_validation:
        useless.append(("data.n_validation", "there are no validation rows"))
    check_packages(recipe.tasks)
    for setting, reason in useless:
        raise RecipeError(f"{setting}: has no effect, because {reason}; remove it")
    for task in (*recipe.tasks, *recipe.described_tasks):
        if not model.text_to_text and (unread := task.settings_of_texts()):
            raise RecipeError(
                f"task '{task.name}', {unread[0]}: is for backbones that generate their answers, and this one "
                "has task heads; remove it"
            )


def _use_attention(backbone: Any, name: str) -> None:
    """Select the attention implementation of a backbone.

    Args:
        backbone: The model.
        name: Name of the implementation in transformers.

    Raises:
        RecipeError: If it cannot be used with this backbone or on this machine.
    """
    try:
        backbone.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise RecipeError(f"training.attention: '{name}' cannot be used: {error}") from error
