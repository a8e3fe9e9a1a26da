"""Configurations: validated on reading, unknown keys refused, never code.

`Task` and `ModelConfig` travel with a checkpoint; `Recipe` describes a training run.
"""

from __future__ import annotations

import re
import string
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, field_validator, model_validator

from hyperadapters.errors import HyperAdaptersError, RecipeError, TaskError, did_you_mean, unknown_name

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Kind = Literal["classification", "regression", "text-to-text"]
Model = TypeVar("Model", bound=BaseModel)
Int = Annotated[int, Strict()]

RECIPE_FILE = "resolved_recipe.yaml"
"""The recipe of a run, in its folder."""

METRICS_OF_KIND: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "macro_f1", "matthews_correlation"),
    "regression": ("pearson", "spearman"),
    "text-to-text": ("exact_match",),
}


class StrictModel(BaseModel):
    """Immutable, refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Task(StrictModel):
    """What is to be predicted from which texts, and how it is measured.

    Attributes:
        name: unique within a model; no path separators or control characters.
        kind: "classification" (one of `labels`), "regression" (a number) or "text-to-text" (any text).
        fields: `("text",)` or `("text", "text_pair")`.
        labels: of a classification task, in the order of the head's outputs. In a recipe they may be left out:
            they are then the sorted labels of the training rows.
        metrics: the first one is the task's score. "f1" is of the last of two labels.
        template: how a text-to-text backbone reads the fields, for example "premise: {text} hypothesis: {text_pair}".
            Default: the fields with a space between them, which a row to be routed gets in any case.
        label_words: what a text-to-text backbone writes for each label. Default: the label itself.
        step: of a regression task: a text-to-text backbone writes the nearest multiple of it, for example 0.2.
    """

    name: str
    kind: Kind = "classification"
    fields: tuple[Literal["text", "text_pair"], ...] = ("text",)
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    template: str | None = None
    label_words: dict[str, str] | None = None
    step: float | None = Field(None, gt=0, allow_inf_nan=False)

    @classmethod
    def classification(cls, name: str, labels: list[str] | tuple[str, ...], **options: Any) -> Task:
        """A task whose answer is one of `labels`."""
        return parse(cls, {"name": name, "kind": "classification", "labels": labels, **options}, TaskError)

    @classmethod
    def regression(cls, name: str, **options: Any) -> Task:
        """A task whose answer is a number."""
        return parse(cls, {"name": name, "kind": "regression", **options}, TaskError)

    @classmethod
    def text_to_text(cls, name: str, **options: Any) -> Task:
        """A task whose answer is a text."""
        return parse(cls, {"name": name, "kind": "text-to-text", **options}, TaskError)

    @property
    def is_pair(self) -> bool:
        """Whether the input is a pair of texts."""
        return len(self.fields) == 2

    @property
    def main_metric(self) -> str:
        """The metric that is the task's score."""
        return self.metrics[0]

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not name.strip() or name != name.strip() or len(name) > 100:
            raise ValueError("expected 1 to 100 characters without spaces at the ends")
        if any(char in "/\\" or unicodedata.category(char).startswith("C") for char in name) or name in (".", ".."):
            raise ValueError("must not contain path separators or control characters")
        return name

    @field_validator("labels", mode="before")
    @classmethod
    def _check_label_types(cls, labels: object) -> object:
        if isinstance(labels, (list, tuple)) and not all(isinstance(label, str) for label in labels):
            raise ValueError(f"labels must be strings, found {labels!r}; put them in quotation marks")
        return labels

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.fields not in (("text",), ("text", "text_pair")):
            raise ValueError(f"fields must be [text] or [text, text_pair], found {list(self.fields)}")
        if self.labels and self.kind != "classification":
            raise ValueError(f"a {self.kind} task has no labels, found {len(self.labels)}: remove them or set kind")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be different from each other")
        if len(self.labels) == 1:
            raise ValueError(f"a classification task needs at least two labels, found only '{self.labels[0]}'")
        if self.label_words is not None and self.kind != "classification":
            raise ValueError(f"label_words belong to a classification task, not to {self.kind}")
        if self.step is not None and self.kind != "regression":
            raise ValueError(f"step belongs to a regression task, not to {self.kind}")
        known = METRICS_OF_KIND[self.kind]
        for metric in self.metrics:
            if metric not in known:
                raise ValueError(unknown_name(f"metric of a {self.kind} task", metric, known))
        if "f1" in self.metrics and len(self.labels) > 2:
            raise ValueError(f"f1 needs two labels, found {len(self.labels)}: use macro_f1")
        if self.template is not None:
            _check_template(self.template, self.fields)
        if self.label_words is not None and self.labels and set(self.label_words) != set(self.labels):
            raise ValueError(f"label_words must have one word for each of {list(self.labels)}")
        words = [word.strip() for word in (self.label_words or {}).values()]
        if len(set(words)) != len(words):
            raise ValueError("label_words must be different from each other")
        if not self.metrics:
            object.__setattr__(self, "metrics", (known[0],))
        return self


