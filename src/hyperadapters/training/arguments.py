"""Settings of a `Trainer`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
import transformers
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils.import_utils import is_in_notebook

from hyperadapters.config import DataConfig, TrainingConfig, parse
from hyperadapters.config.model import GENERATING, RETRIEVING, ROUTING
from hyperadapters.core import Reduction
from hyperadapters.data.sampling import Strategy
from hyperadapters.errors import MissingPackageError, RecipeError, unknown_name
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.prefix_cache import PrefixPlace, StoredDtype
from hyperadapters.training.views import View

NAMED_AS_IN_RECIPES = (
    "learning_rate",
    "head_learning_rate",
    "retriever_learning_rate",
    "hypernetwork_learning_rate",
    "reduction",
    "prefix_cache",
    "prefix_cache_dtype",
    "prefix_cache_gb",
    "early_stopping_patience",
    "false_decline_rate",
    "skip_nonfinite",
    "contrast_batch",
    "shard_backbone",
)
"""Settings of this library that have the same name in the section `training` of a recipe."""


DIVIDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
"""Variables with which `accelerate launch` asks for a division of the weights."""


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Settings of a `Trainer`: those of `transformers.TrainingArguments`, and those of this library.

    The defaults are those of a recipe where it has the setting. By default the model is evaluated every 500 steps if
    there are evaluation data, and nothing is written: the best state is held in memory. With a `save_strategy`
    checkpoints go to `output_dir`, from which `Trainer.train(resume_from_checkpoint=True)` continues.

    Some settings of transformers have a meaning of their own here: `label_smoothing_factor` is that of the task loss of
    classification heads and target tokens. `metric_for_best_model` is a score of `Trainer.evaluate`, by default the
    mean of the tasks' scores. `load_best_model_at_end` needs no checkpoints. `train_sampling_strategy` is refused,
    since batches mix tasks; `sampling` and `group_by_length` take its place.

    Attributes:
        learning_rate: Learning rate of all parameters without a rate of their own; default: 1e-3 if the model has a
            common adapter, otherwise 3e-4.
        head_learning_rate: Learning rate of the task heads; default: 1e-2 where they read directions, as those of the
            preset "plus" do, otherwise `learning_rate`.
        retriever_learning_rate: Learning rate of the retriever, which with method "pha" only the contrastive losses
            reach, and of the prototypes if there is a common adapter; default: 3e-3 with a common adapter, otherwise
            `learning_rate`.
        hypernetwork_learning_rate: Learning rate of the hypernetwork without its common adapter; default: 5e-5
            with a common adapter, otherwise `learning_rate`.
        sampling: How batches are drawn from the tasks: "proportional" to their numbers of rows, by "temperature"
            (rows ** (1 / sampling_temperature)), or "balanced" (all tasks alike).
        sampling_temperature: Temperature of the sampling.
        group_by_length: Whether batches are made of rows of similar length, so that little is padded.
        reduction: "mean" or "sum" of the task loss over rows (heads) or target tokens (text-to-text).
        prefix_cache: Where the hidden states of the frozen layers below everything trained are kept: "memory", "file"
            (without a name, in `output_dir` if checkpoints are saved, otherwise in the folder for temporary files),
            "none", or "auto": memory up to `prefix_cache_gb`, a file above that if it takes less than half of the free
            disk, otherwise none.
        prefix_cache_dtype: Type in which they are kept, "float32" or "float16".
        prefix_cache_gb: GiB of memory that "auto" may take in all.
        early_stopping_patience: Number of evaluations without a better score after which training stops. A model with a
            common adapter that stops in the first half of the steps has no generated part. Default: it does not stop
            early.
        false_decline_rate: Share of a task's own inputs that may be declined when they are routed.
        skip_nonfinite: Number of training steps that may be skipped because their loss or gradients are not finite. It
            is counted anew when a training is resumed.
        contrast_batch: Rows that the instance contrast compares with gradient accumulation: those of a "micro-batch",
            or those of the whole "step", for which instance vectors are computed twice.
        shard_backbone: Whether several processes divide the weights of the backbone's layers among them (FSDP2 of
            PyTorch) instead of each having all of them; see docs/scaling.md. The weights stay divided after the
            training. It has no effect on one process.
        progress: What is shown during the training: "auto", a live table in a terminal, the table of transformers in a
            notebook and lines elsewhere; "lines", one line for each evaluation; "json", JSON objects on standard
            output; or "none". With `disable_tqdm` "auto" shows lines.
    """

    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    learning_rate: float | None = None  # the Trainer chooses it for its model
    optim: str = "adamw_torch_fused"
    eval_strategy: IntervalStrategy | str = "steps"
    eval_steps: float | None = 500
    save_strategy: SaveStrategy | str = "no"
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "mean"
    greater_is_better: bool | None = True
    logging_steps: float = 50
    report_to: None | str | list[str] = "none"  # noqa: RUF036  # the order that HfArgumentParser can read
    seed: int = 0
    remove_unused_columns: bool = False
    head_learning_rate: float | None = None
    retriever_learning_rate: float | None = None
    hypernetwork_learning_rate: float | None = None
    sampling: Strategy = "proportional"
    sampling_temperature: float = 10.0
    group_by_length: bool = True
    reduction: Reduction = "mean"
    prefix_cache: PrefixPlace = "auto"
    prefix_cache_dtype: StoredDtype = "float32"
    prefix_cache_gb: float = 4.0
    early_stopping_patience: int | None = None
    false_decline_rate: float = 0.05
    skip_nonfinite: int = 0
    contrast_batch: Literal["micro-batch", "step"] = "micro-batch"
    shard_backbone: bool = False
    progress: View = "auto"

    def __post_init__(self) -> None:
        """Check the settings, and resolve those that depend on the machine.

        Raises:
            RecipeError: If a setting of this library has a wrong value or no effect, or a logger is unknown.
            MissingPackageError: If the package of a logger is not installed.
            ValueError: If a setting of transformers has a wrong value, or the device does not support it.
        """
        self._check_own_settings()
        if not torch.accelerator.is_available():
            self.use_cpu = True
        is_distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if is_distributed and self.use_cpu and self.ddp_backend is None:  # type: ignore[has-type]
            self.ddp_backend = "gloo"
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
        if self.disable_tqdm is None:  # type: ignore[has-type]  # no bars in files and pipes
            self.disable_tqdm = not (sys.stderr.isatty() or is_in_notebook())
        loads_best = self.load_best_model_at_end and IntervalStrategy(self.eval_strategy) != IntervalStrategy.NO
        # transformers reads the best state from a checkpoint; without checkpoints the Trainer holds it in memory.
        self.load_best_model_at_end = loads_best and self.should_save_checkpoints
        super().__post_init__()
        self.load_best_model_at_end = loads_best
        self._n_gpu = min(1, self.n_gpu)  # the Trainer would use DataParallel, which copies no batch state
        self._check_loggers()

    @property
    def should_save_checkpoints(self) -> bool:
        """Whether checkpoints are written while the model is trained."""
        return SaveStrategy(self.save_strategy) != SaveStrategy.NO

    @property
    def should_save(self) -> bool:
        """Whether this process writes to `output_dir` by itself."""
        return self.should_save_checkpoints and bool(super().should_save)

    def _check_own_settings(self) -> None:
        where = type(self).__name__
        parse(
            TrainingConfig,
            {"max_steps": 1, **{name: getattr(self, name) for name in NAMED_AS_IN_RECIPES}},
            RecipeError,
            where,
        )
        parse(DataConfig, {"sampling": self.sampling, "group_by_length": self.group_by_length}, RecipeError, where)
        if self.sampling == "temperature":
            parse(DataConfig, {"sampling": self.sampling, "temperature": self.sampling_temperature}, RecipeError, where)
        elif self.sampling_temperature != _default("sampling_temperature"):
            raise RecipeError(
                f"sampling_temperature: is for sampling 'temperature', found sampling '{self.sampling}'; remove it"
            )
        if self.progress not in get_args(View):
            raise RecipeError("progress: " + unknown_name("view", self.progress, get_args(View)))
        if self.train_sampling_strategy != _default("train_sampling_strategy"):
            raise RecipeError(
                f"train_sampling_strategy: '{self.train_sampling_strategy}' has no effect, because batches mix tasks; "
                "remove it, and use sampling and group_by_length"
            )
        if self.fsdp or self.deepspeed or any(os.environ.get(name) == "true" for name in DIVIDING):
            raise RecipeError(
                "FSDP and DeepSpeed of accelerate, which also divide the trained weights, are not supported; start "
                "data-parallel training with torchrun or accelerate launch --multi_gpu, and set shard_backbone to "
                "divide the weights of the backbone"
            )
        if self.push_to_hub:
            raise RecipeError(
                "push_to_hub: checkpoints are not uploaded while a model is trained; remove it, and call "
                "trainer.push_to_hub() after trainer.train()"
            )

    def _check_loggers(self) -> None:
        for logger in self.report_to or ():
            if logger not in INTEGRATION_TO_CALLBACK:
                raise RecipeError("report_to: " + unknown_name("logger", logger, INTEGRATION_TO_CALLBACK))
            if logger not in get_available_reporting_integrations():
                raise MissingPackageError(f"report_to: the package of '{logger}' is not installed; install it first")


