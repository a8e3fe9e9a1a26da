"""`transformers.Trainer` with mixed-task batches, the terms of the objective in the log, and scores by task."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils.import_utils import is_in_notebook

from hyperadapters.checkpoints.format import load_state, save_model
from hyperadapters.config import Recipe
from hyperadapters.core import Losses
from hyperadapters.data.collate import Collator
from hyperadapters.data.examples import Example
from hyperadapters.data.sampling import MixedTaskBatchSampler
from hyperadapters.errors import MissingPackageError, NotFiniteError, OutputError, RecipeError, unknown_name
from hyperadapters.inference.finite import has_usable_logits, shown
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.evaluation import evaluate
from hyperadapters.training.optimizers import OfficialAdamW
from hyperadapters.training.prefix_cache import GIB, FrozenPrefix

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "prompt_mask", "sequence_ids")

logger = logging.getLogger(__name__)

DIRECTIONS_LEARNING_RATE = 1e-2
"""Default of heads that read directions, vectors of length 1; hidden states are some seven times as long on MiniLM."""
SHOWN_ROWS = 3
DIVERGED = (
    "Either training diverged: lower training.learning_rate, head_learning_rate or retriever_learning_rate; or the "
    "backbone exceeds the range of float16: set backbone_dtype to bfloat16 or float32, and bf16 instead of fp16"
)


class _TolerantLog(TrainerCallback):
    """Writes the Trainer's log; an output that cannot take a line of it does not end the training."""

    def on_log(self, *arguments: Any, **options: Any) -> None:
        """Write the line, if the output can take it."""
        with suppress(OSError, UnicodeError):
            super().on_log(*arguments, **options)


