"""Recipes: a training run, read from YAML and never code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, Strict, field_validator, model_validator

from hyperadapters.config.model import RETRIEVING, Dtype, Lengths, ModelConfig
from hyperadapters.config.tasks import Task, check_task_names
from hyperadapters.config.validation import Float, Int, StrictModel, parse
from hyperadapters.errors import RecipeError, did_you_mean

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

RECIPE_FILE = "resolved_recipe.yaml"
METRICS_FILE = "metrics.json"
"""The recipe and the scores of a run, in its folder."""


def _is_set(config: StrictModel, name: str) -> bool:
    """Whether a setting has another value than its default."""
    return bool(getattr(config, name) != type(config).model_fields[name].default)


class HeldOut(StrictModel, populate_by_name=True):
    """A split taken out of another one: `size` rows of `from`, or that fraction of them when below 1."""

    from_split: Split = Field("train", alias="from")
    size: Int | Annotated[float, Strict()] = Field(gt=0, allow_inf_nan=False)

    @field_validator("size")
    @classmethod
    def _check_whole(cls, size: float) -> float:
        if size >= 1 and size != int(size):
            raise ValueError(f"expected a whole number of rows, or a share below 1; found {size}")
        return size


class Source(StrictModel):
    """Where the rows of a task are: files, a data set of the Hugging Face Hub, or the demo data of this package.

    Attributes:
        path: JSON-lines, CSV, TSV or Parquet: a name with `{split}` in it (all three files must be there, or be
            cut), one file for everything (then `cut` makes the splits), or a file for each split that there is.
            Relative paths are relative to the recipe.
        dataset: name of a Hub data set, or a folder that `datasets.load_dataset` reads.
        subset: its configuration name, for example "sst2" of "nyu-mll/glue".
        splits: its split for each of ours, for example `{train: train, test: validation_matched}`.
        demo: name of a task of the package's demo data.
        columns: column for each of text, text_pair and label, where they are named differently.
        label_names: replaces the labels found in the data, for example `{"0": negative, "1": positive}`.
        cut: splits that are cut out of others, with the recipe's seed.
        delimiter: character between the cells of CSV and TSV files; default: a comma, or a tab in a TSV file.
    """

    path: str | dict[Split, str] | None = None
    dataset: str | None = None
    subset: str | None = None
    splits: dict[Split, str] | None = None
    demo: str | None = None
    columns: dict[Literal["text", "text_pair", "label"], str] = {}
    label_names: dict[str, str] | None = None
    held_out: dict[Literal["validation", "test"], HeldOut] = {}
    delimiter: str | None = Field(None, min_length=1, max_length=1)

    @field_validator("label_names", mode="before")
    @classmethod
    def _name_as_in_data(cls, names: object) -> object:
        """YAML reads the keys 0 and true as what they are; the data are compared as texts."""
        if not isinstance(names, dict):
            return names
        return {str(key).lower() if isinstance(key, bool) else str(key): name for key, name in names.items()}

    @model_validator(mode="after")
    def _check_one_origin(self) -> Self:
        given = [name for name in ("path", "dataset", "demo") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of path, dataset, demo; found {given or 'none'}")
        if self.dataset is None and (self.subset is not None or self.splits is not None):
            raise ValueError("subset and splits belong to dataset, which is not given")
        paths = self.path.values() if isinstance(self.path, dict) else [self.path or ""]
        if self.delimiter is not None and not all(path.lower().endswith((".csv", ".tsv")) for path in paths):
            raise ValueError("delimiter belongs to a path that ends in .csv or .tsv, which is not given")
        if self.delimiter is not None and self.delimiter in '"\r\n':
            raise ValueError(f"delimiter must not be a quotation mark or a line end, found {self.delimiter!r}")
        return self


class TaskEntry(Task):
    """A task of a recipe: the task and its source."""

    source: Source

    @property
    def task(self) -> Task:
        """The task without its source."""
        return Task(**{name: getattr(self, name) for name in Task.model_fields})


class DataConfig(StrictModel):
    """How much of the data is used, and how batches are drawn.

    Attributes:
        n_train, fraction, k_per_label: at most one of them: rows a task, share of its rows, rows for each label
            (rows a task where there are no labels). Subsets are stratified, seeded and nested: the smaller one is
            part of the larger one. With n_train and fraction a classification task keeps two rows of each label.
        n_validation: at most so many validation rows a task.
        group_by_length: whether batches are made of rows of like length, so that little is padded (see
            `data.sampling.MixedTaskBatchSampler`).
        sampling: "proportional" to the number of rows (what the released code does), by "temperature"
            (rows ** (1 / temperature)), or "balanced" (all tasks alike).
        temperature: of the sampling.
        max_length: tokens of an input, longer ones are cut.
        max_target_length: tokens of a target text.
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

    @property
    def lengths(self) -> Lengths:
        """Where texts are cut."""
        return Lengths(input=self.max_length, target=self.max_target_length)

    @model_validator(mode="after")
    def _check_one_size(self) -> Self:
        given = [name for name in ("n_train", "fraction", "k_per_label") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"expected at most one of n_train, fraction, k_per_label; found {given}")
        if self.sampling != "temperature" and _is_set(self, "temperature"):
            raise ValueError(f"temperature: is for sampling 'temperature', found '{self.sampling}'; remove it")
        return self


