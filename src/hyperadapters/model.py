"""HyperAdapterModel: a frozen backbone, and the network that writes an adapter for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from hyperadapters.config import ModelConfig, Task, parse
from hyperadapters.core import (
    BottleneckWeights,
    InstanceRetriever,
    LearnedBottleneck,
    Losses,
    PrototypeTable,
    PrototypicalHypernetwork,
    Reduction,
    instance_contrastive_loss,
    masked_mean,
    prototype_contrastive_loss,
    sequence_loss,
    total_loss,
)
from hyperadapters.errors import BackboneError, TaskError
from hyperadapters.hosts.active import ActiveAdapters, BatchState
from hyperadapters.hosts.backbone import fingerprint, load_backbone, load_tokenizer
from hyperadapters.hosts.heads import TaskHeads
from hyperadapters.hosts.inject import Injection
from hyperadapters.hosts.placement import check_tasks, place
from hyperadapters.hosts.sites import find_sites


@dataclass
class HyperAdapterOutput(ModelOutput):
    """Result of a forward.

    Attributes:
        loss: the total, if labels were given.
        losses: the total and its terms, if labels were given.
        logits: [B, S, V] for text-to-text backbones, [B, C] for heads (see `TaskHeads.forward`).
        instances: instance vectors [B, p].
        task_ids: the tasks used [B]: those given, or those of the nearest prototypes.
        encoder_hidden_states, decoder_hidden_states: the embedding and each layer's output [B, S, d], if asked for.
    """

    loss: Tensor | None = None
    losses: Losses | None = None
    logits: Tensor | None = None
    instances: Tensor | None = None
    task_ids: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None


class _Result(NamedTuple):
    logits: Tensor
    instances: Tensor
    task_ids: Tensor
    encoder_hidden_states: tuple[Tensor, ...] | None
    decoder_hidden_states: tuple[Tensor, ...] | None


class HyperAdapterModel(nn.Module):
    """A frozen backbone with generated adapters, one task or many in a batch.

    Make one with `from_backbone`, load one with `from_pretrained`, or pass a transformers model to the constructor.
    The backbone is changed in place (frozen and wrapped); `detach` gives it back as it was.

    Attributes:
        backbone: the frozen model.
        tasks: the tasks, the index of each being its `task_id`.
        adapter_config: sizes and preset.
        retriever, prototypes, hypernetwork, shared_adapters, heads: the trained parts.
        unused_adapters: of the preset "official" only: what the released code trains and never uses.
        max_length: number of input tokens that the backbone has positions for; None for any.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tasks: Sequence[Task],
        config: ModelConfig | None = None,
        backbone_name: str | None = None,
    ) -> None:
        """Put adapters into a backbone.

        Args:
            backbone: a transformers model of a known architecture; for encoders the plain one, without a task head.
            tasks: at least one; their order fixes the task ids.
            config: sizes and preset.
            backbone_name: under which a checkpoint finds the backbone again; default: the backbone's `name_or_path`.

        Raises:
            BackboneError: unknown architecture, or a module is missing. Nothing has been changed then.
            TaskError: no task, two of one name, a text-to-text task for a backbone with heads, or labels not known.
            RecipeError: a setting does not fit the backbone.
        """
        super().__init__()
        config = config or ModelConfig()
        self._sites = find_sites(backbone)
        self.text_to_text = self._sites.kind == "encoder-decoder"
        self.max_length = self._sites.max_length
        self.tasks = tuple(tasks)
        check_tasks(self.tasks, self._sites)
        self.adapter_config = place(config, self._sites)
        self.backbone_name = backbone_name or str(getattr(backbone, "name_or_path", "")) or None
        self.backbone_fingerprint = fingerprint(backbone)

        width, dim, hidden = self._sites.width, self.adapter_config.prototype_dim, self.adapter_config.hidden_dim
        first_layer = self.adapter_config.feature_layer or 0
        num_sites = len(self._sites.generated.layers) - first_layer
        self.retriever = InstanceRetriever(width, hidden, dim)
        self.prototypes = PrototypeTable(len(self.tasks), dim)
        self.hypernetwork = PrototypicalHypernetwork(num_sites, width, self.adapter_config.adapter_dim, dim, hidden)
        num_shared = len(self._sites.shared.layers) if self._sites.shared else 0
        shared_dim = self.adapter_config.shared_adapter_dim or self.adapter_config.adapter_dim
        self.shared_adapters = nn.ModuleList(LearnedBottleneck(width, shared_dim) for _ in range(num_shared))
        self.unused_adapters = nn.ModuleList()
        if self.adapter_config.preset == "official":
            # The released code allocates, counts, saves and never uses them; its checkpoints hold them.
            self.unused_adapters.extend(
                LearnedBottleneck(width, self.adapter_config.adapter_dim) for _ in range(num_sites)
            )
        self.heads = None if self.text_to_text else TaskHeads(width, self.tasks)

        self._active = ActiveAdapters()
        self._is_checkpointing = False
        self._is_detached = False
        self.backbone = backbone
        self._injection = Injection(
            backbone,
            self._sites,
            first_layer,
            self.shared_adapters,
            self._active,
            self.adapter_config.adapter_norm_input,
        )
        self.to(next(backbone.parameters()).device)

    @classmethod
    def from_backbone(
        cls, name: str, tasks: Sequence[Task], preset: str = "paper", **settings: Any
    ) -> HyperAdapterModel:
        """Load a backbone and make a model with fresh adapters.

        Args:
            name: on the Hub, or a folder.
            tasks: see the constructor.
            preset: "paper" or "official".
            **settings: other settings of `ModelConfig`.

        Raises:
            BackboneError, TaskError, RecipeError: see the constructor.
        """
        config = parse(ModelConfig, {"preset": preset, **settings})
        return cls(load_backbone(name), tasks, config, backbone_name=name)

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: nn.Module | None = None) -> HyperAdapterModel:
        """Load a checkpoint, and its backbone unless one is given.

        Raises:
            CheckpointError: it is missing, damaged, of a newer format, or of another backbone.
        """
        from hyperadapters.checkpoint import load_model

        return load_model(Path(folder), backbone)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint: everything trained and the tasks, nothing of the backbone."""
        from hyperadapters.checkpoint import save_model

        save_model(self, Path(folder))

    @cached_property
    def tokenizer(self) -> Any:
        """The backbone's tokenizer, loaded when first asked for.

        Raises:
            BackboneError: it cannot be loaded, or the backbone has no name to load it by.
        """
        if self.backbone_name is None:
            raise BackboneError("the backbone was given in memory and has no name to find a tokenizer by")
        return load_tokenizer(self.backbone_name)

    # Forward

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
    ) -> HyperAdapterOutput:
        """Run a batch of one task or of several.

        Args:
            input_ids: [B, S].
            attention_mask: 1 for real tokens [B, S]; default: all real.
            task_ids: task of each row [B]; default: the nearest prototype's.
            labels: token ids [B, T] with -100 for padding (text-to-text), or label index or number [B] (heads).
            token_type_ids: [B, S], for encoders that have them.
            decoder_input_ids: [B, T]; default: the labels moved right.
            label_smoothing, reduction: of the task loss.
            output_hidden_states: whether to return the backbone's hidden states.

        Raises:
            TaskError: `task_ids` has a wrong shape or type or is out of range, or labels come without `task_ids`.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self._check_attached()
        self._check_task_ids(task_ids, len(input_ids), labels is not None)
        if self.text_to_text:
            result = self._sequence_forward(
                input_ids, attention_mask, task_ids, labels, decoder_input_ids, output_hidden_states
            )
        else:
            result = self._head_forward(input_ids, attention_mask, task_ids, token_type_ids, output_hidden_states)
        losses = None if labels is None else self._losses(result, labels, label_smoothing, reduction)
        return HyperAdapterOutput(
            loss=None if losses is None else losses.total,
            losses=losses,
            logits=result.logits,
            instances=result.instances,
            task_ids=result.task_ids,
            encoder_hidden_states=result.encoder_hidden_states,
            decoder_hidden_states=result.decoder_hidden_states,
        )

    def training_loss(
        self, batch: Mapping[str, Tensor], reduction: Reduction = "mean", label_smoothing: float = 0.1
    ) -> Losses:
        """The objective for a batch: the total, the task loss and both contrastive terms.

        Args:
            batch: arguments of `forward`, with `task_ids` and `labels`.
            reduction: of the task loss: "mean" or "sum" over target tokens or rows.
            label_smoothing: of the task loss.
        """
        losses: Losses = self(**batch, reduction=reduction, label_smoothing=label_smoothing).losses
        return losses

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Generate with the backbone's `generate`, each row with its task's adapters.

        The encoder, the retriever and the hypernetwork run once, whatever the length and the number of beams.

        Args:
            input_ids, attention_mask, task_ids: as in `forward`.
            **options: of transformers' `generate`.

        Raises:
            TaskError: see `forward`, or the backbone has heads and generates nothing.
        """
        if not self.text_to_text:
            raise TaskError("generate needs a text-to-text backbone; this one has task heads: use forward")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self._check_attached()
        self._check_task_ids(task_ids, len(input_ids), False)
        encoded, instances = self._encode(input_ids, attention_mask)
        task_ids = self.prototypes.nearest(instances) if task_ids is None else task_ids
        if self._needs_growing_cache(options):
            options["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with self._active.use(self._state_for(task_ids)):
            return self.backbone.generate(  # type: ignore[operator]
                encoder_outputs=encoded, attention_mask=attention_mask, **options
            )

    def _needs_growing_cache(self, options: Mapping[str, Any]) -> bool:
        """Transformers makes a cache of as many layers as the encoder has, which a deeper decoder overruns."""
        chosen = options.keys() & {"past_key_values", "cache_implementation"} or not options.get("use_cache", True)
        assert self._sites.shared is not None
        return not chosen and len(self._sites.generated.layers) > len(self._sites.shared.layers)

    def instances(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Instance vectors [B, p], without running the adapted layers' adapters."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self._check_attached()
        if self.text_to_text:
            return self._encode(input_ids, attention_mask)[1]
        found: list[Tensor] = []
        state = BatchState(enabled=False, on_features=found.append)
        with self._active.use(state):
            self.backbone(**_given(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids))
        return self._instances(found[0], attention_mask)

    def _sequence_forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        task_ids: Tensor | None,
        labels: Tensor | None,
        decoder_input_ids: Tensor | None,
        output_hidden_states: bool,
    ) -> _Result:
        if decoder_input_ids is None:
            if labels is None:
                raise TaskError("forward of a text-to-text backbone needs labels or decoder_input_ids; or use generate")
            decoder_input_ids = self.backbone.prepare_decoder_input_ids_from_labels(labels)  # type: ignore[operator]
        encoded, instances = self._encode(input_ids, attention_mask, output_hidden_states)
        task_ids = self.prototypes.nearest(instances) if task_ids is None else task_ids
        with self._active.use(self._state_for(task_ids)):
            output = self.backbone(
                encoder_outputs=encoded,
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                use_cache=False,
                output_hidden_states=output_hidden_states,
            )
        return _Result(output.logits, instances, task_ids, encoded.hidden_states, output.decoder_hidden_states)

    def _encode(
        self, input_ids: Tensor, attention_mask: Tensor, output_hidden_states: bool = False
    ) -> tuple[BaseModelOutput, Tensor]:
        with self._active.use(BatchState()):
            encoded = self.backbone.encoder(  # type: ignore[operator]
                input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=output_hidden_states
            )
        return encoded, self._instances(encoded.last_hidden_state, attention_mask)

    def _head_forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        task_ids: Tensor | None,
        token_type_ids: Tensor | None,
        output_hidden_states: bool,
    ) -> _Result:
        assert self.heads is not None
        instances = torch.empty(0)

        def on_features(hidden: Tensor) -> None:
            nonlocal instances, task_ids
            instances = self._instances(hidden, attention_mask)
            task_ids = self.prototypes.nearest(instances) if task_ids is None else task_ids
            generated = self._state_for(task_ids)
            state.weights, state.rows = generated.weights, generated.rows

        state = BatchState(on_features=on_features)
        with self._active.use(state):
            output = self.backbone(
                **_given(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids),
                output_hidden_states=output_hidden_states,
            )
        assert task_ids is not None
        logits = self.heads(masked_mean(output.last_hidden_state, attention_mask), task_ids)
        return _Result(logits, instances, task_ids, output.hidden_states, None)

    def _instances(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        vectors: Tensor = self.retriever(masked_mean(hidden, attention_mask))
        return vectors

    def _state_for(self, task_ids: Tensor) -> BatchState:
        """Generate the adapters of the distinct tasks of a batch, once each."""
        distinct, rows = task_ids.unique(return_inverse=True)
        weights: BottleneckWeights = self.hypernetwork(self.prototypes(distinct))
        return BatchState(weights, rows)

    def _losses(self, result: _Result, labels: Tensor, label_smoothing: float, reduction: Reduction) -> Losses:
        official = self.adapter_config.preset == "official"
        if self.heads is not None:
            task = self.heads.loss(result.logits, labels, result.task_ids, label_smoothing, reduction)
        else:
            ignored = (-100, self.backbone.config.pad_token_id) if official else (-100,)  # type: ignore[union-attr]
            task = sequence_loss(result.logits, labels, label_smoothing, reduction, ignored, count_ignored=official)  # type: ignore[arg-type]
        instance = instance_contrastive_loss(result.instances, result.task_ids, self.adapter_config.temperature)
        prototype = prototype_contrastive_loss(
            result.instances,
            self.prototypes.weight,
            result.task_ids,
            self.adapter_config.temperature,
            positive_in_denominator=not official,
        )
        return total_loss(task, instance, prototype, self.adapter_config.contrastive_weight)

    def _check_task_ids(self, task_ids: Tensor | None, rows: int, has_labels: bool) -> None:
        if rows == 0:
            raise TaskError("expected at least one row in the batch, found none")
        if task_ids is None:
            if has_labels:
                raise TaskError("labels need task_ids: a loss is not computed for tasks that were guessed")
            return
        if not isinstance(task_ids, Tensor) or task_ids.dtype != torch.long or task_ids.shape != (rows,):
            found = (
                f"{task_ids.dtype} of shape {tuple(task_ids.shape)}" if isinstance(task_ids, Tensor) else repr(task_ids)
            )
            raise TaskError(f"task_ids: expected a LongTensor of shape ({rows},), one task a row; found {found}")
        low, high = int(task_ids.min()), int(task_ids.max())
        if low < 0 or high >= len(self.tasks):
            raise TaskError(
                f"task_ids: expected 0 to {len(self.tasks) - 1} ({len(self.tasks)} tasks), "
                f"found {low if low < 0 else high}"
            )

    def _check_attached(self) -> None:
        if self._is_detached:
            raise RuntimeError("the adapters were detached from this model's backbone; make or load a new model")

    # Parameters and state

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """All parameters and buffers but the backbone's, by name."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}

    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set all parameters and buffers but the backbone's.

        Raises:
            KeyError: a name is missing or unknown.
            ValueError: a tensor has another shape.
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

    def num_trainable_parameters(self) -> int:
        """Number of parameters that training changes."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation mode; layers below the features stay in evaluation mode.

        Their outputs do not depend on anything trained, so there is nothing for dropout to regularise.
        """
        super().train(mode)
        if self.adapter_config.feature_layer is not None:
            self.backbone.get_submodule("embeddings").eval()
            for layer in self._sites.generated.layers[: self.adapter_config.feature_layer]:
                layer.eval()
        return self

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Switch on gradient checkpointing of the backbone's layers, keeping the batch's tasks for recomputation.

        Called by `transformers.Trainer`. Checkpointing is always the non-reentrant kind.
        """
        settings = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False}
        settings["context_fn"] = self._active.checkpoint_contexts
        self.backbone.activation_checkpointing_enable(  # type: ignore[operator]
            activation_checkpointing_kwargs=settings, **options
        )
        # transformers makes the embeddings require gradients, for the reentrant kind; it would run the backward pass
        # through layers where nothing is trained.
        self.backbone.disable_input_require_grads()  # type: ignore[operator]
        self._is_checkpointing = True

    def adapters_disabled(self) -> AbstractContextManager[None]:
        """A context in which `model.backbone(...)` gives the bare backbone's outputs."""
        return self._active.use(BatchState(enabled=False))

    def detach(self) -> nn.Module:
        """Take all adapters out and return the backbone exactly as it was. The model cannot be used afterwards."""
        if self._is_checkpointing:
            self.backbone.activation_checkpointing_disable()  # type: ignore[operator]
        self._is_detached = True
        self._injection.restore()
        return self.backbone


def _given(**arguments: Tensor | None) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if value is not None}
