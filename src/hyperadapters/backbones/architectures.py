"""The table of supported architectures, and the modules of a backbone that a row of the table names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from hyperadapters.config import BackboneKind, ModelConfig, ModuleNames
from hyperadapters.errors import BackboneError, did_you_mean, unknown_name

Placement = Literal["parallel", "before_residual"]
LayerOutput = Literal["hidden", "tuple", "t5"]

HOLDS_ADAPTERS = "_holds_hyperadapters"
"""Attribute of a backbone that contains adapters."""
HOOKED_FORWARD = "_old_forward"
"""Attribute in which a hook of accelerate stores the original forward method of its module."""


@dataclass(frozen=True)
class StackRow:
    """Names of the modules of one stack of layers.

    Attributes:
        layers: Path of the list of layers in the model.
        feed_forward: Path in a layer of the last module of the feed-forward block.
        placement: "parallel" (default) if the adapter reads the input of the feed-forward block and its output is added
            to that of the block. "before_residual" if the module takes (hidden, residual) and normalizes their sum; the
            adapter then reads the residual, which is the input of the feed-forward block, and its output is added to
            the residual.
        entry: Path in a layer of the first module of the feed-forward block. Default: `feed_forward`.
        norm: Path in `feed_forward` of the layer norm that it applies to its input. Default: the input is already
            normalized.
        layer_output: Return value of a layer: "hidden" (default) for the hidden states, "tuple" for a tuple whose first
            element is the hidden states, "t5" for the return value of a block of T5.
    """

    layers: str
    feed_forward: str
    placement: Placement = "parallel"
    entry: str | None = None
    norm: str | None = None
    layer_output: LayerOutput = "hidden"


@dataclass(frozen=True)
class ArchitectureRow:
    """A row of the table of architectures.

    Attributes:
        kind: Kind of the architecture: "encoder", "encoder-decoder" or "decoder".
        generated: Stack of layers with generated adapters.
        shared: Stack with adapters that are learned once for all tasks, which is the encoder of an encoder-decoder.
            None for the other kinds.
        target_modules: Linear layers that form "lora" changes by default, as the last parts of their paths in a layer.
        not_by_row: Linear layers that are also applied to other inputs than the rows of a batch, so that form "lora"
            cannot change them for each row.
        takes_pooler: Whether the model class has an unused pooling layer that the argument `add_pooling_layer` can
            omit.
        skips_padding_position: Whether positions start after the id of the padding token, as in RoBERTa, so that not
            all position embeddings are for tokens.
        is_pre_norm: Whether the hidden states between layers are not normalized. A few of their components can then be
            larger than all others by orders of magnitude, so each token is normalized before the mean over the tokens
            is computed for the retriever.
    """

    kind: BackboneKind
    generated: StackRow
    shared: StackRow | None = None
    target_modules: tuple[str, ...] = ()
    not_by_row: tuple[str, ...] = ()
    takes_pooler: bool = False
    skips_padding_position: bool = False
    is_pre_norm: bool = False


_T5 = ArchitectureRow(
    kind="encoder-decoder",
    generated=StackRow("decoder.block", "layer.2", norm="layer_norm", layer_output="t5"),
    shared=StackRow("encoder.block", "layer.1", norm="layer_norm", layer_output="t5"),
    target_modules=("q", "v"),
)
_BART = ArchitectureRow(
    kind="encoder-decoder",
    generated=StackRow("model.decoder.layers", "fc2", entry="fc1"),
    shared=StackRow("model.encoder.layers", "fc2", entry="fc1"),
    target_modules=("q_proj", "v_proj"),
)
_BERT = ArchitectureRow(
    kind="encoder",
    generated=StackRow("encoder.layer", "output", "before_residual"),
    target_modules=("query", "value"),
    takes_pooler=True,
)
_ROBERTA = replace(_BERT, skips_padding_position=True)
_MPNET = replace(
    _ROBERTA,
    generated=StackRow("encoder.layer", "output", "before_residual", layer_output="tuple"),
    target_modules=("attn.q", "attn.v"),
)
_DEBERTA = ArchitectureRow(
    kind="encoder",
    generated=StackRow("encoder.layer", "output", "before_residual", layer_output="tuple"),
    target_modules=("value_proj", "attention.output.dense"),
    not_by_row=("query_proj", "key_proj"),  # also applied to relative positions, once for the batch
)
_DISTILBERT = ArchitectureRow(
    kind="encoder", generated=StackRow("transformer.layer", "ffn"), target_modules=("q_lin", "v_lin")
)
_MODERNBERT = ArchitectureRow(
    kind="encoder", generated=StackRow("layers", "mlp"), target_modules=("Wqkv",), is_pre_norm=True
)
_GPT2 = ArchitectureRow(
    kind="decoder", generated=StackRow("transformer.h", "mlp"), target_modules=("c_attn",), is_pre_norm=True
)
_LLAMA = ArchitectureRow(
    kind="decoder", generated=StackRow("model.layers", "mlp"), target_modules=("q_proj", "v_proj"), is_pre_norm=True
)

ARCHITECTURES: dict[str, ArchitectureRow] = {
    "t5": _T5,
    "mt5": _T5,
    "bart": _BART,
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "mpnet": _MPNET,
    "deberta-v2": _DEBERTA,
    "distilbert": _DISTILBERT,
    "modernbert": _MODERNBERT,
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
}
"""Rows by `model_type`, which is "bert" for MiniLM, "t5" for FLAN-T5 and "deberta-v2" for DeBERTa-v3."""


class LinearSize(NamedTuple):
    """Sizes of a linear layer.

    Attributes:
        inputs: Number of input features.
        outputs: Number of output features.
    """

    inputs: int
    outputs: int


@dataclass(frozen=True)
class Stack:
    """A stack of layers of a backbone.

    Attributes:
        row: Names of the modules of the stack.
        layers: Layers of the stack, each with the modules that the row names.
    """

    row: StackRow
    layers: nn.ModuleList


@dataclass(frozen=True)
class ResolvedArchitecture:
    """The architecture of a backbone, with the modules that were found in it.

    Attributes:
        kind: Kind of the architecture: "encoder", "encoder-decoder" or "decoder".
        hidden_size: Size d of the hidden states.
        max_length: Maximum number of tokens for which there are positions; None if there is no limit.
        generated: Stack with generated adapters.
        shared: Stack with adapters that are learned once for all tasks; None if there is none.
        target_modules: Linear layers that form "lora" changes by default; see `ArchitectureRow`.
        not_by_row: Linear layers that form "lora" cannot change; see `ArchitectureRow`.
        is_pre_norm: Whether the hidden states between layers are not normalized; see `ArchitectureRow`.
    """

    kind: BackboneKind
    hidden_size: int
    max_length: int | None
    generated: Stack
    shared: Stack | None
    target_modules: tuple[str, ...]
    not_by_row: tuple[str, ...]
    is_pre_norm: bool

    @property
    def lowest(self) -> Stack:
        """First stack that a batch passes through."""
        return self.shared or self.generated

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Stack with generated adapters, followed by the stack with shared adapters if there is one."""
        return (self.generated,) if self.shared is None else (self.generated, self.shared)

    @property
    def has_heads(self) -> bool:
        """Whether task heads compute the answers. Otherwise the backbone generates them as text."""
        return self.kind == "encoder"

    def first_adapted(self, stack: Stack, config: ModelConfig) -> int:
        """Return the index of the first layer of a stack with adapters. It can be above 0 in the lowest stack only.

        Args:
            stack: One of `stacks`.
            config: Settings with all defaults resolved (see `checks.plan`).
        """
        if stack is not self.lowest:
            return 0
        return (config.feature_layer or 0) if self.shared is None else config.frozen_encoder_layers