def _check_template(template: str, fields: tuple[str, ...]) -> None:
    try:
        used = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        if unknown := [name for name in used if name not in fields]:
            raise ValueError(f"found {{{unknown[0]}}}")
        template.format(**dict.fromkeys(fields, ""))  # whatever else follows the name
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"template may only use {{{'}, {'.join(fields)}}}: {error}") from error
    missing = [field for field in fields if field not in used]
    if missing:
        raise ValueError(f"template does not use {{{missing[0]}}}")


class ModelConfig(StrictModel):
    """Sizes of the method and the preset that fixes its arithmetic.

    Attributes:
        preset: "paper", or "official", which repeats the released code number by number (see docs/faithfulness.md).
        prototype_dim: p, numbers in a prototype, an instance vector, a layer embedding and a hypernetwork code.
        hidden_dim: hidden units of the retriever and of the hypernetwork's trunk.
        adapter_dim: bottleneck of the generated adapters.
        shared_adapter_dim: bottleneck of the learned adapters in the encoder of an encoder-decoder; default:
            `adapter_dim`. Other backbones have none.
        adapter_norm_input: whether an adapter reads the layer-normed input of its feed-forward (encoder-decoder).
        feature_layer: encoder backbones only: m, the number of layers below the hidden states that the retriever
            reads; adapters are generated for the layers above. Default: half of the layers.
        temperature: of both contrastive losses.
        contrastive_weight: lambda, weight of each contrastive loss.
    """

    preset: Literal["paper", "official"] = "paper"
    prototype_dim: Int = Field(64, ge=1)
    hidden_dim: Int = Field(128, ge=1)
    adapter_dim: Int = Field(64, ge=1)
    shared_adapter_dim: Int | None = Field(None, ge=1)
    adapter_norm_input: bool = True
    feature_layer: Int | None = Field(None, ge=0)
    temperature: float = Field(0.1, gt=0, allow_inf_nan=False)
    contrastive_weight: float = Field(0.1, ge=0, allow_inf_nan=False)


class Cut(StrictModel):
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
    """

    path: str | dict[Split, str] | None = None
    dataset: str | None = None
    subset: str | None = None
    splits: dict[Split, str] | None = None
    demo: str | None = None
    columns: dict[Literal["text", "text_pair", "label"], str] = {}
    label_names: dict[str, str] | None = None
    cut: dict[Literal["validation", "test"], Cut] = {}

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
        sampling: "proportional" to the number of rows (what the released code does), by "temperature"
            (rows ** (1 / temperature)), or "balanced" (all tasks alike).
        temperature: of the sampling.
        max_length: tokens of an input, longer ones are cut.
        max_target_length: tokens of a target text.
    """

    n_train: Int | None = Field(None, ge=1)
    fraction: float | None = Field(None, gt=0, le=1)
    k_per_label: Int | None = Field(None, ge=1)
    n_validation: Int | None = Field(None, ge=1)
    sampling: Literal["proportional", "temperature", "balanced"] = "proportional"
    temperature: float = Field(10.0, ge=1, allow_inf_nan=False)
    max_length: Int = Field(128, ge=4)
    max_target_length: Int = Field(32, ge=2)

    @model_validator(mode="after")
    def _check_one_size(self) -> Self:
        given = [name for name in ("n_train", "fraction", "k_per_label") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"expected at most one of n_train, fraction, k_per_label; found {given}")
        return self


