"""Settings that can have no effect are refused, and checkpoints that were written with them still load."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from helpers import save_backbone, tiny_backbone

from hyperadapters.checkpoints.format import _digest
from hyperadapters.config import ModelConfig, Recipe, Task, parse
from hyperadapters.errors import RecipeError, TaskError
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.run import train

HEADS = [Task.classification("mood", ["bad", "good"])]
TEXTS = [Task.text_to_text("text")]
PLACES: dict[str, dict[str, Any]] = {
    "bert": {"tasks": HEADS},
    "modernbert": {"tasks": HEADS},
    "t5": {"tasks": TEXTS},
    "bart": {"tasks": TEXTS},
    "gpt2": {"tasks": TEXTS},
    "llama": {"tasks": TEXTS},
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "hyperformer", "contrast": "none"}, "contrast: method 'hyperformer' has no contrastive losses"),
        ({"method": "hyperdecoder", "contrastive_weight": 0.5}, "contrastive_weight: there are no contrastive losses"),
        ({"contrast": "none", "contrastive_weight": 0.5}, "contrastive_weight: there are no contrastive losses"),
        (
            {"method": "task_adapter", "temperature": 0.2},
            "temperature: method 'task_adapter' has no contrastive losses",
        ),
        ({"method": "hyperformer", "centroids_per_task": 2}, "centroids_per_task: this setting is for routing"),
        ({"preset": "plus", "centroids_per_task": 2}, "centroids_per_task: there are no centroids with routing"),
        ({"method": "hyperformer", "routing": "densities"}, "routing: method 'hyperformer' cannot route"),
        ({"method": "shared_adapter", "codes": "orthogonal"}, "codes: method 'shared_adapter' has no hypernetwork"),
        ({"method": "hyperformer", "features": "backbone"}, "features: method 'hyperformer' has no retriever"),
        ({"method": "hyperformer", "label_names": True}, "label_names: method 'hyperformer' cannot add tasks"),
        ({"form": "lora", "adapter_norm_input": False}, "adapter_norm_input: form 'lora' has no bottleneck adapters"),
        ({"form": "lora", "shared_adapter_dim": 8}, "shared_adapter_dim: form 'lora' has no bottleneck"),
    ],
)
def test_settings_of_other_methods_and_forms_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=rf"{message}.*; remove it"):
        parse(ModelConfig, settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"contrast": "none", "temperature": 0.2},  # a mixture of prototypes has a temperature
        {"method": "hyperdecoder", "hidden_dim": 8, "features": "backbone"},
        {"method": "hyperformer", "codes": "orthogonal"},
        {"method": "task_adapter", "prototype_dim": 8, "hidden_dim": 8},  # sizes that a comparison leaves as they are
        {"preset": "plus", "method": "task_adapter"},  # what the preset sets was not chosen
        {"preset": "plus", "method": "task_adapter", "common_adapter": True},
        {"method": "task_adapter", **{name: ModelConfig().model_dump()[name] for name in ("codes", "temperature")}},
        {"method": "hyperformer", "head_inputs": "pair_features", "label_names": True},
    ],
)
def test_settings_with_an_effect_and_defaults_are_taken(settings: dict[str, Any]) -> None:
    config = parse(ModelConfig, settings)
    assert parse(ModelConfig, config.model_dump()) == config


@pytest.mark.parametrize("kind", [kind for kind in PLACES if kind != "t5"])
def test_only_t5_norms_the_input_of_its_feed_forward(kind: str) -> None:
    with pytest.raises(RecipeError, match=r"adapter_norm_input: the setting is for T5"):
        HyperAdapterModel(tiny_backbone(kind), PLACES[kind]["tasks"], ModelConfig(adapter_norm_input=False))


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2"])
def test_names_of_labels_are_examples_for_heads_only(kind: str) -> None:
    with pytest.raises(RecipeError, match="label_names: the setting is for encoders, which have task heads"):
        HyperAdapterModel(tiny_backbone(kind), TEXTS, ModelConfig(label_names=True))


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2"])
def test_only_encoders_mask_tokens_in_training(kind: str) -> None:
    with pytest.raises(RecipeError, match="token_dropout: the setting is for encoders"):
        HyperAdapterModel(tiny_backbone(kind), TEXTS, ModelConfig(token_dropout=0.1))


def test_a_frozen_encoder_has_no_shared_adapters_to_size() -> None:
    config = ModelConfig(frozen_encoder_layers=2, shared_adapter_dim=8)
    with pytest.raises(RecipeError, match="shared_adapter_dim: with all encoder layers frozen there are no shared"):
        HyperAdapterModel(tiny_backbone("t5"), TEXTS, config)
    HyperAdapterModel(tiny_backbone("t5"), TEXTS, ModelConfig(frozen_encoder_layers=1, shared_adapter_dim=8))


def recipe(folder: Path, kind: str = "bert", splits: tuple[str, ...] = ("train", "validation"), **sections: Any) -> Any:
    save_backbone(folder / kind, kind)
    for split in splits:
        lines = [json.dumps({"text": f"w{row}", "label": ("red", "blue")[row % 2]}) for row in range(8)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    source = {"path": {split: f"{folder}/{split}.jsonl" for split in splits}}
    return {
        "backbone": str(folder / kind),
        "data": {"max_length": 16, **sections.get("data", {})},
        "model": {"preset": "paper", **sections.get("model", {})},
        "training": {"max_steps": 1, "batch_size": 4, **sections.get("training", {})},
        "tasks": [{"name": "colour", "source": source}],
    }


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": {"method": "hyperformer"}, "training": {"retriever_learning_rate": 1e-3}},
            "retriever_learning_rate: method 'hyperformer' has no retriever",
        ),
        (
            {"model": {"method": "hyperdecoder"}, "training": {"false_decline_rate": 0.1}},
            "false_decline_rate: method 'hyperdecoder' cannot route",
        ),
        (
            {"model": {"preset": "official"}, "training": {"optimizer": "adamw_torch"}},
            "optimizer: preset 'official' uses the released code's optimizer",
        ),
        (
            {"training": {"prefix_cache": "file", "prefix_cache_gb": 1.0}},
            "prefix_cache_gb is only for prefix_cache 'auto'",
        ),
        (
            {"training": {"prefix_cache": "none", "prefix_cache_dtype": "float16"}},
            "prefix_cache_dtype has no effect with prefix_cache 'none'",
        ),
        ({"data": {"temperature": 2.0}}, "temperature is only for sampling 'temperature', found 'proportional'"),
    ],
)
def test_settings_of_a_recipe_that_exclude_each_other_are_refused(
    sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=rf"{message}.*remove it"):
        parse(Recipe, recipe(tmp_path, **sections))


@pytest.mark.parametrize(
    ("kind", "splits", "sections", "message"),
    [
        ("t5", ("train",), {"training": {"head_learning_rate": 1e-3}}, "training.head_learning_rate: has no effect"),
        ("t5", ("train",), {"training": {"prefix_cache": "memory"}}, "training.prefix_cache: .* no layers below every"),
        ("t5", ("train",), {"training": {"prefix_cache_dtype": "float16"}}, "training.prefix_cache_dtype: has no eff"),
        ("t5", ("train",), {"training": {"prefix_cache_gb": 1.0}}, "training.prefix_cache_gb: has no effect"),
        ("bert", ("train",), {"training": {"early_stopping_patience": 2}}, "early_stopping_patience: .* no validation"),
        ("bert", ("train",), {"data": {"n_validation": 2}}, "data.n_validation: .* there are no validation rows"),
    ],
)
def test_settings_that_do_not_fit_the_backbone_or_the_data_are_refused_before_training(
    kind: str, splits: tuple[str, ...], sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(parse(Recipe, recipe(tmp_path, kind, splits, **sections)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "task"),
    [
        ("template", {"template": "colour: {text}"}),
        ("verbalizer", {"verbalizer": {"red": "r", "blue": "b"}, "labels": ["red", "blue"]}),
    ],
)
def test_what_only_written_answers_have_is_refused_where_heads_answer(
    setting: str, task: dict[str, Any], tmp_path: Path
) -> None:
    settings = recipe(tmp_path)
    settings["tasks"][0].update(task)
    message = f"task 'colour', {setting}: is for backbones that generate their answers"
    with pytest.raises(RecipeError, match=message):
        train(parse(Recipe, settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    model = HyperAdapterModel(tiny_backbone("bert"), HEADS, ModelConfig(preset="paper"))
    with pytest.raises(TaskError, match=message):
        model.add_task(Task.classification("colour", **{"labels": ["red", "blue"], **task}), [{"text": "w1"}])


def test_no_cache_is_what_a_model_without_frozen_layers_has(tmp_path: Path) -> None:
    settings = recipe(tmp_path, "t5", ("train",), training={"prefix_cache": "none"})
    train(parse(Recipe, settings), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.json").is_file()


@pytest.mark.parametrize(
    ("kind", "method", "ignored"),
    [
        ("bert", "hyperformer", {"contrast": "none", "temperature": 0.5, "features": "backbone"}),
        ("bert", "task_adapter", {"codes": "orthogonal", "adapter_norm_input": False}),
        ("t5", "pha", {"label_names": True}),
        ("bart", "pha", {"label_names": True, "adapter_norm_input": False}),
    ],
)
def test_a_checkpoint_that_was_written_with_them_loads(
    kind: str, method: str, ignored: dict[str, Any], tmp_path: Path
) -> None:
    tasks = PLACES[kind]["tasks"]
    model = HyperAdapterModel(tiny_backbone(kind), tasks, ModelConfig(preset="paper", method=method))  # type: ignore[arg-type]
    model.save_pretrained(tmp_path)
    _write_with(tmp_path, ignored)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, tiny_backbone(kind))
    assert loaded.adapter_config == model.adapter_config
    for name, value in model.adapter_state_dict().items():
        assert torch.equal(loaded.adapter_state_dict()[name], value), name


def _write_with(folder: Path, settings: dict[str, Any]) -> None:
    """Write a checkpoint again as it would have been written with other settings."""
    values = json.loads((folder / "hyperadapter.json").read_text())
    values["model"].update(settings)
    path = folder / values["weights"]["file"]
    weights = safetensors.torch.save(safetensors.torch.load_file(path), metadata={"config_sha256": _digest(values)})
    path.write_bytes(weights)
    values["weights"]["sha256"] = hashlib.sha256(weights).hexdigest()
    (folder / "hyperadapter.json").write_text(json.dumps(values))