class TolerantProgress(_TolerantLog, ProgressCallback):
    """The Trainer's progress bar and log, for terminals; the bar ends when its terminal has gone."""

    training_bar: Any

    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        """Show the bar."""
        self.current_step = 0
        with self._until_gone():
            super().on_train_begin(*arguments, **options)

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        """Move the bar on."""
        with self._until_gone():
            if self.training_bar is not None:
                super().on_step_end(*arguments, **options)

    def on_train_end(self, *arguments: Any, **options: Any) -> None:
        """Leave the bar as it is at the end."""
        with self._until_gone():
            if self.training_bar is not None:
                super().on_train_end(*arguments, **options)

    @contextmanager
    def _until_gone(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            if self.training_bar is not None:
                self.training_bar.disable = True  # or else it would write once more when it is deleted
            self.training_bar = None


class TolerantPrinter(_TolerantLog, PrinterCallback):
    """The Trainer's log alone, for files and pipes."""


class HyperAdapterTrainer(Trainer):
    """Trains a `HyperAdapterModel`; accelerate, mixed precision, accumulation, loggers and resuming are the Trainer's.

    The contrastive losses see the rows of one forward: with gradient accumulation, those of one micro-batch.

    Training ends with a `NotFiniteError` when the loss, the gradients or the answers to validation rows are not finite.
    With `fp16` only the loss counts: the gradient scaler skips steps whose gradients exceed float16.

    Attributes:
        validation_prefix: states of frozen layers of the validation examples; None where there are none of either.
    """

    model: HyperAdapterModel
    data_collator: Collator
    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(
        self,
        model: HyperAdapterModel,
        recipe: Recipe,
        train_examples: list[Example],
        validation_examples: list[Example],
        arguments: TrainingArguments,
        **options: Any,
    ) -> None:
        """Prepare a run.

        Args:
            model: trained in place.
            recipe: its `training`, `data` and `seed` are used.
            train_examples, validation_examples: of all tasks; without validation examples the last state is kept.
            arguments: result of `training_arguments`.
            **options: of `transformers.Trainer`.
        """
        self.recipe = recipe
        callbacks = list(options.pop("callbacks", ()))
        patience = recipe.training.early_stopping_patience
        if patience is not None and validation_examples:
            callbacks.append(EarlyStoppingCallback(early_stopping_patience=patience))
        super().__init__(
            model=model,
            args=arguments,
            data_collator=model.collator,
            train_dataset=train_examples,
            eval_dataset=validation_examples or None,
            callbacks=callbacks,
            **options,
        )
        for callback, tolerant in ((ProgressCallback, TolerantProgress), (PrinterCallback, TolerantPrinter)):
            if self.pop_callback(callback) is not None:  # a notebook has another one
                self.add_callback(tolerant)
        # The loss is a mean over the micro-batch, so the Trainer has to divide by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self._terms: list[torch.Tensor] = []
        self._rows_of_step: list[int] = []
        self._lengths = self.data_collator.lengths(train_examples, with_targets=True)
        self._prefix: FrozenPrefix | None = None
        self.validation_prefix: FrozenPrefix | None = None
        if model.has_frozen_layers:
            self._prefix = self._make_prefix(self._lengths)
            if validation_examples and model.kind != "decoder":  # generating, it runs its frozen layers for each token
                self.validation_prefix = self._make_prefix(self.data_collator.lengths(validation_examples))

    def _make_prefix(self, lengths: list[int]) -> FrozenPrefix:
        taken = 0 if self._prefix is None else self._prefix.bytes_in_memory / GIB
        left = max(0.0, self.recipe.training.prefix_cache_gb - taken)
        training = self.recipe.training.model_copy(update={"prefix_cache_gb": left})
        prefix = FrozenPrefix(self.model, lengths, training, self.args.output_dir)
        logger.info(prefix.describe())
        return prefix

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of mixed tasks, in which each task present has at least two rows."""
        data, examples = self.recipe.data, self.train_dataset
        sampler = MixedTaskBatchSampler(
            [example.task_id for example in examples],
            self.args.per_device_train_batch_size,
            data.sampling,
            data.temperature,
            self.recipe.seed,
            self._lengths if data.group_by_length else None,
        )
        loader: DataLoader[Any] = DataLoader(
            list(range(len(examples))),  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=self._batch,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def _batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {**self.data_collator([self.train_dataset[row] for row in rows]), "rows": torch.tensor(rows)}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Groups by learning rate (heads, retriever, everything else), each with and without weight decay."""
        if self.optimizer is None:
            training = self.recipe.training
            retriever_rate = training.retriever_learning_rate
            rates = {"heads": training.head_learning_rate, "method.retriever": retriever_rate}
            if self.model.adapter_config.head_inputs != "adapted":
                rates["heads"] = rates["heads"] or DIRECTIONS_LEARNING_RATE
            decayed = set(self.get_decay_parameter_names(self.model))
            groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    rate = next((rate for part, rate in rates.items() if name.startswith(f"{part}.")), None)
                    rate = rate or training.learning_rate
                    decay = training.weight_decay if name in decayed else 0.0
                    groups.setdefault((rate, decay), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if self.model.adapter_config.preset == "official":
                optimizer_class, options = OfficialAdamW, {"lr": training.learning_rate}
            self.optimizer = optimizer_class(
                [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()],
                **options,
            )
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The total objective; its terms are collected for the log."""
        training, rows = self.recipe.training, inputs.pop("rows", None)
        frozen = None
        if self._prefix is not None and rows is not None:
            with self.accelerator.autocast():
                frozen = self._prefix(rows.tolist(), {name: inputs[name] for name in MODEL_INPUTS if name in inputs})
        output = model(
            **inputs, frozen_output=frozen, label_smoothing=training.label_smoothing, reduction=training.reduction
        )
        self._terms.append(torch.stack([term.detach() for term in output.losses]))
        if rows is not None:
            self._rows_of_step += rows.tolist()
        if not output.loss.isfinite():
            is_usable = has_usable_logits(output.logits).tolist()
            places = self._rows_of_step[-len(is_usable) :] if rows is not None else []
            unusable = [row for row, usable in zip(places, is_usable, strict=False) if not usable]
            raise self._diverged(f"the loss is {output.loss.item()}", unusable or places)
        return (output.loss, output) if return_outputs else output.loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        scales_gradients = self.accelerator.scaler is not None  # and skips steps whose gradients exceed float16
        if not scales_gradients and not math.isfinite(float(norm)):
            raise self._diverged(f"the norm of the gradients is {float(norm)}", self._rows_of_step)
        self._rows_of_step.clear()
        return norm

    def _diverged(self, what: str, rows: Sequence[int]) -> NotFiniteError:
        """The error for a step, with its tasks and rows."""
        tasks: dict[int, list[int]] = {}
        for row in rows:
            tasks.setdefault(self.train_dataset[row].task_id, []).append(row)
        places = [
            f"task '{self.model.tasks[task].name}' (rows {self._numbers(found)})" for task, found in tasks.items()
        ]
        return NotFiniteError(
            f"training step {self.state.global_step + 1}: {what}, in a batch of {'; '.join(places)}. "
            f"The run is not finished and nothing was saved as its result. {DIVERGED}"
        )

    def _numbers(self, rows: Sequence[int]) -> str:
        """The first of some rows of one task, counted from 1 among its training rows, each with its text."""
        named = []
        for row in sorted(rows)[:SHOWN_ROWS]:
            example = self.train_dataset[row]
            number = sum(other.task_id == example.task_id for other in self.train_dataset[: row + 1])
            named.append(f"{number}: {shown(example)}")
        return ", ".join(named) + (f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else "")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each term since the last log to the Trainer's own values."""
        if "loss" in logs and self._terms:
            means = torch.stack(self._terms).mean(dim=0).tolist()
            logs.update({f"loss_{name}": mean for name, mean in zip(Losses._fields[1:], means[1:], strict=True)})
            self._terms.clear()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score every task; `eval_mean`, the mean of the tasks' scores, chooses the best checkpoint."""
        examples = self.eval_dataset if eval_dataset is None else eval_dataset
        prefix = self.validation_prefix if examples is self.eval_dataset else None
        try:
            result = evaluate(self.model, examples, self.args.per_device_eval_batch_size, prefix)
        except NotFiniteError as error:
            step = self.state.global_step
            raise NotFiniteError(f"evaluation after training step {step}: {error}. {DIVERGED}") from error
        values = {f"{metric_key_prefix}_mean": result.mean}
        if result.routing_accuracy is not None:
            values[f"{metric_key_prefix}_routing_accuracy"] = result.routing_accuracy
        for task, scores in result.tasks.items():
            values.update({f"{metric_key_prefix}_{task}_{name}": value for name, value in scores.items()})
        self.log(values)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, values)
        return values

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        """Without transformers' warning that it sorts checkpoints of one second by their number, which is right."""
        log = logging.getLogger("transformers.trainer_utils")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            super()._save_checkpoint(*arguments, **options)
        finally:
            log.setLevel(level)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_model(self.model, Path(output_dir or self.args.output_dir))  # without a card

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_state(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def training_arguments(recipe: Recipe, folder: Path, has_validation: bool) -> TrainingArguments:
    """The Trainer's arguments for a recipe; its checkpoints and logs go to `folder`.

    Raises:
        RecipeError: a logger is unknown, or the device cannot compute in the type that is asked for.
        MissingPackageError: a logger's package is not installed.
        OutputError: started on several processes.
    """
    training = recipe.training
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OutputError("training on several processes is not supported yet: start one process, without torchrun")
    for logger in training.report_to:
        if logger not in INTEGRATION_TO_CALLBACK:
            raise RecipeError("training.report_to: " + unknown_name("logger", logger, INTEGRATION_TO_CALLBACK))
        if logger not in get_available_reporting_integrations():
            raise MissingPackageError(
                f"training.report_to: the package of '{logger}' is not installed; install it first"
            )
    try:
        arguments = _training_arguments(recipe, folder, has_validation)
    except (ValueError, RuntimeError) as error:
        raise RecipeError(f"training: {error}") from error
    arguments._n_gpu = min(1, arguments.n_gpu)  # the Trainer would use DataParallel, which copies no batch state
    return arguments


def _training_arguments(recipe: Recipe, folder: Path, has_validation: bool) -> TrainingArguments:
    training = recipe.training
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=training.max_steps or -1,
        num_train_epochs=training.num_train_epochs or 1.0,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        warmup_steps=training.warmup_steps,
        lr_scheduler_type="linear",
        max_grad_norm=training.max_grad_norm,
        eval_strategy="steps" if has_validation else "no",
        eval_steps=training.eval_steps,
        save_strategy="steps",
        save_steps=training.eval_steps,
        save_total_limit=2,
        load_best_model_at_end=has_validation,
        metric_for_best_model="mean" if has_validation else None,
        greater_is_better=True,
        logging_steps=training.logging_steps,
        report_to=list(training.report_to) or "none",
        seed=recipe.seed,
        use_cpu=not torch.accelerator.is_available(),
        bf16=training.bf16,
        fp16=training.fp16,
        optim=training.optimizer,
        activation_checkpointing=training.gradient_checkpointing,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not (sys.stderr.isatty() or is_in_notebook()),  # no bars in files and pipes
    )
