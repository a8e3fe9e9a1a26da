"""Injection of adapters into a frozen backbone, and exact restoration of the backbone.

The class of an adapted module is replaced by a subclass whose forward method also applies the adapter. All modules keep
their positions, names and attributes. Forward hooks are not sufficient: torch.compile does not check hooks again after
it has compiled a layer, but it does distinguish modules of different classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

from hyperadapters.backbones.active import ActiveAdapters
from hyperadapters.backbones.architectures import (
    HOLDS_ADAPTERS,
    HOOKED_FORWARD,
    LayerOutput,
    LinearSize,
    ResolvedArchitecture,
    Stack,
)
from hyperadapters.config import ModelConfig
from hyperadapters.core import LearnedLora
from hyperadapters.errors import BackboneError

Adapter = Callable[[Tensor], Tensor]


class _Beside:
    """The adapter of an adapted module, and the state of the batch that it reads."""

    def __init__(self, active: ActiveAdapters, adapter: Adapter | None = None, norm: nn.Module | None = None) -> None:
        self.active, self.adapter, self.norm = active, adapter, norm

    def __call__(self, inputs: Tensor) -> Tensor:
        assert self.adapter is not None
        return self.adapter(inputs if self.norm is None else self.norm(inputs))


class _Adapted(nn.Module):
    """A module whose class was replaced. The attribute `beside` contains everything that belongs to its adapter."""

    beside: _Beside

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the two base classes, because pickle cannot find their generated subclass by its name."""
        return _unpickled, type(self).__bases__, self.__dict__


class _Parallel(_Adapted):
    """A module to whose output the output of an adapter for the same input is added."""

    def forward(self, inputs: Tensor, *args: Any, **options: Any) -> Any:
        output = super().forward(inputs, *args, **options)
        return output + self.beside(inputs) if self.beside.active.enabled else output


class _BeforeResidual(_Adapted):
    """A module with the arguments (hidden, residual). The output of the adapter is added to the residual."""

    def forward(self, hidden: Tensor, residual: Tensor) -> Any:
        if self.beside.active.enabled:
            residual = residual + self.beside(residual)
        return super().forward(hidden, residual)


class _Entry(_Adapted):
    """The first module of a feed-forward block, which stores its input for the last module."""

    def forward(self, inputs: Tensor) -> Any:
        self.beside.active.keep_entered(inputs)
        return super().forward(inputs)


class _Exit(_Adapted):
    """The last module of a feed-forward block, which adds the output of the adapter for the stored input."""

    def forward(self, inputs: Tensor) -> Any:
        entered = self.beside.active.take_entered()
        output = super().forward(inputs)
        return output + self.beside(entered) if self.beside.active.enabled else output


class _BesideLayer(_Beside):
    """The position of an adapted layer.

    `index` is the index among the layers with generated adapters, None for a layer with a shared adapter. `is_first` is
    True for the first adapted layer of the backbone.
    """

    def __init__(self, active: ActiveAdapters, index: int | None, is_first: bool) -> None:
        super().__init__(active)
        self.index, self.is_first = index, is_first


class _Layer(_Adapted):
    """An adapted layer, which selects its generated weights for its modules.

    The retriever reads the input of the first adapted layer, or this input is replaced by features that were computed
    before. This happens in `__call__` and not in `forward`, because gradient checkpointing would repeat it, and
    torch.compile would compile the forward method again for each layer.
    """

    beside: _BesideLayer

    def __call__(self, hidden: Tensor, *args: Any, **options: Any) -> Any:
        active, index = self.beside.active, self.beside.index
        if self.beside.is_first:
            hidden = active.enter_first_layer(hidden)
        with nullcontext() if index is None else active.at(index):
            return super().__call__(hidden, *args, **options)


class _BesideLayerBelow(_Beside):
    """The position of a layer below all adapters, and the function that replaces it while it acts as the identity."""

    def __init__(self, active: ActiveAdapters, identity: Callable[..., Any], is_first: bool) -> None:
        super().__init__(active)
        self.identity, self.is_first = identity, is_first


class _LayerBelow(_Adapted):
    """A layer below all adapters. It acts as the identity if the output of the last such layer is already known."""

    beside: _BesideLayerBelow

    def __call__(self, hidden: Tensor, *args: Any, **options: Any) -> Any:
        if self.beside.active.skips_below:
            return self.beside.identity(self, hidden, *args, **options)
        if self.beside.is_first:
            self.beside.active.enter_layer_below(hidden)
        return super().__call__(hidden, *args, **options)


