"""Promise 4: the backbone is frozen, wrapped, and given back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ENCODER_DECODERS,
    ENCODERS,
    ENCODERS_AND_ENCODER_DECODERS,
    HEAD_TASKS,
    TEXT_TASKS,
    bare_outputs,
    make_batch,
    make_model,
    save_backbone,
    tiny_backbone,
)
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, OPTConfig, OPTForCausalLM

from hyperadapters.backbones.architectures import resolve_architecture
from hyperadapters.backbones.loading import (
    PACKAGED,
    PackagedBackbone,
    fingerprint,
    load_backbone,
    load_tokenizer,
    locate,
)
from hyperadapters.config import ModelConfig, Task
from hyperadapters.errors import BackboneError, RecipeError, TaskError
from hyperadapters.model.model import HyperAdapterModel

OPT_CONFIG = OPTConfig(
    vocab_size=10, hidden_size=8, ffn_dim=8, num_hidden_layers=2, num_attention_heads=1, word_embed_proj_dim=8
)


@pytest.mark.parametrize("kind", ENCODERS_AND_ENCODER_DECODERS)
def test_detaching_gives_the_backbone_back_bit_for_bit(kind: str) -> None:
    batch = make_batch(kind)
    backbone = tiny_backbone(kind).train()
    names = [name for name, _ in backbone.named_modules()]
    flags = {name: parameter.requires_grad for name, parameter in backbone.named_parameters()}
    before = bare_outputs(backbone.eval(), kind, batch)
    backbone.train()
    model = HyperAdapterModel(backbone, HEAD_TASKS if kind in ENCODERS else TEXT_TASKS, ModelConfig(adapter_dim=4))
    model.activation_checkpointing_enable()
    model.train().training_loss(batch).total.backward()
    model.eval()
    assert model.detach() is backbone
    assert not backbone.is_activation_checkpointing
    assert [name for name, _ in backbone.named_modules()] == names
    assert {name: parameter.requires_grad for name, parameter in backbone.named_parameters()} == flags
    assert all(module.training for module in backbone.modules())
    assert torch.equal(bare_outputs(backbone.eval(), kind, batch), before)


@pytest.mark.parametrize("kind", ENCODERS_AND_ENCODER_DECODERS)
def test_adapters_switched_off_give_the_bare_backbone(kind: str) -> None:
    batch = make_batch(kind)
    before = bare_outputs(tiny_backbone(kind), kind, batch)
    model = make_model(kind)
    with model.adapters_disabled():
        assert torch.equal(bare_outputs(model.backbone, kind, batch), before)


@pytest.mark.parametrize("kind", ENCODERS_AND_ENCODER_DECODERS)
def test_only_declared_parameters_receive_gradients(kind: str) -> None:
    model = make_model(kind).train()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    model.training_loss(make_batch(kind)).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.startswith("backbone.")), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())


@pytest.mark.parametrize("kind", ENCODERS_AND_ENCODER_DECODERS)
def test_adapters_change_the_output_and_differ_by_task(kind: str) -> None:
    model, batch = make_model(kind), make_batch(kind)
    batch.pop("labels")
    if kind in ENCODER_DECODERS:
        batch["decoder_input_ids"] = torch.full((6, 3), 5)
    states = []
    for task_id in range(3):
        seen: list[Tensor] = []
        stack = model.backbone.encoder.layer if kind in ENCODERS else model.backbone.decoder.block
        handle = stack[-1].register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        model(**{**batch, "task_ids": torch.full((6,), task_id)})
        handle.remove()
        states.append(seen[0] if isinstance(seen[0], Tensor) else seen[0][0])
    assert (states[0] - states[1]).abs().max() > 1e-3
    assert (states[1] - states[2]).abs().max() > 1e-3


def test_features_do_not_depend_on_the_adapters_above_them() -> None:
    batch, model = make_batch("bert"), make_model("bert", feature_layer=2)
    layers = tiny_backbone("bert")(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
    ).hidden_states
    from hyperadapters.core import masked_mean

    expected = model.method.retriever(masked_mean(layers[2], batch["attention_mask"]))
    assert torch.equal(model(**batch).instances, expected)
    assert torch.equal(model.instance_vectors(batch["input_ids"], batch["attention_mask"]), expected)


def test_layers_below_the_features_stay_in_evaluation_mode() -> None:
    model = make_model("bert", feature_layer=2).train()
    assert [layer.training for layer in model.backbone.encoder.layer] == [False, False, True, True]
    assert not model.backbone.embeddings.training
    assert not any(module.training for module in model.backbone.embeddings.modules())


def test_the_bare_backbone_refuses_to_run_without_a_task() -> None:
    model, batch = make_model("bert"), make_batch("bert")
    with pytest.raises(RuntimeError, match="no task is active: call the HyperAdapterModel"):
        model.backbone(input_ids=batch["input_ids"])


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    backbone = OPTForCausalLM(OPT_CONFIG)
    with pytest.raises(BackboneError, match=r"Unknown architecture 'opt'.*Known: bart, bert, .*modules.*or add a row"):
        HyperAdapterModel(backbone, TEXT_TASKS)


def test_a_model_with_a_task_head_is_refused_with_the_module_that_was_expected() -> None:
    backbone = BertForSequenceClassification(BertConfig(vocab_size=10, hidden_size=8, num_attention_heads=1))
    with pytest.raises(BackboneError, match=r"expected a module at 'encoder\.layer'.*without a task head"):
        HyperAdapterModel(backbone, HEAD_TASKS)


def test_a_missing_module_is_named_and_nothing_has_been_changed() -> None:
    backbone = tiny_backbone("bert")
    del backbone.encoder.layer[2].output
    with pytest.raises(BackboneError, match=r"expected a module at 'encoder\.layer\.2\.output'"):
        HyperAdapterModel(backbone, HEAD_TASKS)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_something_that_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"expected a transformers model whose config.*found Linear"):
        HyperAdapterModel(nn.Linear(2, 2), HEAD_TASKS)


def test_settings_that_do_not_fit_the_backbone_are_refused() -> None:
    with pytest.raises(RecipeError, match="feature_layer: expected 0 to 3"):
        make_model("bert", feature_layer=4)
    with pytest.raises(RecipeError, match="encoder-decoder reads features from its encoder's output"):
        make_model("t5", feature_layer=1)
    with pytest.raises(RecipeError, match="preset 'official' is for encoder-decoder"):
        make_model("bert", preset="official")
    with pytest.raises(RecipeError, match="shared_adapter_dim: encoder backbones have no shared adapters"):
        make_model("bert", shared_adapter_dim=4)


def test_tasks_that_do_not_fit_the_backbone_are_refused() -> None:
    with pytest.raises(TaskError, match="'colour' is text-to-text, which needs an encoder-decoder"):
        HyperAdapterModel(tiny_backbone("bert"), TEXT_TASKS)
    with pytest.raises(TaskError, match="labels are unknown"):
        HyperAdapterModel(tiny_backbone("bert"), [Task(name="any")])
    with pytest.raises(TaskError, match="expected at least one task"):
        HyperAdapterModel(tiny_backbone("bert"), [])
    with pytest.raises(TaskError, match="found 'size' 2 times"):
        HyperAdapterModel(tiny_backbone("bert"), [Task.regression("size"), Task.regression("size")])


def test_fingerprint_recognises_other_weights_but_not_another_floating_point_type() -> None:
    assert fingerprint(tiny_backbone("bert")) == fingerprint(tiny_backbone("bert"))
    assert fingerprint(tiny_backbone("bert")) == fingerprint(tiny_backbone("bert").bfloat16())
    assert fingerprint(tiny_backbone("bert")) != fingerprint(tiny_backbone("bert", seed=1))


def test_a_backbone_that_cannot_be_loaded_is_named(tmp_path: Any) -> None:
    with pytest.raises(BackboneError, match=r"backbone '.*nowhere' cannot be loaded"):
        load_backbone(str(tmp_path / "nowhere"))
    OPTForCausalLM(OPT_CONFIG).save_pretrained(tmp_path / "opt")
    with pytest.raises(BackboneError, match="Unknown architecture 'opt'"):
        load_backbone(str(tmp_path / "opt"))


def test_a_backbone_with_missing_weights_is_refused(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    tiny_backbone("bert").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"the weights lack 1 tensors: encoder\.layer\.1\.output\.dense\.weight"):
        load_backbone(str(tmp_path))


def test_the_packaged_minilm_is_found_and_its_weights_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "sentence-transformers/all-MiniLM-L6-v2"
    assert locate(name).endswith("model")
    assert locate("some/other-model") == "some/other-model"
    wrong = PackagedBackbone(PACKAGED[name].module, PACKAGED[name].folder, "0" * 64)
    monkeypatch.setitem(PACKAGED, name, wrong)
    with pytest.raises(BackboneError, match="expected sha256 0000"):
        locate(name)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_backbone_that_already_holds_adapters_is_refused(kind: str) -> None:
    model = make_model(kind)
    with pytest.raises(BackboneError, match="already contains adapters of another HyperAdapterModel"):
        HyperAdapterModel(model.backbone, model.tasks)


def test_a_backbone_without_a_name_has_no_tokenizer_to_load() -> None:
    with pytest.raises(BackboneError, match="has no name by which its tokenizer could be loaded"):
        _ = make_model("bert").tokenizer


def test_the_longest_input_of_each_architecture_runs() -> None:
    for kind, longest in (("bert", 80), ("roberta", 79), ("xlm-roberta", 79)):
        model = make_model(kind)
        assert resolve_architecture(tiny_backbone(kind)).max_length == longest
        ids = torch.full((1, longest), 5)
        assert model(ids, task_ids=torch.tensor([0])).logits[0, :3].isfinite().all()
    assert resolve_architecture(tiny_backbone("t5")).max_length is None


@pytest.mark.parametrize("contents", [b"", b"[]", b"{}", b"\xff\xfe", b'{"model": {}}', None])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_folder_of_a_backbone_is_one_clear_error(file: str, contents: bytes | None, tmp_path: Path) -> None:
    (save_backbone(tmp_path) / file).write_bytes((tmp_path / file).read_bytes()[:100] if contents is None else contents)
    if file in ("config.json", "model.safetensors"):
        with pytest.raises(BackboneError, match=r"backbone '.*': |backbone '.*' cannot be loaded: "):
            load_backbone(str(tmp_path))
    elif not (file == "tokenizer_config.json" and contents in (b"{}", b'{"model": {}}')):
        with pytest.raises(BackboneError, match=r"the tokenizer of backbone '.*' cannot be loaded: "):
            load_tokenizer(str(tmp_path))


def test_weights_of_another_size_than_the_config_says_are_refused(tmp_path: Path) -> None:
    save_backbone(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(BackboneError, match="cannot be loaded: "):
        load_backbone(str(tmp_path))