def resolve_architecture(backbone: nn.Module, modules: ModuleNames | None = None) -> ResolvedArchitecture:
    """Find the modules of a backbone that the row of its architecture names. The backbone is not changed.

    Args:
        backbone: Model of a supported architecture, or any model if `modules` are given.
        modules: Names of the modules. Default: the names in the table.

    Returns:
        The architecture and its modules.

    Raises:
        BackboneError: If the architecture is not in the table, a module is missing, the hidden size is unknown, or the
            backbone already contains adapters.
    """
    config = getattr(backbone, "config", None)
    row = _find_row(backbone, config) if modules is None else _row_of(modules)
    hidden_size = (
        getattr(config, "hidden_size", None) if modules is None or modules.hidden_size is None else modules.hidden_size
    )
    if hidden_size is None:
        raise BackboneError(
            "the hidden_size of the backbone's hidden states is unknown; specify it as modules.hidden_size"
        )
    if getattr(backbone, HOLDS_ADAPTERS, False):
        raise BackboneError("the backbone already contains adapters of another HyperAdapterModel; detach them first")
    return ResolvedArchitecture(
        kind=row.kind,
        hidden_size=hidden_size,
        max_length=_max_length(config, row),
        generated=_resolve(backbone, row.generated),
        shared=_resolve(backbone, row.shared) if row.shared else None,
        target_modules=row.target_modules,
        not_by_row=row.not_by_row,
        is_pre_norm=row.is_pre_norm,
    )


def _find_row(backbone: nn.Module, config: Any) -> ArchitectureRow:
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise BackboneError(
            f"expected a transformers model whose config has a model_type, found {type(backbone).__name__}; "
            "name the modules of any other model (see ModelConfig.modules)"
        )
    row = ARCHITECTURES.get(model_type)
    if row is None:
        raise BackboneError(unknown_name("architecture", model_type, ARCHITECTURES) + f" {HOW_TO_NAME}")
    return row


HOW_TO_NAME = (
    "Name its modules (see ModelConfig.modules), or add a row to backbones/architectures.py (see docs/backbones.md)."
)
"""Advice in the errors about an unknown architecture."""


