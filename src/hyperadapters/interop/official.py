"""Import of checkpoints of the released implementation (Bumble666/PHA) with its parameter names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from hyperadapters.config import ModelConfig, Task
from hyperadapters.core import PrototypicalHypernetwork
from hyperadapters.errors import CheckpointError, did_you_mean
from hyperadapters.model.model import HyperAdapterModel

_SUPPORTED = {
    "encoder_adapter": "manual",
    "decoder_adapter": "pro-hyper",
    "process_encoder_output": True,
}
_TIED_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def load_official(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    tasks: Sequence[str | Task],
    backbone_name: str | None = None,
) -> HyperAdapterModel:
    """Create a model with preset "official" from a checkpoint of the released implementation.

    Args:
        state_dict: All parameters including the backbone's, with their official names. Copies of tied weights are
            optional.
        config: T5 configuration with the adapter settings, the contents of `config.json`.
        tasks: Tasks in the order of the prototype table. A name is that of a text-to-text task.
        backbone_name: Name of a backbone with the same weights on the Hub, for example "google-t5/t5-base", from which
            a checkpoint of the model can load its backbone and tokenizer. Default: none.

    Returns:
        The model.

    Raises:
        CheckpointError: If the adapter settings are not those of the method, or the tensors do not match them.
    """
    if not isinstance(config, Mapping) or isinstance(tasks, str):
        raise CheckpointError(
            "expected config as a mapping (the contents of config.json) and tasks as a list, found "
            f"{type(config).__name__} and {type(tasks).__name__}"
        )
    for key, expected in _SUPPORTED.items():
        if config.get(key, expected) != expected:
            raise CheckpointError(f"official config: expected {key} to be {expected!r}, found {config[key]!r}")
    backbone = _backbone(state_dict, config)
    table = _tensor(state_dict, "decoder.adapter_task_embedding.weight")
    if len(table) != len(tasks):
        raise CheckpointError(f"expected {len(table)} tasks, one for each prototype, found {len(tasks)}: {list(tasks)}")
    model = HyperAdapterModel(
        backbone,
        [task if isinstance(task, Task) else Task.text_to_text(task) for task in tasks],
        ModelConfig(
            preset="official",
            prototype_dim=table.shape[1],
            hidden_dim=len(_tensor(state_dict, "decoder.mlp.0.weight")),
            adapter_dim=len(_tensor(state_dict, "decoder.param_gen.decoder.bias_down.bias")),
            shared_adapter_dim=len(
                _tensor(state_dict, "encoder.block.0.layer.1.adapter_layer.adapter_down_manual.weight")
            ),
            adapter_norm_input=config.get("adapter_norm_input", True),
        ),
        backbone_name,
    )
    parameters = official_parameters(model)
    unknown = state_dict.keys() - parameters.keys() - {*_TIED_COPIES, "lm_head.weight"}
    if unknown:
        name = min(unknown)
        raise CheckpointError(f"unknown tensor '{name}' in the checkpoint.{did_you_mean(name, parameters)}")
    _copy(state_dict, {name: parameter for name, parameter in parameters.items() if parameter.requires_grad})
    return model


def official_parameters(model: HyperAdapterModel) -> dict[str, nn.Parameter]:
    """Return the parameters of a model with preset "official" by their official names, with each tied weight once.

    Args:
        model: Model with preset "official".
    """
    backbone = {
        name.removeprefix("backbone."): parameter
        for name, parameter in model.named_parameters()
        if name.startswith("backbone.")
    }
    own: dict[str, nn.Parameter] = {}
    for stack, sublayer, adapters in (("encoder", 1, model.shared_adapters), ("decoder", 2, model.unused_adapters)):
        for index, adapter in enumerate(adapters):
            prefix = f"{stack}.block.{index}.layer.{sublayer}.adapter_layer.adapter"
            for side in ("down", "up"):
                for part, parameter in adapter.get_submodule(side).named_parameters():
                    own[f"{prefix}_{side}_manual.{part}"] = parameter
    pha = model.pha
    assert isinstance(pha.hypernetwork, PrototypicalHypernetwork)
    own["decoder.adapter_task_embedding.weight"] = pha.prototypes.weight
    own["decoder.param_gen.layer_embed.weight"] = pha.hypernetwork.layer_embeddings
    trunk = pha.hypernetwork.trunk
    modules: dict[str, nn.Module] = {
        "decoder.mlp.0": pha.retriever.down,
        "decoder.mlp.2": pha.retriever.up,
        "decoder.param_gen.decoder.linear1": trunk[0],
        "decoder.param_gen.decoder.linear2": trunk[2],
        "decoder.param_gen.decoder.LayerNorm": trunk[3],
        "decoder.param_gen.decoder.weight_up": pha.hypernetwork.head("up_weight"),
        "decoder.param_gen.decoder.weight_down": pha.hypernetwork.head("down_weight"),
        "decoder.param_gen.decoder.bias_up": pha.hypernetwork.head("up_bias"),
        "decoder.param_gen.decoder.bias_down": pha.hypernetwork.head("down_bias"),
    }
    for prefix, module in modules.items():
        own.update({f"{prefix}.{part}": parameter for part, parameter in module.named_parameters()})
    return {**backbone, **own}


def _backbone(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> T5ForConditionalGeneration:
    known = {*T5Config().to_dict(), "tie_word_embeddings", "decoder_start_token_id"}
    settings = {key: value for key, value in config.items() if key in known}
    backbone_config = T5Config(**{"decoder_start_token_id": 0, **settings})
    backbone = T5ForConditionalGeneration(backbone_config)
    shared = _tensor(state_dict, "shared.weight")
    if not config.get("tie_word_embeddings", True):
        # transformers 5 ties the weights unless a checkpoint contains both of them; here they are separate.
        backbone.lm_head.weight = nn.Parameter(torch.empty_like(_tensor(state_dict, "lm_head.weight")))
    elif not torch.equal(state_dict.get("lm_head.weight", shared), shared):
        raise CheckpointError(
            "'lm_head.weight' differs from 'shared.weight', but the config has tied embeddings; if it was written by "
            "transformers 5, which always sets tie_word_embeddings to true for T5, set it to false"
        )
    _copy(state_dict, dict(backbone.named_parameters()))
    return backbone.eval()


@torch.no_grad()
def _copy(state_dict: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        tensor = _tensor(state_dict, name)
        if tensor.shape != parameter.shape:
            raise CheckpointError(f"'{name}': expected shape {tuple(parameter.shape)}, found {tuple(tensor.shape)}")
        parameter.copy_(tensor)


def _tensor(state_dict: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state_dict:
        raise CheckpointError(f"expected a tensor '{name}' in the checkpoint.{did_you_mean(name, state_dict)}")
    return state_dict[name]