class TrainingConfig(StrictModel):
    """The training run. Names are those of `transformers.TrainingArguments` where it has the setting.

    Attributes:
        max_steps, num_train_epochs: how long; exactly one of them.
        batch_size: rows of a step on each device (before accumulation).
        learning_rate: of the hypernetwork, prototypes and shared adapters.
        head_learning_rate: of the task heads; default: 1e-2 where they read directions, as those of the preset "plus"
            do, otherwise `learning_rate`.
        retriever_learning_rate: of the retriever, which with method "pha" only the contrastive losses reach; default:
            `learning_rate`.
        warmup_steps: of the linear schedule.
        label_smoothing: of the task loss.
        reduction: of the task loss over tokens (text-to-text) or rows (heads): "mean" or "sum".
        eval_steps: steps between evaluations on the validation rows; the checkpoint with the best mean is kept.
        false_decline_rate: share of a task's own inputs that may be declined when they are routed; sets the similarity
            below which an input is (see `inference.routing`).
        early_stopping_patience: evaluations without a better mean after which training stops.
        prefix_cache: where the hidden states of the frozen layers below everything trained are kept, so that these run
            once for each training row and validation row: "memory", "file" (in the run's folder while it trains),
            "none", or "auto": memory up to `prefix_cache_gb`, a file above that if it takes less than half of the free
            disk, else none.
        prefix_cache_dtype: in which they are kept; "float16" halves them, and rounds.
        prefix_cache_gb: GiB of memory that "auto" may take in all.
        optimizer: as `optim` of `transformers.TrainingArguments`.
        attention: implementation of the backbone's attention during training, as transformers names them; default: its
            own choice.
        report_to: any of "tensorboard", "wandb", "trackio" and what else transformers knows.
    """

    max_steps: Int | None = Field(None, ge=1)
    num_train_epochs: Float | None = Field(None, gt=0)
    batch_size: Int = Field(32, ge=1)
    eval_batch_size: Int = Field(64, ge=1)
    gradient_accumulation_steps: Int = Field(1, ge=1)
    learning_rate: Float = Field(3e-4, gt=0)
    head_learning_rate: Float | None = Field(None, gt=0)
    retriever_learning_rate: Float | None = Field(None, gt=0)
    weight_decay: Float = Field(0.0, ge=0)
    warmup_steps: Int = Field(0, ge=0)
    max_grad_norm: Float = Field(1.0, gt=0)
    label_smoothing: Float = Field(0.0, ge=0, lt=1)
    reduction: Literal["mean", "sum"] = "mean"
    eval_steps: Int = Field(500, ge=1)
    false_decline_rate: Float = Field(0.05, ge=0, lt=1)
    early_stopping_patience: Int | None = Field(None, ge=1)
    logging_steps: Int = Field(50, ge=1)
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    prefix_cache: Literal["auto", "memory", "file", "none"] = "auto"
    prefix_cache_dtype: Literal["float32", "float16"] = "float32"
    prefix_cache_gb: Float = Field(4.0, ge=0)
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
            raise ValueError(f"prefix_cache_gb: is for prefix_cache 'auto', found '{self.prefix_cache}'; remove it")
        if self.prefix_cache == "none" and _is_set(self, "prefix_cache_dtype"):
            raise ValueError("prefix_cache_dtype: with prefix_cache 'none' nothing is kept; remove it")
        return self


