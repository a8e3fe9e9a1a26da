"""Recipes, which describe training runs in YAML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from hyperadapters.config.catalogue import expand
from hyperadapters.config.model import GENERATING, RETRIEVING, ROUTING, Dtype, Lengths, ModelConfig
from hyperadapters.config.sources import TaskEntry
from hyperadapters.config.sweep import SweepConfig
from hyperadapters.config.tasks import Task, check_task_names
from hyperadapters.config.validation import Float, Int, StrictModel, parse
from hyperadapters.errors import RecipeError, did_you_mean, shown
from hyperadapters.utils.reading import is_file, is_folder

DEFAULT_BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"
"""Backbone where none is named."""
RECIPE_FILE = "resolved_recipe.yaml"
METRICS_FILE = "metrics.json"
"""Names of the files with the recipe and the scores in the folder of a run."""


def _is_set(config: StrictModel, name: str) -> bool:
    """Return whether a setting has a value other than its default."""
    return bool(getattr(config, name) != type(config).model_fields[name].default)


class DataConfig(StrictModel):
    """Size of the training data, sampling of batches, and maximum lengths of texts.

    At most one of `n_train`, `fraction` and `k_per_label` is allowed. The subset of the training rows is stratified and
    drawn with the seed of the recipe. A smaller subset is part of a larger one. With `n_train` and `fraction` a
    classification task keeps at least two rows of each label.

    Attributes:
        n_train: Number of training rows of each task. Default: all rows.
        fraction: Fraction of the training rows of each task.
        k_per_label: Number of training rows of each label, or of each task that has no labels.
        n_validation: Maximum number of validation rows of each task. Default: all rows.
        sampling: Probability of a task in a batch: "proportional" (default) to its number of rows, as in the released
            code; by "temperature", proportional to rows ** (1 / temperature); or "balanced", equal for all tasks.
        temperature: Temperature of the sampling. Default: 10.
        group_by_length: If True (default), a batch consists of rows of similar length, which reduces padding (see
            `data.sampling.MixedTaskBatchSampler`).
        max_length: Maximum number of tokens of an input; longer ones are truncated. Default: 128.
        max_target_length: Maximum number of tokens of a target text and of a generated text. Default: 32.
        on_bad_row: What is done with a row that cannot be read (see `data.bad_rows`): "error" (default) or "skip".
        report_texts: Maximum number of evaluated rows whose texts and instance vectors are kept in the folder of the
            run for `hyperadapters report`; 0 for none. Default: 1000.
    """

    n_train: Int | None = Field(None, ge=1)
    fraction: Float | None = Field(None, gt=0, le=1)
    k_per_label: Int | None = Field(None, ge=1)
    n_validation: Int | None = Field(None, ge=1)
    sampling: Literal["proportional", "temperature", "balanced"] = "proportional"
    temperature: Float = Field(10.0, ge=1)
    group_by_length: bool = True
    max_length: Int = Field(128, ge=4)
    max_target_length: Int = Field(32, ge=2)
    on_bad_row: Literal["error", "skip"] = "error"
    report_texts: Int = Field(1000, ge=0)

    @property
    def lengths(self) -> Lengths:
        """Maximum lengths of texts."""
        return Lengths(input=self.max_length, target=self.max_target_length)

    @model_validator(mode="after")
    def _check_one_size(self) -> Self:
        given = [name for name in ("n_train", "fraction", "k_per_label") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"expected at most one of n_train, fraction, k_per_label; found {given}")
        if self.sampling != "temperature" and _is_set(self, "temperature"):
            raise ValueError(f"temperature is only for sampling 'temperature', found '{self.sampling}'; remove it")
        return self


class TrainingConfig(StrictModel):
    """Settings of training, with the names of `transformers.TrainingArguments` where it has the same setting.

    Exactly one of `max_steps` and `num_train_epochs` is required.

    Attributes:
        max_steps: Number of training steps.
        num_train_epochs: Number of epochs.
        batch_size: Number of rows in a batch, which several processes divide among them, before gradient accumulation.
            Default: 32.
        auto_batch: Whether to halve the batch size and start anew while a batch needs more memory than there is, with
            `accelerate.utils.find_executable_batch_size`. Only for one process. Default: False.
        eval_batch_size: Number of rows in a batch of an evaluation. Default: 64.
        gradient_accumulation_steps: Number of batches in a training step. Default: 1.
        learning_rate: Learning rate of all parameters without a rate of their own. Default: 1e-3 with a common
            adapter, and 3e-4 otherwise.
        head_learning_rate: Learning rate of the task heads. Default: 1e-2 for heads that read normalised features, such
            as those of preset "plus", and `learning_rate` otherwise.
        retriever_learning_rate: Learning rate of the retriever, which receives gradients only from the contrastive
            losses with method "pha", and of the prototypes if there is a common adapter. Default: 3e-3 with a common
            adapter, and `learning_rate` otherwise.
        hypernetwork_learning_rate: Learning rate of the hypernetwork without its common adapter. Default: 5e-5
            with a common adapter, and `learning_rate` otherwise.
        weight_decay: Weight decay. Default: 0.
        warmup_steps: Number of warm-up steps of the linear schedule. A common adapter and the rest of its hypernetwork,
            which are trained in one half of the steps each, have half as many. Default: 0.
        max_grad_norm: Norm to which gradients are clipped. Default: 1.
        label_smoothing: Label smoothing of the task loss in [0, 1). Default: 0.
        reduction: Reduction of the task loss over tokens of a generated text or rows of a head, "mean" (default) or
            "sum".
        eval_steps: Number of steps between evaluations on the validation rows. The checkpoint with the best mean score
            is kept. Default: 500.
        false_decline_rate: Fraction of the inputs of a task that may be declined in routing, which determines the
            similarity threshold (see `inference.routing`). Default: 0.05.
        early_stopping_patience: Number of evaluations without improvement after which training stops. A model with a
            common adapter that stops in the first half of the steps has no generated part. Default: never.
        skip_nonfinite: Number of training steps that may be skipped because their loss or gradients are not finite;
            one more ends the training. Default: 0.
        contrast_batch: Rows that the instance contrast compares with gradient accumulation: those of a "micro-batch"
            (default), or those of the whole "step", for which instance vectors are computed twice.
        logging_steps: Number of steps between log entries. Default: 50.
        bf16: Whether to train with mixed precision in bfloat16. Default: False.
        fp16: Whether to train with mixed precision in float16. Default: False.
        gradient_checkpointing: Whether to recompute activations in the backward pass to save memory. Default: False.
        prefix_cache: Storage of the hidden states of the frozen layers below all trained ones, which then run only once
            for each row: "memory"; "file" in the folder of the run during training; "none"; or "auto" (default) for
            memory up to `prefix_cache_gb`, otherwise a file if it takes less than half of the free disk space,
            otherwise none.
        prefix_cache_dtype: Data type of the stored hidden states. "float16" halves their size and rounds them. Default:
            "float32".
        prefix_cache_gb: Maximum memory for "auto" in GiB. Default: 4.
        shard_backbone: Whether several processes divide the weights of the backbone's layers among them (FSDP2)
            instead of each having all of them. States of frozen layers are then not stored, as with `prefix_cache:
            none`. It has no effect on one process. Default: False.
        optimizer: Optimizer, as `optim` of `transformers.TrainingArguments`. Default: "adamw_torch_fused".
        attention: Attention implementation of the backbone in training, as in transformers. Default: the choice of
            transformers.
        report_to: Integrations to report to, such as "tensorboard", "wandb" and "trackio". Default: none.
    """

    max_steps: Int | None = Field(None, ge=1)
    num_train_epochs: Float | None = Field(None, gt=0)
    batch_size: Int = Field(32, ge=1)
    auto_batch: bool = False
    eval_batch_size: Int = Field(64, ge=1)
    gradient_accumulation_steps: Int = Field(1, ge=1)
    learning_rate: Float | None = Field(None, gt=0)
    head_learning_rate: Float | None = Field(None, gt=0)
    retriever_learning_rate: Float | None = Field(None, gt=0)
    hypernetwork_learning_rate: Float | None = Field(None, gt=0)
    weight_decay: Float = Field(0.0, ge=0)
    warmup_steps: Int = Field(0, ge=0)
    max_grad_norm: Float = Field(1.0, gt=0)
    label_smoothing: Float = Field(0.0, ge=0, lt=1)
    reduction: Literal["mean", "sum"] = "mean"
    eval_steps: Int = Field(500, ge=1)
    false_decline_rate: Float = Field(0.05, ge=0, lt=1)
    early_stopping_patience: Int | None = Field(None, ge=1)
    skip_nonfinite: Int = Field(0, ge=0)
    contrast_batch: Literal["micro-batch", "step"] = "micro-batch"
    logging_steps: Int = Field(50, ge=1)
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    prefix_cache: Literal["auto", "memory", "file", "none"] = "auto"
    prefix_cache_dtype: Literal["float32", "float16"] = "float32"
    prefix_cache_gb: Float = Field(4.0, ge=0)
    shard_backbone: bool = False
    optimizer: Literal["adamw_torch", "adamw_torch_fused"] = "adamw_torch_fused"
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    report_to: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("expected exactly one of max_steps, num_train_epochs")
        return self

    @model_validator(mode="after")
    def _check_prefix_cache(self) -> Self:
        if self.prefix_cache != "auto" and _is_set(self, "prefix_cache_gb"):
            raise ValueError(f"prefix_cache_gb is only for prefix_cache 'auto', found '{self.prefix_cache}'; remove it")
        if self.prefix_cache == "none" and _is_set(self, "prefix_cache_dtype"):
            raise ValueError("prefix_cache_dtype has no effect with prefix_cache 'none'; remove it")
        if self.shard_backbone and self.prefix_cache not in ("auto", "none"):
            raise ValueError(
                f"prefix_cache: expected 'auto' or 'none' with shard_backbone, found '{self.prefix_cache}'; processes "
                "that find stored states would not run the frozen layers, which all of them must run together"
            )
        return self


class Recipe(StrictModel):
    """Description of a training run.

    Attributes:
        backbone: Name of the backbone on the Hub, or its folder, relative to the recipe if it exists there.
        backbone_dtype: Data type of the backbone's weights. Trained weights are always in float32. Default: the data
            type of the backbone's files.
        seed: Seed of subsets, held-out splits, sampling, initial weights and dropout. Default: 0.
        model: Settings of the model.
        data: Settings of the data.
        training: Settings of training.
        tasks: Tasks with their sources.
        sweep: Settings that `hyperadapters sweep` tries instead of those of the recipe.
        described_tasks: Classification tasks of single texts without rows, which are added after the training from the
            descriptions or names of their labels (see `fewshot.add_task`). Default: none.
    """

    backbone: str
    backbone_dtype: Dtype | None = None
    seed: Int = Field(0, ge=0, lt=2**32)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig
    tasks: tuple[TaskEntry, ...]
    sweep: SweepConfig | None = None
    described_tasks: tuple[Task, ...] = ()

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        check_task_names(self.tasks)
        check_task_names((*self.tasks, *self.described_tasks))
        for task in self.described_tasks:
            if task.kind != "classification" or not task.label_texts:
                raise ValueError(
                    f"described_tasks: '{task.name}': expected a classification task of single texts with labels whose "
                    "names or descriptions have letters; correct it, or give it a source and move it to tasks"
                )
        return self

    @model_validator(mode="after")
    def _check_training_fits_the_model(self) -> Self:
        method, training = self.model.method, self.training
        if method not in RETRIEVING and _is_set(training, "retriever_learning_rate"):
            raise ValueError(f"training.retriever_learning_rate: method '{method}' has no retriever; remove it")
        if method not in GENERATING and _is_set(training, "hypernetwork_learning_rate"):
            raise ValueError(f"training.hypernetwork_learning_rate: method '{method}' has no hypernetwork; remove it")
        if method not in ROUTING and _is_set(training, "false_decline_rate"):
            raise ValueError(f"training.false_decline_rate: method '{method}' cannot route; remove it")
        if self.model.preset == "official" and _is_set(training, "optimizer"):
            raise ValueError("training.optimizer: preset 'official' uses the released code's optimizer; remove it")
        return self


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Load a recipe from a YAML file.

    A recipe may name another recipe in `extends`, whose settings it replaces or extends. Relative paths are relative to
    the file that contains them.

    Args:
        path: Path of the file.
        overrides: Settings that replace those of the file, each in the form "key.of.setting=value" with a value in
            YAML. Default: none.

    Returns:
        The recipe.

    Raises:
        RecipeError: If a file is missing, is not YAML in UTF-8, or does not describe a recipe.
    """
    values = _read_yaml(Path(path), ())
    for override in overrides:
        _override(values, override)
    return parse(Recipe, values, RecipeError, str(path))