class TrainingConfig(StrictModel):
    """The training run. Names are those of `transformers.TrainingArguments` where it has the setting.

    Attributes:
        max_steps, num_train_epochs: how long; exactly one of them.
        batch_size: rows of a step on each device (before accumulation).
        learning_rate: of the hypernetwork, prototypes and shared adapters.
        head_learning_rate: of the task heads; default: `learning_rate`.
        retriever_learning_rate: of the retriever, which only the contrastive losses reach; default: `learning_rate`.
        warmup_steps: of the linear schedule.
        label_smoothing: of the task loss.
        reduction: of the task loss over tokens (text-to-text) or rows (heads): "mean" or "sum".
        eval_steps: steps between evaluations on the validation rows; the checkpoint with the best mean is kept.
        early_stopping_patience: evaluations without a better mean after which training stops.
        report_to: any of "tensorboard", "wandb", "trackio" and what else transformers knows.
    """

    max_steps: Int | None = Field(None, ge=1)
    num_train_epochs: float | None = Field(None, gt=0, allow_inf_nan=False)
    batch_size: Int = Field(32, ge=1)
    eval_batch_size: Int = Field(64, ge=1)
    gradient_accumulation_steps: Int = Field(1, ge=1)
    learning_rate: float = Field(3e-4, gt=0, allow_inf_nan=False)
    head_learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False)
    retriever_learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: Int = Field(0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    reduction: Literal["mean", "sum"] = "mean"
    eval_steps: Int = Field(500, ge=1)
    early_stopping_patience: Int | None = Field(None, ge=1)
    logging_steps: Int = Field(50, ge=1)
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    report_to: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise ValueError("expected exactly one of max_steps, num_train_epochs")
        return self


class Recipe(StrictModel):
    """A training run: backbone, tasks with their data, model and training settings.

    Attributes:
        backbone: name on the Hub, or a folder (relative to the recipe when it starts with a dot).
        seed: of subsets, cuts, sampling, initial weights and dropout.
    """

    backbone: str
    seed: Int = Field(0, ge=0)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig
    tasks: tuple[TaskEntry, ...]

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        check_task_names(self.tasks)
        return self


def check_task_names(tasks: tuple[Task, ...]) -> None:
    """Raise ValueError when there is no task or two have the same name."""
    names = [task.name for task in tasks]
    if not names:
        raise ValueError("expected at least one task, found none")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"task names must be different from each other, found '{name}' {names.count(name)} times")


def parse(model: type[Model], values: object, error: type[HyperAdaptersError] = RecipeError, where: str = "") -> Model:
    """Validate `values` as `model`, reporting all faults together with the nearest known keys.

    Raises:
        error: with one line a fault: where it is, what is wrong, what was found.
    """
    try:
        return model.model_validate(values)
    except ValidationError as invalid:
        faults = [_describe(model, fault) for fault in invalid.errors()]
        raise error("\n".join([f"{where or model.__name__}: {len(faults)} fault(s)", *faults])) from None


def _describe(model: type[BaseModel], fault: Any) -> str:
    path = [str(part) for part in fault["loc"]]
    place = ".".join(path) or "as a whole"
    if fault["type"] == "extra_forbidden":
        return f"  {place}: unknown key.{did_you_mean(path[-1], _known_keys(model, path[:-1]))}"
    if fault["type"] == "missing":
        return f"  {place}: required, not given"
    message = fault["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    if fault["type"] == "literal_error":
        message += "." + did_you_mean(str(fault["input"]), re.findall(r"'([^']*)'", fault["ctx"]["expected"]))
    found = "" if fault["type"] == "value_error" else f"; found {fault['input']!r}"
    return f"  {place}: {message}{found}"


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    current: Any = model
    for part in path:
        if part.isdigit():
            continue
        if part not in current.model_fields and current is Cut:
            continue
        annotation = current.model_fields[part].annotation if part in current.model_fields else None
        nested = [annotation, *getattr(annotation, "__args__", ())]
        current = next((item for item in nested if isinstance(item, type) and issubclass(item, BaseModel)), None)
        if current is None:
            return []
    return [field.alias or name for name, field in current.model_fields.items()]


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

    path = path.resolve()
    if path in chain:
        raise RecipeError(f"{path}: extends itself through {' -> '.join(map(str, chain))}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
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
    if str(values.get("backbone", "")).startswith("."):
        values["backbone"] = str((folder / values["backbone"]).resolve())
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
        if str(source.get("dataset", "")).startswith("."):
            source["dataset"] = str((folder / source["dataset"]).resolve())


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _override(values: dict[str, Any], override: str) -> None:
    import yaml

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
        values[last] = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"override '{override}': the value is not YAML: {error}") from None
