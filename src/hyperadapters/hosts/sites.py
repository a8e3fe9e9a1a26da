"""Where adapters go: a table row for each architecture, resolved completely before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from hyperadapters.errors import BackboneError, unknown_name

Placement = Literal["after_sublayer", "before_residual"]


@dataclass(frozen=True)
class StackRow:
    """One stack of layers.

    Attributes:
        layers: path of the list of layers in the model.
        sublayer: path, inside a layer, of the module to wrap.
        placement: "after_sublayer": the module is a whole pre-norm feed-forward sublayer with its norm in
            `layer_norm`, and the adapter's output is added to its output. "before_residual": the module ends a
            post-norm feed-forward sublayer, takes (hidden, residual) and norms their sum, and the adapter's output
            is added to the residual.
    """

    layers: str
    sublayer: str
    placement: Placement


@dataclass(frozen=True)
class ArchitectureRow:
    """An architecture.

    Attributes:
        kind: decides what is generated for which stack, and how the model answers.
        width: attribute of the config that holds the size of the hidden states.
        generated, shared: the stack that gets generated adapters, and the one that gets learned ones.
        skips_padding_position: whether positions are counted from behind the padding token's id (RoBERTa), so that
            as many fewer tokens fit than there are position embeddings.
    """

    kind: Literal["encoder-decoder", "encoder"]
    width: str
    generated: StackRow
    shared: StackRow | None = None
    skips_padding_position: bool = False


_T5 = ArchitectureRow(
    kind="encoder-decoder",
    width="d_model",
    generated=StackRow("decoder.block", "layer.2", "after_sublayer"),
    shared=StackRow("encoder.block", "layer.1", "after_sublayer"),
)
_BERT = ArchitectureRow(
    kind="encoder",
    width="hidden_size",
    generated=StackRow("encoder.layer", "output", "before_residual"),
)
_ROBERTA = replace(_BERT, skips_padding_position=True)

SITES: dict[str, ArchitectureRow] = {
    "t5": _T5,
    "mt5": _T5,
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}
"""Rows by `model_type`. MiniLM models are "bert", FLAN-T5 models are "t5"."""


@dataclass(frozen=True)
class Stack:
    """A resolved stack: its layers, and for each layer the owner and attribute of the module to wrap."""

    layers: nn.ModuleList
    owners: tuple[nn.Module, ...]
    attribute: str
    placement: Placement


@dataclass(frozen=True)
class Sites:
    """The resolved sites of a backbone; `max_length` is the number of tokens it has positions for, None for any."""

    kind: Literal["encoder-decoder", "encoder"]
    width: int
    max_length: int | None
    generated: Stack
    shared: Stack | None


def find_sites(backbone: nn.Module) -> Sites:
    """Resolve the row of the backbone's architecture, without changing anything.

    Raises:
        BackboneError: the architecture has no row, or a module of its row is missing.
    """
    config = getattr(backbone, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise BackboneError(
            f"expected a transformers model with a config and its model_type, found {type(backbone).__name__}"
        )
    row = SITES.get(model_type)
    if row is None:
        raise BackboneError(unknown_name("architecture", model_type, SITES) + " Add a row to hosts/sites.py.")
    return Sites(
        kind=row.kind,
        width=getattr(config, row.width),
        max_length=_max_length(config, row),
        generated=_resolve(backbone, row.generated),
        shared=_resolve(backbone, row.shared) if row.shared else None,
    )


def _max_length(config: Any, row: ArchitectureRow) -> int | None:
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is not None and row.skips_padding_position:
        positions -= config.pad_token_id + 1
    return positions


def _resolve(backbone: nn.Module, row: StackRow) -> Stack:
    layers = _module(backbone, row.layers, row.layers)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise BackboneError(f"expected a list of layers at '{row.layers}' of {type(backbone).__name__}")
    parent, _, attribute = row.sublayer.rpartition(".")
    owners = []
    for index, layer in enumerate(layers):
        owner = _module(layer, parent, f"{row.layers}.{index}.{parent}") if parent else layer
        wrapped = _module(owner, attribute, f"{row.layers}.{index}.{row.sublayer}")
        if getattr(wrapped, "holds_adapter", False):
            raise BackboneError(
                "the backbone already holds the adapters of another HyperAdapterModel; detach that first"
            )
        if row.placement == "after_sublayer":
            _module(wrapped, "layer_norm", f"{row.layers}.{index}.{row.sublayer}.layer_norm")
        owners.append(owner)
    return Stack(layers, tuple(owners), attribute, row.placement)


def _module(root: nn.Module, path: str, full_path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        children = ", ".join(name for name, _ in root.named_children()) or "none"
        raise BackboneError(
            f"expected a module at '{full_path}', found none; {type(root).__name__} has: {children}. "
            "Is this the plain model of its architecture (for an encoder: without a task head)?"
        ) from None