def settings_without_effect(
    arguments: TrainingArguments, model: HyperAdapterModel, has_eval_data: bool
) -> Iterator[tuple[str, str]]:
    """Find settings that were changed and have no effect on a model or its data.

    Args:
        arguments: Settings.
        model: Model to be trained.
        has_eval_data: Whether there are evaluation data.

    Returns:
        An iterator over the names of the settings, each with the reason.
    """
    config = model.adapter_config
    heads = model.text_to_text, "this backbone generates its answers as text and has no task heads"
    frozen = not model.has_frozen_layers, "this model has no layers below everything that is trained"
    useless = {
        "head_learning_rate": heads,
        "hypernetwork_learning_rate": (
            config.method not in GENERATING,
            f"method '{config.method}' has no hypernetwork",
        ),
        "retriever_learning_rate": (config.method not in RETRIEVING, f"method '{config.method}' has no retriever"),
        "false_decline_rate": (not model.method.can_route, f"method '{config.method}' cannot route"),
        "skip_nonfinite": (arguments.fp16, "with fp16 the gradient scaler decides which steps are skipped"),
        "contrast_batch": (
            arguments.gradient_accumulation_steps == 1
            or config.method not in ROUTING
            or config.contrast not in ("both", "instance"),
            "there is one micro-batch in a step, or no instance contrast",
        ),
        "optim": (config.preset == "official", "preset 'official' has the released code's optimizer"),
        "prefix_cache": frozen,
        "prefix_cache_dtype": frozen,
        "prefix_cache_gb": frozen,
        "early_stopping_patience": (not has_eval_data, "there are no validation rows"),
        "neftune_noise_alpha": (True, "the embeddings are frozen and in evaluation mode"),
        "dataloader_drop_last": (True, "the rows of an epoch are spread over batches of about equal sizes"),
    }
    for name, (is_useless, reason) in useless.items():
        if is_useless and getattr(arguments, name) not in (_default(name), "none"):  # "none": without a cache anyway
            yield name, reason


def _default(name: str) -> object:
    return next(field.default for field in fields(TrainingArguments) if field.name == name)