def _row_of(modules: ModuleNames) -> ArchitectureRow:
    is_decoder = modules.kind == "decoder"
    return ArchitectureRow(modules.kind, StackRow(modules.layers, modules.feed_forward), is_pre_norm=is_decoder)


def _max_length(config: Any, row: ArchitectureRow) -> int | None:
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is not None and row.skips_padding_position:
        positions -= config.pad_token_id + 1
    return positions


def _resolve(backbone: nn.Module, row: StackRow) -> Stack:
    layers = _module(backbone, row.layers)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise BackboneError(f"expected a list of layers at '{row.layers}' of {type(backbone).__name__}")
    if len({id(layer) for layer in layers}) < len(layers):
        raise BackboneError(
            f"some of the layers at '{row.layers}' of {type(backbone).__name__} are the same module, which cannot have "
            "an adapter for each layer; make separate layers with copy.deepcopy"
        )
    for index, layer in enumerate(layers):
        feed_forward = _module(layer, row.feed_forward, f"{row.layers}.{index}.")
        if row.norm is not None:
            _module(feed_forward, row.norm, f"{row.layers}.{index}.{row.feed_forward}.")
        if row.entry is not None:
            _module(layer, row.entry, f"{row.layers}.{index}.")
    return Stack(row, layers)


def _module(root: nn.Module, path: str, before: str = "") -> nn.Module:
    found = root
    for part in path.split("."):
        children = dict(found.named_children())
        if part not in children:
            raise BackboneError(
                f"expected a module at '{before}{path}', found none; {type(found).__name__} has: "
                f"{', '.join(children) or 'none'}.{did_you_mean(part, children)} "
                "Is this the plain model of its architecture (for an encoder: without a task head)?"
            )
        found = children[part]
    return found


def check_feed_forward(stack: Stack, hidden_size: int) -> None:
    """Check that the module named as feed-forward maps hidden states to hidden states, if its sizes are known.

    Args:
        stack: Stack whose layers are checked.
        hidden_size: Size d of the hidden states.

    Raises:
        BackboneError: If the module is a linear layer with other sizes.
    """
    for index, layer in enumerate(stack.layers):
        size = _size(layer.get_submodule(stack.row.feed_forward))
        if size is not None and size != (hidden_size, hidden_size):
            raise BackboneError(
                f"modules.feed_forward: '{stack.row.layers}.{index}.{stack.row.feed_forward}' is a linear layer from "
                f"{size.inputs} to {size.outputs}; expected the one module that maps hidden states to hidden "
                f"states, which have hidden_size {hidden_size}. If the layers have no such module, use form 'lora'"
            )


def find_linears(stack: Stack, num_frozen: int, targets: Sequence[str]) -> dict[str, LinearSize]:
    """Find the linear layers that form "lora" changes in each adapted layer of a stack.

    Args:
        stack: Stack to search.
        num_frozen: Number of layers without adapters at the bottom of the stack.
        targets: Names of the linear layers, as the last parts of their paths, like `target_modules` of PEFT.

    Returns:
        Sizes of the linear layers by their paths in a layer, which are the same in each adapted layer. Empty if no
        layer is adapted.

    Raises:
        BackboneError: If no module has one of the names, a module with such a name is not a linear layer, or the layers
            of the stack differ.
    """
    found = [_linears(layer, targets) for layer in stack.layers[num_frozen:]]
    for index, linears in enumerate(found):
        if linears != found[0]:
            names = sorted(name for name, _ in linears.items() ^ found[0].items())
            raise BackboneError(
                f"target_modules: expected the same linear layers in each layer; {stack.row.layers}.{num_frozen} and "
                f"{stack.row.layers}.{num_frozen + index} differ in {', '.join(names)}; name others"
            )
    return found[0] if found else {}


def _linears(layer: nn.Module, targets: Sequence[str]) -> dict[str, LinearSize]:
    modules = {name: module for name, module in layer.named_modules() if name}
    found: dict[str, LinearSize] = {}
    for target in targets:
        named = {name: module for name, module in modules.items() if f".{name}".endswith(f".{target}")}
        if not named:
            known = dict.fromkeys(name.split(".")[-1] for name, module in modules.items() if _size(module))
            raise BackboneError("target_modules: " + unknown_name("module", target, known))
        for name, module in named.items():
            size = _size(module)
            if size is None:
                raise BackboneError(
                    f"target_modules: '{target}' is {type(module).__name__} '{name}'; expected a linear layer"
                )
            found[name] = size
    return found


def _size(module: nn.Module) -> LinearSize | None:
    """Return the sizes of a linear layer, quantised or not; None for any other module."""
    if isinstance(module, Conv1D):  # GPT-2's linear layer, with its weight transposed
        return LinearSize(module.nx, module.nf)
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return LinearSize(inputs, outputs) if isinstance(inputs, int) and isinstance(outputs, int) else None