def _read_yaml(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    import yaml

    from hyperadapters.config.reading import MAX_CHARACTERS, load_yaml

    try:
        path = Path(os.path.realpath(path))  # `Path.resolve` raises RuntimeError for some links
        if path in chain:
            raise RecipeError(f"{path}: extends itself through {' -> '.join(map(str, chain))}; remove one extends")
        with path.open(encoding="utf-8") as file:
            values = load_yaml(file.read(MAX_CHARACTERS + 1))
    except FileNotFoundError:
        nearby = [str(other) for other in path.parent.glob("*.yaml")] if is_folder(path.parent) else []
        raise RecipeError(f"{path}: no such recipe.{did_you_mean(str(path), nearby)}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: expected a recipe, found a folder; a run has its recipe in recipe.yaml") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not a readable UTF-8 YAML file: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected keys and values, found {type(values).__name__}")
    resolve_paths(values, path.parent)
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise RecipeError(f"{path}: extends must name a recipe file; found {shown(base)}")
    if os.path.exists(path.parent / base) and not is_file(path.parent / base):  # a pipe might never end
        raise RecipeError(f"{path}: extends must name a recipe file; found '{base}', which is no file")
    return _merge(_read_yaml(path.parent / base, (*chain, path)), values)


def resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Replace the relative paths in the values of a recipe by absolute paths, in place.

    Args:
        values: Values of the recipe.
        folder: Folder to which the paths are relative.
    """
    if isinstance(backbone := values.get("backbone"), str):
        values["backbone"] = _name_or_path(backbone, folder)
    tasks = values.get("tasks")
    if isinstance(tasks, list):
        tasks = values["tasks"] = [expand(task) if isinstance(task, dict) else task for task in tasks]
    for task in tasks if isinstance(tasks, list) else ():
        source = task.get("source") if isinstance(task, dict) else None
        if not isinstance(source, dict):
            continue
        if isinstance(source.get("path"), str):
            source["path"] = str(folder / source["path"])
        elif isinstance(source.get("path"), dict):
            source["path"] = {
                split: str(folder / file) if isinstance(file, str) else file for split, file in source["path"].items()
            }
        if isinstance(source.get("dataset"), str):
            source["dataset"] = _name_or_path(source["dataset"], folder)


def _name_or_path(name: str, folder: Path) -> str:
    """Return a name on the Hub unchanged, and a path, which starts with a dot or exists, as an absolute path."""
    is_path = name.startswith(".") or (bool(name) and os.path.isdir(folder / name))
    try:
        return os.path.realpath(folder / name) if is_path else name
    except ValueError:  # a null character: no folder has this name, which is reported when it is loaded
        return name


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _override(values: dict[str, Any], override: str) -> None:
    import yaml

    from hyperadapters.config.reading import load_yaml

    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"override '{override}': expected key.of.setting=value")
    *parents, last = key.strip().split(".")
    for parent in parents:
        nested = values.setdefault(parent, {})
        if not isinstance(nested, dict):
            raise RecipeError(f"override '{override}': '{parent}' has a value and no settings below it")
        values = nested
    try:
        values[last] = load_yaml(text)
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"override '{override}': the value is not YAML: {error}") from None
