"""Freeze a backbone, wrap its feed-forward sublayers, and give it back exactly as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from hyperadapters.hosts.active import ActiveAdapters
from hyperadapters.hosts.sites import Placement, Sites, Stack

Adapter = Callable[[Tensor], Tensor]


class _Wrapped(nn.Module):
    """A submodule of the backbone with an adapter beside it. The adapter is not registered: it belongs to the model."""

    holds_adapter = True

    def __init__(self, inner: nn.Module, adapter: Adapter, active: ActiveAdapters, norm_input: bool) -> None:
        super().__init__()
        self.inner = inner
        self._host = (adapter, active)
        self._norm_input = norm_input


class AfterSublayer(_Wrapped):
    """`inner(x) + adapter(norm(x))`, or `adapter(x)` where the adapter's input is not normed."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states [B, S, d] to [B, S, d]."""
        adapter, active = self._host
        output: Tensor = self.inner(hidden)
        if not active.enabled:
            return output
        return output + adapter(self.inner.layer_norm(hidden) if self._norm_input else hidden)  # type: ignore[operator]


class BeforeResidual(_Wrapped):
    """`inner(hidden, residual + adapter(residual))`: inside the sum that the inner module norms."""

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """Map the feed-forward's hidden states [B, S, f] and its input [B, S, d] to [B, S, d]."""
        adapter, active = self._host
        output: Tensor = self.inner(hidden, residual + adapter(residual) if active.enabled else residual)
        return output


_WRAPPERS: dict[Placement, type[_Wrapped]] = {"after_sublayer": AfterSublayer, "before_residual": BeforeResidual}


class Injection:
    """Adapters put into a backbone, until `restore`."""

    def __init__(
        self,
        backbone: nn.Module,
        sites: Sites,
        num_frozen: int,
        shared: nn.ModuleList,
        active: ActiveAdapters,
        norm_input: bool,
    ) -> None:
        """Freeze and wrap.

        Args:
            backbone: the model that `sites` were found in.
            sites: where.
            num_frozen: layers of the lowest stack that get no adapter.
            shared: learned adapters, one for each further layer of the shared stack; empty for none.
            active: state that generated adapters read.
            norm_input: see `ModelConfig.adapter_norm_input`.
        """
        self._modes = {module: module.training for module in backbone.modules()}
        self._trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        backbone.requires_grad_(False)
        first_generated = num_frozen if sites.shared is None else 0
        generated = [partial(active.adapt, site=site) for site in range(len(sites.generated.layers) - first_generated)]
        self._wrap(sites.generated, first_generated, generated, active, norm_input)
        if sites.shared is not None:
            self._wrap(sites.shared, num_frozen, list(shared), active, norm_input)
        adapted = (sites.shared or sites.generated).layers[num_frozen:]
        self._hooks = [layer.register_forward_pre_hook(active.enter_first_layer) for layer in adapted[:1]]

    def restore(self) -> None:
        """Put every module, hook, mode and `requires_grad` of the backbone back."""
        for hook in self._hooks:
            hook.remove()
        for owner, attribute, module in self._replaced:
            setattr(owner, attribute, module)
        self._replaced.clear()
        for parameter in self._trained:
            parameter.requires_grad_(True)
        for module, training in self._modes.items():
            module.training = training

    def _wrap(
        self, stack: Stack, first_layer: int, adapters: Sequence[Adapter], active: ActiveAdapters, norm_input: bool
    ) -> None:
        for owner, adapter in zip(stack.owners[first_layer:], adapters, strict=True):
            inner = owner.get_submodule(stack.attribute)
            wrapper = _WRAPPERS[stack.placement](inner, adapter, active, norm_input)
            wrapper.train(inner.training)
            setattr(owner, stack.attribute, wrapper)
            self._replaced.append((owner, stack.attribute, inner))
