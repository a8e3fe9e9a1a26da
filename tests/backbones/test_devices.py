"""Backbones that accelerate has attached hooks to, and models in other floating point types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model, init_empty_weights
from accelerate.hooks import attach_execution_device_hook
from helpers import FROZEN_TEXTS, pairwise, save_backbone, tiny_backbone
from torch import Tensor, nn

from hyperadapters import HyperAdapterModel, ModelConfig, Predictor, Task
from hyperadapters.backbones.devices import execution_device
from hyperadapters.backbones.loading import fingerprint
from hyperadapters.errors import BackboneError
from hyperadapters.training.sharding import shard_layers

LAYERS = {"bert": "encoder.layer", "bart": "model.decoder.layers", "llama": "model.layers", "t5": "decoder.block"}
FORMS = ["bottleneck", "lora"]


def adapted(backbone: nn.Module, form: str = "bottleneck") -> HyperAdapterModel:
    """A model of two tasks whose adapters differ."""
    torch.manual_seed(1)
    has_heads = not hasattr(backbone, "lm_head")
    labels = ["yes", "no"]
    tasks = [Task.classification(name, labels) if has_heads else Task.text_to_text(name) for name in ("a", "b")]
    model = HyperAdapterModel(backbone, tasks, ModelConfig(preset="paper", form=form))  # type: ignore[arg-type]
    for parameter in model.method.hypernetwork.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
def hidden_of_both_tasks(model: HyperAdapterModel) -> Tensor:
    """Last hidden states or logits of one text under each of the two tasks [2, ...]."""
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [5, 6, 7]]), "task_ids": torch.tensor([0, 1])}
    if model.kind == "encoder-decoder":
        inputs["decoder_input_ids"] = torch.tensor([[0, 4], [0, 4]])
    output = model(**inputs, output_hidden_states=True)
    return output.encoder_hidden_states[-1] if model.heads else output.logits


def offloaded(kind: str, folder: Path) -> nn.Module:
    """A backbone whose lower layers are offloaded to the CPU and whose upper half of layers to the disk."""
    backbone = tiny_backbone(kind)
    layers = LAYERS[kind]
    num_layers = len(backbone.get_submodule(layers))  # type: ignore[arg-type]
    places: dict[str, str] = {}
    for name, module in backbone.named_modules():
        is_leaf_or_other = not any(True for _ in module.children())
        if name and is_leaf_or_other and not name.startswith(f"{layers}."):
            places[name] = "cpu"
    places |= {f"{layers}.{index}": "cpu" if index < num_layers // 2 else "disk" for index in range(num_layers)}
    dispatched: nn.Module = dispatch_model(
        backbone, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )
    return dispatched


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_hooks_of_accelerate_call_the_adapters(kind: str, form: str) -> None:
    expected = hidden_of_both_tasks(adapted(tiny_backbone(kind), form))
    backbone = tiny_backbone(kind)
    attach_execution_device_hook(backbone, "cpu")
    found = hidden_of_both_tasks(adapted(backbone, form))
    assert not torch.allclose(expected[0], expected[1])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])  # of BART, accelerate cannot place final_logits_bias
def test_a_backbone_on_cpu_and_disk_gives_what_one_in_memory_gives(kind: str, form: str, tmp_path: Path) -> None:
    expected = hidden_of_both_tasks(adapted(tiny_backbone(kind), form))
    backbone = offloaded(kind, tmp_path)
    assert any(parameter.is_meta for parameter in backbone.parameters())
    model = adapted(backbone, form)
    assert model.fingerprint.bfloat16 == fingerprint(tiny_backbone(kind))
    assert torch.equal(hidden_of_both_tasks(model), expected)
    model.to("cpu")
    with pytest.raises(BackboneError, match="offloaded some of its weights; load it again"):
        model.half()
    with pytest.raises(BackboneError, match="shard_backbone: quantised or offloaded weights cannot be divided"):
        shard_layers(model, "cpu")


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("hooks_come", ["before", "after"])
def test_a_hooked_backbone_is_given_back_as_it_was(kind: str, hooks_come: str) -> None:
    backbone = tiny_backbone(kind)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    if kind in ("t5", "bart"):
        inputs["decoder_input_ids"] = torch.tensor([[0, 4]])
    with torch.no_grad():
        expected = backbone(**inputs)[0]
        if hooks_come == "before":
            attach_execution_device_hook(backbone, "cpu")
        model = adapted(backbone)
        if hooks_come == "after":
            attach_execution_device_hook(backbone, "cpu")
        both = hidden_of_both_tasks(model)
        assert not torch.equal(both[0], both[1])
        assert torch.equal(model.detach()(**inputs)[0], expected)


def test_a_backbone_on_several_devices_is_refused_and_left_as_it_was() -> None:
    backbone = tiny_backbone("bert")
    attach_execution_device_hook(backbone.get_submodule("embeddings"), "cpu")
    attach_execution_device_hook(backbone.get_submodule("encoder"), "meta")
    with pytest.raises(BackboneError, match="executed on several devices \\(cpu, meta\\)"):
        adapted(backbone)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_a_backbone_without_values_is_refused() -> None:
    with init_empty_weights():
        backbone = tiny_backbone("bert")
    with pytest.raises(BackboneError, match="on the meta device, where they have no values; load them first"):
        adapted(backbone)
    assert execution_device(tiny_backbone("bert")) == torch.device("cpu")


def test_offloaded_weights_are_not_merged(tmp_path: Path) -> None:
    model = adapted(offloaded("llama", tmp_path), "lora")
    with pytest.raises(BackboneError, match="found it offloaded"):
        model.merge("a")
    assert hidden_of_both_tasks(model).isfinite().all()


EXAMPLES = [
    {"text": "good", "label": "yes"},
    {"text": "bad", "label": "no"},
    {"text": "good w1", "label": "yes"},
    {"text": "bad w2", "label": "no"},
]


@pytest.mark.parametrize(
    ("kind_and_preset", "dtype", "fit"),
    pairwise(
        [("bert", "paper"), ("bert", "plus"), ("bert", "frozen texts"), ("t5", "paper"), ("gpt2", "paper")],
        [torch.float16, torch.bfloat16, torch.float64],
        ["adapter", "prototype", "shared", "none"],
    ),
    ids=str,
)
def test_a_converted_model_answers_and_learns_tasks(
    kind_and_preset: tuple[str, str], dtype: torch.dtype, fit: Any, tmp_path: Path
) -> None:
    kind, preset = kind_and_preset
    folder = str(save_backbone(tmp_path / kind, kind))
    tasks = [Task.classification("a", ["yes", "no"]), Task.classification("b", ["red", "blue"])]
    settings = FROZEN_TEXTS if preset == "frozen texts" else {"preset": preset}
    model = HyperAdapterModel.from_backbone(folder, tasks, **settings).to(dtype)
    if preset == "frozen texts":  # so that what known heads say is read
        nn.init.normal_(model.heads.wide_weight)  # type: ignore[union-attr]
    assert next(model.backbone.parameters()).dtype == dtype
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {torch.promote_types(dtype, torch.float32)}
    before = [found.answer for found in Predictor(model)(["w1", "w2"], task="a")]
    model.add_task(Task.classification("c", ["yes", "no"]), EXAMPLES, fit=fit, max_steps=2)
    assert len(list(Predictor(model)(["w1", "w2"], task="c"))) == len(model.route(["w1", "w2"])) == 2
    if fit != "shared":
        assert [found.answer for found in Predictor(model)(["w1", "w2"], task="a")] == before


def test_detaching_gives_layers_back_uncompiled() -> None:
    model = adapted(tiny_backbone("bert"))
    model.compile(backend="eager")
    layers = model.backbone.get_submodule("encoder.layer")
    assert all(layer._compiled_call_impl is not None for layer in layers.children())
    assert all(layer._compiled_call_impl is None for layer in model.detach().get_submodule("encoder.layer").children())


def test_a_forward_that_another_library_has_replaced_is_refused() -> None:
    backbone = tiny_backbone("bert")
    layer: Any = backbone.get_submodule("encoder.layer.3.output")
    layer.forward = layer.forward
    classes = [type(module) for module in backbone.modules()]
    with pytest.raises(BackboneError, match=r"'encoder\.layer\.3\.output' was replaced by another library"):
        adapted(backbone)
    assert [type(module) for module in backbone.modules()] == classes
    assert all(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("layer", ["encoder.layer.0", "encoder.layer.3"])
def test_a_layer_whose_forward_another_library_has_replaced_is_adapted(layer: str) -> None:
    expected = hidden_of_both_tasks(adapted(tiny_backbone("bert")))
    backbone = tiny_backbone("bert")
    module: Any = backbone.get_submodule(layer)
    module.forward = module.forward
    assert torch.equal(hidden_of_both_tasks(adapted(backbone)), expected)
