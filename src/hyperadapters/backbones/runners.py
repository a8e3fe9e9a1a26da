"""The runner that a backbone needs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hyperadapters.backbones.architectures import LinearSize, ResolvedArchitecture
from hyperadapters.backbones.encoder_decoder import EncoderDecoderRunner
from hyperadapters.backbones.passes import PassRunner
from hyperadapters.config import ModelConfig


def make_runner(
    backbone: nn.Module,
    architecture: ResolvedArchitecture,
    config: ModelConfig,
    linears: Sequence[dict[str, LinearSize]],
    shared: nn.ModuleList,
) -> PassRunner:
    """Freeze a backbone, put adapters into it, and return what runs it.

    Args:
        backbone: The model to adapt. It is changed in place, until the runner's `detach`.
        architecture: The resolved architecture of `backbone`.
        config: Settings with all defaults resolved (see `checks.plan`).
        linears: The linear layers that form "lora" changes, of the stack with generated adapters and of the one with
            learned adapters.
        shared: Learned adapters, one for each adapted layer of the stack that shares them; empty if there are none.

    Returns:
        A runner for one stack of layers, or for an encoder-decoder.

    Raises:
        BackboneError: If another library has replaced the forward of a module. Nothing has been changed then.
    """
    runner = PassRunner if architecture.shared is None else EncoderDecoderRunner
    return runner(backbone, architecture, config, linears, shared)
