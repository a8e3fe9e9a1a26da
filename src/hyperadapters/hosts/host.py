"""A backbone with adapters in it: the passes through it, in whole and in part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from hyperadapters.config import ModelConfig
from hyperadapters.core import BottleneckWeights, masked_mean
from hyperadapters.hosts.active import ActiveAdapters, BatchState
from hyperadapters.hosts.inject import Injection
from hyperadapters.hosts.sites import Sites
from hyperadapters.hosts.texts import text_features

Inputs = Mapping[str, Tensor]


class Encoded(NamedTuple):
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


class Frozen(NamedTuple):
    """What the layers below everything trained make of a batch; it stays the same through training.

    Attributes:
        hidden: input of the first layer with an adapter, or output of a wholly frozen encoder [B, S, d].
        pooled: what the retriever reads [B, d], float32; None where layers with adapters come before it.
        head_features: see `HyperAdapterModel.head_features` [B, F]; None where they are not known yet.
    """

    hidden: Tensor
    pooled: Tensor | None
    head_features: Tensor | None = None


class _PrefixDoneError(Exception):
    """Raised by a hook to leave a forward whose upper layers are not needed."""


class Host:
    """Runs a backbone that adapters were put into. Not a module: the parameters belong to the model."""

    def __init__(self, backbone: nn.Module, sites: Sites, config: ModelConfig, shared: nn.ModuleList) -> None:
        """Freeze and wrap the backbone.

        Args:
            backbone: changed in place, until `detach`.
            sites: found in it.
            config: placed on the backbone (see `placement.place`).
            shared: learned adapters, one for each layer of the shared stack; empty for none.
        """
        self.backbone: Any = backbone
        self.text_to_text = sites.kind == "encoder-decoder"
        self.is_one_pass = not self.text_to_text and config.features == "layer"
        self._reads_whole_pass = config.features == "backbone"
        self._sites = sites
        self._lowest, num_frozen = sites.generated, config.feature_layer or 0
        if sites.shared is not None:
            self._lowest, num_frozen = sites.shared, config.frozen_encoder_layers
        self._below = tuple(self._lowest.layers[:num_frozen])
        self._active = ActiveAdapters()
        self._is_checkpointing = False
        self._injection: Injection | None = Injection(
            backbone, sites, num_frozen, shared, self._active, config.adapter_norm_input
        )

    @property
    def has_frozen_layers(self) -> bool:
        """Whether there are layers below everything trained."""
        return bool(self._below)

    @torch.no_grad()
    def frozen(self, inputs: Inputs) -> Frozen:
        """Run the layers below everything trained, in evaluation mode: dropout there would regularise nothing."""
        self._check_attached()
        entered: list[Tensor] = []

        def on_features(hidden: Tensor) -> None:
            entered.append(hidden)
            if not self._reads_whole_pass:
                raise _PrefixDoneError

        stack = self.backbone.encoder if self.text_to_text else self.backbone
        read = None
        with self._active.use(BatchState(enabled=False, on_features=on_features)), evaluating(self.backbone):
            try:
                read = stack(**inputs).last_hidden_state
            except _PrefixDoneError:
                read = None if self.text_to_text else entered[0]
        hidden = entered[0] if entered else read
        assert hidden is not None
        return Frozen(hidden, None if read is None else masked_mean(read, inputs["attention_mask"]))

    @torch.no_grad()
    def text_features(self, inputs: Inputs, is_pair: Tensor | bool, compared: bool) -> Tensor:
        """What the frozen backbone makes of each text by itself [B, F]; see `texts.text_features`."""
        self._check_attached()

        def encode(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            hidden: Tensor = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return hidden

        with self.disabled(), evaluating(self.backbone):
            return text_features(encode, inputs["input_ids"], inputs["attention_mask"], is_pair, compared)

    def encode(self, inputs: Inputs, output_hidden_states: bool = False, frozen: Frozen | None = None) -> Encoded:
        """Run what lies below the generated adapters; the layers above are left out where their output is not read.

        `frozen` is the result of the method of that name, where it is there already.
        """
        self._check_attached()
        if frozen is None and (self._below or not self.text_to_text):
            frozen = self.frozen(inputs)
        needs_encoder = self.text_to_text and output_hidden_states
        if frozen is not None and frozen.pooled is not None and not needs_encoder:
            return Encoded(frozen.hidden, frozen.pooled, None, frozen.head_features)
        state = BatchState(features=None if frozen is None else frozen.hidden)
        with self._active.use(state), self._without_layers_below(output_hidden_states):
            output = self.backbone.encoder(**inputs, output_hidden_states=output_hidden_states)
        hidden = output.last_hidden_state
        return Encoded(hidden, masked_mean(hidden, inputs["attention_mask"]), output.hidden_states)

    def run(self, inputs: Inputs, choose: Callable[[Tensor], BatchState], output_hidden_states: bool = False) -> Any:
        """One pass of an encoder: on the way `choose` gets what the retriever reads [B, d] and returns the adapters."""
        self._check_attached()

        state = BatchState()

        def on_features(hidden: Tensor) -> None:
            chosen = choose(masked_mean(hidden, inputs["attention_mask"]))
            state.weights, state.grouping = _like(hidden, chosen.weights), chosen.grouping
            state.on_features = None  # a circle of references would keep the weights until the garbage is collected

        state.on_features = on_features
        with self._active.use(state):
            return self.backbone(**inputs, output_hidden_states=output_hidden_states)

    def run_above(
        self,
        inputs: Inputs,
        encoded: Encoded,
        state: BatchState,
        decoder_input_ids: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> Any:
        """Run the layers with generated adapters on the result of `encode`, and return the backbone's output."""
        self._check_attached()
        state.weights = _like(encoded.hidden, state.weights)
        if self.text_to_text:
            with self._active.use(state):
                return self.backbone(
                    encoder_outputs=BaseModelOutput(encoded.hidden),
                    attention_mask=inputs["attention_mask"],
                    decoder_input_ids=decoder_input_ids,
                    use_cache=False,
                    output_hidden_states=output_hidden_states,
                )
        state.features = encoded.hidden
        with self._active.use(state), self._without_layers_below(output_hidden_states):
            return self.backbone(**inputs, output_hidden_states=output_hidden_states)

    def generate(self, inputs: Inputs, encoded: Encoded, state: BatchState, options: dict[str, Any]) -> Any:
        """Run the backbone's own `generate` on the result of `encode`."""
        self._check_attached()
        state.weights = _like(encoded.hidden, state.weights)
        if self._needs_growing_cache(options):
            options["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with self._active.use(state):
            return self.backbone.generate(
                encoder_outputs=BaseModelOutput(encoded.hidden), attention_mask=inputs["attention_mask"], **options
            )

    def _needs_growing_cache(self, options: Mapping[str, Any]) -> bool:
        """Transformers makes a cache of as many layers as the encoder has, which a deeper decoder overruns."""
        chosen = options.keys() & {"past_key_values", "cache_implementation"} or not options.get("use_cache", True)
        assert self._sites.shared is not None
        return not chosen and len(self._sites.generated.layers) > len(self._sites.shared.layers)

    def keep_frozen_in_evaluation(self) -> None:
        """Switch dropout off below everything trained, where it would regularise nothing and only take time.

        An encoder-decoder whose lowest encoder layer has an adapter keeps the dropout that it was pretrained with.
        """
        if self.text_to_text and not self._below:
            return
        for layer in self._below:
            layer.eval()
        for owner in self._lowest.owners[len(self._below) :][:1]:  # the first layer with an adapter, but for that
            for name, module in owner.named_children():
                module.train(module.training and name == self._lowest.attribute)
        if not self.text_to_text:
            self.backbone.get_submodule("embeddings").eval()
        elif len(self._below) == len(self._lowest.layers):
            self.backbone.encoder.eval()

    def _without_layers_below(self, needed: bool) -> AbstractContextManager[None]:
        """A context in which the frozen layers hand on their input, unless they are needed for their hidden states."""
        return nullcontext() if needed else _skipped(self._below, _hand_on_block if self.text_to_text else _hand_on)

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


def _like(hidden: Tensor, weights: BottleneckWeights | None) -> BottleneckWeights | None:
    """The weights in the type of the hidden states, at once rather than at each site and decoding step."""
    return None if weights is None else weights.to(hidden.dtype)


def pool(output: Any, inputs: Inputs) -> Tensor:
    """Mean of the last hidden states over the real tokens [B, d]."""
    return masked_mean(output.last_hidden_state, inputs["attention_mask"])


@contextmanager
def _skipped(layers: Sequence[nn.Module], hand_on: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of layers, where the output of the last one is known already."""
    own = [vars(layer).get("forward") for layer in layers]  # what another library may have put there
    for layer in layers:
        layer.forward = partial(hand_on, layer)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _hand_on(layer: nn.Module, hidden: Tensor, *args: Any, **options: Any) -> Tensor:
    return hidden


def _hand_on_block(
    block: Any,
    hidden: Tensor,
    mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    *args: Any,
    **options: Any,
) -> tuple[Tensor, Tensor, None]:
    """As `_hand_on` for a block of T5's encoder, the first of which makes the position bias for all."""
    if position_bias is None:
        length = hidden.shape[1]
        position_bias = block.layer[0].SelfAttention.compute_bias(length, length, device=hidden.device)
    return hidden, position_bias, None


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
