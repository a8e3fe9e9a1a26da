"""Passes through a backbone with adapters: through all layers, the frozen, the lower or the upper layers.

`PassRunner` runs backbones with one stack of layers, which are encoders and decoders. Its subclass for encoder-decoders
is in `encoder_decoder`. `runners.make_runner` chooses between them.
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
from hyperadapters.backbones.text_features import mean_of_texts, sequence_ids_of, text_features
from hyperadapters.config import ModelConfig
from hyperadapters.core import AdapterWeights, masked_mean

Inputs = Mapping[str, Tensor]
"""Tensors of a batch by name: `input_ids`, `attention_mask` and other inputs of the backbone, each [B, S]. If each text
of a pair is a sequence of its own, the result of `text_features.separate_texts`, each [R, S']."""
LIBRARY_INPUTS = ("prompt_mask", "sequence_ids", "is_pair", "pair_rows")
"""Names of the tensors of a batch that only this library reads."""
Choose = Callable[[Tensor], BatchState]
"""Function that returns the state of a batch with its adapters, given the pooled hidden states [B, d]."""


class LowerOutput(NamedTuple):
    """Output of the layers below the generated adapters, which is the same for every task.

    Attributes:
        hidden: Input of the first layer with generated adapters, or output of the encoder of an encoder-decoder
            [B, S, d], or [R, S', d] if each text of a pair is a sequence of its own.
        pooled: Pooled hidden states that the retriever reads [B, d], in float32.
        hidden_states: Hidden states of all layers of the encoder of an encoder-decoder, each [B, S, d], if requested.
        head_features: Output of `HyperAdapterModel.head_features` [B, F]; None if it has not been computed.
    """

    hidden: Tensor
    pooled: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    head_features: Tensor | None = None


class FrozenOutput(NamedTuple):
    """Output of the layers below all trained parameters, which does not change during training.

    Attributes:
        hidden: Input of the first layer with an adapter, or output of an encoder of which all layers are frozen
            [B, S, d], or [R, S', d] if each text of a pair is a sequence of its own.
        pooled: Pooled hidden states that the retriever reads [B, d], in float32; None if they depend on adapters.
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
        is_shared: Whether its LoRA is learned once for all tasks instead of being generated.
    """

    path: str
    layer: int
    name: str
    is_shared: bool


class _FrozenLayersDoneError(Exception):
    """Error that a callback raises to end a forward pass whose other layers are not needed."""


class PassRunner:
    """Runner of a backbone with one stack of layers and adapters. It is not a module: the model owns all parameters.

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
        """Freeze the backbone and inject adapters. If an error is raised, the backbone has not changed.

        Args:
            backbone: Model to adapt. It is changed in place until `detach`.
            architecture: Resolved architecture of `backbone`.
            config: Settings with all defaults resolved (see `checks.plan`).
            linears: Linear layers that form "lora" changes, in the stack with generated adapters and in the stack with
                shared adapters.
            shared: Shared adapters, one for each adapted layer of their stack; empty if there are none.

        Raises:
            BackboneError: If another library has replaced the forward method of a module.
        """
        self.backbone: Any = backbone
        self._reads_whole_pass = config.features == "backbone"
        self._architecture, self._config, self._linears = architecture, config, linears
        self._lowest = architecture.lowest
        self._below = tuple(self._lowest.layers[: architecture.first_adapted(self._lowest, config)])
        self._active = ActiveAdapters()
        self._is_checkpointing = self._is_compiled = False
        self._injection: Injection | None = Injection(backbone, architecture, linears, shared, self._active, config)

    # Adapted modules

    def adapted_linears(self) -> list[AdaptedLinear]:
        """Return the linear layers that form "lora" changes, ordered by layer; none for another form.

        The linear layers with generated LoRAs come first, followed by those with shared LoRAs.
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
        """Whether there are layers below all trained parameters."""
        return bool(self._below)

    def set_merged(self, is_merged: bool) -> None:
        """Disable the adapters while those of a task are merged into the backbone's weights.

        Args:
            is_merged: Whether the adapters of a task are merged.
        """
        self._active.is_merged = is_merged

    def disabled(self) -> AbstractContextManager[None]:
        """Return a context in which the backbone runs without adapters."""
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
        """Run a batch through the whole backbone, if possible in one pass.

        Args:
            inputs: Tensors of the batch [B, S].
            choose: Function that is called once, with the pooled hidden states [B, d], and returns the state of the
                batch with its adapters.
            decoder_input_ids: Token ids [B, T], for encoder-decoders.
            output_hidden_states: Whether the output should contain the hidden states of all layers. Default: False.
            lower_output: Result of `forward_lower_layers` for the same inputs, if it has been computed before.
            frozen_output: Result of `forward_frozen_layers` for the same inputs, if it has been computed before.

        Returns:
            Output of the backbone, and output of the lower layers. The latter is None if they did not run separately.
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
        """Run the layers below all trained parameters.

        They run in evaluation mode, because dropout in these layers would not regularise anything.

        Args:
            inputs: Tensors of the batch [B, S].

        Returns:
            Input of the first layer with an adapter, and pooled hidden states.
        """
        self._check_attached()
        entered: list[Tensor] = []

        def on_features(hidden: Tensor) -> None:
            entered.append(hidden)
            if not self._reads_whole_pass:
                _end_pass()

        last = None
        state = BatchState(enabled=False, on_features=on_features)
        with self._active.use(state), evaluating(self.backbone), suppress(_FrozenLayersDoneError):
            last = _last_hidden_state(self._forward_lowest_stack(inputs))
        if torch.compiler.is_exporting() and not self._reads_whole_pass:
            last = None  # see `_end_pass`
        return self._frozen_output(inputs, entered[0] if entered else None, last)

    @torch.no_grad()
    def pool_embeddings(self, inputs: Inputs) -> Tensor | None:
        """Compute the pooled input of the first layer, which no adapter changes.

        If a forward pass of the batch is running and has reached the layer, its input is used.

        Args:
            inputs: Tensors of the batch [B, S].

        Returns:
            Means [B, d] in float32; None if there are no layers below all adapters.
        """
        self._check_attached()
        if not self.has_frozen_layers:
            return None
        if self._active.embeddings is not None:
            return self._pool(self._active.embeddings, inputs)
        found: list[Tensor] = []

        def on_embeddings(hidden: Tensor) -> None:
            found.append(self._pool(hidden, inputs))
            _end_pass()

        state = BatchState(enabled=False, on_embeddings=on_embeddings)
        with self._active.use(state), evaluating(self.backbone), suppress(_FrozenLayersDoneError):
            self._forward_lowest_stack(inputs)
        return found[0]

    def forward_lower_layers(
        self, inputs: Inputs, output_hidden_states: bool = False, frozen_output: FrozenOutput | None = None
    ) -> LowerOutput:
        """Run the layers below the generated adapters.

        Args:
            inputs: Tensors of the batch [B, S].
            output_hidden_states: Whether to return the hidden states of the encoder of an encoder-decoder. Default:
                False.
            frozen_output: Result of `forward_frozen_layers` for the same inputs, if it has been computed before.

        Returns:
            Input of the layers with generated adapters, and pooled hidden states.
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
            inputs: Tensors of the batch [B, S].
            lower_output: Result of `forward_lower_layers` for the same inputs.
            state: State of the batch with its adapters.
            decoder_input_ids: Token ids [B, T], for encoder-decoders.
            output_hidden_states: Whether the output should contain the hidden states of all layers. Default: False.

        Returns:
            Output of the backbone.
        """
        self._check_attached()
        state.weights = _like(lower_output.hidden, state.weights)
        with self._active.use(state):
            return self._forward_upper(inputs, lower_output, state, decoder_input_ids, output_hidden_states)

    @torch.no_grad()
    def text_features(self, inputs: Inputs, is_pair: Tensor | bool, compared: bool) -> Tensor:
        """Encode each text of a batch separately with the frozen backbone, which must be an encoder.

        Args:
            inputs: Tensors of the batch [B, S].
            is_pair: Whether each row is a pair of texts, as a boolean mask [B], or one value for all rows.
            compared: Whether the features compare the texts of a pair.

        Returns:
            Features [B, F]; see `text_features.text_features`.

        Raises:
            TaskError: If there are pairs, and the inputs do not determine the text to which a token belongs.
        """
        self._check_attached()
        mask = inputs["attention_mask"]
        sequence_ids = sequence_ids_of(mask, is_pair, inputs.get("sequence_ids"), inputs.get("token_type_ids"))

        def encode(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return _last_hidden_state(self.backbone(input_ids=input_ids, attention_mask=attention_mask))

        with self.disabled(), evaluating(self.backbone):
            return text_features(encode, inputs["input_ids"], mask, is_pair, compared, sequence_ids)

    def default_decoder_input_ids(self, labels: Tensor | None) -> Tensor | None:
        """Make the inputs of the decoder of an encoder-decoder from the labels.

        Args:
            labels: Token ids of the targets [B, T], -100 for padding.

        Returns:
            The labels, shifted to the right by one position [B, T]; None for backbones with one stack of layers.

        Raises:
            TaskError: If the backbone is an encoder-decoder and there are no labels.
        """
        return None

    @property
    def _is_one_pass(self) -> bool:
        """Whether one pass through the backbone computes both the input of the retriever and the output."""
        return not self._reads_whole_pass

    def _is_complete(self, lower_output: LowerOutput, output_hidden_states: bool) -> bool:
        """Return whether the output of the lower layers contains everything that is requested."""
        return True

    def _frozen_output(self, inputs: Inputs, entered: Tensor | None, last: Tensor | None) -> FrozenOutput:
        """Make the output of the frozen layers.

        Args:
            inputs: Tensors of the batch [B, S].
            entered: Input of the first adapted layer [B, S, d]; None if the lowest stack has no adapted layer.
            last: Last hidden states of the lowest stack [B, S, d]; None if the pass ended before them.
        """
        assert entered is not None
        return FrozenOutput(entered, self._pool(entered if last is None else last, inputs))

    def _forward_lower(self, inputs: Inputs, output_hidden_states: bool, frozen: FrozenOutput | None) -> LowerOutput:
        """Run the lower layers. They are the frozen layers, because all adapters are generated."""
        if frozen is None:
            frozen = self.forward_frozen_layers(inputs)
        assert frozen.pooled is not None
        return LowerOutput(frozen.hidden, frozen.pooled, None, frozen.head_features)

    def _choosing(self, inputs: Inputs, choose: Choose) -> BatchState:
        """Return a state that gets its adapters from `choose` when the first adapted layer is reached."""
        state, num_rows = BatchState(), inputs["input_ids"].shape[0]

        def on_features(hidden: Tensor) -> None:
            of_rows = hidden[:: hidden.shape[0] // num_rows]  # `generate` repeats each row for its beams
            chosen = choose(self._pool(of_rows, inputs))
            state.weights, state.grouping = _like(hidden, chosen.weights), chosen.grouping
            state.embeddings = None
            state.on_features = None  # breaks a reference cycle that would keep the weights alive

        state.on_features = on_features
        return state

    def _forward(self, inputs: Inputs, output_hidden_states: bool = False) -> Any:
        """Run the forward method of the backbone."""
        options: dict[str, Any] = backbone_inputs(inputs)
        if output_hidden_states:
            options["output_hidden_states"] = True
        if self._architecture.kind == "decoder":
            positions = inputs["attention_mask"].cumsum(dim=1) - 1  # padding on the left shifts no token
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
        """Run the layers with generated adapters while `state` is active."""
        state.features, state.skips_below = lower_output.hidden, not output_hidden_states
        return self._forward(inputs, output_hidden_states)

    def _forward_lowest_stack(self, inputs: Inputs) -> Any:
        """Run the first stack of layers that a batch passes through."""
        return self._forward(inputs)

    def _pool(self, hidden: Tensor, inputs: Inputs) -> Tensor:
        """Return the input of the retriever [B, d]: the mean of hidden states [B, S, d] over the prompt tokens."""
        if self._architecture.is_pre_norm:
            hidden = F.layer_norm(hidden.float(), hidden.shape[-1:])
        return mean_of_texts(masked_mean(hidden, inputs.get("prompt_mask", inputs["attention_mask"])), inputs)

    # Generation

    def generate(
        self, inputs: Inputs, choose: Choose, lower_output: LowerOutput | None, options: dict[str, Any]
    ) -> Any:
        """Run the `generate` method of the backbone.

        Args:
            inputs: Tensors of the prompts, or the inputs of the encoder [B, S].
            choose: Function that is called once, with the pooled hidden states [B, d], and returns the state of the
                batch with its adapters.
            lower_output: Result of `forward_lower_layers` for the same inputs. If it is None, the lower layers run
                first, unless the first step of `generate` reads the whole prompt.
            options: Keyword arguments of `generate`.

        Returns:
            Result of the backbone's `generate`.
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
        """Return whether the first step of `generate` reads the whole prompt, so the retriever needs no own pass."""
        configs = (options.get("generation_config"), self.backbone.generation_config)
        in_chunks = [options.get("prefill_chunk_size")]
        in_chunks += [getattr(config, "prefill_chunk_size", None) for config in configs]
        return self._is_one_pass and "past_key_values" not in options and not any(in_chunks)

    def _prompt(self, inputs: Inputs, lower_output: LowerOutput | None, options: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of `generate`. The options may be changed accordingly."""
        return _padded_left(inputs)

    def _set_padding(self, options: dict[str, Any]) -> None:
        """Use the first end-of-sequence token for padding if there is no padding token, as transformers does."""
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
        """Switch the modules below all trained parameters to evaluation mode, also while the model is trained.

        Dropout in these modules would not regularise anything.
        """
        self._evaluate_below()
        for module in self._outside:
            module.training = False

    def _evaluate_below(self) -> None:
        """Switch layers without adapters, and modules before the first adapter, to evaluation mode."""
        for layer in self._below:
            layer.eval()
        if self._config.form != "bottleneck":  # the first linear layer may have a LoRA
            return
        parent, _, name = self._lowest.row.feed_forward.rpartition(".")
        for layer in self._lowest.layers[len(self._below) :][:1]:
            for child_name, module in layer.get_submodule(parent).named_children():
                module.train(module.training and child_name == name)

    @cached_property
    def _outside(self) -> list[nn.Module]:
        return _modules_outside(self.backbone, self._lowest.row.layers)

    def enable_checkpointing(self, settings: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Enable non-reentrant gradient checkpointing of the backbone's layers.

        Args:
            settings: Keyword arguments of `torch.utils.checkpoint.checkpoint`.
            options: Other keyword arguments of the backbone's `activation_checkpointing_enable`.
        """
        kept = {**settings, "use_reentrant": False, "context_fn": self._active.checkpoint_contexts}
        self.backbone.activation_checkpointing_enable(activation_checkpointing_kwargs=kept, **options)
        # For the reentrant kind, transformers makes the embeddings require gradients. The backward pass would then run
        # through layers without trained parameters.
        self.backbone.disable_input_require_grads()
        self._is_checkpointing = True

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile each layer of the backbone.

        Args:
            *args: Positional arguments of `torch.compile`.
            **options: Keyword arguments of `torch.compile`.
        """
        self._is_compiled = True
        for layer in self.layers:
            layer.compile(*args, **options)

    def detach(self) -> nn.Module:
        """Remove the adapters from the backbone.

        Returns:
            The backbone as it was before the adapters were injected.
        """
        if self._is_checkpointing:
            self.backbone.activation_checkpointing_disable()
        if self._is_compiled:
            for layer in self.layers:
                layer._compiled_call_impl = None
        if self._injection is not None:
            self._injection.restore()
            self._injection = None
        backbone: nn.Module = self.backbone
        return backbone

    @property
    def layers(self) -> list[nn.Module]:
        """Layers of all stacks of the backbone."""
        return [layer for stack in self._architecture.stacks for layer in stack.layers]

    def _check_attached(self) -> None:
        if self._injection is None:
            raise RuntimeError("the adapters have been detached from the backbone; make or load a new model")


def _end_pass() -> None:
    """End a forward pass whose other layers are not needed.

    If torch exports the pass, it goes on, because the exporter does not allow exceptions. The other layers are not a
    part of the exported graph, since nothing reads them.
    """
    if not torch.compiler.is_exporting():
        raise _FrozenLayersDoneError


def _like(hidden: Tensor, weights: AdapterWeights | None) -> AdapterWeights | None:
    """Convert weights to the type of the hidden states once, and not in each adapted layer and decoding step."""
    return None if weights is None else weights.to(hidden.dtype)


def backbone_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """Return the tensors of a batch that are arguments of the backbone, without those that only this library reads.

    Args:
        inputs: Tensors of the batch [B, S].
    """
    return {name: tensor for name, tensor in inputs.items() if name not in LIBRARY_INPUTS}


def pool(output: Any, inputs: Inputs) -> Tensor:
    """Compute the mean of the last hidden states over the tokens that are not padding [B, d], in float32.

    Args:
        output: Output of an encoder.
        inputs: Tensors of the batch, with the `attention_mask` [B, S].
    """
    return masked_mean(_last_hidden_state(output), inputs["attention_mask"])


def _last_hidden_state(output: Any) -> Tensor:
    """Return the last hidden states [B, S, d] of an output, which may also be this tensor itself."""
    hidden: Tensor = output if isinstance(output, Tensor) else output.last_hidden_state
    return hidden


def _padded_left(inputs: Inputs) -> dict[str, Tensor]:
    """Return token ids and attention mask [B, S] with the padding of each row moved to the left."""
    mask = inputs["attention_mask"]
    places = mask.argsort(dim=1, stable=True)
    return {"input_ids": inputs["input_ids"].gather(1, places), "attention_mask": mask.gather(1, places)}


def _modules_outside(backbone: nn.Module, path: str) -> list[nn.Module]:
    """Return the modules that are neither inside the module at a path nor contain it."""
    inside = {id(module) for module in backbone.get_submodule(path).modules()}
    return [
        module
        for name, module in backbone.named_modules()
        if name and id(module) not in inside and not f"{path}.".startswith(f"{name}.")
    ]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Return a context in which a model is in evaluation mode. Afterwards, the mode of each module is restored.

    Args:
        model: The model. A module that is added inside the context gets the mode of the model.
    """
    was_training = model.training
    modes = {module: module.training for module in model.modules()}
    if any(modes.values()):
        model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            if module.training != (mode := modes.get(module, was_training)):  # setting attributes of modules is slow
                module.training = mode
