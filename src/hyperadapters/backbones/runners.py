"""Choice of the pass runner for a backbone."""

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
    """Freeze a backbone, inject adapters, and make its pass runner. If an error is raised, the backbone is unchanged.

    Args:
        backbone: Model to adapt. It is changed in place until `PassRunner.detach`.
        architecture: Resolved architecture of `backbone`.
        config: Settings with all defaults resolved (see `checks.plan`).
        linears: Linear layers that form "lora" changes, in the stack with generated adapters and in the stack with
            shared adapters.
        shared: Shared adapters, one for each adapted layer of their stack; empty if there are none.

    Returns:
        Runner of a single stack of layers or of an encoder-decoder.

    Raises:
        BackboneError: If another library has replaced the forward method of a module.
    """
    runner = PassRunner if architecture.shared is None else EncoderDecoderRunner
    return runner(backbone, architecture, config, linears, shared)
