"""`transformers.Trainer` with batches of mixed tasks, the terms of the objective in the log, and scores by task."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate.data_loader import prepare_data_loader
from accelerate.utils.memory import should_reduce_batch_size
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PrinterCallback, SchedulerType, TrainerCallback, TrainerControl
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, PredictionOutput, TrainOutput
from transformers.utils.import_utils import is_in_notebook

from hyperadapters.backbones.passes import FrozenOutput
from hyperadapters.checkpoints.format import load_state, save_model
from hyperadapters.core import ONE_PROCESS, DataParallelProcesses, MicroBatches, Processes
from hyperadapters.data.collate import Collator
from hyperadapters.data.examples import Example, by_task
from hyperadapters.data.memory import read_examples, read_train_and_eval_data
from hyperadapters.data.sampling import MixedTaskBatchSampler
from hyperadapters.errors import (
    CheckpointError,
    DataError,
    NotFiniteError,
    OutOfMemoryError,
    RecipeError,
    TaskError,
    unknown_name,
)
from hyperadapters.heads.unfitted import expecting_unfitted_heads
from hyperadapters.inference.finite import has_usable_logits, shown
from hyperadapters.inference.predictor import Predictor
from hyperadapters.inference.routing import calibrate
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.arguments import TrainingArguments, settings_without_effect
from hyperadapters.training.calibration import calibrate_heads
from hyperadapters.training.evaluation import Evaluation, evaluate, predict_together, score_predictions
from hyperadapters.training.interruption import Interruption
from hyperadapters.training.loss_means import LossMeans
from hyperadapters.training.optimizers import OfficialAdamW, learning_rates, phased_schedule, training_phases
from hyperadapters.training.prefix_cache import GIB, FrozenPrefix
from hyperadapters.training.sharding import is_sharded, num_processes, process_index, shard_layers, wait_for_all
from hyperadapters.training.states import check_intact, is_complete, last_checkpoint, write_files
from hyperadapters.training.text_heads import check_not_fitted, fit_text_heads
from hyperadapters.training.views import TASK_LOSS, make_view

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "prompt_mask", "sequence_ids")

logger = logging.getLogger(__name__)

SHOWN_ROWS = 3
DIVERGED = (
    "Either training diverged: lower learning_rate or the rates of single parts, such as head_learning_rate; or the "
    "backbone exceeds the range of float16: set backbone_dtype to bfloat16 or float32, and bf16 instead of fp16"
)


class _Rows:
    """A data set whose items are their own indices, from which whole batches are made."""

    def __getitem__(self, row: int) -> int:
        return row


class _Finish(TrainerCallback):
    """Finishes the model at the end of training, before the callbacks of the user are called."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_end(self, *arguments: Any, **options: Any) -> None:
        """Finish the model, unless the training was interrupted."""
        if not self._trainer.is_interrupted:
            self._trainer._finish()


