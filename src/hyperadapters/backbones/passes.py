"""The passes through a backbone with adapters: whole, up to the adapters, and from the adapters on.

`PassRunner` runs backbones of one stack of layers, encoders and decoders. What is particular to encoder-decoders is in
`encoder_decoder`; `runners.make_runner` makes the one that a backbone needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperadapters.backbones.active import ActiveAdapters, BatchState
from hyperadapters.backbones.architectures import LinearSize, ResolvedArchitecture
from hyperadapters.backbones.injection import Injection, parameter_name
from hyperadapters.backbones.text_features import sequence_ids_of, text_features
from hyperadapters.config import ModelConfig
from hyperadapters.core import AdapterWeights, masked_mean

Inputs = Mapping[str, Tensor]
"""The tensors of a batch by name: `input_ids`, `attention_mask`, and what else the backbone takes, each [B, S]."""
Choose = Callable[[Tensor], BatchState]
"""Returns the adapters of a batch, given what the retriever reads of it [B, d]."""


class LowerOutput(NamedTuple):
    """Output of the layers below the generated adapters; it is the same for every task.

    Attributes:
        hidden: Input of the first layer with generated adapters, or output of an encoder-decoder's encoder [B, S, d].
        pooled: What the retriever reads [B, d], float32.
        hidden_states: Hidden states of all layers of an encoder-decoder's encoder, each [B, S, d]; None unless they
            were asked for.
        head_features: Output of `HyperAdapterModel.head_features` [B, F]; None if it has not been computed.
    """

    hidden: Tensor
    pooled: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    head_features: Tensor | None = None


class FrozenOutput(NamedTuple):
    """Output of the layers below everything that is trained; it stays the same through training.

    Attributes:
        hidden: Input of the first layer with an adapter, or output of an encoder that is frozen as a whole [B, S, d].
        pooled: What the retriever reads [B, d], float32; None if layers with adapters come before it.
        head_features: Output of `HyperAdapterModel.head_features` [B, F]; None if it has not been computed.
    """

    hidden: Tensor
    pooled: Tensor | None
    head_features: Tensor | None = None


class AdaptedLinear(NamedTuple):
    """A linear layer of the backbone that form "lora" changes.

    Attributes:
        path: Path of the linear layer in the backbone.
        layer: Index of its layer among the layers with adapters of the same stack.
        name: Name of the linear layer in the names of its LoRA's tensors.
        is_shared: Whether its LoRA is learned once for all tasks, and not generated.
    """

    path: str
    layer: int
    name: str
    is_shared: bool


class _FrozenLayersDoneError(Exception):
    """Raised by a callback to leave a forward whose upper layers are not needed."""


class PassRunner:
    """Runs a backbone of one stack of layers with adapters in it. Not a module: the model owns all parameters.

    Attributes:
        backbone: The frozen model.
    """

    def __init__(
        self,
        backbone: nn.Module,
        architecture: ResolvedArchitecture,
        config: ModelConfig,
        linears: Sequence[dict[str, LinearSize]],
        shared: nn.ModuleList,
    ) -> None:
        """Freeze the backbone and put adapters into it.

        Args:
            backbone: The model to adapt. It is changed in place, until `detach`.
            architecture: The resolved architecture of `backbone`.
            config: Settings with all defaults resolved (see `checks.plan`).
            linears: The linear layers that form "lora" changes, of the stack with generated adapters and of the one
                with learned adapters.
            shared: Learned adapters, one for each adapted layer of the stack that shares them; empty if there are none.

        Raises:
            BackboneError: If another library has replaced the forward of a module. Nothing has been changed then.
        """
        self.backbone: Any = backbone
        self._reads_whole_pass = config.features == "backbone"
        self._architecture, self._config, self._linears = architecture, config, linears
        self._lowest = architecture.lowest
        self._below = tuple(self._lowest.layers[: architecture.first_adapted(self._lowest, config)])
        self._active = ActiveAdapters()
        self._is_checkpointing = self._is_compiled = False
        self._injection: Injection | None = Injection(backbone, architecture, linears, shared, self._active, config)

    # What is adapted

    def adapted_linears(self) -> list[AdaptedLinear]:
        """List the linear layers that form "lora" changes.

        Returns:
            Those with generated LoRAs, then those with learned ones, each by layer; empty for another form.
        """
        found = []
        for stack, linears in zip(self._architecture.stacks, self._linears, strict=False):
            first = self._architecture.first_adapted(stack, self._config)
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

    @property
    def has_frozen_layers(self) -> bool:
        """Whether there are layers below everything that is trained."""
        return bool(self._below)

    def set_merged(self, is_merged: bool) -> None:
        """Switch the adapters off while those of a task are merged into the backbone's weights.

        Args:
            is_merged: Whether they are merged.
        """
        self._active.is_merged = is_merged

    def disabled(self) -> AbstractContextManager[None]:
        """Make a context in which the backbone runs without adapters.

        Returns:
            The context manager.
        """
        return self._active.use(BatchState(enabled=False))

    # Passes

    def run_batch(
        self,
        inputs: Inputs,
        choose: Choose,
        decoder_input_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        lower_output: LowerOutput | None = None,
        frozen_output: FrozenOutput | None = None,
    ) -> tuple[Any, LowerOutput | None]:
        """Run a batch through the whole backbone, in one pass where that is possible.

        Args:
            inputs: The batch, tensors [B, S].
            choose: Called once, with what the retriever reads [B, d]; it returns the adapters of the batch.
            decoder_input_ids: [B, T], for encoder-decoders.
            output_hidden_states: Whether the output is to have the hidden states of all layers.
            lower_output: Result of `forward_lower_layers` for the same inputs, if it has been computed before.
            frozen_output: Result of `forward_frozen_layers` for the same inputs, if it has been computed before.

        Returns:
            The backbone's output, and the output of the lower layers; None for that if they did not run separately.
        """
        self._check_attached()
        if lower_output is None and frozen_output is None and self._is_one_pass:
            with self._active.use(self._choosing(inputs, choose)):
                return self._forward(inputs, output_hidden_states), None
        if lower_output is None or not self._is_complete(lower_output, output_hidden_states):
            lower_output = self.forward_lower_layers(inputs, output_hidden_states, frozen_output)
        state = choose(lower_output.pooled)
        output = self.run_upper_layers(inputs, lower_output, state, decoder_input_ids, output_hidden_states)
        return output, lower_output

    @torch.no_grad()
    def forward_frozen_layers(self, inputs: Inputs) -> FrozenOutput:
        """Run the layers below everything that is trained.

        They run in evaluation mode: there is nothing that dropout in them could regularise.

        Args:
            inputs: The batch, tensors [B, S].

        Returns:
            The input of the first layer with an adapter, and what the retriever reads.
        """
        self._check_attached()
        entered: list[Tensor] = []

        def on_features(hidden: Tensor) -> None:
            entered.append(hidden)
            if not self._reads_whole_pass:
                raise _FrozenLayersDoneError

        last = None
        state = BatchState(enabled=False, on_features=on_features)
        with self._active.use(state), evaluating(self.backbone), suppress(_FrozenLayersDoneError):
            last = _last_hidden_state(self._forward_lowest_stack(inputs))
        return self._frozen_output(inputs, entered[0] if entered else None, last)

    def forward_lower_layers(
        self, inputs: Inputs, output_hidden_states: bool = False, frozen_output: FrozenOutput | None = None
    ) -> LowerOutput:
        """Run the layers below the generated adapters.

        Args:
            inputs: The batch, tensors [B, S].
            output_hidden_states: Whether to keep the hidden states of an encoder-decoder's encoder.
            frozen_output: Result of `forward_frozen_layers` for the same inputs, if it has been computed before.

        Returns:
            The input of the layers with generated adapters, and what the retriever reads.
        """
        self._check_attached()
        return self._forward_lower(inputs, output_hidden_states, frozen_output)

    def run_upper_layers(
        self,
        inputs: Inputs,
        lower_output: LowerOutput,
        state: BatchState,
        decoder_input_ids: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> Any:
        """Run the layers with generated adapters on the output of the layers below them.

        Args:
            inputs: The batch, tensors [B, S].
            lower_output: Result of `forward_lower_layers` for the same inputs.
            state: The adapters of the batch.
            decoder_input_ids: [B, T], for encoder-decoders.
            output_hidden_states: Whether the output is to have the hidden states of all layers.

        Returns:
            The backbone's output.
        """
        self._check_attached()
        state.weights = _like(lower_output.hidden, state.weights)
        with self._active.use(state):
            return self._forward_upper(inputs, lower_output, state, decoder_input_ids, output_hidden_states)

    @torch.no_grad()
    def text_features(self, inputs: Inputs, is_pair: Tensor | bool, compared: bool) -> Tensor:
        """Encode each text of a batch by itself with the frozen backbone, an encoder.

        Args:
            inputs: The batch, tensors [B, S].
            is_pair: Which rows are pairs of texts [B], or whether all of them are.
            compared: Whether the features compare the texts of a pair.

        Returns:
            The features [B, F]; see `text_features.text_features`.

        Raises:
            TaskError: If there are pairs, and the inputs do not tell which text a token belongs to.
        """
        self._check_attached()
        mask = inputs["attention_mask"]
        sequence_ids = sequence_ids_of(mask, is_pair, inputs.get("sequence_ids"), inputs.get("token_type_ids"))

        def encode(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return _last_hidden_state(self.backbone(input_ids=input_ids, attention_mask=attention_mask))

        with self.disabled(), evaluating(self.backbone):
            return text_features(encode, inputs["input_ids"], mask, is_pair, compared, sequence_ids)

    def default_decoder_input_ids(self, labels: Tensor | None) -> Tensor | None:
        """Make the inputs of an encoder-decoder's decoder from the labels; other backbones have no such inputs.

        Args:
            labels: Token ids of the targets [B, T], -100 for padding.

        Returns:
            The labels shifted to the right by one position [B, T]; None if the backbone has one stack only.

        Raises:
            TaskError: If the backbone is an encoder-decoder, and there are no labels.
        """
        return None

    @property
    def _is_one_pass(self) -> bool:
        """Whether one pass through the backbone gives what the retriever reads as well as the output."""
        return not self._reads_whole_pass

    def _is_complete(self, lower_output: LowerOutput, output_hidden_states: bool) -> bool:
        """Whether the output of the lower layers has all that is asked for."""
        return True

    def _frozen_output(self, inputs: Inputs, entered: Tensor | None, last: Tensor | None) -> FrozenOutput:
        """The output of the frozen layers.

        It is made from the input of the first adapted layer, None if there is none, and the last hidden states of the
        lowest stack, None if the pass ended before them; both [B, S, d].
        """
        assert entered is not None
        return FrozenOutput(entered, self._pool(entered if last is None else last, inputs))

    def _forward_lower(self, inputs: Inputs, output_hidden_states: bool, frozen: FrozenOutput | None) -> LowerOutput:
        """The output of the lower layers, which are the frozen ones: the first adapter is a generated one."""
        if frozen is None:
            frozen = self.forward_frozen_layers(inputs)
        assert frozen.pooled is not None
        return LowerOutput(frozen.hidden, frozen.pooled, None, frozen.head_features)

    def _choosing(self, inputs: Inputs, choose: Choose) -> BatchState:
        """A state that gets its adapters from `choose` as soon as the first adapted layer is reached."""
        state, num_rows = BatchState(), inputs["input_ids"].shape[0]

        def on_features(hidden: Tensor) -> None:
            of_rows = hidden[:: hidden.shape[0] // num_rows]  # `generate` repeats each row for its beams
            chosen = choose(self._pool(of_rows, inputs))
            state.weights, state.grouping = _like(hidden, chosen.weights), chosen.grouping
            state.on_features = None  # this reference cycle would keep the weights until garbage is collected

        state.on_features = on_features
        return state

    def _forward(self, inputs: Inputs, output_hidden_states: bool = False) -> Any:
        """The backbone's forward."""
        options: dict[str, Any] = backbone_inputs(inputs)
        if output_hidden_states:
            options["output_hidden_states"] = True
        if self._architecture.kind == "decoder":
            positions = inputs["attention_mask"].cumsum(dim=1) - 1  # padding on the left moves no token
            options.update(position_ids=positions.clamp(min=0), use_cache=False)
        return self.backbone(**options)

    def _forward_upper(
        self,
        inputs: Inputs,
        lower_output: LowerOutput,
        state: BatchState,
        decoder_input_ids: Tensor | None,
        output_hidden_states: bool,
    ) -> Any:
        """The forward of the layers with generated adapters, in which `state` is active."""
        state.features, state.skips_below = lower_output.hidden, not output_hidden_states
        return self._forward(inputs, output_hidden_states)

    def _forward_lowest_stack(self, inputs: Inputs) -> Any:
        """The forward of the first stack of layers that a batch passes through."""
        return self._forward(inputs)

    def _pool(self, hidden: Tensor, inputs: Inputs) -> Tensor:
        """What the retriever reads [B, d]: the mean of hidden states [B, S, d] over the tokens of the prompt."""
        if self._architecture.is_pre_norm:
            hidden = F.layer_norm(hidden.float(), hidden.shape[-1:])
        return masked_mean(hidden, inputs.get("prompt_mask", inputs["attention_mask"]))

    # Generation

    def generate(
        self, inputs: Inputs, choose: Choose, lower_output: LowerOutput | None, options: dict[str, Any]
    ) -> Any:
        """Run the backbone's own `generate`.

        Args:
            inputs: The prompts, or the inputs of the encoder, tensors [B, S].
            choose: Called once, with what the retriever reads [B, d]; it returns the adapters of the batch.
            lower_output: Result of `forward_lower_layers` for the same inputs; if it is None, the lower layers run
                before, except where the first step of `generate` reads the whole prompt.
            options: Keyword arguments of `generate`.

        Returns:
            What the backbone's `generate` returns.
        """
        self._check_attached()
        self._set_padding(options)
        if lower_output is None and not self._generates_in_one_pass(options):
            lower_output = self.forward_lower_layers(inputs)
        prompt = self._prompt(inputs, lower_output, options)
        if lower_output is None:
            state = self._choosing(prompt, choose)
        else:
            state = choose(lower_output.pooled)
            state.weights = _like(lower_output.hidden, state.weights)
        with self._active.use(state):
            return self.backbone.generate(**prompt, **options)

    def _generates_in_one_pass(self, options: Mapping[str, Any]) -> bool:
        """Whether the first step of `generate` reads the whole prompt, so that the retriever needs no separate pass."""
        configs = (options.get("generation_config"), self.backbone.generation_config)
        in_chunks = [options.get("prefill_chunk_size")]
        in_chunks += [getattr(config, "prefill_chunk_size", None) for config in configs]
        return self._is_one_pass and "past_key_values" not in options and not any(in_chunks)

    def _prompt(self, inputs: Inputs, lower_output: LowerOutput | None, options: dict[str, Any]) -> dict[str, Any]:
        """The inputs of `generate`; `options` may be changed to go with them."""
        return _padded_left(inputs)

    def _set_padding(self, options: dict[str, Any]) -> None:
        """Pad with the first end-of-sequence token if the model has no padding token, as transformers does."""
        configs = (options.get("generation_config"), self.backbone.generation_config)
        if any(getattr(config, "pad_token_id", None) is not None for config in configs):
            return
        ends = options.get("eos_token_id")
        for config in configs:
            ends = getattr(config, "eos_token_id", None) if ends is None else ends
        if ends is not None:
            options.setdefault("pad_token_id", int(torch.as_tensor(ends).flatten()[0]))

    # Modes

    def keep_frozen_in_evaluation(self) -> None:
        """Put the modules below everything that is trained into evaluation mode, also while the model is trained.

        Dropout there would regularise nothing and only take time.
        """
        self._evaluate_below()
        for module in self._outside:
            module.training = False

    def _evaluate_below(self) -> None:
        """Put the layers without adapters into evaluation mode, and of the next layer what comes before its adapter."""
        for layer in self._below:
            layer.eval()
        if self._config.form != "bottleneck":  # a LoRA may be in the first linear layer already
            return
        parent, _, name = self._lowest.row.feed_forward.rpartition(".")
        for layer in self._lowest.layers[len(self._below) :][:1]:
            for child_name, module in layer.get_submodule(parent).named_children():
                module.train(module.training and child_name == name)

    @cached_property
    def _outside(self) -> list[nn.Module]:
        return _modules_outside(self.backbone, self._lowest.row.layers)

    def enable_checkpointing(self, settings: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Switch on non-reentrant gradient checkpointing of the backbone's layers.

        Args:
            settings: Keyword arguments of `torch.utils.checkpoint.checkpoint`.
            options: Further keyword arguments of the backbone's `activation_checkpointing_enable`.
        """
        kept = {**settings, "use_reentrant": False, "context_fn": self._active.checkpoint_contexts}
        self.backbone.activation_checkpointing_enable(activation_checkpointing_kwargs=kept, **options)
        # transformers makes the embeddings require gradients, for the reentrant kind; it would run the backward pass
        # through layers where nothing is trained.
        self.backbone.disable_input_require_grads()
        self._is_checkpointing = True

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile each layer of the backbone.

        Args:
            *args: Positional arguments of `torch.compile`.
            **options: Keyword arguments of `torch.compile`.
        """
        self._is_compiled = True
        for layer in self._layers():
            layer.compile(*args, **options)

    def detach(self) -> nn.Module:
        """Take the adapters out of the backbone.

        Returns:
            The backbone as it was before the adapters were put in.
        """
        if self._is_checkpointing:
            self.backbone.activation_checkpointing_disable()
        if self._is_compiled:
            for layer in self._layers():
                layer._compiled_call_impl = None
        if self._injection is not None:
            self._injection.restore()
            self._injection = None
        backbone: nn.Module = self.backbone
        return backbone

    def _layers(self) -> list[nn.Module]:
        return [layer for stack in self._architecture.stacks for layer in stack.layers]

    def _check_attached(self) -> None:
        if self._injection is None:
            raise RuntimeError("the adapters were detached from this model's backbone; make or load a new model")


def _like(hidden: Tensor, weights: AdapterWeights | None) -> AdapterWeights | None:
    """Convert weights to the type of the hidden states, once instead of in each adapted layer and decoding step."""
    return None if weights is None else weights.to(hidden.dtype)


def backbone_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """Select the inputs that a backbone takes, without those that only this library reads.

    Args:
        inputs: The batch, tensors [B, S].

    Returns:
        The tensors by the names of the backbone's arguments.
    """
    return {name: tensor for name, tensor in inputs.items() if name not in ("prompt_mask", "sequence_ids")}


def pool(output: Any, inputs: Inputs) -> Tensor:
    """Take the mean of the last hidden states over the tokens that are not padding.

    Args:
        output: The output of an encoder.
        inputs: The batch, with its `attention_mask` [B, S].

    Returns:
        The means [B, d], in float32.
    """
    return masked_mean(_last_hidden_state(output), inputs["attention_mask"])


def _last_hidden_state(output: Any) -> Tensor:
    """The last hidden states [B, S, d] of an output, which a module that is not of transformers may return as such."""
    hidden: Tensor = output if isinstance(output, Tensor) else output.last_hidden_state
    return hidden


def _padded_left(inputs: Inputs) -> dict[str, Tensor]:
    """Token ids and attention mask [B, S] with each row's padding moved to its left."""
    mask = inputs["attention_mask"]
    places = mask.argsort(dim=1, stable=True)
    return {"input_ids": inputs["input_ids"].gather(1, places), "attention_mask": mask.gather(1, places)}


def _modules_outside(backbone: nn.Module, path: str) -> list[nn.Module]:
    """The modules that are neither inside the module of this path nor around it."""
    inside = {id(module) for module in backbone.get_submodule(path).modules()}
    return [
        module
        for name, module in backbone.named_modules()
        if name and id(module) not in inside and not f"{path}.".startswith(f"{name}.")
    ]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Make a context in which a model is in evaluation mode; on leaving it, each module gets its own mode back.

    Args:
        model: The model. A module that is added to it inside the context gets the model's mode.

    Yields:
        Nothing.
    """
    was_training = model.training
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = modes.get(module, was_training)