class Recipe(StrictModel):
    """A training run: backbone, tasks with their data, model and training settings.

    Attributes:
        backbone: name on the Hub, or a folder; a relative path is looked for beside the recipe first.
        backbone_dtype: of the backbone's weights; default: that of its files. What is trained is in float32.
        seed: of subsets, cuts, sampling, initial weights and dropout.
    """

    backbone: str
    backbone_dtype: Dtype | None = None
    seed: Int = Field(0, ge=0, lt=2**32)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig
    tasks: tuple[TaskEntry, ...]

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        check_task_names(self.tasks)
        return self

    @model_validator(mode="after")
    def _check_training_fits_the_model(self) -> Self:
        method, training = self.model.method, self.training
        if method not in RETRIEVING and _is_set(training, "retriever_learning_rate"):
            raise ValueError(f"training.retriever_learning_rate: method '{method}' has no retriever; remove it")
        if method != "pha" and _is_set(training, "false_decline_rate"):
            raise ValueError(f"training.false_decline_rate: method '{method}' cannot route; remove it")
        if self.model.preset == "official" and _is_set(training, "optimizer"):
            raise ValueError("training.optimizer: preset 'official' has the released code's optimizer; remove it")
        return self


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe from a YAML file.

    A recipe may name another one in `extends`; its own keys then replace or add to the other's. Relative paths are
    resolved against the file that holds them.

    Args:
        path: the file.
        overrides: `key.of.setting=value` each, the value read as YAML; applied last.

    Raises:
        RecipeError: a file is missing, is not UTF-8 YAML, or does not describe a recipe.
    """
    values = _read_yaml(Path(path), ())
    for override in overrides:
        _override(values, override)
    return parse(Recipe, values, RecipeError, str(path))


def _read_yaml(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    import yaml

    from hyperadapters.config.reading import load_yaml

    path = path.resolve()
    if path in chain:
        raise RecipeError(f"{path}: extends itself through {' -> '.join(map(str, chain))}")
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        nearby = [str(other) for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise RecipeError(f"{path}: no such recipe.{did_you_mean(str(path), nearby)}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not a readable UTF-8 YAML file: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected keys and values, found {type(values).__name__}")
    resolve_paths(values, path.resolve().parent)
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise RecipeError(f"{path}: extends must name a recipe file; found {base!r}")
    return _merge(_read_yaml(path.parent / base, (*chain, path)), values)


def resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Make the relative paths in the values of a recipe absolute, in place, taking them relative to a folder."""
    if isinstance(backbone := values.get("backbone"), str):
        values["backbone"] = _name_or_path(backbone, folder)
    tasks = values.get("tasks")
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
    """A name on the Hub as it is; what is a path, because it starts with a dot or is there, as an absolute path."""
    is_path = name.startswith(".") or (bool(name) and os.path.isdir(folder / name))
    return str((folder / name).resolve()) if is_path else name


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
            raise RecipeError(f"override '{override}': '{parent}' holds no settings")
        values = nested
    try:
        values[last] = load_yaml(text)
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"override '{override}': the value is not YAML: {error}") from None
