"""HyperAdapterModel: a frozen backbone and a method that gives each row of a batch the adapters of its task."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from hyperadapters.backbones.active import BatchState
from hyperadapters.backbones.architectures import LinearSize
from hyperadapters.backbones.checks import plan
from hyperadapters.backbones.devices import execution_device, is_offloaded
from hyperadapters.backbones.injection import parameter_name
from hyperadapters.backbones.loading import (
    absolute_name,
    fingerprint,
    is_quantised,
    load_backbone,
    load_tokenizer,
    num_embeddings,
)
from hyperadapters.backbones.passes import AdaptedLinear, FrozenOutput, Inputs, LowerOutput, pool
from hyperadapters.backbones.runners import make_runner
from hyperadapters.backbones.text_features import features_size
from hyperadapters.config import BackboneKind, Dtype, Lengths, ModelConfig, Task, parse
from hyperadapters.core import (
    AdapterWeights,
    Grouping,
    LearnedBottleneck,
    LearnedLora,
    Losses,
    Reduction,
    bottleneck_tensors,
    lora_tensors,
)
from hyperadapters.data.collate import Collator
from hyperadapters.errors import BackboneError, RecipeError, TaskError
from hyperadapters.heads.task_heads import TaskHeads
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
    prepare_inputs,
)
from hyperadapters.model.merging import Lora, Merged, task_loras
from hyperadapters.model.output import Generated, HyperAdapterOutput
from hyperadapters.model.tasks import TaskTable

if TYPE_CHECKING:
    import numpy as np

    from hyperadapters.fewshot.add_task import FitReport
    from hyperadapters.fewshot.fit import Fit
    from hyperadapters.inference.predictor import Prediction
    from hyperadapters.inference.routing import RoutingResult

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _exclusive(method: _Function) -> _Function:
    """Make a method hold the lock of its model."""

    @wraps(method)
    def locked(self: HyperAdapterModel, *args: Any, **options: Any) -> Any:
        with self.lock:
            return method(self, *args, **options)

    return cast(_Function, locked)


class HyperAdapterModel(nn.Module):
    """A frozen backbone whose adapters differ from row to row of a batch, by the row's task.

    Make a model with `from_backbone`, load one with `from_pretrained`, or pass a transformers model to the constructor.
    The backbone is changed in place (frozen, and adapters are injected); `detach` returns it as it was.

    Attributes:
        backbone: The frozen model.
        method: Where adapters come from; holds retriever, prototypes and hypernetwork (see `methods.pha`).
        heads: Task heads of encoder backbones; None for backbones that write their answers.
        shared_adapters: Learned adapters in the encoder of an encoder-decoder, shared by all tasks.
        unused_adapters: Preset "official" only: parameters that the released code trains and never uses.
        adapter_config: Settings, with all defaults resolved.
        task_table: The tasks, and everything that belongs to one of them.
        lengths: Maximum numbers of tokens; longer texts are truncated.
        hidden_size: Size d of the backbone's hidden states.
        text_to_text: Whether the backbone writes its answers instead of having task heads.
        lock: Held while the model is run or changed. Hold it for several calls that belong together. Threads may share
            a model: they take turns.
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
        """Inject adapters into a backbone.

        Args:
            backbone: A transformers model of a known architecture; for encoders the plain model without a task head.
            tasks: At least one task; their order gives the task ids.
            config: Method, sizes and preset.
            backbone_name: Name by which a checkpoint finds the backbone; default: its `name_or_path`.
            lengths: Maximum numbers of tokens, longer texts are truncated; default: 128 tokens of input, or fewer where
                the backbone has fewer positions.

        Raises:
            BackboneError: If the architecture is unknown, or a module is missing. Nothing has been changed then.
            TaskError: If there is no task, two have the same name, or a task does not fit the backbone.
            RecipeError: If a setting does not fit the backbone.
        """
        super().__init__()
        config = ModelConfig() if config is None else config
        if not isinstance(config, ModelConfig) or not isinstance(lengths, Lengths | None):
            wrong = lengths if isinstance(config, ModelConfig) else config
            raise RecipeError(f"expected config as a ModelConfig, and lengths as Lengths; found {wrong!r}")
        planned = plan(backbone, tasks, config, lengths)
        config, architecture, hidden_size = planned.config, planned.architecture, planned.architecture.hidden_size
        self.adapter_config, self.lengths, self.hidden_size = config, planned.lengths, hidden_size
        self._architecture = architecture
        self.text_to_text = architecture.kind != "encoder"
        name = backbone_name or str(getattr(backbone, "name_or_path", ""))
        self.backbone_name = absolute_name(name) if name else None
        self.backbone_fingerprint = fingerprint(backbone)
        self.backbone_fingerprint_float16 = fingerprint(backbone, torch.float16)
        self.lock = threading.RLock()
        self.folder: Path | None = None
        self._merged: Merged | None = None
        self._is_compiled = False

        tensors = bottleneck_tensors(hidden_size, config.adapter_dim)
        if config.form == "lora":
            tensors = lora_tensors(_by_parameter(planned.linears.generated), config.lora_rank)
        num_tasks, num_layers = len(planned.tasks), planned.num_layers
        self.method: Method = make_method(config, num_tasks, num_layers, hidden_size, tensors)
        shared_dim = config.shared_adapter_dim or config.adapter_dim
        self.shared_adapters = nn.ModuleList(
            LearnedBottleneck(hidden_size, shared_dim)
            if config.form == "bottleneck"
            else LearnedLora(_by_parameter(planned.linears.shared), config.lora_rank)
            for _ in range(planned.num_shared)
        )
        self.unused_adapters = nn.ModuleList()
        if config.preset == "official":
            # The released code allocates, counts, saves and never uses them; its checkpoints hold them.
            self.unused_adapters.extend(LearnedBottleneck(hidden_size, config.adapter_dim) for _ in range(num_layers))
        self.heads = None if self.text_to_text else _make_heads(hidden_size, planned.tasks, config)
        self.task_table = TaskTable(planned.tasks, architecture, self.method, self.heads)
        self.backbone = backbone
        self.passes = make_runner(backbone, architecture, config, planned.linears, self.shared_adapters)
        self.to(planned.device)

    @classmethod
    def from_backbone(
        cls,
        name: str,
        tasks: Sequence[Task],
        preset: str | None = None,
        dtype: Dtype | None = None,
        max_length: int | None = None,
        **settings: Any,
    ) -> HyperAdapterModel:
        """Load a backbone and make a model with fresh adapters.

        Args:
            name: Name on the Hub, or a folder.
            tasks: See the constructor.
            preset: See `ModelConfig`.
            dtype: Type of the backbone's weights; default: that of its files. Trained parameters are float32.
            max_length: Maximum number of tokens of an input, longer texts are truncated; default: see the constructor.
            **settings: Other settings of `ModelConfig`.

        Raises:
            BackboneError: If see the constructor.
            TaskError: If see the constructor.
            RecipeError: If see the constructor.
        """
        config = parse(ModelConfig, {"preset": preset, **settings})
        lengths = None if max_length is None else parse(Lengths, {"input": max_length})
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
            name_or_folder: A folder; or a name on the Hub, such as "user/name", if there is no folder of that name.
            backbone: The backbone to load the checkpoint into.
            revision: Branch, tag or commit on the Hub.
            token: Token for the Hub; default: that of `hf auth login`.
            dtype: Type of the weights of a backbone that is loaded; default: that of its files.

        Raises:
            CheckpointError: If the checkpoint is missing, damaged, of a newer format or of another backbone; or the Hub
                does not provide it.
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
        """Write a checkpoint (trained parameters and tasks, nothing of the backbone) and its model card, README.md.

        A README.md that the library did not write, or that was changed since, is kept.

        Args:
            folder: Folder to write to.
            license: License for the card by its name on the Hub, such as "apache-2.0"; default: that of the card that
                is replaced.
            scores: Scores for the card, by task, split and metric; default: those of the folder's `metrics.json`.

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
        """Upload a checkpoint and its model card to the Hugging Face Hub, in one commit that replaces the last one.

        The card has the scores of the `metrics.json` in the model's `folder`. A README.md that somebody wrote or
        changed takes precedence over the generated one: that in `folder`, or else that on the Hub.

        Args:
            repo_id: Name such as "user/name"; the repository is created if it does not exist.
            private: Whether a new repository is private; default: the owner's default.
            token: Token for the Hub; default: that of `hf auth login`.
            license: See `save_pretrained`.
            commit_message: Message of the commit.
            revision: Branch to commit to; default: main.
            create_pr: Whether to propose the commit as a pull request.

        Returns:
            The address of the commit.

        Raises:
            OutputError: If the Hub cannot be reached, or refuses the commit.
        """
        from hyperadapters.checkpoints.hub import push

        return push(self, repo_id, private, token, license, commit_message, revision, create_pr)

    def refresh_fingerprint(self) -> bool:
        """Compute the fingerprints of the backbone again if its weights have changed.

        Another floating-point type is not a change, and neither is a merged task or quantisation with torchao.

        Returns:
            Whether the weights have changed.
        """
        if self._merged is not None or is_quantised(self.backbone):
            return False
        found = fingerprint(self.backbone), fingerprint(self.backbone, torch.float16)
        if found[0] == self.backbone_fingerprint or found[1] == self.backbone_fingerprint_float16:
            return False
        self.backbone_fingerprint, self.backbone_fingerprint_float16 = found
        return True

    # Properties

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks; the index of a task is its id."""
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
        """The parts of method "pha".

        Raises:
            TaskError: If the model has another method.
        """
        if not isinstance(self.method, PHA):
            raise TaskError(f"expected a model of method 'pha', found method '{self.adapter_config.method}'")
        return self.method

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a row in the first stack of layers: the input, in decoders with its answer."""
        return self.lengths.input + (self.lengths.target if self.kind == "decoder" else 0)

    @cached_property
    def tokenizer(self) -> Any:
        """The backbone's tokenizer, loaded on first access; it can be changed, or another one be set.

        A checkpoint contains it if it differs from the tokenizer that the backbone's name leads to.

        Raises:
            BackboneError: If it cannot be loaded, or the backbone has no name to load it by.
        """
        if self.backbone_name is None:
            raise BackboneError(
                "the backbone was given in memory and has no name to find a tokenizer by; set model.tokenizer"
            )
        return load_tokenizer(self.backbone_name)

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer was set, or the backbone has a name to load one by."""
        return self.backbone_name is not None or "tokenizer" in vars(self)

    @property
    def collator(self) -> Collator:
        """A collator that makes batches for this model."""
        return self.collator_of(self.tasks)

    def collator_of(self, tasks: Sequence[Task]) -> Collator:
        """Return a collator that makes batches for this model, with other tasks than its own."""
        limit = num_embeddings(self.backbone)
        return Collator(self.tokenizer, tasks, self.kind, self.lengths.input, self.lengths.target, limit)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled and copied: everything except the lock, which belongs to this object."""
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
    ) -> HyperAdapterOutput:
        """Run a batch of one task or of several.

        Args:
            input_ids: Token ids [B, S].
            attention_mask: 1 for real tokens, 0 for padding [B, S]; default: all tokens are real.
            task_ids: Task of each row [B]; default: the most similar task, if the method can route.
            labels: For task heads, indices of labels or numbers [B]; for encoder-decoders, token ids [B, T] with -100
                for padding; for decoders, token ids [B, S] of the input with its answer, -100 except for the answer.
            token_type_ids: [B, S], for encoders that have them.
            decoder_input_ids: [B, T], for encoder-decoders; default: the labels shifted to the right.
            label_smoothing: Share of the target distribution that is uniform, for the task loss.
            reduction: "mean" or "sum" over rows or target tokens, for the task loss.
            output_hidden_states: Whether to return the backbone's hidden states.
            route: Adapters of rows without `task_ids`: "nearest" for those of the most similar task, "soft" for those
                generated from a mixture of the prototypes, weighted by similarity. The head, and an adapter that a task
                has of its own, are the most similar task's in both cases.
            lower_output: Result of `forward_lower_layers` for the same inputs, to save its computation.
            frozen_output: Result of `forward_frozen_layers` for the same inputs, to save its computation.
            prompt_mask: For decoders: 1 for the tokens of the input without its answer [B, S], which the retriever
                reads; default: the tokens before the first label, or all.
            sequence_ids: For encoders whose heads read each text of a pair: 0 for tokens of the first text, 1 for
                those of the second, -1 for special tokens and padding [B, S], as `collator` makes them; default:
                derived from `token_type_ids`, where these are 1 for the second text.

        Raises:
            TaskError: If an input has a wrong shape or type, or `input_ids`, `task_ids` or `labels` are out of range;
                `task_ids` is missing where labels are given or the method cannot route; or a head reads the texts of
                pairs, and no argument tells these apart.
        """
        inputs = prepare_inputs(self.kind, input_ids, attention_mask, token_type_ids, prompt_mask, sequence_ids)
        self._check_task_ids(task_ids, len(input_ids), labels is not None)
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
        selector = _Selector(self.method, task_ids, route)
        output, lower_output = self.passes.run_batch(
            inputs, selector, decoder_input_ids, output_hidden_states, lower_output, frozen_output
        )
        task_ids = selector.selected
        if self.heads is None:
            logits = output.logits
        else:
            known = None if lower_output is None else lower_output.head_features
            features = self._features_of(inputs, selector.features, task_ids) if known is None else known
            logits = self.heads(pool(output, inputs), features, task_ids)
        losses = None
        if labels is not None:
            task_loss = self.task_loss(logits, labels, task_ids, label_smoothing, reduction)
            losses = objective(self.method, task_loss, selector.instances, task_ids)
        own_states = getattr(output, "hidden_states", None)
        return HyperAdapterOutput(
            loss=None if losses is None else losses.total,
            losses=losses,
            logits=logits,
            instances=selector.instances,
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
    ) -> Tensor:
        """Compute the task loss of logits; the arguments are those of `forward`."""
        if self.heads is not None:
            return self.heads.loss(logits, labels, task_ids, label_smoothing, reduction)
        padding_id = self.backbone.config.pad_token_id if self.adapter_config.preset == "official" else None  # type: ignore[union-attr]
        predicts_next = self.kind == "decoder"
        return text_loss(
            logits,
            labels,
            label_smoothing,
            reduction,
            predicts_next=predicts_next,
            padding_id=padding_id,  # type: ignore[arg-type]
        )

    def training_loss(
        self, batch: Mapping[str, Tensor], reduction: Reduction = "mean", label_smoothing: float = 0.1
    ) -> Losses:
        """Compute the objective of a batch.

        Args:
            batch: Arguments of `forward`, with `task_ids` and `labels`.
            reduction: "mean" or "sum" over target tokens or rows, for the task loss.
            label_smoothing: Share of the target distribution that is uniform, for the task loss.

        Returns:
            The total, the task loss and both contrastive losses.
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
        """Generate with the backbone's `generate`, each row with its task's adapters.

        The layers below the features, the retriever and the hypernetwork run once for each input, whatever the length
        of the answer and the number of beams. Inputs of a decoder may be padded on either side; the result begins with
        the inputs, padded on the left, as in transformers.

        Args:
            input_ids: See `forward`.
            attention_mask: See `forward`.
            task_ids: See `forward`.
            route: See `forward`.
            lower_output: See `forward`.
            **options: Options of transformers' `generate`.

        Returns:
            The result of transformers' `generate`.

        Raises:
            TaskError: If see `forward`; or the backbone has task heads and cannot generate.
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
        """Generate as `generate` does, and return the tasks and the instance vectors too."""
        if not self.text_to_text:
            raise TaskError("generate needs a backbone that writes its answers; this one has task heads: use forward")
        inputs = prepare_inputs(self.kind, input_ids, attention_mask)
        self._check_task_ids(task_ids, len(input_ids), False)
        check_token_ids("input_ids", input_ids, num_embeddings(self.backbone))
        selector = _Selector(self.method, task_ids, route)
        tokens = self.passes.generate(inputs, selector, lower_output, options)
        return Generated(tokens, selector.selected, selector.instances)

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
        """Run the layers below the generated adapters, whose output is the same for every task.

        The arguments are those of `forward`.
        """
        inputs = prepare_inputs(self.kind, input_ids, attention_mask, token_type_ids, prompt_mask, sequence_ids)
        return self.passes.forward_lower_layers(inputs, frozen_output=frozen_output)

    @_exclusive
    def forward_frozen_layers(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> FrozenOutput:
        """Run the layers below everything that is trained; the arguments are those of `forward`."""
        inputs = prepare_inputs(self.kind, input_ids, attention_mask, token_type_ids, prompt_mask, sequence_ids)
        return self.passes.forward_frozen_layers(inputs)

    @property
    def has_frozen_layers(self) -> bool:
        """Whether there are layers below everything that is trained, so that their output can be cached."""
        return self.passes.has_frozen_layers

    def instance_vectors(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> Tensor:
        """Compute the instance vectors [B, p] of a batch; the arguments are those of `forward`.

        Raises:
            TaskError: If the method has no retriever.
        """
        output = self.forward_lower_layers(input_ids, attention_mask, token_type_ids, sequence_ids=sequence_ids)
        vectors = self.method.instance_vectors(output.pooled)
        if vectors is None:
            raise TaskError(f"method '{self.adapter_config.method}' has no instance vectors")
        return vectors

    @_exclusive
    def head_features(self, inputs: Inputs, pooled: Tensor, is_pair: Sequence[bool] | bool) -> Tensor:
        """Compute the features that heads read besides the adapted hidden states; no adapter changes them.

        Args:
            inputs: Arguments of `forward_lower_layers`.
            pooled: Pooled hidden states that the retriever reads [B, d]; used with `head_inputs: adapted` only.
            is_pair: Which rows are pairs of texts; or whether all rows are, which makes the function exportable.

        Returns:
            [B, F].
        """
        head_inputs = self.adapter_config.head_inputs
        if head_inputs == "adapted":
            return pooled
        pairs = is_pair if isinstance(is_pair, bool) else torch.tensor(is_pair, device=inputs["input_ids"].device)
        return self.passes.text_features(prepare_inputs(self.kind, **inputs), pairs, head_inputs == "pair_features")

    def _features_of(self, inputs: Inputs, pooled: Tensor, task_ids: Tensor) -> Tensor:
        """`head_features` of a batch [B, F]; zeros where no head has weights for them yet."""
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
        """Run a batch with the same given adapter for every row. torch can export it for encoders.

        Args:
            inputs: Arguments of `forward_lower_layers`.
            weights: Adapter of one task [L, 1, ...].
            lower_output: See `forward`.
            decoder_input_ids: [B, T], for encoder-decoders.

        Returns:
            Pooled last hidden states [B, d], or logits of a text-to-text backbone, as in `forward`; and the pooled
            hidden states that the retriever reads [B, d].
        """
        inputs = prepare_inputs(self.kind, **inputs)
        rows = inputs["input_ids"]
        features = []

        def choose(pooled: Tensor) -> BatchState:
            features.append(pooled)
            return BatchState(weights, Grouping.of(rows.new_zeros(rows.shape[0]), 1))

        output, _ = self.passes.run_batch(inputs, choose, decoder_input_ids, lower_output=lower_output)
        values: Tensor = output.logits if self.text_to_text else pool(output, inputs)
        return values, features[0]

    def _check_task_ids(self, task_ids: Tensor | None, rows: int, has_labels: bool) -> None:
        check_task_ids(task_ids, rows, len(self.tasks), has_labels)
        if task_ids is None:
            self.method.check_can_route()
        if self._merged is not None and (task_ids is None or bool((task_ids != self._merged.task_id).any())):
            raise TaskError(
                f"task '{self.tasks[self._merged.task_id].name}' is merged into the backbone, which answers for no "
                "other one: give its task id for every row, or call unmerge()"
            )

    # Texts

    def predict(self, texts: Iterable[Any], task: str | None = None, batch_size: int = 64) -> list[Prediction]:
        """Predict the answers to texts.

        `Predictor` does the same for streams of any length.

        Args:
            texts: Strings, pairs of strings, or rows with the columns `text`, `text_pair` and `task` (a list of
                mappings, a DataFrame, a `datasets.Dataset`).
            task: Name of the task of rows that do not name one; default: such rows are routed to the most similar task.
            batch_size: Number of rows in a batch.

        Returns:
            A prediction for each text, in their order.

        Raises:
            DataError: If a text has another type, or does not fit its task.
            TaskError: If the task is unknown, or a row has no task and the method cannot route.
        """
        from hyperadapters.inference.predictor import Predictor

        return list(Predictor(self, batch_size)(texts, task=task))

    def predict_proba(self, texts: Iterable[Any], task: str, batch_size: int = 64) -> np.ndarray[Any, Any]:
        """Predict the probabilities of the labels of a classification task.

        Args:
            texts: See `predict`.
            task: Name of the task.
            batch_size: Number of rows in a batch.

        Returns:
            [N, C] in float32, the columns in the order of the task's labels.

        Raises:
            DataError: If see `predict`.
            TaskError: If the task is unknown or has no probabilities.
        """
        from hyperadapters.inference.predictor import label_probabilities

        return label_probabilities(self, texts, task, batch_size)

    def encode(self, texts: Iterable[Any], batch_size: int = 64) -> np.ndarray[Any, Any]:
        """Compute the instance vectors of texts, which cluster by task.

        Args:
            texts: See `predict`.
            batch_size: Number of rows in a batch.

        Returns:
            [N, p] in float32.

        Raises:
            DataError: If a text has another type.
            TaskError: If the method has no retriever.
        """
        from hyperadapters.inference.routing import encode_texts

        return encode_texts(self, texts, batch_size)

    def route(self, texts: Iterable[Any], batch_size: int = 64) -> list[RoutingResult]:
        """Find the task of each text; see `inference.routing.route`."""
        from hyperadapters.inference.routing import route

        return route(self, texts, batch_size)

    # Tasks

    def task_id(self, name: str) -> int:
        """Return the id of a task.

        Raises:
            TaskError: If there is none of this name.
        """
        return self.task_table.id_of(name)

    @_exclusive
    def add_task(
        self,
        task: Task,
        examples: Iterable[Any],
        fit: Fit = "adapter",
        init: Literal["nearest", "mixture", "mean_instance", "random"] = "nearest",
        k_per_label: int | None = None,
        max_steps: int | None = None,
        seed: int = 0,
    ) -> FitReport:
        """Add a task from a handful of examples; see `fewshot.add_task.add_task`."""
        from hyperadapters.fewshot.add_task import add_task

        return add_task(self, task, examples, fit, init, k_per_label, max_steps, seed)

    @_exclusive
    def refit_task(
        self,
        name: str,
        examples: Iterable[Any],
        fit: Fit = "adapter",
        init: Literal["nearest", "mixture", "mean_instance", "random", "current"] = "current",
        k_per_label: int | None = None,
        max_steps: int | None = None,
        seed: int = 0,
    ) -> FitReport:
        """Fit a task again, to other examples for instance; see `fewshot.add_task.refit_task`."""
        from hyperadapters.fewshot.add_task import refit_task

        return refit_task(self, name, examples, fit, init, k_per_label, max_steps, seed)

    @_exclusive
    def remove_task(self, name: str) -> None:
        """Remove a task. The ids of the tasks after it decrease by one; their outputs stay as they are.

        Raises:
            TaskError: If it is unknown, or the last one, or the method's tasks cannot change.
        """
        self._check_not_merged()
        self.task_table.remove(name)

    @_exclusive
    def rename_task(self, name: str, new_name: str) -> None:
        """Give a task another name; nothing else changes.

        Raises:
            TaskError: If it is unknown, or the new name is taken or not a valid one.
        """
        self._check_not_merged()
        self.task_table.rename(name, new_name)

    def check_tasks(self, tasks: Sequence[Task]) -> None:
        """Raise TaskError unless this model can have these tasks."""
        self._check_not_merged()
        self.task_table.check(tasks)

    @_exclusive
    def fit_heads(
        self, train_data: Mapping[str, Any], eval_data: Mapping[str, Any] | None = None, batch_size: int = 64
    ) -> None:
        """Fit the heads of a trained model to features of its frozen backbone, where they are to read these.

        That is the last step of training with the preset "plus" (`head_inputs` other than "adapted"). `Trainer.train`
        does it; a training loop of your own has to end with it, or else the heads read the adapted hidden states alone.

        Args:
            train_data: Data of each task by its name: a list of mappings with the keys `text`, `text_pair` and `label`,
                a DataFrame, a `datasets.Dataset`, a map-style dataset of PyTorch whose items are such mappings, or a
                list of `Example`.
            eval_data: The same, of some or all tasks; they decide how much the fitted and the trained head count.
            batch_size: Number of rows in a batch.

        Raises:
            DataError: If the data are wrong; the message names task and row.
            TaskError: If the model has no such heads, or a task is unknown.
            NotFiniteError: If the features of a row are not finite.
            ValueError: If the heads have been fitted already.
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

        Raises:
            TaskError: If the task is unknown, adapters have another form, or the method has no adapters of tasks.
        """
        task_id = self.task_id(task)
        if self.adapter_config.form != "lora":
            raise TaskError(
                "the adapters of this model are bottlenecks, which have a ReLU and are no change of the backbone's "
                "weights; train a model with form 'lora' for that"
            )
        weights = self.method.adapters(torch.tensor([task_id], device=self.device))
        return task_loras(self.adapted_linears(), weights, self.shared_adapters, self.adapter_config.lora_scale)

    @_exclusive
    def merge(self, task: str) -> None:
        """Merge the LoRA of one task into the backbone's weights; until `unmerge` the model answers for it alone.

        The backbone is then the task's model, without any adapters: `detach` returns it as it is. The model is put
        into evaluation mode.

        Raises:
            TaskError: If see `task_loras`; or a task is merged, or the task's head also reads the unchanged backbone.
            BackboneError: If a weight is quantised, or also used elsewhere in the backbone.
        """
        self._check_not_merged()
        loras, task_id = self.task_loras(task), self.task_id(task)
        config = self.adapter_config
        reads_texts = config.head_inputs != "adapted" and self.task_table.head_features_are_read
        if reads_texts or config.features == "backbone":
            setting = "head_inputs" if reads_texts else "features"
            raise TaskError(
                f"task '{task}' cannot be merged: with {setting} '{getattr(config, setting)}' the model also reads the "
                "frozen backbone by itself, which merged weights would change; train with preset 'paper' and features "
                "'layer' for that"
            )
        self._merged = Merged(self.eval().backbone, task_id, loras)
        self.passes.set_merged(True)

    @_exclusive
    def unmerge(self) -> None:
        """Put the backbone's weights back, bit for bit.

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
        """Return all parameters and buffers except the backbone's, by name."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}

    @_exclusive
    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set all parameters and buffers except the backbone's.

        Raises:
            KeyError: If a name is missing or unknown.
            ValueError: If a tensor has another shape.
        """
        own = self.adapter_state_dict()
        if own.keys() != state.keys():
            raise KeyError(f"expected and found names differ in {sorted(own.keys() ^ state.keys())}")
        for name, value in state.items():
            if own[name].shape != value.shape:
                raise ValueError(f"'{name}': expected shape {tuple(own[name].shape)}, found {tuple(value.shape)}")
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)
        self.task_table.changed()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the model, for `to`, `half`, `double` and the like.

        Trained parameters are never converted to less than float32, in which small steps of an optimizer would be lost.

        Raises:
            BackboneError: If accelerate has offloaded weights of the backbone, and it would have to be moved.
        """
        backbone = self._modules.pop("backbone")
        assert backbone is not None
        try:
            super()._apply(partial(_at_least_float32, fn), recurse)
        finally:
            self._modules["backbone"] = backbone
        if not is_offloaded(backbone):
            backbone._apply(fn, recurse)
            return self
        probe = torch.empty(0, device=execution_device(backbone), dtype=next(backbone.parameters()).dtype)
        if (fn(probe).device, fn(probe).dtype) != (probe.device, probe.dtype):
            raise BackboneError(
                "the backbone cannot be moved or converted, since accelerate has offloaded weights of it; load it anew "
                "with another device_map or dtype"
            )
        return self

    def num_trainable_parameters(self) -> int:
        """Return the number of parameters that training changes."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation mode; layers below the features stay in evaluation mode.

        Their outputs do not depend on anything that is trained, so dropout would not regularise anything there.

        Raises:
            TaskError: `mode` is True while a task is merged.
        """
        if mode:
            self._check_not_merged()
        super().train(mode)
        self.passes.keep_frozen_in_evaluation()
        return self

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Enable gradient checkpointing of the backbone's layers, which keeps the batch's tasks for recomputation.

        `transformers.Trainer` calls it. Checkpointing is always of the non-reentrant kind.
        """
        self.passes.enable_checkpointing(activation_checkpointing_kwargs or {}, options)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile each layer of the backbone, with the arguments of `torch.compile`.

        A change of the task does not recompile. The selection of tasks is not compiled: its result decides what is
        computed.
        """
        self._is_compiled = True
        for layer in self._layers():
            layer.compile(*args, **options)

    def adapters_disabled(self) -> AbstractContextManager[None]:
        """Return a context in which `model.backbone(...)` gives the outputs of the backbone without adapters.

        Raises:
            TaskError: If a task is merged into the backbone.
        """
        self._check_not_merged()
        return self.passes.disabled()

    @_exclusive
    def detach(self) -> nn.Module:
        """Remove all adapters and return the backbone exactly as it was; a merged task stays in its weights.

        The model cannot be used afterwards.
        """
        if self._is_compiled:
            for layer in self._layers():
                layer._compiled_call_impl = None
        return self.passes.detach()

    def _layers(self) -> list[nn.Module]:
        stacks = (self._architecture.generated, self._architecture.shared)
        return [layer for stack in stacks if stack is not None for layer in stack.layers]


class _Selector:
    """Selects the tasks and adapters of a batch as soon as its features are there.

    Attributes:
        features: Pooled hidden states that the retriever reads [B, d].
        instances: Instance vectors [B, p]; None for a method without a retriever.
        selected: The tasks that were selected [B].
    """

    features: Tensor
    selected: Tensor
    instances: Tensor | None = None

    def __init__(self, method: Method, task_ids: Tensor | None, route: Route) -> None:
        self._method, self._task_ids, self._route = method, task_ids, route

    def __call__(self, features: Tensor) -> BatchState:
        self.features, self.instances = features, self._method.instance_vectors(features)
        self.selected, weights, grouping = self._method.select(self._task_ids, self.instances, self._route)
        return BatchState(weights, grouping)


def _at_least_float32(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply a conversion to a tensor, but to float32 instead of a shorter floating-point type."""
    converted = fn(tensor)
    if not tensor.is_floating_point() or converted.dtype == tensor.dtype:
        return converted
    return tensor.to(converted.device, torch.promote_types(converted.dtype, torch.float32))


def _by_parameter(linears: Mapping[str, LinearSize]) -> dict[str, LinearSize]:
    return {parameter_name(path): size for path, size in linears.items()}


def _make_heads(hidden_size: int, tasks: Sequence[Task], config: ModelConfig) -> TaskHeads:
    if config.head_inputs == "adapted":
        return TaskHeads(hidden_size, tasks)
    size = features_size(hidden_size, config.head_inputs == "pair_features")
    return TaskHeads(hidden_size, tasks, [True] * len(tasks), size)
