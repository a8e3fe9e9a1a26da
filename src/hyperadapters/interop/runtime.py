"""Export of all tasks of an encoder model for `hyperadapters.runtime`, which needs neither torch nor transformers."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from hyperadapters._version import __version__
from hyperadapters.backbones.active import BatchState
from hyperadapters.backbones.loading import num_embeddings
from hyperadapters.backbones.passes import Inputs, LowerOutput, pool
from hyperadapters.checkpoints.format import BackboneReference
from hyperadapters.core import AdapterWeights, Grouping
from hyperadapters.errors import BackboneError, ExportError, TaskError, unknown_name
from hyperadapters.heads.unfitted import warn_of_unfitted_heads
from hyperadapters.interop.onnx import check_exportable, trace
from hyperadapters.methods import PHA
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.runtime.folder import (
    ARRAYS_FILE,
    FILES,
    FORMAT_VERSION,
    LOWER_FILE,
    SETTINGS_FILE,
    TOKENIZER_FILE,
    UPPER_FILE,
)
from hyperadapters.utils.files import new_folder
from hyperadapters.utils.optional import require

Quantization = Literal["int8"]
QUANTIZATIONS: tuple[Quantization, ...] = ("int8",)
MAX_GRAPH_BYTES = 2**31
"""Size from which onnxruntime cannot read a graph from one file."""


@torch.no_grad()
def export_runtime(model: HyperAdapterModel, folder: str | Path, quantize: Quantization | None = None) -> None:
    """Write all tasks of a model for `hyperadapters.runtime.Runtime`.

    `hyperadapters.runtime.folder` describes the files. The weights of adapters are inputs of the graph of the upper
    layers, so that the graphs do not depend on the tasks.

    Args:
        model: Model on an encoder backbone, which is not changed.
        folder: Folder to create, which must not exist or be empty.
        quantize: "int8" to store the weights of the backbone's linear layers and embeddings in eight bits, and to
            compute with them. Adapters and heads remain in float32. Default: everything is in float32.

    Raises:
        ExportError: If the backbone generates text, is offloaded or is not in float32; if heads read features of texts
            that a second pass computes; if the tokenizer is not a fast one; or if `quantize` is unknown.
        TaskError: If the method of the model has no adapters of tasks, or a task is merged into the backbone.
        MissingPackageError: If a package of the extra `onnx` is not installed.
        OutputError: If the folder is not empty or cannot be written.
        BackboneError: If the tokenizer cannot be loaded, or has token ids for which the backbone has no embeddings.
    """
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise ExportError(unknown_name("quantization", str(quantize), QUANTIZATIONS))
    _check(model)
    for package in ("onnxscript", "onnxruntime"):
        require(package)
    assert model.heads is not None
    warn_of_unfitted_heads(model.heads, model.tasks)
    tokenizer = _tokenizer(model)
    weights = model.method.adapters(torch.arange(len(model.tasks), device=model.device))
    with new_folder(folder) as new:
        (new / TOKENIZER_FILE).write_text(tokenizer.to_str(), encoding="utf-8")
        arrays = {name: tensor.float().cpu().contiguous() for name, tensor in _arrays(model, weights).items()}
        (new / ARRAYS_FILE).write_bytes(safetensors.torch.save(arrays))
        _write_graph(_trace_lower(model), new / LOWER_FILE, quantize)
        _write_graph(_trace_upper(model, weights), new / UPPER_FILE, quantize)
        values = {**_settings(model, quantize), "files": {name: _checksum(new / name) for name in FILES}}
        text = json.dumps(values, ensure_ascii=False, indent=2) + "\n"
        (new / SETTINGS_FILE).write_text(text, encoding="utf-8")


class LowerLayers(nn.Module):
    """The layers below the generated adapters."""

    def __init__(self, model: HyperAdapterModel) -> None:
        """Store the model.

        Args:
            model: Model on an encoder backbone.
        """
        super().__init__()
        self.model = model
        self.reads_embeddings = _routing(model) == "densities" and model.has_frozen_layers

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Run the layers.

        Args:
            input_ids: Token ids [R, S].
            attention_mask: Mask [R, S], 1 for tokens and 0 for padding.
            token_type_ids: Token types [R, S]. Default: none.

        Returns:
            Input of the first layer with adapters [R, S, d], the pooled hidden states of each sequence that the
            retriever reads [R, d], and the pooled input of the first layer [R, d] if routing reads it.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        lower = self.model.passes.forward_lower_layers(inputs)
        found = [lower.hidden, lower.pooled]
        if self.reads_embeddings:
            embeddings = self.model.passes.pool_embeddings(inputs)
            assert embeddings is not None
            found.append(embeddings)
        return tuple(found)


class UpperLayers(nn.Module):
    """The layers with generated adapters, whose weights are arguments."""

    def __init__(self, model: HyperAdapterModel) -> None:
        """Store the model.

        Args:
            model: Model on an encoder backbone.
        """
        super().__init__()
        self.model = model

    def forward(
        self, hidden: Tensor, attention_mask: Tensor, rows: Tensor, slots: Tensor, adapters: dict[str, Tensor]
    ) -> Tensor:
        """Run the layers.

        Args:
            hidden: Input of the first layer with adapters [R, S, d].
            attention_mask: Mask [R, S], 1 for tokens and 0 for padding.
            rows: Sequence in each slot of each group of sequences with the same task [G, c].
            slots: Slot of each sequence [R].
            adapters: Weights of the adapters of the groups by name, each [L, G, ...].

        Returns:
            Pooled last hidden states of each sequence [R, d].
        """
        # The embeddings of these token ids are replaced by `hidden`, so that they are no part of the exported graph.
        inputs: Inputs = {"input_ids": torch.zeros_like(attention_mask), "attention_mask": attention_mask}
        grouping = Grouping(rows[:, 0], hidden.shape[0], rows.flatten(), slots)
        state = BatchState(AdapterWeights(adapters), grouping)
        output = self.model.passes.run_upper_layers(inputs, LowerOutput(hidden, hidden[:, 0]), state)
        return pool(output, inputs)


def _check(model: HyperAdapterModel) -> None:
    check_exportable(model)
    config = model.adapter_config
    if config.head_inputs not in ("adapted", "adapted_texts"):
        raise ExportError(
            f"head_inputs '{config.head_inputs}': these heads also read each text as the frozen backbone encodes it, "
            "which the runtime does not compute; train with head_inputs 'adapted_texts' (preset 'plus') or 'adapted'"
        )
    if model.is_merged:
        raise TaskError("a task is merged into the backbone, so that the others cannot be exported: call unmerge()")


def _routing(model: HyperAdapterModel) -> str | None:
    if not isinstance(model.method, PHA):
        return None
    return "densities" if model.method.routes_by_densities else "prototypes"


def _reads_types(model: HyperAdapterModel) -> bool:
    """Return whether the backbone reads token types, which sequences of single texts do not have."""
    makes_types = "token_type_ids" in model.tokenizer.model_input_names
    has_types = getattr(getattr(model.backbone, "config", None), "type_vocab_size", 0) > 1
    return not model.adapter_config.separates_texts and makes_types and has_types


def _tokenizer(model: HyperAdapterModel) -> Tokenizer:
    """Return a copy of the tokenizer that truncates texts as the model does, and does not pad."""
    own = model.tokenizer
    if not getattr(own, "is_fast", False):
        raise ExportError(
            f"expected a fast tokenizer, which the package tokenizers can load, found {type(own).__name__}; convert it "
            "with transformers.AutoTokenizer.from_pretrained(NAME, use_fast=True) and set model.tokenizer"
        )
    if own.pad_token_id is None:
        raise ExportError("expected a tokenizer with a padding token, found none; set model.tokenizer.pad_token")
    tokenizer: Tokenizer = Tokenizer.from_str(own.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.enable_truncation(model.lengths.input, direction=own.truncation_side)
    limit, largest = num_embeddings(model.backbone), max(tokenizer.get_vocab().values(), default=0)
    if limit is not None and largest >= limit:
        raise BackboneError(
            f"the tokenizer has token ids up to {largest}, but the backbone only has embeddings for ids below {limit}; "
            "use the backbone's own tokenizer, or call backbone.resize_token_embeddings(len(tokenizer)) before "
            "creating the model"
        )
    return tokenizer


def _settings(model: HyperAdapterModel, quantize: Quantization | None) -> dict[str, Any]:
    assert model.heads is not None
    heads = model.heads.unpack()
    return {
        "format": FORMAT_VERSION,
        "library_version": __version__,
        "backbone": BackboneReference.of(model).model_dump(),
        "quantization": quantize,
        "routing": _routing(model),
        "separates_texts": model.adapter_config.separates_texts,
        "padding_id": model.tokenizer.pad_token_id,
        "special_ids": sorted(model.tokenizer.all_special_ids),
        "tasks": [
            {
                "name": task.name,
                "kind": task.kind,
                "labels": list(task.labels),
                "is_pair": task.is_pair,
                "target_mean": head.target_mean,
                "target_std": head.target_std,
                **({"thresholds": head.label_thresholds} if task.is_multi_label else {}),
            }
            for task, head in zip(model.tasks, heads, strict=True)
        ],
    }


def _arrays(model: HyperAdapterModel, weights: AdapterWeights) -> dict[str, Tensor]:
    """Return everything that depends on tasks, by the names in `runtime.folder.expected_shapes`."""
    assert model.heads is not None
    found = {f"adapters.{name}": tensor for name, tensor in weights.items()}
    for task_id, head in enumerate(model.heads.unpack()):
        folded = head.folded()
        found |= {f"heads.{task_id}.weight": folded.weight, f"heads.{task_id}.bias": folded.bias}
    routing = _routing(model)
    if routing is None:
        return found
    pha = model.pha
    found["thresholds"] = pha.thresholds
    if routing == "prototypes":
        retriever = {f"retriever.{name}": tensor for name, tensor in pha.retriever.state_dict().items()}
        return {**found, **retriever, "prototypes": pha.prototypes.weight, "centroids": pha.prototypes.centroids}
    assert pha.densities is not None
    return found | {f"densities.{name}": tensor for name, tensor in pha.densities.state_dict().items()}


def _trace_lower(model: HyperAdapterModel) -> Any:
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * _reads_types(model)
    layers, free = LowerLayers(model), torch.export.Dim.DYNAMIC
    examples = {name: torch.zeros(2, 3, dtype=torch.long, device=model.device) for name in names}
    outputs = ["hidden", "pooled"] + ["embeddings"] * layers.reads_embeddings
    return trace(layers, examples, {name: {0: free, 1: free} for name in names}, names, outputs)


def _trace_upper(model: HyperAdapterModel, weights: AdapterWeights) -> Any:
    """Return the graph, traced with five sequences of four tokens in three groups of two slots."""
    free, device = torch.export.Dim.DYNAMIC, model.device
    groups = weights.tasks(torch.zeros(3, dtype=torch.long, device=device))
    slots = torch.arange(5, device=device)
    examples = {
        "hidden": torch.zeros(5, 4, model.hidden_size, device=device),
        "attention_mask": torch.ones(5, 4, dtype=torch.long, device=device),
        "rows": torch.tensor([[0, 1], [2, 3], [4, 4]], device=device),
        "slots": slots,
        "adapters": dict(groups),
    }
    shapes = {
        "hidden": {0: free, 1: free},
        "attention_mask": {0: free, 1: free},
        "rows": {0: free, 1: free},
        "slots": {0: free},
        "adapters": {name: {1: free} for name in groups},
    }
    names = ["hidden", "attention_mask", "rows", "slots", *groups]
    return trace(UpperLayers(model), examples, shapes, names, ["pooled"])


def _write_graph(program: Any, path: Path, quantize: Quantization | None) -> None:
    program.save(path)
    others = [other for other in path.parent.iterdir() if other.name.startswith(f"{path.name}.")]
    if others or path.stat().st_size >= MAX_GRAPH_BYTES:
        raise ExportError(f"{path.name}: the graph is larger than 2 GB, which the runtime cannot read from one file")
    if quantize is None:
        return
    quantization: Any = require("onnxruntime.quantization")
    with _without_advice():
        # With one scale for a whole matrix, routing fails. Weights of seven bits are a little less precise than those
        # of eight, but their products do not overflow on processors without instructions for eight bits (VNNI).
        quantization.quantize_dynamic(
            path, path, weight_type=quantization.QuantType.QInt8, per_channel=True, reduce_range=True
        )


@contextmanager
def _without_advice() -> Iterator[None]:
    """Suppress the advice to run a preparation of graphs that improves nothing here: shapes are known already."""
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _checksum(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
