"""Passes through an encoder-decoder. The retriever reads the output of the encoder, and the decoder is adapted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from hyperadapters.backbones.active import BatchState
from hyperadapters.backbones.passes import FrozenOutput, Inputs, LowerOutput, PassRunner
from hyperadapters.errors import TaskError


class EncoderDecoderRunner(PassRunner):
    """Runner of an encoder-decoder. The lower layers are the encoder with its shared adapters, the upper the decoder.

    The frozen layers are the layers of the encoder without adapters. There may be none.
    """

    def default_decoder_input_ids(self, labels: Tensor | None) -> Tensor | None:
        """Return the labels, shifted to the right by one position, as inputs of the decoder [B, T].

        Args:
            labels: Token ids of the targets [B, T], -100 for padding.

        Raises:
            TaskError: If there are no labels.
        """
        if labels is None:
            raise TaskError("forward of an encoder-decoder needs labels or decoder_input_ids; or use generate")
        shifted: Tensor = self.backbone.prepare_decoder_input_ids_from_labels(labels)
        return shifted

    def keep_frozen_in_evaluation(self) -> None:
        """Switch layers of the encoder without adapters to evaluation mode, or the whole encoder if it is frozen.

        If the lowest layer has an adapter, all of the encoder keeps its dropout.
        """
        if not self.has_frozen_layers:
            return
        self._evaluate_below()
        if len(self._below) == len(self._lowest.layers):
            self.backbone.get_encoder().eval()

    @property
    def _is_one_pass(self) -> bool:
        return False

    def _is_complete(self, lower_output: LowerOutput, output_hidden_states: bool) -> bool:
        return not output_hidden_states or lower_output.hidden_states is not None

    def _frozen_output(self, inputs: Inputs, entered: Tensor | None, last: Tensor | None) -> FrozenOutput:
        """Make the output of the frozen layers. The retriever's input is known only if all layers are frozen."""
        if last is not None:
            return FrozenOutput(last, self._pool(last, inputs))
        assert entered is not None
        return FrozenOutput(entered, None)

    def _forward_lower(self, inputs: Inputs, output_hidden_states: bool, frozen: FrozenOutput | None) -> LowerOutput:
        """Run the encoder. Its frozen layers run first, without gradients."""
        if frozen is None and self.has_frozen_layers:
            frozen = self.forward_frozen_layers(inputs)
        if frozen is not None and frozen.pooled is not None and not output_hidden_states:
            return super()._forward_lower(inputs, output_hidden_states, frozen)
        features = None if frozen is None else frozen.hidden
        with self._active.use(BatchState(features=features, skips_below=not output_hidden_states)):
            output = self._encode(inputs, output_hidden_states=output_hidden_states)
        hidden = output.last_hidden_state
        return LowerOutput(hidden, self._pool(hidden, inputs), output.hidden_states)

    def _forward_upper(
        self,
        inputs: Inputs,
        lower_output: LowerOutput,
        state: BatchState,
        decoder_input_ids: Tensor | None,
        output_hidden_states: bool,
    ) -> Any:
        return self.backbone(
            encoder_outputs=BaseModelOutput(lower_output.hidden),
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=decoder_input_ids,
            use_cache=False,
            output_hidden_states=output_hidden_states,
        )

    def _forward_lowest_stack(self, inputs: Inputs) -> Any:
        return self._encode(inputs)

    def _encode(self, inputs: Inputs, **options: Any) -> Any:
        return self.backbone.get_encoder()(**inputs, **options)

    def _prompt(self, inputs: Inputs, lower_output: LowerOutput | None, options: dict[str, Any]) -> dict[str, Any]:
        """Return the output of the encoder, which replaces the inputs in `generate`."""
        assert lower_output is not None
        if self._needs_growing_cache(options):
            options["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        return {
            "encoder_outputs": BaseModelOutput(lower_output.hidden),
            "attention_mask": inputs["attention_mask"],
        }

    def _needs_growing_cache(self, options: Mapping[str, Any]) -> bool:
        """Return whether `generate` needs a cache that grows with the decoder.

        Transformers makes a cache with the number of layers of the encoder, which is too small for a deeper decoder.
        """
        chosen = options.keys() & {"past_key_values", "cache_implementation"} or not options.get("use_cache", True)
        return not chosen and len(self._architecture.generated.layers) > len(self._lowest.layers)
