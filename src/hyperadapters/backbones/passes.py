"""A backbone with adapters in it: the passes through it, in whole and in part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from hyperadapters.backbones.active import ActiveAdapters, BatchState
from hyperadapters.backbones.architectures import LinearSize, ResolvedArchitecture
from hyperadapters.backbones.injection import Injection, parameter_name
from hyperadapters.backbones.text_features import sequence_ids_of, text_features
from hyperadapters.config import ModelConfig
from hyperadapters.core import AdapterWeights, masked_mean
from hyperadapters.errors import TaskError

Inputs = Mapping[str, Tensor]
"""Arguments of `HyperAdapterModel.encode`: `input_ids`, `attention_mask`, and what else the backbone has."""


class LowerOutput(NamedTuple):
    """What the layers below the generated adapters make of a batch; it is the same for every task.

    Attributes:
        hidden: input of the first layer with generated adapters, or output of an encoder-decoder's encoder [B, S, d].
        pooled: what the retriever reads [B, d], float32.
        hidden_states: of an encoder-decoder's encoder, if asked for.
        head_features: see `HyperAdapterModel.head_features` [B, F]; None where they are not known yet.
    """

    hidden: Tensor
    pooled: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    head_features: Tensor | None = None


class FrozenOutput(NamedTuple):
    """What the layers below everything trained make of a batch; it stays the same through training.

    Attributes:
        hidden: input of the first layer with an adapter, or output of a wholly frozen encoder [B, S, d].
        pooled: what the retriever reads [B, d], float32; None where layers with adapters come before it.
        head_features: see `HyperAdapterModel.head_features` [B, F]; None where they are not known yet.
    """

    hidden: Tensor
    pooled: Tensor | None
    head_features: Tensor | None = None


class AdaptedLinear(NamedTuple):
    """A linear layer of the backbone that form "lora" changes.

    Attributes:
        path: in the backbone.
        layer: number of its layer among those with adapters in its stack.
        name: part of the names of its tensors.
        is_shared: whether its change is learned once for all tasks, not generated.
    """

    path: str
    layer: int
    name: str
    is_shared: bool


class _PrefixDoneError(Exception):
    """Raised by a hook to leave a forward whose upper layers are not needed."""


class PassRunner:
    """Runs a backbone that adapters were put into. Not a module: the parameters belong to the model."""

    def __init__(
        self,
        backbone: nn.Module,
        architecture: ResolvedArchitecture,
        config: ModelConfig,
        linears: Sequence[dict[str, LinearSize]],
        shared: nn.ModuleList,
    ) -> None:
        """Freeze the backbone and put adapters in.

        Args:
            backbone: changed in place, until `detach`.
            architecture: found in it.
            config: placed on the backbone (see `placement.place`).
            linears: see `Injection`.
            shared: learned adapters, one for each layer of the shared stack; empty for none.
        """
        self.backbone: Any = backbone
        self.is_one_pass = architecture.kind != "encoder-decoder" and config.features == "layer"
        self._reads_whole_pass = config.features == "backbone"
        self._architecture, self._has_feed_forward_adapters = architecture, config.form == "bottleneck"
        num_frozen = (config.feature_layer or 0) if architecture.shared is None else config.frozen_encoder_layers
        self._linears = linears
        self._lowest, self._below = architecture.lowest, tuple(architecture.lowest.layers[:num_frozen])
        self._outside = _modules_outside(backbone, architecture.lowest.row.layers)
        self._active = ActiveAdapters()
        self._is_checkpointing = False
        self._injection: Injection | None = Injection(
            backbone, architecture, num_frozen, linears, shared, self._active, config
        )

    @property
    def _has_encoder(self) -> bool:
        return self._architecture.kind == "encoder-decoder"

    def adapted_linears(self) -> list[AdaptedLinear]:
        """The linear layers that form "lora" changes."""
        found = []
        for stack, linears in zip(
            (self._architecture.generated, self._architecture.shared), self._linears, strict=True
        ):
            if stack is not None:
                first = len(self._below) if stack is self._lowest else 0
                found += [
                    AdaptedLinear(
                        f"{stack.row.layers}.{index}.{path}",
                        index - first,
                        parameter_name(path),
                        stack is self._architecture.shared,
                    )
                    for index in range(first, len(stack.layers))
                    for path in linears
                ]
        return found

    def set_merged(self, is_merged: bool) -> None:
        """Leave all adapters out, while a task's are in the backbone's weights."""
        self._active.is_merged = is_merged

    @property
    def has_frozen_layers(self) -> bool:
        """Whether there are layers below everything trained."""
        return bool(self._below)

    @torch.no_grad()
    def forward_frozen_layers(self, inputs: Inputs) -> FrozenOutput:
        """Run the layers below everything trained, in evaluation mode: dropout there would regularise nothing."""
        self._check_attached()
        entered: list[Tensor] = []

        def on_features(hidden: Tensor) -> None:
            entered.append(hidden)
            if not self._reads_whole_pass:
                raise _PrefixDoneError

        read = None
        with self._active.use(BatchState(enabled=False, on_features=on_features)), evaluating(self.backbone):
            try:
                read = _last_hidden_state(self._encoder(inputs) if self._has_encoder else self._call(inputs))
            except _PrefixDoneError:
                read = None if self._has_encoder else entered[0]
        hidden = entered[0] if entered else read
        assert hidden is not None
        return FrozenOutput(hidden, None if read is None else self._pool(read, inputs))

    @torch.no_grad()
    def text_features(self, inputs: Inputs, is_pair: Tensor | bool, compared: bool) -> Tensor:
        """What the frozen backbone makes of each text by itself [B, F]; see `texts.text_features`."""
        self._check_attached()
        mask = inputs["attention_mask"]
        sequence_ids = sequence_ids_of(mask, is_pair, inputs.get("sequence_ids"), inputs.get("token_type_ids"))

        def encode(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return _last_hidden_state(self.backbone(input_ids=input_ids, attention_mask=attention_mask))

        with self.disabled(), evaluating(self.backbone):
            return text_features(encode, inputs["input_ids"], mask, is_pair, compared, sequence_ids)

    def forward_lower_layers(
        self, inputs: Inputs, output_hidden_states: bool = False, frozen_output: FrozenOutput | None = None
    ) -> LowerOutput:
        """Run what lies below the generated adapters; the layers above are left out where their output is not read.

        `frozen_output` is the result of the method of that name, where it is there already.
        """
        self._check_attached()
        if frozen_output is None and (self._below or not self._has_encoder):
            frozen_output = self.forward_frozen_layers(inputs)
        needs_encoder = self._has_encoder and output_hidden_states
        if frozen_output is not None and frozen_output.pooled is not None and not needs_encoder:
            return LowerOutput(frozen_output.hidden, frozen_output.pooled, None, frozen_output.head_features)
        features = None if frozen_output is None else frozen_output.hidden
        with self._active.use(BatchState(features=features, skips_below=not output_hidden_states)):
            output = self._encoder(inputs, output_hidden_states=output_hidden_states)
        hidden = output.last_hidden_state
        return LowerOutput(hidden, self._pool(hidden, inputs), output.hidden_states)

    def run(self, inputs: Inputs, choose: Callable[[Tensor], BatchState], output_hidden_states: bool = False) -> Any:
        """One pass of one stack: on the way `choose` gets what the retriever reads [B, d] and returns the adapters."""
        self._check_attached()
        with self._active.use(self._choosing(inputs, choose)):
            return self._call(inputs, output_hidden_states)

    def _choosing(self, inputs: Inputs, choose: Callable[[Tensor], BatchState]) -> BatchState:
        """A state that gets its adapters from `choose` when the features are there."""
        state, num_rows = BatchState(), inputs["input_ids"].shape[0]

        def on_features(hidden: Tensor) -> None:
            of_rows = hidden[:: hidden.shape[0] // num_rows]  # `generate` repeats each row for its beams
            chosen = choose(self._pool(of_rows, inputs))
            state.weights, state.grouping = _like(hidden, chosen.weights), chosen.grouping
            state.on_features = None  # a circle of references would keep the weights until the garbage is collected

        state.on_features = on_features
        return state

    def run_upper_layers(
        self,
        inputs: Inputs,
        lower_output: LowerOutput,
        state: BatchState,
        decoder_input_ids: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> Any:
        """Run the layers with generated adapters on the result of `encode`, and return the backbone's output."""
        self._check_attached()
        state.weights = _like(lower_output.hidden, state.weights)
        if self._has_encoder:
            with self._active.use(state):
                return self.backbone(
                    encoder_outputs=BaseModelOutput(lower_output.hidden),
                    attention_mask=inputs["attention_mask"],
                    decoder_input_ids=decoder_input_ids,
                    use_cache=False,
                    output_hidden_states=output_hidden_states,
                )
        state.features, state.skips_below = lower_output.hidden, not output_hidden_states
        with self._active.use(state):
            return self._call(inputs, output_hidden_states)

    def run_batch(
        self,
        inputs: Inputs,
        choose: Any,
        decoder_input_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        lower_output: LowerOutput | None = None,
        frozen_output: FrozenOutput | None = None,
    ) -> tuple[Any, LowerOutput | None]:
        """Run."""
        if self._has_encoder and decoder_input_ids is None:
            raise TaskError("forward of an encoder-decoder needs labels or decoder_input_ids; or use generate")
        if lower_output is None and frozen_output is None and self.is_one_pass:
            return self.run(inputs, choose, output_hidden_states), None
        if lower_output is None or (self._has_encoder and output_hidden_states and lower_output.hidden_states is None):
            lower_output = self.forward_lower_layers(inputs, output_hidden_states, frozen_output)
        state = choose(lower_output.pooled)
        return self.run_upper_layers(inputs, lower_output, state, decoder_input_ids, output_hidden_states), lower_output

    def default_decoder_input_ids(self, labels: Tensor | None) -> Tensor | None:
        """Shift."""
        if labels is None or not self._has_encoder:
            return None
        return self.backbone.prepare_decoder_input_ids_from_labels(labels)

    def generate(
        self,
        inputs: Inputs,
        choose: Callable[[Tensor], BatchState],
        lower_output: LowerOutput | None,
        options: dict[str, Any],
    ) -> Any:
        """Run the backbone's own `generate`.

        Args:
            inputs: of the prompt, or of the encoder.
            choose: see `run`; it is called once.
            lower_output: result of `encode`. A language model does without: its first step reads the whole prompt.
            options: of `generate`.
        """
        self._check_attached()
        self._set_padding(options)
        inputs = inputs if self._has_encoder else _padded_left(inputs)
        if lower_output is None:
            state = self._choosing(inputs, choose)
        else:
            state = choose(lower_output.pooled)
            state.weights = _like(lower_output.hidden, state.weights)
        if not self._has_encoder:
            with self._active.use(state):
                return self.backbone.generate(**inputs, **options)
        assert lower_output is not None
        if self._needs_growing_cache(options):
            options["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with self._active.use(state):
            return self.backbone.generate(
                encoder_outputs=BaseModelOutput(lower_output.hidden), attention_mask=inputs["attention_mask"], **options
            )

    def generates_in_one_pass(self, options: Mapping[str, Any]) -> bool:
        """Whether the first step of `generate` reads the whole prompt, so that it can give the features."""
        configs = (options.get("generation_config"), self.backbone.generation_config)
        in_parts = [options.get("prefill_chunk_size")]
        in_parts += [getattr(config, "prefill_chunk_size", None) for config in configs]
        return self.is_one_pass and "past_key_values" not in options and not any(in_parts)

    def _set_padding(self, options: dict[str, Any]) -> None:
        """Pad with the first token that ends a text where there is no token for padding, as transformers does."""
        configs = (options.get("generation_config"), self.backbone.generation_config)
        if any(getattr(config, "pad_token_id", None) is not None for config in configs):
            return
        ends = options.get("eos_token_id")
        for config in configs:
            ends = getattr(config, "eos_token_id", None) if ends is None else ends
        if ends is not None:
            options.setdefault("pad_token_id", int(torch.as_tensor(ends).flatten()[0]))

    def _needs_growing_cache(self, options: Mapping[str, Any]) -> bool:
        """Transformers makes a cache of as many layers as the encoder has, which a deeper decoder overruns."""
        chosen = options.keys() & {"past_key_values", "cache_implementation"} or not options.get("use_cache", True)
        assert self._architecture.shared is not None
        return not chosen and len(self._architecture.generated.layers) > len(self._architecture.shared.layers)

    def keep_frozen_in_evaluation(self) -> None:
        """Switch dropout off below everything trained, where it would regularise nothing and only take time.

        An encoder-decoder whose lowest encoder layer has an adapter keeps the dropout that it was pretrained with.
        """
        if self._has_encoder and not self._below:
            return
        for layer in self._below:
            layer.eval()
        for layer in self._lowest.layers[len(self._below) :][: int(self._has_feed_forward_adapters)]:
            # In the first layer with an adapter, everything before that.
            parent, _, name = self._lowest.row.feed_forward.rpartition(".")
            for child_name, module in layer.get_submodule(parent).named_children():
                module.train(module.training and child_name == name)
        if not self._has_encoder:
            for module in self._outside:
                module.training = False
        elif len(self._below) == len(self._lowest.layers):
            self.backbone.get_encoder().eval()

    def _call(self, inputs: Inputs, output_hidden_states: bool = False) -> Any:
        """The backbone's forward."""
        options: dict[str, Any] = backbone_inputs(inputs)
        if output_hidden_states:
            options["output_hidden_states"] = True
        if self._architecture.kind == "decoder":
            positions = inputs["attention_mask"].cumsum(dim=1) - 1  # padding on the left moves no token
            options.update(position_ids=positions.clamp(min=0), use_cache=False)
        return self.backbone(**options)

    def _encoder(self, inputs: Inputs, **options: Any) -> Any:
        return self.backbone.get_encoder()(**inputs, **options)

    def _pool(self, hidden: Tensor, inputs: Inputs) -> Tensor:
        """What the retriever reads [B, d]: the mean over the tokens of the prompt, or all."""
        if self._architecture.is_pre_norm:
            hidden = F.layer_norm(hidden.float(), hidden.shape[-1:])
        return masked_mean(hidden, inputs.get("prompt_mask", inputs["attention_mask"]))

    def disabled(self) -> AbstractContextManager[None]:
        """A context in which the backbone runs without adapters."""
        return self._active.use(BatchState(enabled=False))

    def enable_checkpointing(self, settings: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Switch on gradient checkpointing of the backbone's layers, of the non-reentrant kind."""
        kept = {**settings, "use_reentrant": False, "context_fn": self._active.checkpoint_contexts}
        self.backbone.activation_checkpointing_enable(activation_checkpointing_kwargs=kept, **options)
        # transformers makes the embeddings require gradients, for the reentrant kind; it would run the backward pass
        # through layers where nothing is trained.
        self.backbone.disable_input_require_grads()
        self._is_checkpointing = True

    def detach(self) -> nn.Module:
        """Take the adapters out and return the backbone as it was."""
        if self._is_checkpointing:
            self.backbone.activation_checkpointing_disable()
        if self._injection is not None:
            self._injection.restore()
            self._injection = None
        backbone: nn.Module = self.backbone
        return backbone

    def _check_attached(self) -> None:
        if self._injection is None:
            raise RuntimeError("the adapters were detached from this model's backbone; make or load a new model")


def _like(hidden: Tensor, weights: AdapterWeights | None) -> AdapterWeights | None:
    """The weights in the type of the hidden states, at once rather than at each site and decoding step."""
    return None if weights is None else weights.to(hidden.dtype)


def backbone_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """The inputs that a backbone takes, without those that only this library reads."""
    return {name: tensor for name, tensor in inputs.items() if name not in ("prompt_mask", "sequence_ids")}


def pool(output: Any, inputs: Inputs) -> Tensor:
    """Mean of the last hidden states over the real tokens [B, d]."""
    return masked_mean(_last_hidden_state(output), inputs["attention_mask"])


def _last_hidden_state(output: Any) -> Tensor:
    """Of a transformers model's output; a module of one's own may return it as it is."""
    hidden: Tensor = output if isinstance(output, Tensor) else output.last_hidden_state
    return hidden


def _padded_left(inputs: Inputs) -> dict[str, Tensor]:
    """Token ids and attention mask [B, S] with each row's padding moved to its left."""
    mask = inputs["attention_mask"]
    places = mask.argsort(dim=1, stable=True)
    return {"input_ids": inputs["input_ids"].gather(1, places), "attention_mask": mask.gather(1, places)}


def _modules_outside(backbone: nn.Module, path: str) -> list[nn.Module]:
    """The modules that neither are in the one of this path nor hold it."""
    inside = {id(module) for module in backbone.get_submodule(path).modules()}
    return [
        module
        for name, module in backbone.named_modules()
        if name and id(module) not in inside and not f"{path}.".startswith(f"{name}.")
    ]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in evaluation mode; on leaving, each module is put back into its own."""
    was_training = model.training
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():  # one that was made meanwhile takes the model's
            module.training = modes.get(module, was_training)