class Trainer(transformers.Trainer):
    """`transformers.Trainer` for a `HyperAdapterModel`.

    Accelerate, mixed precision, gradient accumulation, loggers and resuming work as in `transformers.Trainer`. After
    `train`, the model is ready for use: the best state is loaded if there are evaluation data, heads that read features
    of the texts are fitted (see `HyperAdapterModel.fit_heads`), routing is calibrated, and the model is in evaluation
    mode.

    The contrastive losses are computed over the rows of one forward pass, which with gradient accumulation is one
    micro-batch. With `contrast_batch="step"`, the instance contrast sees the rows of all micro-batches of a step.
    Several processes (see docs/scaling.md) divide the rows of a forward pass among them, and compute the losses and
    gradients of one process with all of these rows.

    Training ends with a `NotFiniteError` if the loss, the gradients or the predictions for evaluation rows are not
    finite. A few steps with such a loss or such gradients can be skipped instead (`skip_nonfinite`). With `fp16` the
    gradients are not checked, because the gradient scaler skips steps whose gradients exceed the range of float16.

    Attributes:
        validation_prefix: States of frozen layers for the evaluation examples; None without evaluation data or without
            frozen layers.
        evaluation_seconds: Time that the evaluations of `evaluate` have taken.
    """

    model: HyperAdapterModel
    args: TrainingArguments
    data_collator: Collator
    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(
        self,
        model: HyperAdapterModel,
        train_data: Mapping[str, Any],
        eval_data: Mapping[str, Any] | None = None,
        args: TrainingArguments | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        """Read the data and prepare training.

        Args:
            model: Model that is trained in place.
            train_data: Data of each task of the model by its name: a list of mappings with the keys `text`, `text_pair`
                (for tasks of pairs) and `label`, a DataFrame, a `datasets.Dataset`, a map-style dataset of PyTorch
                whose items are such mappings, or a list of `Example`.
            eval_data: Data of some or all tasks in the same forms. Default: no evaluation, and the last state is kept.
            args: Settings. Default: `TrainingArguments()`.
            callbacks: Callbacks, as for `transformers.Trainer`.
            optimizers: Optimizer and learning rate scheduler. Default: AdamW with parameter groups by learning rate,
                and a linear schedule, in which a common adapter is trained in the first half of the steps and the rest
                of its hypernetwork in the second. An optimizer or scheduler of your own trains both in all steps.

        Raises:
            DataError: If a row is invalid. The message names the task and the row.
            TaskError: If a task is unknown, or a text-to-text backbone cannot generate a label or number.
            RecipeError: If a setting has no effect on this model or these data, or `args` are of another class.
        """
        if not isinstance(model, HyperAdapterModel):
            raise TaskError(f"model: expected a HyperAdapterModel, found {type(model).__name__}")
        args = TrainingArguments() if args is None else args
        if not isinstance(args, TrainingArguments):
            raise RecipeError(
                f"args: expected hyperadapters.TrainingArguments, found {_full_name(args)}; import them from "
                "hyperadapters, they have all settings of transformers.TrainingArguments"
            )
        train_examples, eval_examples = read_train_and_eval_data(model.tasks, train_data, eval_data)
        for task, rows in zip(model.tasks, by_task(train_examples, len(model.tasks)), strict=True):
            model.collator.check_targets(task, rows)
        for setting, reason in settings_without_effect(args, model, bool(eval_examples)):
            raise RecipeError(f"{setting}: has no effect, because {reason}; remove it")
        if eval_examples:
            _check_metric(args.metric_for_best_model, model, eval_examples)
        self._interruption = next((item for item in callbacks or () if isinstance(item, Interruption)), None)
        shows_notebook = args.progress == "auto" and not args.disable_tqdm and is_in_notebook()
        is_shown = process_index() == 0 and not shows_notebook
        self._view = make_view(args.progress if is_shown else "none", model.tasks, not args.disable_tqdm)
        callbacks = [self._view, _Finish(self), *(callbacks or ())]
        if args.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(early_stopping_patience=args.early_stopping_patience))
        if args.shard_backbone and num_processes() > 1:  # before the Trainer moves the model to its device
            shard_layers(model, args.device.type)
        own_args = _adjusted(args, model, bool(eval_examples))
        own_args.label_smoothing_factor = 0.0  # The Trainer would need a transformers config otherwise.
        super().__init__(
            model=model,
            args=own_args,
            data_collator=model.collator,
            train_dataset=train_examples,
            eval_dataset=eval_examples or None,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        own_args.label_smoothing_factor = args.label_smoothing_factor
        if not shows_notebook:
            self.pop_callback(PrinterCallback if args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK)
        # The loss is a mean over the micro-batch, so the Trainer has to divide by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self._losses = LossMeans(len(model.tasks))
        self._rows_of_step: list[int] = []
        self._batches_of_step: list[Any] = []
        self._instances_of_step: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._what_is_not_finite: str | None = None
        self._skipped_steps = 0
        self.evaluation_seconds = 0.0
        self._best_state: dict[str, torch.Tensor] | None = None
        self._lengths = self.data_collator.lengths(train_examples, with_targets=True)
        self._prefix: FrozenPrefix | None = None
        self.validation_prefix: FrozenPrefix | None = None
        if model.has_frozen_layers:
            self._prefix = self._make_prefix(self._lengths)
            if eval_examples and model.kind != "decoder":  # generation runs the frozen layers for every token
                self.validation_prefix = self._make_prefix(self.data_collator.lengths(eval_examples))

    @property
    def is_interrupted(self) -> bool:
        """Whether a callback `Interruption` has ended the training."""
        return self._interruption is not None and self._interruption.signal is not None

    def _make_prefix(self, lengths: list[int]) -> FrozenPrefix:
        taken = 0 if self._prefix is None else self._prefix.bytes_in_memory / GIB
        prefix = FrozenPrefix(
            self.model,
            lengths,
            "none" if is_sharded(self.model) else self.args.prefix_cache,
            self.args.prefix_cache_dtype,
            memory_gb=max(0.0, self.args.prefix_cache_gb - taken),
            folder=self.args.output_dir if self.args.should_save else None,
        )
        logger.info(prefix.describe())
        return prefix

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train the model and make it ready for use, as described for the class.

        Args:
            resume_from_checkpoint: Checkpoint to continue from, or True for the last one in `args.output_dir`. Default:
                training starts from the beginning.
            trial: Trial of a hyperparameter search; see `transformers.Trainer`.
            ignore_keys_for_eval: Unused.

        Returns:
            Number of steps, mean loss and metrics.

        Raises:
            CheckpointError: If there is no checkpoint to continue from, or it is of another model.
            NotFiniteError: If training diverges.
            ValueError: If the heads have already been fitted to frozen features.
        """
        resume_from_checkpoint, self._best_state = self._resume_from(resume_from_checkpoint), None
        self._skipped_steps = 0
        heads = self.model.heads
        if heads is not None:
            if self.model.adapter_config.head_inputs != "adapted":
                check_not_fitted(heads)
            for task_id, task in enumerate(self.model.tasks):
                if task.kind == "regression":
                    rows = (row for row in self.train_dataset if row.task_id == task_id)
                    heads.set_target_scale(task_id, [float(row.target) for row in rows])
            self.model.task_table.reset_calibration()
        if self.model.method.can_change_tasks:
            self.model.task_table.reset_adapter_scales()
        with self._view.showing(), expecting_unfitted_heads(heads):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _resume_from(self, checkpoint: str | bool | None) -> str | None:
        """Return the path of the checkpoint to continue from, or raise CheckpointError if there is none."""
        if not checkpoint:
            return None
        folder = Path(self.args.output_dir)
        found = last_checkpoint(folder) if checkpoint is True else str(checkpoint)
        if found is None or not is_complete(Path(found)):
            raise CheckpointError(
                f"resume_from_checkpoint: expected a checkpoint that was written during a training, found none in "
                f"'{found or folder}'; give its folder, such as {folder / 'checkpoint-500'}, or train without it and "
                "with save_strategy='steps'"
            )
        check_intact(Path(found))
        return found

    def _finish(self) -> None:
        """Make a trained model ready for use."""
        model, evaluation = self.model, self.eval_dataset or []
        batch_size = self.args.per_device_eval_batch_size
        if self._best_state is not None:
            model.load_adapter_state_dict(self._best_state)
        if model.adapter_config.head_inputs != "adapted":
            fit_text_heads(model, self.train_dataset, evaluation, batch_size)
        if model.heads is not None:
            calibrate_heads(model, evaluation, batch_size, self.validation_prefix)
        if model.method.can_route:
            calibrate(model, self.train_dataset, evaluation, self.args.false_decline_rate, self.args.seed)
        if not evaluation:  # checks that the result is finite
            evaluate(model, self.train_dataset[:batch_size])
        model.eval()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a data loader with batches of mixed tasks, in which each task has no row or at least two rows."""
        args, examples = self.args, self.train_dataset
        sampler = MixedTaskBatchSampler(
            [example.task_id for example in examples],
            self._train_batch_size * num_processes(),
            args.sampling,
            args.sampling_temperature,
            args.seed if args.data_seed is None else args.data_seed,
            self._lengths if args.group_by_length else None,
            num_processes(),
            process_index(),
        )
        loader: DataLoader[Any] = DataLoader(
            cast(Any, _Rows()),
            batch_sampler=sampler,
            collate_fn=self._batch,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        # The sampler has divided the batches already, so accelerate must not do it.
        prepared: Any = prepare_data_loader(loader, self.accelerator.device, num_processes=1, put_on_device=True)
        prepared._is_accelerate_prepared = True
        return cast(DataLoader[Any], self.accelerator.prepare(prepared))

    def _batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        examples = [self.train_dataset[max(row, -1 - row)] for row in rows]
        return {**self.data_collator(examples), "rows": torch.tensor(rows)}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the optimizer, with parameter groups by learning rate, weight decay and phase.

        Their learning rates are those of `optimizers.learning_rates`, and their phases those of
        `optimizers.training_phases`.

        Args:
            model: Unused.
        """
        if self.optimizer is None:
            args = self.args
            rates = learning_rates(
                self.model.adapter_config,
                args.learning_rate,
                args.head_learning_rate,
                args.retriever_learning_rate,
                args.hypernetwork_learning_rate,
            )
            phases = training_phases(self.model.adapter_config)
            decayed = set(self.get_decay_parameter_names(self.model))
            groups: dict[tuple[float, float, tuple[float, float]], list[torch.nn.Parameter]] = {}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    rate = next(rate for part, rate in rates.items() if name.startswith(part))
                    phase = next(phase for part, phase in phases.items() if name.startswith(part))
                    decay = args.weight_decay if name in decayed else 0.0
                    groups.setdefault((rate, decay, phase), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, self.model)
            if self.model.adapter_config.preset == "official":
                optimizer_class, options = OfficialAdamW, {"lr": args.learning_rate}
            self.optimizer = optimizer_class(
                [
                    {"params": params, "lr": rate, "weight_decay": decay, "phase": phase}
                    for (rate, decay, phase), params in groups.items()
                ],
                **options,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the learning rate scheduler, in which the parts of a model with a common adapter have their phases.

        Args:
            num_training_steps: Number of training steps.
            optimizer: Optimizer of the scheduler. Default: that of the Trainer.

        Raises:
            RecipeError: If the model has a common adapter and the schedule does not depend on the step alone.
        """
        is_given = self.lr_scheduler is not None  # type: ignore[has-type]
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if is_given or not self.model.adapter_config.common_adapter:
            return scheduler
        if not isinstance(scheduler, LambdaLR):
            name = SchedulerType(self.args.lr_scheduler_type).value
            raise RecipeError(
                "lr_scheduler_type: with a common adapter, expected a schedule that depends on the step alone, such as "
                f"'linear' or 'cosine', found '{name}'; choose one of these, or set common_adapter to False"
            )
        self.lr_scheduler = phased_schedule(scheduler.optimizer, scheduler.lr_lambdas[0], num_training_steps)
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the total objective, and store its terms for the log.

        Args:
            model: Model, possibly wrapped by accelerate.
            inputs: Batch of the data loader.
            return_outputs: Whether to return the outputs of the model, too. Default: False.
            num_items_in_batch: Unused.

        Returns:
            Total loss, or a tuple of the total loss and the outputs.

        Raises:
            NotFiniteError: If the loss is not finite, and no steps may be skipped.
        """
        args, rows = self.args, inputs.pop("rows", None)
        processes = _processes(rows)
        if self._instances_of_step:
            number = self._losses.micro_batches  # of this micro-batch in its step
            processes = MicroBatches(
                processes, self._instances_of_step[:number] + self._instances_of_step[number + 1 :]
            )
        output = model(
            **inputs,
            frozen_output=self._frozen(inputs, rows),
            label_smoothing=args.label_smoothing_factor,
            reduction=args.reduction,
            processes=processes,
        )
        self._losses.add(output.losses, output.task_loss, output.task_ids, rows is None or rows[0] >= 0)
        if rows is not None:
            rows = torch.maximum(rows, -1 - rows)
            self._rows_of_step += rows.tolist()
        if not output.loss.isfinite():
            is_usable = has_usable_logits(output.logits).tolist()
            places = self._rows_of_step[-len(is_usable) :] if rows is not None else []
            unusable = [row for row, usable in zip(places, is_usable, strict=False) if not usable]
            what = self._described(f"the loss is {output.loss.item()}", unusable or places)
            self._what_is_not_finite = self._what_is_not_finite or what
            if not args.skip_nonfinite:
                raise self._diverged(self._what_is_not_finite)
            output.loss = output.loss * math.nan  # so that all processes find gradients that are not finite
        return (output.loss, output) if return_outputs else output.loss

    def _frozen(self, inputs: Mapping[str, Any], rows: torch.Tensor | None) -> FrozenOutput | None:
        """Return the states of the frozen layers for a batch, if they are kept."""
        if self._prefix is None or rows is None:
            return None
        rows = torch.maximum(rows, -1 - rows)
        with self.accelerator.autocast():
            return self._prefix(rows.tolist(), {name: inputs[name] for name in MODEL_INPUTS if name in inputs})

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the micro-batches of the next step, and forget what is left of a step that was not finished.

        Args:
            epoch_iterator: Iterator over the micro-batches of an epoch.
            num_batches: Number of micro-batches of a step.
            device: Device of the model.

        Returns:
            The micro-batches, and the number of their target tokens if the Trainer needs it.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._losses.discard_step()
        self._rows_of_step.clear()
        self._instances_of_step.clear()
        self._what_is_not_finite = None
        self._batches_of_step = batches if self.args.contrast_batch == "step" and len(batches) > 1 else []
        return batches, num_items

    @torch.no_grad()
    def _instances(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the instance vectors and tasks of a micro-batch, of all processes."""
        inputs, rows = {**batch}, batch.get("rows")
        inputs.pop("rows", None)
        with self.accelerator.autocast():
            output = self.model(**inputs, frozen_output=self._frozen(inputs, rows))
        if rows is not None and not output.instances.isfinite().all():
            unusable = (~output.instances.isfinite().all(dim=1)).nonzero()[:, 0]
            places = torch.maximum(rows, -1 - rows)[unusable].tolist()
            self._what_is_not_finite = self._described("an instance vector is not finite", places)
            if not self.args.skip_nonfinite:
                raise self._diverged(self._what_is_not_finite)
        return _processes(rows).rows(output.instances, batch["task_ids"])

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Train on a micro-batch; see `transformers.Trainer.training_step`.

        Args:
            model: Model, possibly wrapped by accelerate.
            inputs: Batch of the data loader.
            num_items_in_batch: Unused.

        Returns:
            The loss, divided by the number of accumulated micro-batches.

        Raises:
            OutOfMemoryError: If the memory of the device does not suffice.
            NotFiniteError: If the loss is not finite.
        """
        rows, tokens = inputs["input_ids"].shape
        try:
            if self._batches_of_step:  # a random state that is resumed is loaded after `get_batch_samples`
                model.train()
                batches, self._batches_of_step = self._batches_of_step, []
                self._instances_of_step += map(self._instances, batches)
            return super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if self.args.auto_find_batch_size or not should_reduce_batch_size(error):
                raise
            raise OutOfMemoryError(
                f"training step {self.state.global_step + 1}: the memory of '{self.args.device}' does not suffice for "
                f"a batch of {rows} rows of {tokens} tokens; lower the batch size (auto_batch of a recipe finds one) "
                "and raise gradient_accumulation_steps, lower max_length, or use gradient_checkpointing or bf16"
            ) from error

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        scales_gradients = self.accelerator.scaler is not None  # and skips steps with infinite gradients
        if scales_gradients or math.isfinite(float(norm)):
            self._losses.keep_step()
        else:
            what = f"the norm of the gradients is {float(norm)}"
            self._skip_step(self._what_is_not_finite or self._described(what, self._rows_of_step))
            norm = 0.0  # of the gradients that are left
        self._what_is_not_finite = None
        self._losses.discard_step()
        self._rows_of_step.clear()
        return norm

    def _skip_step(self, what: str) -> None:
        """Discard the gradients, or raise NotFiniteError if no further step may be skipped."""
        self._skipped_steps += 1
        if self._skipped_steps > self.args.skip_nonfinite:
            raise self._diverged(what)
        logger.warning("%s. The step is skipped (%d of %d).", what, self._skipped_steps, self.args.skip_nonfinite)
        for parameter in self.model.parameters():
            parameter.grad = None  # optimizers leave such parameters and their state unchanged

    def _described(self, what: str, rows: Sequence[int]) -> str:
        """Describe what is not finite in a step, with its tasks and rows."""
        tasks: dict[int, list[int]] = {}
        for row in rows:
            tasks.setdefault(self.train_dataset[row].task_id, []).append(row)
        places = [
            f"task '{self.model.tasks[task].name}' (rows {self._numbers(found)})" for task, found in tasks.items()
        ]
        return f"training step {self.state.global_step + 1}: {what}, in a batch of {'; '.join(places)}"

    def _diverged(self, what: str) -> NotFiniteError:
        return NotFiniteError(f"{what}. The run is not finished and nothing was saved as its result. {DIVERGED}")

    def _numbers(self, rows: Sequence[int]) -> str:
        """List rows of one task with their texts. Rows are counted from 1 among the training rows of the task."""
        named = []
        for row in sorted(rows)[:SHOWN_ROWS]:
            example = self.train_dataset[row]
            number = sum(other.task_id == example.task_id for other in self.train_dataset[: row + 1])
            named.append(f"{number}: {shown(example)}")
        return ", ".join(named) + (f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else "")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log values, and with the loss also the means of its terms and of each task's loss since the last time.

        Args:
            logs: Values to log.
            start_time: Start of the training; see `transformers.Trainer`.
        """
        if "loss" in logs and (means := self._losses.read()) is not None:
            logs["loss"] = means.objective.pop("total")  # also if the Trainer counts steps that were skipped
            logs.update({f"loss_{name}": mean for name, mean in means.objective.items()})
            logs.update({TASK_LOSS + self.model.tasks[task].name: mean for task, mean in means.tasks.items()})
        if "loss" in logs and self._skipped_steps:
            logs["skipped_steps"] = self._skipped_steps
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score every task that has rows.

        Args:
            eval_dataset: Data with labels, in the forms that the constructor accepts. Default: the evaluation data of
                the constructor.
            ignore_keys: Unused.
            metric_key_prefix: Prefix of the names of the scores. Default: "eval".

        Returns:
            `eval_mean`, the mean of the main metrics of the tasks, by which the best checkpoint is chosen;
            `eval_<task>_<metric>` of each task; and `eval_routing_accuracy` if the method can route.

        Raises:
            DataError: If there are no evaluation data, or a row is invalid.
            NotFiniteError: If an output of the model for a row is not finite.
        """
        examples = self._read(eval_dataset, "eval_dataset") if eval_dataset is not None else self.eval_dataset
        if not examples:
            raise DataError("evaluate: expected evaluation data, found none; pass them here or to the constructor")
        prefix = self.validation_prefix if examples is self.eval_dataset else None
        started = time.monotonic()
        try:
            result = evaluate(self.model, examples, self.args.per_device_eval_batch_size, prefix)
        except NotFiniteError as error:
            step = self.state.global_step
            raise NotFiniteError(f"evaluation after training step {step}: {error}. {DIVERGED}") from error
        self.evaluation_seconds += time.monotonic() - started
        values = _flat(result, metric_key_prefix)
        self.log(values)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, values)
        return values

    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> PredictionOutput:
        """Predict the answers to rows with their own tasks, and score the tasks whose rows have labels.

        Args:
            test_dataset: Data in the forms that the constructor accepts. Labels may be missing.
            ignore_keys: Unused.
            metric_key_prefix: Prefix of the names of the scores. Default: "test".

        Returns:
            `predictions`, a list of `Prediction` in the order of the model's tasks and their rows; `label_ids`, a list
            of the label index, number or string of each row, or None if it has no label; and `metrics`, named as in
            `evaluate`, empty if no row has a label.

        Raises:
            DataError: If a row is invalid.
            NotFiniteError: If an output of the model for a row is not finite.
        """
        examples = self._read(test_dataset, "test_dataset", needs_labels=False)
        predictions = predict_together(Predictor(self.model, self.args.per_device_eval_batch_size), examples)
        targets = [example.target for example in examples]
        labelled = [row for row, target in enumerate(targets) if target is not None]
        metrics: dict[str, float] = {}
        if labelled:
            found = [examples[row] for row in labelled], [predictions[row] for row in labelled]
            metrics = _flat(score_predictions(self.model, *found), metric_key_prefix)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(predictions=predictions, label_ids=targets, metrics=metrics)

    def _read(self, data: Any, what: str, needs_labels: bool = True) -> Sequence[Example]:
        """Return data as examples, which the data sets of this Trainer already are."""
        if data is self.eval_dataset or data is self.train_dataset:
            return data
        return read_examples(self.model.tasks, data, what, needs_labels)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end and not self.args.should_save_checkpoints:
            state = self.model.adapter_state_dict()
            self._best_state = {name: value.detach().to("cpu", copy=True) for name, value in state.items()}
        self._view.evaluated(metrics, bool(is_best))
        return bool(is_best)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a checkpoint with its model card; see `HyperAdapterModel.save_pretrained`.

        Args:
            output_dir: Folder to write to. Default: `args.output_dir`.
            _internal_call: Whether `transformers.Trainer` calls the method, to save a state for resuming without a
                model card. Default: False.

        Raises:
            OutputError: If the folder cannot be written.
        """
        folder = Path(output_dir or self.args.output_dir)
        if process_index() > 0:
            return
        if _internal_call:
            save_model(self.model, folder)
        else:
            self.model.save_pretrained(folder)

    def save_state(self) -> None:
        """Write the state of the training to `args.output_dir`, see `transformers.Trainer.save_state`."""
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        super().save_state()

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Write metrics to `args.output_dir`, see `transformers.Trainer.save_metrics`.

        Args:
            split: Name of the split, which becomes a part of the name of the file.
            metrics: Values by their names.
            combined: If True, `all_results.json` is updated as well. Default: True.
        """
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        super().save_metrics(split, metrics, combined)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> str:
        """Upload the model with its card to `args.hub_model_id`; see `HyperAdapterModel.push_to_hub`.

        Args:
            commit_message: Message of the commit.
            token: Token for the Hub. Default: `args.hub_token`, or the one of `hf auth login`.
            revision: Branch to commit to. Default: `args.hub_revision`, or main.
            private: Whether a new repository is private. Default: `args.hub_private_repo`.

        Returns:
            The address of the commit.

        Raises:
            RecipeError: If there is no `hub_model_id`.
            OutputError: If the Hub cannot be reached, or refuses the commit.
        """
        args = self.args
        if args.hub_model_id is None:
            raise RecipeError("hub_model_id: expected a name such as 'user/name' to upload to, found None; set it")
        return self.model.push_to_hub(
            args.hub_model_id,
            private=args.hub_private_repo if private is None else private,
            token=token or args.hub_token,
            commit_message=commit_message,
            revision=revision or args.hub_revision,
        )

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        """Save a state for resuming, without transformers' warning about checkpoints with equal modification times.

        It then sorts them by step, which is the correct order.
        """
        log = logging.getLogger("transformers.trainer_utils")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            super()._save_checkpoint(*arguments, **options)
        finally:
            log.setLevel(level)
        wait_for_all()  # each process writes the state of its random numbers
        state = Path(self._get_output_dir(trial=None)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if process_index() == 0:
            write_files(state)

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        # A run that has made all of its `max_steps` and died while its heads were fitted has no step left, and
        # transformers would make one nevertheless.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*arguments, **options)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_state(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        wait_for_all()  # the first process may still write it
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _processes(rows: torch.Tensor | None) -> Processes:
    """Return the processes that share a batch, of which this one has some rows."""
    if num_processes() == 1:
        return ONE_PROCESS
    return DataParallelProcesses(has_rows=rows is None or bool(rows[0] >= 0))


def _adjusted(args: TrainingArguments, model: HyperAdapterModel, has_eval_data: bool) -> TrainingArguments:
    """Return a copy of the settings with a learning rate, and without evaluation if there are no data for it."""
    adjusted = copy.copy(args)
    adjusted.learning_rate = learning_rates(model.adapter_config, args.learning_rate)[""]
    if not has_eval_data:
        adjusted.eval_strategy, adjusted.do_eval = IntervalStrategy.NO, False
        adjusted.load_best_model_at_end, adjusted.metric_for_best_model = False, None
    return adjusted


def _check_metric(name: str | None, model: HyperAdapterModel, examples: Sequence[Example]) -> None:
    """Raise RecipeError unless an evaluation of the examples has a score of this name."""
    evaluated = {example.task_id for example in examples}
    known = ["mean", *(["routing_accuracy"] if model.method.can_route else [])]
    for task_id, task in enumerate(model.tasks):
        known += [f"{task.name}_{metric}" for metric in task.metrics if task_id in evaluated]
    if name is not None and name.removeprefix("eval_") not in known:
        raise RecipeError("metric_for_best_model: " + unknown_name("score", name, known))


def _flat(result: Evaluation, prefix: str) -> dict[str, float]:
    """Return scores by their names in the log."""
    values = {f"{prefix}_mean": result.mean}
    if result.routing_accuracy is not None:
        values[f"{prefix}_routing_accuracy"] = result.routing_accuracy
    for task, scores in result.tasks.items():
        values.update({f"{prefix}_{task}_{name}": value for name, value in scores.items()})
    return values


def _full_name(value: object) -> str:
    return f"{type(value).__module__.partition('.')[0]}.{type(value).__qualname__}"
