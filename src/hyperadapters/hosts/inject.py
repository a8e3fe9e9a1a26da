"""Freeze a backbone, put adapters beside its modules, and give it back exactly as it was.

Adapters are hooks: the backbone's modules stay where they are, under their own names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hyperadapters.config import ModelConfig
from hyperadapters.core import LearnedLora
from hyperadapters.hosts.active import ActiveAdapters
from hyperadapters.hosts.sites import HOLDS_ADAPTERS, LinearSize, Sites, Stack

Adapter = Callable[[Tensor], Tensor]


class _Hook:
    """What adapters beside a module have in common."""

    def __init__(self, adapter: Adapter, active: ActiveAdapters) -> None:
        self.adapter, self.active = adapter, active


class _Parallel(_Hook):
    """Forward hook: adds the adapter's output for the module's input to the module's output."""

    norm: nn.Module | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self.active.enabled:
            return None
        return output + self.adapter(args[0] if self.norm is None else self.norm(args[0]))


class _BeforeResidual(_Hook):
    """Forward pre-hook of a module that takes (hidden, residual): adds the adapter's output to the residual."""

    def __call__(self, module: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
        if not self.active.enabled:
            return None
        hidden, residual = args
        return hidden, residual + self.adapter(residual)


class _Across(_Hook):
    """Hooks of the first and the last module of a feed-forward: the adapter reads what enters the first."""

    _entered: Tensor | None = None

    def enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._entered = args[0]

    def leave(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        entered, self._entered = self._entered, None
        assert entered is not None
        return output + self.adapter(entered) if self.active.enabled else None


class Injection:
    """Adapters put into a backbone, until `restore`."""

    def __init__(
        self,
        backbone: nn.Module,
        sites: Sites,
        num_frozen: int,
        linears: Sequence[dict[str, LinearSize]],
        shared: nn.ModuleList,
        active: ActiveAdapters,
        config: ModelConfig,
    ) -> None:
        """Freeze, and put adapters in.

        Args:
            backbone: the model that `sites` were found in.
            sites: where.
            num_frozen: layers of the lowest stack that get no adapter.
            linears: of the stack with generated adapters, and of the shared one, see `sites.find_linears`.
            shared: learned adapters, one for each further layer of the shared stack; empty for none.
            active: state that generated adapters read.
            config: form and settings of the adapters.
        """
        self._backbone = backbone
        self._modes = {module: module.training for module in backbone.modules()}
        self._trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
        self._hooks: list[RemovableHandle] = []
        self._active, self._config = active, config
        backbone.requires_grad_(False)
        setattr(backbone, HOLDS_ADAPTERS, True)
        first = num_frozen if sites.shared is None else 0
        for site, layer in enumerate(sites.generated.layers[first:]):
            self._put_generated(sites.generated, layer, site, linears[0])
        if sites.shared is not None:
            for layer, adapter in zip(sites.shared.layers[num_frozen:], shared, strict=True):
                self._put_shared(sites.shared, layer, adapter, linears[1])
        for layer in sites.lowest.layers[num_frozen:][:1]:
            self._hooks.append(layer.register_forward_pre_hook(active.enter_first_layer))

    def restore(self) -> None:
        """Take out every hook, and put modes and `requires_grad` of the backbone back."""
        for hook in self._hooks:
            hook.remove()
        delattr(self._backbone, HOLDS_ADAPTERS)
        for parameter in self._trained:
            parameter.requires_grad_(True)
        for module, training in self._modes.items():
            module.training = training

    def _put_generated(self, stack: Stack, layer: nn.Module, site: int, linears: dict[str, LinearSize]) -> None:
        if self._config.form == "bottleneck":
            self._put(stack, layer, partial(self._active.adapt, site=site))
            return
        for path in linears:
            name, scale = parameter_name(path), self._config.lora_scale
            self._put_beside(
                layer.get_submodule(path), partial(self._active.adapt_linear, site=site, name=name, scale=scale)
            )

    def _put_shared(self, stack: Stack, layer: nn.Module, adapter: nn.Module, linears: dict[str, LinearSize]) -> None:
        if not isinstance(adapter, LearnedLora):
            self._put(stack, layer, adapter)
            return
        for path in linears:
            self._put_beside(
                layer.get_submodule(path), _ScaledLora(adapter, parameter_name(path), self._config.lora_scale)
            )

    def _put(self, stack: Stack, layer: nn.Module, adapter: Adapter) -> None:
        """Put a bottleneck adapter beside the feed-forward of a layer."""
        row, feed_forward = stack.row, layer.get_submodule(stack.row.feed_forward)
        if row.placement == "before_residual":
            self._hooks.append(feed_forward.register_forward_pre_hook(_BeforeResidual(adapter, self._active)))
        elif row.entry is not None:
            across = _Across(adapter, self._active)
            self._hooks.append(layer.get_submodule(row.entry).register_forward_pre_hook(across.enter))
            self._hooks.append(feed_forward.register_forward_hook(across.leave))
        else:
            norm = row.norm if self._config.adapter_norm_input else None
            self._put_beside(feed_forward, adapter, None if norm is None else feed_forward.get_submodule(norm))

    def _put_beside(self, module: nn.Module, adapter: Adapter, norm: nn.Module | None = None) -> None:
        hook = _Parallel(adapter, self._active)
        hook.norm = norm
        self._hooks.append(module.register_forward_hook(hook))


class _ScaledLora:
    """The part of a learned LoRA that belongs to one linear map."""

    def __init__(self, adapter: LearnedLora, name: str, scale: float) -> None:
        self.adapter, self.name, self.scale = adapter, name, scale

    def __call__(self, inputs: Tensor) -> Tensor:
        output: Any = self.adapter(inputs, self.name)
        return self.scale * output


def parameter_name(path: str) -> str:
    """A module's path as a part of the name of a parameter."""
    return path.replace(".", "_")