def _identity(layer: nn.Module, hidden: Tensor, *args: Any, **options: Any) -> Tensor:
    return hidden


def _identity_in_tuple(layer: nn.Module, hidden: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
    return hidden, None


def _identity_block(
    block: Any,
    hidden: Tensor,
    mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    *args: Any,
    **options: Any,
) -> tuple[Tensor, Tensor, None]:
    """Act as the identity in place of a block of T5. The first block computes the position bias for all blocks."""
    if position_bias is None:
        length = hidden.shape[1]
        position_bias = block.layer[0].SelfAttention.compute_bias(length, length, device=hidden.device)
    return hidden, position_bias, None


_IDENTITIES: dict[LayerOutput, Callable[..., Any]] = {
    "hidden": _identity,
    "tuple": _identity_in_tuple,
    "t5": _identity_block,
}
"""Functions by which a layer acts as the identity, by kind of layer output."""


@cache
def _adapted_class(adapted: type[_Adapted], module_class: type[nn.Module]) -> type[nn.Module]:
    return type(module_class.__name__, (adapted, module_class), {})


def _unpickled(adapted: type[_Adapted], module_class: type[nn.Module]) -> nn.Module:
    made = _adapted_class(adapted, module_class)  # type: ignore[arg-type] # mypy misreads __hash__
    return made.__new__(made)


class Injection:
    """Adapters that are injected into a backbone until `restore`."""

    def __init__(
        self,
        backbone: nn.Module,
        architecture: ResolvedArchitecture,
        linears: Sequence[dict[str, LinearSize]],
        shared: nn.ModuleList,
        active: ActiveAdapters,
        config: ModelConfig,
    ) -> None:
        """Freeze the backbone and inject adapters. If an error is raised, the backbone has not changed.

        Args:
            backbone: Model to adapt in place.
            architecture: Resolved architecture of `backbone`.
            linears: Linear layers that form "lora" changes, in the stack with generated adapters and in the stack with
                shared adapters (see `architectures.find_linears`).
            shared: Shared adapters, one for each adapted layer of their stack; empty if there are none.
            active: State of the batch, which generated adapters read.
            config: Settings with all defaults resolved (see `checks.plan`).

        Raises:
            BackboneError: If another library has replaced the forward method of a module.
        """
        self._backbone = backbone
        self._modes = {module: module.training for module in backbone.modules()}
        # Names, because parameters that are kept here would stay in memory when FSDP replaces them.
        self._trained = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
        self._planned: list[tuple[nn.Module, type[_Adapted], _Beside]] = []
        self._changed: list[tuple[nn.Module, type[nn.Module]]] = []
        self._active, self._config = active, config
        self._plan(architecture, linears, shared)
        # A layer is adapted by its __call__, which runs before any forward method.
        _check_forwards(backbone, [module for module, adapted, _ in self._planned if "forward" in vars(adapted)])
        backbone.requires_grad_(False)
        setattr(backbone, HOLDS_ADAPTERS, True)
        for change in self._planned:
            self._carry_out(*change)

    def restore(self) -> None:
        """Restore the class and the mode of every module, and `requires_grad` of every parameter."""
        for module, own_class in reversed(self._changed):
            _change_class(module, own_class)
            del module.__dict__["beside"]
        delattr(self._backbone, HOLDS_ADAPTERS)
        for name in self._trained:
            self._backbone.get_parameter(name).requires_grad_(True)
        for module, training in self._modes.items():
            module.training = training

    def _plan(
        self, architecture: ResolvedArchitecture, linears: Sequence[dict[str, LinearSize]], shared: nn.ModuleList
    ) -> None:
        """Plan the changes of all modules."""
        generated, lowest = architecture.generated, architecture.lowest
        identity = _IDENTITIES[lowest.row.layer_output]
        for index, layer in enumerate(lowest.layers[: architecture.first_adapted(lowest, self._config)]):
            self._change(layer, _LayerBelow, _BesideLayerBelow(self._active, identity, index == 0))
        for index, layer in enumerate(generated.layers[architecture.first_adapted(generated, self._config) :]):
            self._put_generated(generated, layer, linears[0])
            is_first = index == 0 and generated is lowest
            self._change(layer, _Layer, _BesideLayer(self._active, index, is_first))
        if architecture.shared is None:
            return
        layers = architecture.shared.layers[architecture.first_adapted(architecture.shared, self._config) :]
        for layer, adapter in zip(layers, shared, strict=True):
            self._put_shared(architecture.shared, layer, adapter, linears[1])
        for layer in layers[:1]:
            self._change(layer, _Layer, _BesideLayer(self._active, None, True))

    def _put_generated(self, stack: Stack, layer: nn.Module, linears: dict[str, LinearSize]) -> None:
        if self._config.form == "bottleneck":
            self._put(stack, layer, self._active.adapt)
            return
        for path in linears:
            name, scale = parameter_name(path), self._config.lora_scale
            self._put_beside(layer.get_submodule(path), partial(self._active.adapt_linear, name=name, scale=scale))

    def _put_shared(self, stack: Stack, layer: nn.Module, adapter: nn.Module, linears: dict[str, LinearSize]) -> None:
        if not isinstance(adapter, LearnedLora):
            self._put(stack, layer, adapter)
            return
        for path in linears:
            self._put_beside(
                layer.get_submodule(path), _ScaledLora(adapter, parameter_name(path), self._config.lora_scale)
            )

    def _put(self, stack: Stack, layer: nn.Module, adapter: Adapter) -> None:
        """Plan a bottleneck adapter beside the feed-forward block of a layer."""
        row, feed_forward = stack.row, layer.get_submodule(stack.row.feed_forward)
        if row.placement == "before_residual":
            self._change(feed_forward, _BeforeResidual, _Beside(self._active, adapter))
        elif row.entry is not None:
            beside = _Beside(self._active, adapter)
            self._change(layer.get_submodule(row.entry), _Entry, beside)
            self._change(feed_forward, _Exit, beside)
        else:
            norm = row.norm if self._config.adapter_norm_input else None
            self._put_beside(feed_forward, adapter, None if norm is None else feed_forward.get_submodule(norm))

    def _put_beside(self, module: nn.Module, adapter: Adapter, norm: nn.Module | None = None) -> None:
        self._change(module, _Parallel, _Beside(self._active, adapter, norm))

    def _change(self, module: nn.Module, adapted: type[_Adapted], beside: _Beside) -> None:
        self._planned.append((module, adapted, beside))

    def _carry_out(self, module: nn.Module, adapted: type[_Adapted], beside: _Beside) -> None:
        own_class = type(module)
        _change_class(module, _adapted_class(adapted, own_class))  # type: ignore[arg-type] # as in `_unpickled`
        module.__dict__["beside"] = beside  # bypasses nn.Module, which would register it
        self._changed.append((module, own_class))


def _check_forwards(backbone: nn.Module, changed: Sequence[nn.Module]) -> None:
    """Check that no instance has its own forward method, which would be called instead of that of its class.

    Raises:
        BackboneError: If another library has replaced the forward method of an instance.
    """
    names = {module: name for name, module in backbone.named_modules()}
    for module in changed:
        if "forward" in vars(module) and HOOKED_FORWARD not in vars(module):
            raise BackboneError(
                f"the forward method of the backbone's module '{names[module]}' was replaced by another library, so "
                "its adapter would not be called; undo the replacement, and repeat it after the adapters are injected"
            )


def _change_class(module: nn.Module, new_class: type[nn.Module]) -> None:
    """Change the class of a module, and the forward method that a hook of accelerate on it calls, if there is one.

    The hook replaces the forward method of the instance and stores the original method, bound to the former class.
    """
    wrapped = getattr(vars(module).get(HOOKED_FORWARD), "__func__", None)
    is_of_class = wrapped is not None and wrapped is type(module).forward
    module.__class__ = new_class
    if is_of_class:
        setattr(module, HOOKED_FORWARD, MethodType(new_class.forward, module))


class _ScaledLora:
    """The part of a shared LoRA that belongs to one linear layer, with its scale."""

    def __init__(self, adapter: LearnedLora, name: str, scale: float) -> None:
        self.adapter, self.name, self.scale = adapter, name, scale

    def __call__(self, inputs: Tensor) -> Tensor:
        output: Any = self.adapter(inputs, self.name)
        return self.scale * output


def parameter_name(path: str) -> str:
    """Return the path of a module with underscores instead of dots, as a part of the name of a parameter.

    Args:
        path: Path of the module, such as "self_attn.q_proj".
    """
    return path.replace(".", "_")
