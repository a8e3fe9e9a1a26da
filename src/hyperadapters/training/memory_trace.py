"""Runs PyTorch code without computing floating-point values, and counts the bytes of its tensors.

A model of any size can be built and trained for a step in such a context, because its floating-point tensors have
shapes, types and storages of a known size, but no memory (they are the `FakeTensor` of PyTorch). Integers and booleans
that follow from integers alone are computed as usual, because shapes depend on them: a batch is grouped by its task
ids, and its rows are split by their lengths.

A condition on floating-point values, such as whether a weight differs from zero, cannot be computed. It is answered as
the attribute `condition` says, and a search for elements that differ from zero finds none.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTrace(TorchDispatchMode):
    """Context in which floating-point tensors have no values, and the bytes of new tensors are counted.

    Attributes:
        condition: Answer to conditions on values that are not computed. Default: False, as for weights that are
            initially zero.
        live: Bytes of the tensors that were made in the context and are still referenced.
        peak: Largest value of `live` since the last call of `restart`.
    """

    def __init__(self) -> None:
        """Set up the context with nothing counted."""
        super().__init__()
        self.condition = False
        self.live = self.peak = 0
        self._fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def restart(self) -> None:
        """Forget the peak before this call."""
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation. The arguments are those of `TorchDispatchMode.__torch_dispatch__`."""
        found = self._run(func, args, kwargs or {})
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return found

    def _run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        has_fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not has_fake and any(tensor.is_floating_point() for tensor in tensors):
            return func(*args, **kwargs)  # numbers given from outside, such as labels
        try:
            with self._fake_mode:
                found = func(*args, **kwargs)
        except DataDependentOutputException:
            return self._assumed(tensors[0]) if has_fake else func(*args, **kwargs)
        except DynamicOutputShapeException:
            if has_fake and func is not torch.ops.aten.nonzero.default:
                raise
            return _no_indices(tensors[0]) if has_fake else func(*args, **kwargs)
        if has_fake or any(leaf.is_floating_point() for leaf in tree_leaves(found) if isinstance(leaf, Tensor)):
            return found
        return func(*args, **kwargs)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = weakref.ref(storage, partial(self._discount, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _discount(self, key: int, size: int, _: object) -> None:
        del self._storages[key]
        self.live -= size

    def _assumed(self, tensor: Tensor) -> bool | int | float:
        """Return the number that is read in place of an unknown element of a tensor."""
        if tensor.dtype == torch.bool:
            return self.condition
        return 1.0 if tensor.is_floating_point() else 1


def _no_indices(tensor: Tensor) -> Tensor:
    return torch.empty(0, tensor.dim(), dtype=torch.long, device=tensor.device)
