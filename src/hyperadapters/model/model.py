"""HyperAdapterModel: a frozen backbone and a method that gives each row of a batch the adapters of its task."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from hyperadapters.backbones.active import BatchState
from hyperadapters.backbones.checks import plan
from hyperadapters.backbones.devices import convert_backbone
from hyperadapters.backbones.loading import (
    BackboneFingerprint,
    absolute_name,
    load_backbone,
    load_tokenizer,
    num_embeddings,
)
from hyperadapters.backbones.passes import AdaptedLinear, FrozenOutput, Inputs, LowerOutput, pool
from hyperadapters.backbones.runners import make_runner
from hyperadapters.backbones.text_features import compare_texts, separate_texts, sequence_ids_of, sequence_rows
from hyperadapters.config import BackboneKind, DataConfig, Dtype, Lengths, ModelConfig, Task, parse
from hyperadapters.core import ONE_PROCESS, AdapterWeights, Grouping, Losses, Processes, Reduction, TaskLoss
from hyperadapters.data.collate import Collator, make_collator
from hyperadapters.errors import BackboneError, TaskError
from hyperadapters.heads.unfitted import warn_of_unfitted_heads
from hyperadapters.methods import PHA, make_method
from hyperadapters.methods.base import Method, Route
from hyperadapters.methods.objective import objective, text_loss
from hyperadapters.model.inputs import (
    before_labels,
    check_labels,
    check_loss_settings,
    check_task_ids,
    check_token_ids,
    mask_tokens,
    prepare_inputs,
)
from hyperadapters.model.merging import Lora, Merged, check_can_merge, task_loras
from hyperadapters.model.output import Generated, HyperAdapterOutput
from hyperadapters.model.parts import (
    adapter_tensors,
    convert_parameter,
    copy_state,
    make_heads,
    make_shared_adapters,
    make_unused_adapters,
)
from hyperadapters.model.selector import BatchSelector, density_features
from hyperadapters.model.tasks import TaskTable

if TYPE_CHECKING:
    import numpy as np

    from hyperadapters.fewshot.add_task import FitReport
    from hyperadapters.fewshot.fit import Fit
    from hyperadapters.inference.predictor import Prediction
    from hyperadapters.inference.routing import RoutingResult
    from hyperadapters.interop.pipeline import TaskPipeline
    from hyperadapters.training.calibration import CalibrationReport

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _exclusive(method: _Function) -> _Function:
    """Make a method hold the lock of its model."""

    @wraps(method)
    def locked(self: HyperAdapterModel, *args: Any, **options: Any) -> Any:
        with self.lock:
            return method(self, *args, **options)

    return cast(_Function, locked)


class HyperAdapterModel(nn.Module):
    """A frozen backbone whose adapters differ from row to row of a batch, depending on the task of the row.

    Make a model with `from_backbone`, load one with `from_pretrained`, or pass a transformers model to the constructor.
    The backbone is changed in place: it is frozen, and adapters are injected. `detach` returns it as it was.

    Attributes:
        backbone: The frozen model.
        method: Source of the adapters, with retriever, prototypes and hypernetwork (see `methods.pha`).
        heads: Task heads of encoder backbones; None for text-to-text backbones.
        shared_adapters: Learned adapters in the encoder of an encoder-decoder, shared by all tasks.
        unused_adapters: For preset "official": parameters that the released code trains but never uses.
        adapter_config: Settings with all defaults resolved.
        task_table: The tasks and everything that belongs to one of them.
        passes: Runner of the backbone with its adapters.
        lengths: Maximum numbers of tokens; longer texts are truncated.
        hidden_size: Size d of the backbone's hidden states.
        text_to_text: Whether the backbone generates its answers as text instead of having task heads.
        backbone_name: Name on the Hub or folder of the backbone; None if it was passed in memory and has no name.
        fingerprint: Fingerprints of the backbone's weights.
        lock: Lock that is held while the model is run or changed. Hold it during several calls that belong together.
            Threads can share a model: they take turns.
        folder: Last local checkpoint directory that the model was saved to or loaded from.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tasks: Sequence[Task],
        config: ModelConfig | None = None,
        backbone_name: str | None = None,
        lengths: Lengths | None = None,
    ) -> None:
        """Inject adapters into a backbone. If an error is raised, the backbone has not changed.

        Args:
            backbone: Transformers model of a supported architecture; for encoders the plain model without a task head.
            tasks: At least one task. Their order determines the task ids.
            config: Method, sizes and preset. Default: `ModelConfig()`.
            backbone_name: Name by which a checkpoint finds the backbone. Default: its `name_or_path`.
            lengths: Maximum numbers of tokens; longer texts are truncated. Default: 128 tokens of input, or fewer if
                the backbone has fewer positions.

        Raises:
            BackboneError: If the architecture is not supported, a module is missing, or the backbone does not compute
                on one device.
            TaskError: If there is no task, two tasks have the same name, or a task does not fit the backbone.
            RecipeError: If a setting does not fit the backbone.
        """
        super().__init__()
        planned = plan(backbone, tasks, config, lengths)
        self.adapter_config, self.lengths, self._architecture = planned.config, planned.lengths, planned.architecture
        self.hidden_size, self.text_to_text = self._architecture.hidden_size, self.kind != "encoder"
        name = backbone_name or str(getattr(backbone, "name_or_path", ""))
        self.backbone_name = absolute_name(name) if name else None
        self.fingerprint = BackboneFingerprint.of(backbone)
        self.lock = threading.RLock()
        self.folder: Path | None = None
        self._merged: Merged | None = None
        # The order of the parts is the order of the random draws and of the parameters in an optimizer.
        self.method: Method = make_method(
            planned.config, len(planned.tasks), planned.num_layers, self.hidden_size, adapter_tensors(planned)
        )
        self.shared_adapters = make_shared_adapters(planned)
        self.unused_adapters = make_unused_adapters(planned)
        self.heads = make_heads(planned)
        self.task_table = TaskTable(planned.tasks, self._architecture, self.method, self.heads)
        self.backbone = backbone
        self.passes = make_runner(backbone, self._architecture, planned.config, planned.linears, self.shared_adapters)
        if self.device != planned.device:  # parameters without values, as in a `MemoryTrace`, cannot be moved
            self.to(planned.device)

    @classmethod
    def from_backbone(
        cls,
        name: str,
        tasks: Sequence[Task],
        preset: str | None = None,
        dtype: Dtype | None = None,
        max_length: int | None = None,
        max_target_length: int | None = None,
        **settings: Any,
    ) -> HyperAdapterModel:
        """Load a backbone and make a model with fresh adapters. The errors are those of `HyperAdapterModel`.

        Args:
            name: Name of the backbone on the Hub, or a folder.
            tasks: At least one task. Their order determines the task ids.
            preset: Name of a preset; see `ModelConfig`.
            dtype: Floating-point type of the backbone's weights. Default: the type in its files. Trained parameters are
                always in float32.
            max_length: Maximum number of tokens of an input; longer texts are truncated. Default: 128, or fewer if the
                backbone has fewer positions.
            max_target_length: Maximum number of tokens of a target text and of a generated text. Default: 32.
            **settings: Other settings of `ModelConfig`.

        Returns:
            The model.
        """
        config = parse(ModelConfig, {"preset": preset, **settings})
        given = {"max_length": max_length, "max_target_length": max_target_length}
        given = {name: length for name, length in given.items() if length is not None}
        lengths = parse(DataConfig, given, where="from_backbone").lengths if given else None
        return cls(load_backbone(name, config.modules, dtype), tasks, config, backbone_name=name, lengths=lengths)

    # Checkpoints

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        backbone: nn.Module | None = None,
        revision: str | None = None,
        token: str | None = None,
        dtype: Dtype | None = None,
    ) -> HyperAdapterModel:
        """Load a checkpoint, and its backbone unless one is given.

        Args:
            name_or_folder: Folder of the checkpoint, or a name on the Hub such as "user/name" if there is no folder of
                that name.
            backbone: Backbone to load the checkpoint into. Default: the backbone is loaded by its name.
            revision: Branch, tag or commit on the Hub. Default: the main branch.
            token: Token for the Hub. Default: the token of `hf auth login`.
            dtype: Floating-point type of a backbone that is loaded. Default: the type in its files.

        Returns:
            The model, in evaluation mode.

        Raises:
            CheckpointError: If the checkpoint is missing, damaged, of a newer format or of another backbone, or if the
                Hub does not provide it.
        """
        from hyperadapters.checkpoints.format import load_model
        from hyperadapters.checkpoints.hub import find_checkpoint

        folder = find_checkpoint(name_or_folder, revision, token)
        model = load_model(folder, backbone, dtype)
        model.folder = folder if folder == Path(name_or_folder) else None
        return model

    @_exclusive
    def save_pretrained(
        self,
        folder: str | Path,
        license: str | None = None,
        scores: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    ) -> None:
        """Save a checkpoint (the trained parameters and the tasks, not the backbone) and its model card, README.md.

        A README.md that was not written by this library, or has been edited since, is kept.

        Args:
            folder: Folder to write to.
            license: License for the card by its name on the Hub, such as "apache-2.0". Default: the license of the card
                that is replaced.
            scores: Scores for the card, by task, split and metric. Default: the scores in the folder's `metrics.json`.

        Raises:
            OutputError: If the folder cannot be written.
        """
        from hyperadapters.checkpoints.card import read_scores, write_card
        from hyperadapters.checkpoints.format import save_model

        path = Path(folder)
        warn_of_unfitted_heads(self.heads, self.tasks)
        save_model(self, path)
        self.folder = path
        write_card(self, path, str(folder), license, read_scores(path) if scores is None else scores)

    @_exclusive
    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        license: str | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload a checkpoint and its model card to the Hugging Face Hub.

        The arguments, result and errors are those of `checkpoints.hub.push`.
        """
        from hyperadapters.checkpoints.hub import push

        return push(self, repo_id, private, token, license, commit_message, revision, create_pr)

    # Properties

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks of the model in the order of their ids."""
        return self.task_table.tasks

    @property
    def kind(self) -> BackboneKind:
        """Kind of the backbone: "encoder", "encoder-decoder" or "decoder"."""
        return self._architecture.kind

    @property
    def device(self) -> torch.device:
        """Device of the trained parameters, on which the backbone computes."""
        return next(self.method.parameters()).device

    @property
    def pha(self) -> PHA:
        """Method of the model, if it is "pha".

        Raises:
            TaskError: If the model has another method.
        """
        if not isinstance(self.method, PHA):
            raise TaskError(f"expected a model of method 'pha', found method '{self.adapter_config.method}'")
        return self.method

    @property
    def max_tokens(self) -> int:
        """Maximum sequence length: the maximum number of tokens of an input, for decoders plus that of a target."""
        return self.lengths.input + (self.lengths.target if self.kind == "decoder" else 0)

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the backbone, loaded on first access. It can be modified or replaced.

        A checkpoint contains the tokenizer if it differs from the one that is loaded by the name of the backbone.

        Raises:
            BackboneError: If it cannot be loaded, or the backbone has no name.
        """
        if self.backbone_name is None:
            raise BackboneError(
                "the backbone was passed in memory and has no name by which its tokenizer could be loaded; set "
                "model.tokenizer"
            )
        return load_tokenizer(self.backbone_name)

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer has been set, or the backbone has a name by which one can be loaded."""
        return self.backbone_name is not None or "tokenizer" in vars(self)

    @property
    def collator(self) -> Collator:
        """Collator that makes batches for this model."""
        return self.collator_of(self.tasks)

    def collator_of(self, tasks: Sequence[Task]) -> Collator:
        """Return a collator that makes batches for this model, but of other tasks.

        Args:
            tasks: Tasks in the order of their ids.
        """
        limit = num_embeddings(self.backbone)
        return make_collator(self.kind, self.tokenizer, tasks, self.lengths.input, self.lengths.target, limit)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickling and copying: everything except the lock, which belongs to this object."""
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.RLock()

    # Forward

    @_exclusive
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        output_hidden_states: bool = False,
        route: Route = "nearest",
        lower_output: LowerOutput | None = None,
        frozen_output: FrozenOutput | None = None,
        prompt_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        processes: Processes = ONE_PROCESS,
    ) -> HyperAdapterOutput:
        """Run a batch of one task or of several tasks.

        Args:
            input_ids: Token ids [B, S].
            attention_mask: Mask [B, S], 1 for tokens and 0 for padding. Default: there is no padding.
            task_ids: Id of the task of each row [B]. Default: the most similar task, if the method can route.
            labels: For task heads, label indices or numbers [B], or [B, C] with rows of multi-label tasks (see
                `data.collate.EncoderCollator`). For encoder-decoders, token ids [B, T] with -100 for padding. For
                decoders, token ids [B, S] of the input and its answer, -100 except for the answer.
            token_type_ids: Token type ids [B, S], for encoders that have them.
            decoder_input_ids: Token ids [B, T], for encoder-decoders. Default: the labels, shifted to the right.
            label_smoothing: Share of the target distribution that is uniform, in the task loss. Default: 0.
            reduction: "mean" (default) or "sum" over rows or target tokens, in the task loss.
            output_hidden_states: Whether to return the backbone's hidden states. Default: False.
            route: Adapters of rows if there are no `task_ids`. "nearest" (default) gives each row those of its most
                similar task, "soft" those generated from a mixture of the prototypes, weighted by similarity. In both
                cases the head is that of the most similar task, and so is the adapter if this task has its own.
            lower_output: Result of `forward_lower_layers` for the same inputs, which saves its computation.
            frozen_output: Result of `forward_frozen_layers` for the same inputs, which saves its computation.
            prompt_mask: Mask [B, S] for decoders, 1 for the tokens of the input without its answer, which the retriever
                reads. Default: the tokens before the first label, or all tokens if there are no labels.
            sequence_ids: For encoders whose heads read each text of a pair: 0 for tokens of the first text, 1 for
                tokens of the second text, and -1 for special tokens and padding [B, S], as made by `collator`. Default:
                derived from `token_type_ids`, if these are 1 for the second text. With the setting `head_inputs`
                "adapted_texts", the rows with a 1 are pairs.
            processes: Processes that share the batch, whose gradients are averaged; see `core.processes`. Default: this
                one only.

        Returns:
            Logits, and the losses if there are `labels`.

        Raises:
            TaskError: If an input has a wrong shape or type; if `input_ids`, `task_ids` or `labels` are out of range;
                if `task_ids` are missing, but there are labels or the method cannot route; or if a head reads each text
                of a pair and no argument distinguishes the texts.
        """
        inputs = prepare_inputs(self.kind, input_ids, attention_mask, token_type_ids, prompt_mask, sequence_ids)
        self._check_task_ids(task_ids, len(input_ids), labels is not None)
        self._check_texts(inputs, task_ids)
        limit = num_embeddings(self.backbone)
        check_token_ids("input_ids", input_ids, limit)
        if labels is not None:
            assert task_ids is not None
            check_labels(labels, input_ids, task_ids, self.tasks, self.kind, limit)
            check_loss_settings(label_smoothing, reduction)
            if prompt_mask is None and self.kind == "decoder":
                inputs["prompt_mask"] = before_labels(labels) * inputs["attention_mask"]
        if decoder_input_ids is None:
            decoder_input_ids = self.passes.default_decoder_input_ids(labels)
        inputs = self._sequences(inputs)
        embeddings = partial(self._embeddings, inputs)
        excluded = self._tasks_of_other_inputs(inputs)
        selector = BatchSelector(self.method, task_ids, route, sequence_rows(inputs), embeddings, excluded)
        read = inputs
        if self.training and self.adapter_config.token_dropout:
            if lower_output is None and frozen_output is None:
                frozen_output = self.passes.forward_frozen_layers(inputs)
            read = mask_tokens(inputs, self.adapter_config.token_dropout)
        output, lower_output = self.passes.run_batch(
            read, selector, decoder_input_ids, output_hidden_states, lower_output, frozen_output
        )
        task_ids = selector.selected
        if self.heads is None:
            logits = output.logits
        else:
            known = None if lower_output is None else lower_output.head_features
            features = self.read_features(inputs, selector.features, task_ids) if known is None else known
            logits = self.heads(self._plain_head_inputs(output, read), features, task_ids)
        losses = task_loss = None
        if labels is not None:
            task_loss = self.task_loss(logits, labels, task_ids, label_smoothing, reduction, processes)
            losses = objective(self.method, task_loss.value, selector.instances, task_ids, processes)
        own_states = getattr(output, "hidden_states", None)
        return HyperAdapterOutput(
            loss=None if losses is None else losses.total,
            losses=losses,
            task_loss=task_loss,
            logits=logits,
            instances=selector.instances,
            similarity=selector.similarity,
            task_ids=task_ids,
            encoder_hidden_states=own_states if self.heads else lower_output.hidden_states if lower_output else None,
            decoder_hidden_states=getattr(output, "decoder_hidden_states", None if self.heads else own_states),
        )

    def task_loss(
        self,
        logits: Tensor,
        labels: Tensor,
        task_ids: Tensor,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        processes: Processes = ONE_PROCESS,
    ) -> TaskLoss:
        """Compute the task loss.

        Args:
            logits: Logits as returned by `forward`.
            labels: Labels of the rows; see `forward`.
            task_ids: Id of the task of each row [B].
            label_smoothing: Share of the target distribution that is uniform. Default: 0.
            reduction: "mean" (default) or "sum" over rows or target tokens.
            processes: Processes that share the batch. Default: this one only.
        """
        if self.heads is not None:
            rows = self.heads.loss(logits, labels, task_ids, label_smoothing, reduction="none")
            value = processes.sum(rows.sum()) if reduction == "sum" else processes.mean(rows.mean(), len(rows))
            return TaskLoss(value, rows.detach(), torch.ones_like(task_ids))
        config: Any = self.backbone.config
        padding_id = config.pad_token_id if self.adapter_config.preset == "official" else None
        predicts_next = self.kind == "decoder"
        return text_loss(
            logits,
            labels,
            label_smoothing,
            reduction,
            predicts_next=predicts_next,
            padding_id=padding_id,
            processes=processes,
        )

    def training_loss(
        self, batch: Mapping[str, Tensor], reduction: Reduction = "mean", label_smoothing: float = 0.1
    ) -> Losses:
        """Compute the objective of a batch: the total, the task loss and both contrastive losses.

        Args:
            batch: Arguments of `forward`, with `task_ids` and `labels`.
            reduction: "mean" (default) or "sum" over rows or target tokens, in the task loss.
            label_smoothing: Share of the target distribution that is uniform, in the task loss. Default: 0.1.
        """
        losses: Losses = self(**batch, reduction=reduction, label_smoothing=label_smoothing).losses
        return losses

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        route: Route = "nearest",
        lower_output: LowerOutput | None = None,
        **options: Any,
    ) -> Any:
        """Generate token ids with the `generate` method of the backbone, each row with the adapters of its task.

        The layers below the adapters, the retriever and the hypernetwork run once for each input, independent of the
        length of the answer and the number of beams. Inputs of a decoder can be padded on either side; the result
        begins with the inputs, padded on the left, as in transformers.

        Args:
            input_ids: Token ids [B, S].
            attention_mask: Mask [B, S], 1 for tokens and 0 for padding. Default: there is no padding.
            task_ids: Id of the task of each row [B]. Default: the most similar task, if the method can route.
            route: Adapters of rows if there are no `task_ids`; see `forward`.
            lower_output: Result of `forward_lower_layers` for the same inputs, which saves its computation.
            **options: Options of transformers' `generate`.

        Returns:
            The result of transformers' `generate`.

        Raises:
            TaskError: If an input is invalid (see `forward`), or the backbone has task heads and cannot generate.
        """
        return self.generate_with_tasks(input_ids, attention_mask, task_ids, route, lower_output, **options).tokens

    @_exclusive
    @torch.no_grad()
    def generate_with_tasks(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        route: Route = "nearest",
        lower_output: LowerOutput | None = None,
        **options: Any,
    ) -> Generated:
        """Generate token ids, and also return the tasks that were used and the instance vectors.

        The arguments and errors are those of `generate`.
        """
        if not self.text_to_text:
            raise TaskError(
                "generate: expected a backbone that generates its answers as text, found an encoder with task heads; "
                "use forward or predict"
            )
        inputs = prepare_inputs(self.kind, input_ids, attention_mask)
        self._check_task_ids(task_ids, len(input_ids), False)
        check_token_ids("input_ids", input_ids, num_embeddings(self.backbone))
        embeddings = self._embeddings(inputs)  # not in the pass of `generate`, whose rows may be padded or repeated
        selector = BatchSelector(self.method, task_ids, route, embeddings=lambda: embeddings)
        tokens = self.passes.generate(inputs, selector, lower_output, options)
        return Generated(tokens, selector.selected, selector.instances, selector.similarity)

    @_exclusive
    def forward_lower_layers(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        frozen_output: FrozenOutput | None = None,
        prompt_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> LowerOutput:
        """Run the layers below the generated adapters. The arguments and errors are those of `forward`.

        Returns:
            Outputs of these layers, which are the same for every task.
        """
        inputs = prepare_inputs(self.kind, input_ids, attention_mask, token_type_ids, prompt_mask, sequence_ids)
        return self.passes.forward_lower_layers(self._sequences(inputs), frozen_output=frozen_output)

    @_exclusive
    def forward_frozen_layers(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> FrozenOutput:
        """Run the layers below all trained parameters. The arguments and errors are those of `forward`.

        Returns:
            Outputs of these layers, which do not change during training.
        """
        inputs = prepare_inputs(self.kind, input_ids, attention_mask, token_type_ids, prompt_mask, sequence_ids)
        return self.passes.forward_frozen_layers(self._sequences(inputs))

    def sequences(self, inputs: Inputs) -> dict[str, Tensor]:
        """Return the sequences that pass through the backbone for a batch.

        They are the rows of the batch, unless the setting `head_inputs` is "adapted_texts". Each text of a pair is then
        a sequence of its own, as described in `text_features.separate_texts`. The hidden states in the results of
        `forward_frozen_layers` and `forward_lower_layers` are those of these sequences.

        Args:
            inputs: Arguments of `forward_lower_layers`, by name.
        """
        return self._sequences(prepare_inputs(self.kind, **inputs))

    def _sequences(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return separate_texts(inputs) if self.adapter_config.separates_texts else inputs

    def _check_texts(self, inputs: Inputs, task_ids: Tensor | None) -> None:
        """Raise TaskError if the texts of pairs are to be separated, but nothing distinguishes them."""
        if not self.adapter_config.separates_texts or "sequence_ids" in inputs:
            return
        is_pair: Tensor | bool = any(task.is_pair for task in self.tasks)
        if task_ids is not None:
            is_pair = torch.tensor([self.tasks[task_id].is_pair for task_id in task_ids.tolist()]).to(task_ids.device)
        elif "token_type_ids" in inputs:
            return
        sequence_ids_of(inputs["attention_mask"], is_pair, None, inputs.get("token_type_ids"))

    @property
    def has_frozen_layers(self) -> bool:
        """Whether there are layers below all trained parameters, so that their outputs can be cached."""
        return self.passes.has_frozen_layers

    def instance_vectors(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> Tensor:
        """Compute the instance vectors [B, p] of a batch. The arguments are those of `forward`.

        Raises:
            TaskError: If the method has no retriever.
        """
        output = self.forward_lower_layers(input_ids, attention_mask, token_type_ids, sequence_ids=sequence_ids)
        vectors = self.method.instance_vectors(output.pooled)
        if vectors is None:
            raise TaskError(f"method '{self.adapter_config.method}' has no retriever and therefore no instance vectors")
        return vectors

    @_exclusive
    def density_features(self, inputs: Inputs) -> Tensor:
        """Compute the features [B, n, d] of a batch that `core.TaskDensities` reads.

        Args:
            inputs: Arguments of `forward_lower_layers`, by name.
        """
        sequences = self.sequences(inputs)
        pooled = self.passes.forward_lower_layers(sequences).pooled
        return density_features(pooled, self.passes.pool_embeddings(sequences))

    @_exclusive
    def task_similarity(self, inputs: Inputs, frozen_output: FrozenOutput | None = None) -> Tensor:
        """Compute the similarities [B, T] of a batch to the tasks, by which it is routed.

        Args:
            inputs: Arguments of `forward_lower_layers`, by name.
            frozen_output: Result of `forward_frozen_layers` for the same inputs, which saves its computation.

        Raises:
            TaskError: If the method cannot route.
        """
        method, sequences = self.pha, self.sequences(inputs)
        pooled = self.passes.forward_lower_layers(sequences, frozen_output=frozen_output).pooled
        features = density_features(pooled, self._embeddings(sequences))
        return method.similarity(method.instance_vectors(pooled), features, self._tasks_of_other_inputs(sequences))

    def _tasks_of_other_inputs(self, sequences: Inputs) -> Tensor | None:
        """Return whether a task reads single texts, but a row is a pair of texts, or the other way round [B, T].

        Returns:
            The tasks that are excluded from routing; none of them for a row that would have no task then. None if the
            model does not separate the texts of a pair.
        """
        if not self.adapter_config.separates_texts:
            return None
        reads_pairs = self.task_table.read_pairs(self.device)
        rows = len(sequences["input_ids"]) - len(sequences.get("pair_rows", ()))
        is_pair = sequences["is_pair"].bool() if "is_pair" in sequences else reads_pairs.new_zeros(rows)
        excluded = is_pair[:, None] != reads_pairs
        return excluded & ~excluded.all(dim=1, keepdim=True)

    def _embeddings(self, inputs: Inputs) -> Tensor | None:
        """Compute the pooled input of the first layer [B, d] if routing reads it."""
        routes_by_densities = isinstance(self.method, PHA) and self.method.routes_by_densities
        return self.passes.pool_embeddings(inputs) if routes_by_densities else None

    @_exclusive
    def head_inputs(
        self,
        inputs: Inputs,
        task_ids: Tensor,
        lower_output: LowerOutput | None = None,
        frozen_output: FrozenOutput | None = None,
    ) -> Tensor:
        """Compute what plain heads read from rows with the adapters of given tasks.

        With the setting `head_inputs` "adapted_texts", these are the features of `text_features.text_features` [B, F],
        but of texts that are encoded with adapters. Otherwise they are the pooled last hidden states [B, d]. Gradients
        reach all parameters that the adapters depend on.

        Args:
            inputs: Arguments of `forward_lower_layers`, by name.
            task_ids: Id of the task of each row [B].
            lower_output: Result of `forward_lower_layers` for the same inputs, which saves its computation.
            frozen_output: Result of `forward_frozen_layers` for the same inputs, which saves its computation.

        Raises:
            TaskError: If the backbone has no task heads, or an argument is invalid (see `forward`).
        """
        if self.heads is None:
            raise TaskError("head_inputs: expected an encoder with task heads, found a backbone that generates text")
        prepared = prepare_inputs(self.kind, **inputs)
        self._check_task_ids(task_ids, len(prepared["input_ids"]), False)
        self._check_texts(prepared, task_ids)
        sequences = self._sequences(prepared)
        selector = BatchSelector(self.method, task_ids, rows=sequence_rows(sequences), reports_similarity=False)
        output, _ = self.passes.run_batch(sequences, selector, lower_output=lower_output, frozen_output=frozen_output)
        return self._plain_head_inputs(output, sequences)

    def _plain_head_inputs(self, output: Any, sequences: Inputs) -> Tensor:
        """Compute the inputs of plain heads from the output of the backbone for the sequences of a batch."""
        pooled = pool(output, sequences)
        return compare_texts(pooled, sequences) if self.adapter_config.separates_texts else pooled

    @_exclusive
    def head_features(self, inputs: Inputs, pooled: Tensor, is_pair: Sequence[bool] | bool) -> Tensor:
        """Compute the features [B, F] that heads read besides the adapted hidden states. No adapter changes them.

        With the setting `head_inputs` "adapted_texts", heads do not read them. They are what `head_inputs` would be for
        the frozen backbone.

        Args:
            inputs: Arguments of `forward_lower_layers`, by name.
            pooled: Pooled hidden states that the retriever reads [B, d]. They are only used if the setting
                `head_inputs` is "adapted".
            is_pair: Whether each row is a pair of texts, or one value for all rows, which torch can export.
        """
        head_inputs = self.adapter_config.head_inputs
        if head_inputs == "adapted":
            return pooled
        pairs = is_pair if isinstance(is_pair, bool) else torch.tensor(is_pair, device=inputs["input_ids"].device)
        return self.passes.text_features(prepare_inputs(self.kind, **inputs), pairs, head_inputs != "text_features")

    def read_features(self, inputs: Inputs, pooled: Tensor, task_ids: Tensor) -> Tensor:
        """Compute the `head_features` of a batch, or return zeros if all weights for them are still zero.

        Args:
            inputs: Arguments of `forward_lower_layers`, by name.
            pooled: Pooled hidden states that the retriever reads [B, d].
            task_ids: Id of the task of each row [B], which determines whether the row is a pair of texts.

        Returns:
            Features [B, F].
        """
        assert self.heads is not None
        if self.adapter_config.head_inputs != "adapted" and not self.task_table.head_features_are_read:
            return pooled.new_zeros(len(pooled), self.heads.features_size)
        return self.head_features(inputs, pooled, [self.tasks[task_id].is_pair for task_id in task_ids.tolist()])

    @_exclusive
    def forward_with_adapter(
        self,
        inputs: Inputs,
        weights: AdapterWeights,
        lower_output: LowerOutput | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run a batch with the same given adapter for every row. For encoders, torch can export this method.

        Args:
            inputs: Arguments of `forward_lower_layers`, by name.
            weights: Adapter of one task [L, 1, ...].
            lower_output: Result of `forward_lower_layers` for the same inputs, which saves its computation.
            decoder_input_ids: Token ids [B, T], for encoder-decoders.

        Returns:
            Inputs of plain heads (see `head_inputs`) of encoders or logits [B, S, V] of text-to-text backbones, and the
            pooled hidden states that the retriever reads [B, d].
        """
        inputs = self.sequences(inputs)
        rows = inputs["input_ids"]
        features = []

        def choose(pooled: Tensor) -> BatchState:
            features.append(pooled)
            return BatchState(weights, Grouping.of(rows.new_zeros(rows.shape[0]), 1))

        output, _ = self.passes.run_batch(inputs, choose, decoder_input_ids, lower_output=lower_output)
        values: Tensor = output.logits if self.text_to_text else self._plain_head_inputs(output, inputs)
        return values, features[0]

    def _check_task_ids(self, task_ids: Tensor | None, rows: int, has_labels: bool) -> None:
        check_task_ids(task_ids, rows, len(self.tasks), has_labels)
        if task_ids is None:
            self.method.check_can_route()
        if self._merged is not None and (task_ids is None or bool((task_ids != self._merged.task_id).any())):
            raise TaskError(
                f"task '{self.tasks[self._merged.task_id].name}' is merged into the backbone, so the model cannot "
                "compute other tasks: pass its task id for every row, or call unmerge()"
            )

    # Texts

    @overload
    def predict(
        self,
        texts: Iterable[Any],
        task: str | None = None,
        batch_size: int = 64,
        *,
        decline: bool = True,
        max_error: float | None = None,
    ) -> list[Prediction]: ...

    @overload
    def predict(
        self,
        texts: Iterable[Any],
        task: None = None,
        batch_size: int = 64,
        *,
        tasks: Sequence[str] | Literal["*"],
        max_error: float | None = None,
    ) -> list[list[Prediction]]: ...

    def predict(
        self,
        texts: Iterable[Any],
        task: str | None = None,
        batch_size: int = 64,
        *,
        tasks: Sequence[str] | Literal["*"] | None = None,
        decline: bool = True,
        max_error: float | None = None,
    ) -> list[Prediction] | list[list[Prediction]]:
        """Predict the answers to texts. `Predictor` does the same for streams of any length.

        Args:
            texts: Strings, pairs of strings, or rows with the columns `text`, `text_pair` and `task` (a list of
                mappings, a DataFrame or a `datasets.Dataset`).
            task: Name of the task of all texts. Default: the task that a row names, or the most similar task for rows
                that name none.
            batch_size: Number of rows in a batch. Default: 64.
            tasks: Names of several tasks that are answered for each text, or "*" for all tasks that read such texts;
                see `Predictor.predict_tasks`. Default: each text is answered for one task.
            decline: Whether texts that name no task and are not similar to any are declined; see `Predictor`.
                Default: True.
            max_error: Maximum share of wrong answers of each task; texts for which this is not supported are not
                answered, see `Predictor`. Default: all texts are answered.

        Returns:
            Predictions in the order of the texts. With `tasks`, a list of predictions for each text.

        Raises:
            DataError: If a text has an unsupported type or does not fit its task.
            TaskError: If the task is unknown, a row has no task and the method cannot route, or both `task` and `tasks`
                are given.
        """
        from hyperadapters.inference.predictor import Predictor

        predictor = Predictor(self, batch_size, decline=decline, max_error=max_error)
        if tasks is None:
            return list(predictor(texts, task=task))
        if task is not None:
            raise TaskError("task and tasks: expected one of them, found both; remove one")
        return list(predictor.predict_tasks(texts, tasks))

    def predict_proba(self, texts: Iterable[Any], task: str, batch_size: int = 64) -> np.ndarray[Any, Any]:
        """Predict the probabilities [N, C] of the labels of a classification or multi-label task.

        The arguments, result and errors are those of `inference.predictor.label_probabilities`.
        """
        from hyperadapters.inference.predictor import label_probabilities

        return label_probabilities(self, texts, task, batch_size)

    def encode(self, texts: Iterable[Any], batch_size: int = 64) -> np.ndarray[Any, Any]:
        """Compute the instance vectors [N, p] of texts, which cluster by task.

        The arguments, result and errors are those of `inference.routing.encode_texts`.
        """
        from hyperadapters.inference.routing import encode_texts

        return encode_texts(self, texts, batch_size)

    def route(self, texts: Iterable[Any], batch_size: int = 64) -> list[RoutingResult]:
        """Find the task of each text. The arguments, result and errors are those of `inference.routing.route`."""
        from hyperadapters.inference.routing import route

        return route(self, texts, batch_size)

    def to_pipeline(self, task: str, **options: Any) -> TaskPipeline:
        """Return a task as a text classification pipeline of transformers.

        The arguments, result and errors are those of `interop.pipeline.to_pipeline`.
        """
        from hyperadapters.interop.pipeline import to_pipeline

        return to_pipeline(self, task, **options)

    # Tasks

    def task_id(self, name: str) -> int:
        """Return the id of a task. The arguments and errors are those of `TaskTable.id_of`."""
        return self.task_table.id_of(name)

    @_exclusive
    def add_task(
        self,
        task: Task,
        examples: Iterable[Any] = (),
        fit: Fit | None = None,
        init: Literal["nearest", "mixture", "mean_instance", "random"] = "nearest",
        k_per_label: int | None = None,
        max_steps: int | None = None,
        seed: int = 0,
    ) -> FitReport:
        """Add a task to a trained model from a few examples, or from its labels alone.

        The arguments, result and errors are those of `fewshot.add_task.add_task`.
        """
        from hyperadapters.fewshot.add_task import add_task

        return add_task(self, task, examples, fit, init, k_per_label, max_steps, seed)

    @_exclusive
    def refit_task(
        self,
        name: str,
        examples: Iterable[Any],
        fit: Fit | None = None,
        init: Literal["nearest", "mixture", "mean_instance", "random", "current"] = "current",
        k_per_label: int | None = None,
        max_steps: int | None = None,
        seed: int = 0,
    ) -> FitReport:
        """Fit an existing task again, for example to more examples.

        The arguments, result and errors are those of `fewshot.add_task.refit_task`.
        """
        from hyperadapters.fewshot.add_task import refit_task

        return refit_task(self, name, examples, fit, init, k_per_label, max_steps, seed)

    @_exclusive
    def remove_task(self, name: str) -> None:
        """Remove a task. The arguments and errors are those of `TaskTable.remove`."""
        self._check_not_merged()
        self.task_table.remove(name)

    @_exclusive
    def rename_task(self, name: str, new_name: str) -> None:
        """Give a task another name. The arguments and errors are those of `TaskTable.rename`."""
        self._check_not_merged()
        self.task_table.rename(name, new_name)

    @_exclusive
    def calibrate(
        self,
        data: Mapping[str, Any],
        foreign: Iterable[Any] | None = None,
        false_decline_rate: float = 0.05,
        false_accept_rate: float | None = None,
        batch_size: int = 64,
    ) -> CalibrationReport:
        """Calibrate thresholds of routing, probabilities and error bounds on rows that were not used for training.

        The arguments, result and errors are those of `training.calibration.calibrate_model`.
        """
        from hyperadapters.training.calibration import calibrate_model

        self._check_not_merged()
        return calibrate_model(self, data, foreign, false_decline_rate, false_accept_rate, batch_size)

    def check_tasks(self, tasks: Sequence[Task]) -> None:
        """Check that this model can have tasks. The arguments and errors are those of `TaskTable.check`."""
        self._check_not_merged()
        self.task_table.check(tasks)

    @_exclusive
    def fit_heads(
        self, train_data: Mapping[str, Any], eval_data: Mapping[str, Any] | None = None, batch_size: int = 64
    ) -> None:
        """Fit the heads of a trained model to the features of texts by regularised regressions.

        This is the last step of training if heads read such features, as with the preset "plus" (`head_inputs` other
        than "adapted"). `Trainer.train` calls it. Call it at the end of a training loop of your own, because otherwise
        the heads only read the adapted hidden states, or remain those of the training loop with "adapted_texts".

        The arguments and errors are those of `training.text_heads.fit_heads`.
        """
        from hyperadapters.training.text_heads import fit_heads

        self._check_not_merged()
        fit_heads(self, train_data, eval_data, batch_size)

    # Form "lora"

    def adapted_linears(self) -> list[AdaptedLinear]:
        """Return the linear layers of the backbone that form "lora" changes; none for another form."""
        return self.passes.adapted_linears()

    def task_loras(self, task: str) -> dict[str, Lora]:
        """Return the low-rank changes of a task, by the paths of the backbone's linear layers.

        Args:
            task: Name of the task.

        Raises:
            TaskError: If the task is unknown, the adapters have another form, or the method has no adapters of tasks.
        """
        return task_loras(self.method, self.task_id(task), self.adapted_linears(), self.shared_adapters)

    @property
    def is_merged(self) -> bool:
        """Whether the LoRA of a task is merged into the backbone's weights."""
        return self._merged is not None

    @_exclusive
    def merge(self, task: str) -> None:
        """Merge the LoRA of a task into the backbone's weights. Until `unmerge`, the model only computes this task.

        The backbone then computes the task without any adapters, and `detach` returns it with the merged weights. The
        model is switched to evaluation mode.

        Args:
            task: Name of the task.

        Raises:
            TaskError: If the task has no LoRA (see `task_loras`), a task is already merged, or parts of the model also
                read the frozen backbone without adapters.
            BackboneError: If a weight is quantised, offloaded, or shared with another module of the backbone.
        """
        self._check_not_merged()
        loras = self.task_loras(task)
        check_can_merge(task, self.adapter_config, self.task_table.head_features_are_read)
        self._merged = Merged(self.eval().backbone, self.task_id(task), loras)
        self.passes.set_merged(True)

    @_exclusive
    def unmerge(self) -> None:
        """Restore the backbone's weights bit for bit.

        Raises:
            TaskError: If no task is merged.
        """
        if self._merged is None:
            raise TaskError("no task is merged")
        self._merged.undo()
        self._merged = None
        self.passes.set_merged(False)

    def _check_not_merged(self) -> None:
        if self._merged is not None:
            raise TaskError(f"task '{self.tasks[self._merged.task_id].name}' is merged: call unmerge() first")

    # Parameters and modes

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return all parameters and buffers except those of the backbone, by name."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}

    @_exclusive
    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set all parameters and buffers except those of the backbone.

        Args:
            state: Result of `adapter_state_dict`.

        Raises:
            KeyError: If a name is missing or unknown.
            ValueError: If a tensor has another shape.
        """
        copy_state(self.adapter_state_dict(), state)
        self.task_table.changed()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the model; called by `to`, `half`, `double` and similar methods."""
        backbone = self._modules.pop("backbone")
        assert backbone is not None
        try:
            super()._apply(partial(convert_parameter, fn), recurse)
        finally:
            self._modules["backbone"] = backbone
        convert_backbone(backbone, fn)
        return self

    def num_trainable_parameters(self) -> int:
        """Return the number of parameters that training changes."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation mode. Layers below all trained parameters stay in evaluation mode.

        Their outputs do not depend on a trained parameter, so dropout in these layers would not regularise anything.

        Args:
            mode: True (default) for training mode, False for evaluation mode.

        Returns:
            The model itself.

        Raises:
            TaskError: If `mode` is True and a task is merged.
        """
        if mode:
            self._check_not_merged()
        super().train(mode)
        self.passes.keep_frozen_in_evaluation()
        return self

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Enable gradient checkpointing of the backbone's layers, always of the non-reentrant kind.

        `transformers.Trainer` calls this method.

        Args:
            activation_checkpointing_kwargs: Keyword arguments of `torch.utils.checkpoint.checkpoint`.
            **options: Other options of the method of the same name of transformers' models.
        """
        self.passes.enable_checkpointing(activation_checkpointing_kwargs or {}, options)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile each layer of the backbone. A change of the task does not cause recompilation.

        The selection of tasks is not compiled, because the computation depends on its result.

        Args:
            *args: Positional arguments of `torch.compile`.
            **options: Keyword arguments of `torch.compile`.
        """
        self.passes.compile(*args, **options)

    def adapters_disabled(self) -> AbstractContextManager[None]:
        """Return a context in which `model.backbone(...)` computes the outputs of the backbone without adapters.

        Raises:
            TaskError: If a task is merged into the backbone.
        """
        self._check_not_merged()
        return self.passes.disabled()

    @_exclusive
    def detach(self) -> nn.Module:
        """Remove all adapters from the backbone. The model cannot be used afterwards.

        Returns:
            The backbone exactly as it was before, except that the weights of a merged task stay merged.
        """
        return self.passes.detach()
