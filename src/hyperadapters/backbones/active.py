"""What the wrapped modules of a backbone read while a batch passes through it.

A wrapped module deep inside the backbone cannot be given an argument, so the batch's generated weights are put here
for the time of one forward. Three things make that delicate, and each has its answer here:
recomputation under gradient checkpointing happens after the forward has ended, so the state is taken up again from
`checkpoint_contexts`; beams multiply the rows after the weights were activated, which the grouping allows for;
an exception must not leave a state behind, so it is only ever set in a context manager; and threads that share a model
must not see each other's batches, so each thread has a state of its own.
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
    """State of one forward: the `grouping` of its rows by task, and the `weights` of its groups [L, G, ...].

    `on_features` is called with the hidden states that enter the first adapted layer, before any adapter is used; it
    may fill in the weights. `features` replaces these hidden states, where they are known already.
    `here` are the weights of the layer that is under way [G, ...]. `skips_below` lets the layers below all adapters act
    as the identity, where their output is known already.
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
    """Holds the state of the forward that is under way in the current thread.

    Attributes:
        is_merged: whether the adapters of a task are in the backbone's weights, so that none are put beside them.
    """

    def __init__(self) -> None:
        self._of_thread = _OfThread()
        self.is_merged = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the state of the thread: a copy has no forward under way."""
        return {"is_merged": self.is_merged}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(values)

    @property
    def _state(self) -> BatchState | None:
        return self._of_thread.state

    def keep_entered(self, inputs: Tensor) -> None:
        """Keep what enters a feed-forward of several modules for the last one of them."""
        self._of_thread.entered = inputs

    def take_entered(self) -> Tensor:
        """What `keep_entered` was given last; it is not kept any longer."""
        entered, self._of_thread.entered = self._of_thread.entered, None
        assert entered is not None
        return entered

    @property
    def skips_below(self) -> bool:
        """Whether layers below all adapters act as the identity in this forward."""
        return self._state is not None and self._state.skips_below

    @contextmanager
    def use(self, state: BatchState) -> Iterator[None]:
        """Make `state` the one that wrapped modules read; the one before is put back on leaving, however that is."""
        before, self._of_thread.state = self._state, state
        try:
            yield
        finally:
            self._of_thread.state = before

    def at(self, index: int) -> AbstractContextManager[None]:
        """A context for the layer of a site, in which its modules find the weights of their layer.

        Modules do not know their site: a compiled layer can then be used for all layers.
        """
        state = self._state
        if state is None or state.weights is None:
            return nullcontext()
        return self.use(replace(state, here=state.weights.layer(index)))

    @property
    def enabled(self) -> bool:
        """False while adapters are switched off, or merged."""
        return not self.is_merged and (self._state is None or self._state.enabled)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts for forward and recomputation of a checkpointed layer: the `context_fn` of torch's checkpoint."""
        state = self._state
        return nullcontext(), self.use(state) if state is not None else nullcontext()

    def enter_first_layer(self, hidden: Tensor) -> Tensor:
        """What is to enter the first adapted layer: known features, or `hidden`, which is handed to `on_features`."""
        state = self._state
        if state is None:
            return hidden
        if state.features is not None:
            return state.features
        if state.on_features is not None:
            state.on_features(hidden)
        return hidden

    def adapt(self, inputs: Tensor) -> Tensor:
        """The output of a layer's generated adapters for inputs [rows, S, d].

        Raises:
            RuntimeError: no weights are active: the backbone was called by itself, not through its model.
        """
        weights, grouping = self._generated()
        return bottleneck(inputs, weights.to(inputs.dtype), grouping)

    def adapt_linear(self, inputs: Tensor, name: str, scale: float) -> Tensor:
        """What the generated LoRAs add to a linear layer of a layer, for its inputs [rows, S, i].

        Raises:
            RuntimeError: as for `adapt`.
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
