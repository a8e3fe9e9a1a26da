"""Export of a task of an encoder model as an ONNX graph that contains its adapter and its head as constants."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperadapters.backbones.devices import is_offloaded
from hyperadapters.backbones.passes import evaluating
from hyperadapters.errors import ExportError
from hyperadapters.interop.task_files import classifier_config, write_task_files
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.utils.files import new_folder
from hyperadapters.utils.optional import require

MODEL_FILE = "model.onnx"


def export_onnx(model: HyperAdapterModel, task: str, folder: str | Path) -> None:
    """Write a task of a model for onnxruntime.

    The inputs of `model.onnx` are `input_ids` and `attention_mask` (int64 [B, S], padded on the right), for any B and
    S. Further inputs are `token_type_ids` if the tokenizer returns them, and `sequence_ids` (see
    `data.collate.Collator`) if the head reads features of each text of a pair and the token types do not distinguish
    them. The output is `logits` [B, C], as `HyperAdapterModel.forward` computes them for rows of the task.

    The folder also contains the backbone's `config.json` with the labels and the files of the tokenizer, if the model
    has these, and the files that are part of every format (see `task_files.write_task_files`).

    Args:
        model: Model on an encoder backbone, which is not changed.
        task: Name of the task.
        folder: Folder to create, which must not exist or be empty.

    Raises:
        TaskError: If the task is unknown, or the method of the model has no adapters of tasks.
        ExportError: If the backbone generates text, is offloaded, or is not in float32.
        MissingPackageError: If a package of the extra `onnx` is not installed.
        OutputError: If the folder is not empty or cannot be written.
        BackboneError: If the tokenizer cannot be loaded.
    """
    task_id = model.task_id(task)
    check_exportable(model)
    require("onnxscript")
    tokenizer, config = _tokenizer(model), classifier_config(model, task_id)
    names = ["input_ids", "attention_mask"]
    makes_types = tokenizer is None or "token_type_ids" in tokenizer.model_input_names
    if makes_types and getattr(config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    one_task = OneTask(model, task_id)
    if one_task.splits_pairs and not ("token_type_ids" in names and _types_tell_texts_apart(tokenizer)):
        names.append("sequence_ids")
    with new_folder(folder) as new:
        _trace(one_task, names).save(new / MODEL_FILE)
        for part in (config, tokenizer):
            if part is not None:
                part.save_pretrained(new)
        write_task_files(model, task, new)


class OneTask(nn.Module):
    """A module that computes the logits of one task as the model does, without the selection of tasks."""

    @torch.no_grad()
    def __init__(self, model: HyperAdapterModel, task_id: int) -> None:
        """Store the adapter and the head of the task.

        Args:
            model: Model on an encoder backbone.
            task_id: Index of the task.
        """
        super().__init__()
        assert model.heads is not None
        self.model = model
        ids = torch.tensor([task_id], device=model.device)
        # Indexing copies the weights, which may be parameters of the model.
        self.weights = model.method.adapters(ids).tasks(torch.zeros_like(ids))
        self.head = model.heads.head(task_id)
        self.is_pair = model.tasks[task_id].is_pair
        self.num_features = self.head.weight.shape[1] - model.heads.hidden_size
        self.reads_features = bool(self.head.weight[:, : self.num_features].any())
        self.separates_texts = model.adapter_config.separates_texts
        compares_frozen = model.adapter_config.head_inputs != "adapted" and self.reads_features
        self.splits_pairs = self.is_pair and (self.separates_texts or compares_frozen)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> Tensor:
        """Compute the logits of a batch. No shape and no branch depends on the values of a tensor.

        Args:
            input_ids: Token ids [B, S].
            attention_mask: Mask [B, S], 1 for tokens and 0 for padding.
            token_type_ids: Token types [B, S]. Default: none.
            sequence_ids: Text of each token [B, S], as in `data.collate.Collator`. Default: none.

        Returns:
            Logits [B, C].
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if sequence_ids is not None:
            inputs["sequence_ids"] = sequence_ids
        if self.separates_texts and not self.is_pair:  # Nothing may split the rows, which are single texts.
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        pooled, features = self.model.forward_with_adapter(inputs, self.weights)
        if self.reads_features:
            features = self.model.head_features(inputs, features, self.is_pair)
        else:
            features = features.new_zeros(features.shape[0], self.num_features)
        return self.head.logits(pooled, features)


def check_exportable(model: HyperAdapterModel) -> None:
    """Check that the backbone of a model can be exported to ONNX.

    Args:
        model: Model to export.

    Raises:
        ExportError: If the backbone generates text, is offloaded, or is not in float32.
    """
    if model.text_to_text:
        raise ExportError(
            "the ONNX export is only for encoder backbones, which have task heads; this backbone generates text token "
            "by token, which requires more than one graph"
        )
    if is_offloaded(model.backbone):
        raise ExportError("accelerate has offloaded weights of the backbone; load it without offloading to export it")
    for name, parameter in model.backbone.named_parameters():
        if parameter.dtype != torch.float32:
            raise ExportError(
                f"expected a backbone in float32, found '{name}' in {str(parameter.dtype).removeprefix('torch.')}; "
                "call model.float() before the export"
            )


def _tokenizer(model: HyperAdapterModel) -> Any:
    """Return a copy of the tokenizer that truncates texts as the model does, or None if the model has no tokenizer."""
    if not model.has_tokenizer:
        return None
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.model_max_length, tokenizer.padding_side = model.lengths.input, "right"
    return tokenizer


def _types_tell_texts_apart(tokenizer: Any) -> bool:
    return tokenizer is not None and 1 in tokenizer("a", "a")["token_type_ids"]


def _trace(one_task: OneTask, names: list[str]) -> Any:
    """Return the ONNX program of a task for inputs of any B and S."""
    device, any_size = one_task.head.weight.device, torch.export.Dim.DYNAMIC
    examples = {name: torch.zeros(2, 3, dtype=torch.long, device=device) for name in names}
    shapes = {name: {0: any_size, 1: any_size} for name in names}
    size_names = {**shapes, "input_ids": {0: "batch", 1: "sequence"}}
    return trace(one_task, examples, shapes, names, ["logits"], size_names)


def trace(
    module: nn.Module,
    examples: dict[str, Any],
    shapes: dict[str, Any],
    input_names: list[str],
    output_names: list[str],
    size_names: dict[str, Any] | None = None,
) -> Any:
    """Return the ONNX program of a module.

    Args:
        module: Module to trace, which is not changed.
        examples: Keyword arguments of its forward method.
        shapes: Free sizes of each argument, as `torch.export.export` takes them.
        input_names: Names of the inputs of the graph.
        output_names: Names of the outputs of the graph.
        size_names: Free sizes with names that the graph gives them. Default: `shapes`.
    """
    with torch.no_grad(), evaluating(module), _quiet():
        # The model is traced here, because torch.onnx tries other ways of tracing for minutes if one fails.
        program = torch.export.export(module, (), examples, dynamic_shapes=shapes, strict=False)
        return torch.onnx.export(
            program,
            kwargs=examples,
            dynamo=True,
            verbose=False,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=shapes if size_names is None else size_names,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings of the exporter about torchvision's operators, and of PyTorch about its own functions."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        log.setLevel(level)
