"""The state of a forward, which the adapted modules of a backbone read while a batch passes through it.

An adapted module deep inside the backbone cannot be given another argument, so the generated weights of the batch are
stored here for the time of one forward. Four cases need care:

- Gradient checkpointing recomputes layers after the forward has ended: `checkpoint_contexts` restores the state then.
- Beam search multiplies the rows after the weights were generated: the grouping allows for that.
- An exception must not leave a state behind: a state is only ever set by a context manager.
- Threads that share a model must not see each other's batches: each thread has a state of its own.
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
    """The state of one forward.

    Attributes:
        weights: Generated weights of the batch's groups, each tensor [L, G, ...].
        grouping: The grouping of the batch's rows by task.
        here: Weights of the layer that is running, each tensor [G, ...].
        on_features: Called with the input of the first adapted layer [B, S, d], before any adapter is used; it may set
            the weights.
        features: Input of the first adapted layer [B, S, d], if it was computed before; it replaces the actual input.
        enabled: Whether adapters are applied.
        skips_below: Whether the layers below all adapters act as the identity, since their output is given in
            `features`.
    """

    weights: AdapterWeights | None = None
    grouping: Grouping | None = None
    here: AdapterWeights | None = None
    on_features: Callable[[Tensor], None] | None = None
    features: Tensor | None = None
    enabled: bool = True
    skips_below: bool = False


class _OfThread(threading.local):
    state: BatchState | None = None
    entered: Tensor | None = None


class ActiveAdapters:
    """Holds the state of the forward that is running in the current thread.

    Attributes:
        is_merged: Whether the adapters of a task are merged into the backbone's weights, so that none are applied.
    """

    def __init__(self) -> None:
        self._of_thread = _OfThread()
        self.is_merged = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the state of the thread: no forward is running in a copy."""
        return {"is_merged": self.is_merged}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(values)

    @property
    def _state(self) -> BatchState | None:
        return self._of_thread.state

    def keep_entered(self, inputs: Tensor) -> None:
        """Keep the input of a feed-forward that consists of several modules, for the last one of them.

        Args:
            inputs: The input of the first module [B, S, d].
        """
        self._of_thread.entered = inputs

    def take_entered(self) -> Tensor:
        """Return the tensor that `keep_entered` was given last, and drop it.

        Returns:
            The input of the feed-forward [B, S, d].
        """
        entered, self._of_thread.entered = self._of_thread.entered, None
        assert entered is not None
        return entered

    @property
    def skips_below(self) -> bool:
        """Whether layers below all adapters act as the identity in this forward."""
        return self._state is not None and self._state.skips_below

    @contextmanager
    def use(self, state: BatchState) -> Iterator[None]:
        """Make a context in which adapted modules read a state; on leaving it, the state before is restored.

        Args:
            state: The state of the forward.

        Yields:
            Nothing.
        """
        before, self._of_thread.state = self._state, state
        try:
            yield
        finally:
            self._of_thread.state = before

    def at(self, index: int) -> AbstractContextManager[None]:
        """Make a context in which the modules of a layer read the weights of that layer.

        The modules do not know the index of their layer, so that the compiled code of one layer serves all of them.

        Args:
            index: Index of the layer among those with generated adapters.

        Returns:
            The context manager.
        """
        state = self._state
        if state is None or state.weights is None:
            return nullcontext()
        return self.use(replace(state, here=state.weights.layer(index)))

    @property
    def enabled(self) -> bool:
        """Whether adapters are applied: they are neither disabled nor merged."""
        return not self.is_merged and (self._state is None or self._state.enabled)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Make the contexts of a checkpointed layer, as the `context_fn` of `torch.utils.checkpoint.checkpoint`.

        Returns:
            A context for the forward and one for its recomputation.
        """
        state = self._state
        return nullcontext(), self.use(state) if state is not None else nullcontext()

    def enter_first_layer(self, hidden: Tensor) -> Tensor:
        """Return the features if they are given; otherwise call `on_features` with the layer's input and return that.

        Args:
            hidden: The input of the first adapted layer [B, S, d].

        Returns:
            What the layer is to read instead [B, S, d].
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
            inputs: The input of the layer's feed-forward [B, S, d].

        Returns:
            The adapters' output [B, S, d].

        Raises:
            RuntimeError: If no weights are active, since the backbone was called by itself and not through its model.
        """
        weights, grouping = self._generated()
        return bottleneck(inputs, weights.to(inputs.dtype), grouping)

    def adapt_linear(self, inputs: Tensor, name: str, scale: float) -> Tensor:
        """Compute what the generated LoRAs add to the output of a linear layer.

        Args:
            inputs: The input of the linear layer [B, S, i].
            name: Name of the linear layer in the names of its LoRA's tensors.
            scale: Factor of the LoRA's output.

        Returns:
            The scaled output of the LoRAs [B, S, o].

        Raises:
            RuntimeError: If no weights are active, since the backbone was called by itself and not through its model.
        """
        weights, grouping = self._generated()
        down, up = (weights[f"{side}_{name}"].to(inputs.dtype) for side in ("down", "up"))
        return scale * lora(inputs, down, up, grouping)

    def _generated(self) -> tuple[AdapterWeights, Grouping]:
        state = self._state
        if state is None or state.here is None or state.grouping is None:
            raise RuntimeError(
                "the backbone holds generated adapters, but no task is active: call the HyperAdapterModel, "
                "not its backbone, or detach the adapters first"
            )
        return state.here, state.grouping
