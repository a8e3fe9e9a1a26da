"""The state of a forward pass, which the adapted modules of a backbone read while a batch passes through it.

Adapted modules deep inside the backbone cannot receive additional arguments, so the generated weights of the batch are
stored here during one forward pass. Four cases need care:

- Gradient checkpointing recomputes layers after the forward pass has ended: `checkpoint_contexts` restores the state.
- Beam search repeats the rows after the weights were generated: the grouping supports this.
- An exception must not leave a state behind: a state is only set by a context manager.
- Threads that share a model must not see each other's batches: each thread has its own state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hyperadapters.core import AdapterWeights, Grouping, bottleneck, lora


@dataclass
class BatchState:
    """The state of one forward pass.

    Attributes:
        weights: Generated weights of the groups of rows, each tensor [L, G, ...].
        grouping: Grouping of the rows of the batch by task.
        here: Weights of the layer that is running, each tensor [G, ...].
        on_embeddings: Function that is called with the input of the first layer below all adapters [B, S, d].
        embeddings: This input, as soon as the pass has reached the layer.
        on_features: Function that is called with the input of the first adapted layer [B, S, d], before any adapter is
            applied. It may set the weights.
        features: Input of the first adapted layer [B, S, d] if it was computed before. It replaces the actual input.
        enabled: Whether adapters are applied.
        skips_below: Whether the layers below all adapters act as the identity, because `features` replaces their
            output.
    """

    weights: AdapterWeights | None = None
    grouping: Grouping | None = None
    here: AdapterWeights | None = None
    on_embeddings: Callable[[Tensor], None] | None = None
    embeddings: Tensor | None = None
    on_features: Callable[[Tensor], None] | None = None
    features: Tensor | None = None
    enabled: bool = True
    skips_below: bool = False


class _OfThread(threading.local):
    state: BatchState | None = None
    entered: Tensor | None = None


class ActiveAdapters:
    """Container of the state of the forward pass that is running in the current thread.

    Attributes:
        is_merged: Whether the adapters of a task are merged into the backbone's weights, so that none are applied.
    """

    def __init__(self) -> None:
        """Set up the container without a state."""
        self._of_thread = _OfThread()
        self.is_merged = False

    def __getstate__(self) -> dict[str, Any]:
        """Omit the state of the thread, because no forward pass is running in a copy."""
        return {"is_merged": self.is_merged}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(values)

    @property
    def _state(self) -> BatchState | None:
        return self._of_thread.state

    def keep_entered(self, inputs: Tensor) -> None:
        """Store the input of a feed-forward block that consists of several modules, for the last of these modules.

        Args:
            inputs: Input of the first module [B, S, d].
        """
        self._of_thread.entered = inputs

    def take_entered(self) -> Tensor:
        """Return and remove the input of the feed-forward block [B, S, d] that `keep_entered` stored."""
        entered, self._of_thread.entered = self._of_thread.entered, None
        assert entered is not None
        return entered

    @property
    def skips_below(self) -> bool:
        """Whether layers below all adapters act as the identity in this forward pass."""
        return self._state is not None and self._state.skips_below

    @contextmanager
    def use(self, state: BatchState) -> Iterator[None]:
        """Return a context in which adapted modules read a state. Afterwards, the previous state is restored.

        Args:
            state: State of the forward pass.
        """
        before, self._of_thread.state = self._state, state
        try:
            yield
        finally:
            self._of_thread.state = before

    def at(self, index: int) -> AbstractContextManager[None]:
        """Return a context in which the modules of a layer read the weights of that layer.

        The modules do not store the index of their layer, so that all layers can share compiled code.

        Args:
            index: Index of the layer among those with generated adapters.
        """
        state = self._state
        if state is None or state.weights is None:
            return nullcontext()
        return self.use(replace(state, here=state.weights.layer(index)))

    @property
    def enabled(self) -> bool:
        """Whether adapters are applied, which means that they are neither disabled nor merged."""
        return not self.is_merged and (self._state is None or self._state.enabled)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a checkpointed layer: for the forward pass, and for its recomputation.

        The method is a `context_fn` of `torch.utils.checkpoint.checkpoint`.
        """
        state = self._state
        return nullcontext(), self.use(state) if state is not None else nullcontext()

    def enter_layer_below(self, hidden: Tensor) -> None:
        """Store the input of the first layer below all adapters, and call `on_embeddings` with it.

        Args:
            hidden: Input of the layer [B, S, d].
        """
        if self._state is None:
            return
        self._state.embeddings = hidden
        if self._state.on_embeddings is not None:
            self._state.on_embeddings(hidden)

    @property
    def embeddings(self) -> Tensor | None:
        """Input of the first layer below all adapters [B, S, d] if this forward pass has reached the layer."""
        return None if self._state is None else self._state.embeddings

    def enter_first_layer(self, hidden: Tensor) -> Tensor:
        """Process the input of the first adapted layer: replace it by `features`, or call `on_features` with it.

        Args:
            hidden: Input of the layer [B, S, d].

        Returns:
            The `features` if there are any, otherwise `hidden` [B, S, d].
        """
        state = self._state
        if state is None:
            return hidden
        if state.features is not None:
            return state.features
        if state.on_features is not None:
            state.on_features(hidden)
        return hidden

    def adapt(self, inputs: Tensor) -> Tensor:
        """Compute the output of the generated bottleneck adapters of the layer that is running.

        Args:
            inputs: Input of the feed-forward block of the layer [B, S, d].

        Returns:
            Output of the adapters [B, S, d].

        Raises:
            RuntimeError: If no weights are active, because the backbone was called directly and not through its model.
        """
        weights, grouping = self._generated()
        return bottleneck(inputs, weights.to(inputs.dtype), grouping)

    def adapt_linear(self, inputs: Tensor, name: str, scale: float) -> Tensor:
        """Compute the output of the generated LoRAs of a linear layer of the layer that is running.

        Args:
            inputs: Input of the linear layer [B, S, i].
            name: Name of the linear layer in the names of the LoRA tensors.
            scale: Factor of the output of the LoRAs.

        Returns:
            Scaled output of the LoRAs [B, S, o].

        Raises:
            RuntimeError: If no weights are active, because the backbone was called directly and not through its model.
        """
        weights, grouping = self._generated()
        down, up = (weights[f"{side}_{name}"].to(inputs.dtype) for side in ("down", "up"))
        return scale * lora(inputs, down, up, grouping)

    def _generated(self) -> tuple[AdapterWeights, Grouping]:
        state = self._state
        if state is None or state.here is None or state.grouping is None:
            raise RuntimeError(
                "the backbone contains generated adapters, but no task is active: call the HyperAdapterModel instead "
                "of its backbone, or detach the adapters first"
            )
        return state.here, state.grouping
