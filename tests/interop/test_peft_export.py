"""Form "lora" in PEFT's own hands: folders that PEFT loads, and folders that PEFT wrote; and merged models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    DECODERS,
    HEAD_TASKS,
    TEXT_TASKS,
    assert_same,
    bare_outputs,
    kind_of,
    make_batch,
    make_model,
    save_backbone,
    tiny_backbone,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hyperadapters.backbones.loading import load_backbone
from hyperadapters.config import ModelConfig
from hyperadapters.errors import BackboneError, CheckpointError, OutputError, TaskError
from hyperadapters.interop.export import FORMATS, export
from hyperadapters.interop.merged import export_merged
from hyperadapters.interop.peft import export_all_peft, export_peft, import_peft, serving_notes
from hyperadapters.interop.task_files import HEAD_FILE, TASK_FILE
from hyperadapters.model.model import HyperAdapterModel

peft: Any = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks
LORA = ModelConfig(form="lora", lora_rank=2)
DEEP = json.loads("[" * 150 + "]" * 150)
KINDS = ["t5", "bart", "bert", "modernbert", "gpt2", "llama", "qwen3"]


def with_adapter(model: HyperAdapterModel, kind: str, batch: dict[str, Tensor]) -> Tensor:
    """What the backbone makes of a batch under the adapter of the task 'mood'."""
    inputs: Any = {**batch, "task_ids": torch.full((6,), 2)}
    if kind_of(kind) != "encoder":
        return model(**inputs).logits
    seen: list[Tensor] = []
    handle = model.backbone.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state))
    del inputs["labels"]
    model(**inputs)
    handle.remove()
    return seen[0]


def frozen_setting(kind: str) -> dict[str, int]:
    """Return the setting that leaves the first layer of this kind of backbone without an adapter."""
    return {"frozen_encoder_layers": 1} if kind_of(kind) == "encoder-decoder" else {"feature_layer": 1}


def real_rows(kind: str, batch: dict[str, Tensor]) -> Tensor:
    is_decoded = kind_of(kind) == "encoder-decoder"
    return torch.ones(batch["labels"].shape, dtype=torch.bool) if is_decoded else batch["attention_mask"].bool()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(kind, settings) for kind in KINDS for settings in ({}, frozen_setting(kind))],
    ids=str,
)
def test_peft_gives_our_outputs(kind: str, settings: dict[str, int], tmp_path: Path) -> None:
    model, batch = make_model(kind, "lora", **settings).double(), make_batch(kind)
    expected, real = with_adapter(model, kind, batch), real_rows(kind, batch)
    export_peft(model, "mood", tmp_path / "mood")
    loaded = peft.PeftModel.from_pretrained(tiny_backbone(kind).double(), tmp_path / "mood").eval()
    assert_same(bare_outputs(loaded, kind, batch)[real], expected[real])
    assert (bare_outputs(tiny_backbone(kind).double(), kind, batch)[real] - expected[real]).abs().max() > 1e-3
    changed = {name.split(".lora_A")[0] for name, _ in loaded.named_modules() if name.endswith("lora_A.default")}
    assert changed == {f"base_model.model.{place.path}" for place in model.adapted_linears()}


@pytest.mark.parametrize("form", ["lora", "bottleneck"])
def test_a_tokenizer_that_was_changed_goes_along(form: str, tmp_path: Path) -> None:
    backbone = load_backbone(str(save_backbone(tmp_path / "bert")))
    model = HyperAdapterModel(backbone, HEAD_TASKS, ModelConfig(adapter_dim=2) if form == "bottleneck" else LORA)
    write = FORMATS["peft-lora" if form == "lora" else "adapterhub"]
    assert model.tokenizer("neu w1")["input_ids"] != [51, 4, 1]
    write(model, "mood", tmp_path / "as it was")
    assert not list((tmp_path / "as it was").glob("tokenizer*"))
    model.tokenizer.add_tokens(["neu"])
    write(model, "mood", tmp_path / "changed")
    assert AutoTokenizer.from_pretrained(tmp_path / "changed")("neu w1")["input_ids"] == [51, 4, 1]


def test_a_folder_holds_what_servers_ask_for_and_the_labels_and_the_head(tmp_path: Path) -> None:
    model = make_model("llama", "lora")
    assert export_peft(model, "mood", tmp_path / "mood") == []
    config = json.loads((tmp_path / "mood" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 3.0, "LORA")
    assert set(config["target_modules"]) == {"q_proj", "v_proj"}
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    names = set(load_file(tmp_path / "mood" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight" in names
    assert len(names) == 2 * 2 * 2
    assert not (tmp_path / "mood" / HEAD_FILE).exists()
    bert = make_model("bert", "lora")
    export_peft(bert, "mood", tmp_path / "bert")
    found = json.loads((tmp_path / "bert" / TASK_FILE).read_text())
    assert found["task"]["labels"] == ["bad", "good"]
    head = load_file(tmp_path / "bert" / HEAD_FILE)
    known = bert.heads.unpack()[2]
    assert torch.equal(head["weight"], known.weight)
    assert torch.equal(head["bias"], known.bias)


def test_what_servers_would_refuse_or_leave_out_is_said() -> None:
    assert serving_notes(make_model("llama", "lora")) == []
    (note,) = serving_notes(make_model("t5", "lora"))
    assert "decoder-only language models; this backbone is an encoder-decoder" in note
    (note,) = serving_notes(make_model("gpt2", "lora"))
    assert "'gpt2'" in note
    backbone = tiny_backbone("llama", hidden_size=136, head_dim=136, num_attention_heads=1)
    config = ModelConfig(preset="paper", form="lora", lora_rank=130, target_modules=("q_proj",))
    first, second = serving_notes(HyperAdapterModel(backbone, TEXT_TASKS, config))
    assert "--max-lora-rank 130" in first
    assert "up to 128, found 130" in second
    model = make_model("llama", "lora")
    for layer in model.backbone.model.layers:
        layer.self_attn.other = nn.Linear(16, 16)
    config = ModelConfig(preset="paper", form="lora", target_modules=("q_proj", "other"), lora_rank=2)
    (note,) = serving_notes(HyperAdapterModel(model.detach(), TEXT_TASKS, config))
    assert "ignore the LoRAs of other" in note


def test_all_tasks_become_folders_with_an_index(tmp_path: Path) -> None:
    model, batch = make_model("gpt2", "lora").double(), make_batch("gpt2")
    export_all_peft(model, tmp_path / "all")
    index = json.loads((tmp_path / "all" / "hyperadapters_index.json").read_text())
    assert list(index["tasks"]) == ["colour", "size", "mood"]
    loaded = peft.PeftModel.from_pretrained(
        tiny_backbone("gpt2").double(), tmp_path / "all" / "colour", adapter_name="colour"
    )
    for name in ("size", "mood"):
        loaded.load_adapter(tmp_path / "all" / index["tasks"][name]["folder"], adapter_name=name)
    real = batch["attention_mask"].bool()
    for task_id, name in enumerate(index["tasks"]):
        loaded.set_adapter(name)
        expected = model(**{**batch, "task_ids": torch.full((6,), task_id)}).logits
        assert_same(bare_outputs(loaded.eval(), "gpt2", batch)[real], expected[real])


@pytest.mark.parametrize("kind", ["t5", "bert", "gpt2", "llama"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_that_peft_wrote_becomes_the_adapter_of_a_task(kind: str, rslora: bool, tmp_path: Path) -> None:
    settings = {"frozen_encoder_layers": 2} if kind == "t5" else {"feature_layer": 2}
    model, batch = make_model(kind, "lora", **settings), make_batch(kind)
    targets = [place.path for place in model.adapted_linears()][::2]  # not all of them
    config = peft.LoraConfig(
        r=1, lora_alpha=5, target_modules=targets, use_rslora=rslora, fan_in_fan_out=kind == "gpt2", lora_dropout=0.1
    )
    theirs = peft.get_peft_model(tiny_backbone(kind), config)
    torch.manual_seed(3)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    theirs.eval().save_pretrained(tmp_path)
    others = [model.method.adapters(torch.tensor([task_id])) for task_id in range(2)]
    import_peft(model, "mood", tmp_path)
    for task_id, before in enumerate(others):
        assert all(torch.equal(model.method.adapters(torch.tensor([task_id]))[name], before[name]) for name in before)
    real = real_rows(kind, batch)
    assert_same(with_adapter(model.double(), kind, batch)[real], bare_outputs(theirs.double(), kind, batch)[real])


@pytest.mark.parametrize("method", ["task_adapter", "shared_adapter", "hyperformer", "hyperdecoder"])
def test_a_method_whose_tasks_do_not_change_takes_no_lora(method: Any, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny_backbone("gpt2"), peft.LoraConfig(r=1, target_modules=["c_attn"]))
    theirs.save_pretrained(tmp_path)
    config = ModelConfig(form="lora", lora_rank=2, method=method)
    model = HyperAdapterModel(tiny_backbone("gpt2"), TEXT_TASKS, config)
    before = {name: tensor.clone() for name, tensor in model.adapter_state_dict().items()}
    with pytest.raises(TaskError, match=f"method '{method}' keeps the tasks .* only 'pha' can change them"):
        import_peft(model, "mood", tmp_path)
    after = model.adapter_state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_what_is_no_readable_folder_of_peft_is_said(tmp_path: Path) -> None:
    model = make_model("gpt2", "lora", feature_layer=2)
    for name in ("gone", "file", "n" * 300):
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match=r"expected a PEFT adapter with adapter_config.json in it: "):
            import_peft(model, "mood", tmp_path / name)
    export_peft(model, "mood", tmp_path / "mood")
    (tmp_path / "mood" / TASK_FILE).unlink()
    (tmp_path / "mood" / TASK_FILE).mkdir()
    with pytest.raises(CheckpointError, match=f"{TASK_FILE}: cannot be read: "):
        import_peft(model, "mood", tmp_path / "mood")
    (tmp_path / "mood" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: cannot be read: "):
        import_peft(model, "mood", tmp_path / "mood")


def test_what_is_no_plain_lora_of_this_backbone_is_refused(tmp_path: Path) -> None:
    model = make_model("gpt2", "lora", feature_layer=2)
    export_peft(model, "mood", tmp_path / "good")
    expected = model.method.adapters(torch.tensor([2]))
    config = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "good" / "adapter_model.safetensors")
    first = next(iter(tensors))
    for number, (changes, state, message) in enumerate(
        (
            ({"peft_type": "IA3"}, tensors, "expected a PEFT adapter of type LORA, found IA3"),
            (
                {"modules_to_save": ["lm_head"]},
                tensors,
                r"modules_to_save is \['lm_head'\], expected a plain LoRA",
            ),
            ({"use_dora": True}, tensors, "use_dora is True"),
            ({"init_lora_weights": "pissa"}, tensors, "init_lora_weights is 'pissa', expected a plain LoRA"),
            ({"r": 1}, tensors, "expected rank 1, as in adapter_config.json"),
            ({}, {}, "contains no tensors"),
            ({}, {**tensors, first: torch.full_like(tensors[first], torch.nan)}, "values that are not finite"),
            ({"r": 0}, tensors, "expected r and lora_alpha above 0"),
            ({}, {**tensors, first: tensors[first].to(torch.float8_e4m3fn)}, "has type torch.float8_e4m3fn, expected"),
            ({}, {**tensors, first: tensors[first].to(torch.int64)}, "has type torch.int64, expected floating-point"),
            ({"lora_alpha": math.inf}, tensors, "expected r and lora_alpha above 0"),
            ({"lora_alpha": 10**400}, tensors, "expected r and lora_alpha above 0"),
            (
                {"lora_alpha": 1e6},
                {name: torch.full_like(tensor, 1e38) for name, tensor in tensors.items()},
                r"'transformer.* has values that are not finite when they are multiplied by",
            ),
            (
                {"base_model_name_or_path": ["bert"]},
                tensors,
                r"expected the name of a backbone in .*, found \['bert'\]",
            ),
            ({"deep": DEEP}, tensors, "expected at most 100 levels of nested lists"),
            (
                {},
                {**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)},
                "'base_model.model.lm_head.weight'",
            ),
            (
                {},
                {name: tensor for name, tensor in tensors.items() if name != first},
                "only one of lora_A and lora_B; the file is damaged",
            ),
            ({}, {name.replace(".h.2.", ".h.0."): t for name, t in tensors.items()}, "adapts 'transformer.h.0.attn"),
            (
                {},
                {name: torch.zeros((2, 5) if "lora_A" in name else (5, 2)) for name in tensors},
                r"has shapes \(5, 2\) and \(2, 5\); expected \(16, 2\)",
            ),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        save_file(state, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            import_peft(model, "mood", folder)
    (tmp_path / "good" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        import_peft(model, "mood", tmp_path / "good")
    with pytest.raises(CheckpointError, match=r"with adapter_config\.json in it"):
        import_peft(model, "mood", tmp_path)
    assert all(torch.equal(model.method.adapters(torch.tensor([2]))[name], expected[name]) for name in expected)
    shared = make_model("t5", "lora")
    export_peft(shared, "mood", tmp_path / "t5")
    with pytest.raises(CheckpointError, match="of the encoder, whose adapters are shared by all tasks"):
        import_peft(shared, "mood", tmp_path / "t5")


def test_a_lora_of_another_backbone_is_refused(tmp_path: Path) -> None:
    model = make_model("llama", "lora")
    export_peft(model, "mood", str(tmp_path / "ours"))
    import_peft(model, "mood", str(tmp_path / "ours"))
    backbone = tiny_backbone("llama")
    with torch.no_grad():
        next(backbone.parameters()).mul_(1.5)
    other = HyperAdapterModel(backbone, model.tasks, model.adapter_config, backbone_name="their/other")
    with pytest.raises(CheckpointError, match="this model has 'their/other' with other weights"):
        import_peft(other, "mood", tmp_path / "ours")
    config = tmp_path / "ours" / "adapter_config.json"
    (tmp_path / "ours" / "hyperadapters_task.json").unlink()  # as PEFT itself writes it
    import_peft(other, "mood", tmp_path / "ours")  # neither has a name for the other's backbone
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "/models/other"}))
    import_peft(other, "mood", tmp_path / "ours")
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "our/llama"}))
    with pytest.raises(CheckpointError, match="trained on backbone 'our/llama', this model has 'their/other'; import"):
        import_peft(other, "mood", tmp_path / "ours")
    import_peft(other, "mood", tmp_path / "ours", check_backbone=False)


def test_what_cannot_be_exported_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="found form 'bottleneck'"):
        export_peft(make_model("gpt2"), "mood", tmp_path / "out")
    with pytest.raises(TaskError, match="Unknown task 'modo'"):
        export_peft(make_model("gpt2", "lora"), "modo", tmp_path / "out")
    with pytest.raises(TaskError, match="generates adapters for inputs"):
        export_peft(make_model("bert", "lora", method="hyperdecoder"), "mood", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        export_peft(make_model("gpt2", "lora"), "mood", tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


@pytest.mark.parametrize("kind", ["t5", "bert", "gpt2", "llama"])
def test_a_merged_task_is_a_transformers_model(kind: str, tmp_path: Path) -> None:
    name = str(save_backbone(tmp_path / "backbone", kind))
    tasks = HEAD_TASKS if kind_of(kind) == "encoder" else TEXT_TASKS
    config = ModelConfig(preset="paper", form="lora", lora_rank=2, lora_alpha=3.0)
    model = HyperAdapterModel(load_backbone(name).double(), tasks, config, name).double().eval()
    with torch.no_grad():
        for parameter in (*model.method.hypernetwork.parameters(), *model.shared_adapters.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch, before = make_batch(kind), {name: value.clone() for name, value in model.backbone.state_dict().items()}
    expected, real = with_adapter(model, kind, batch), real_rows(kind, batch)
    export_merged(model, "mood", tmp_path / "merged")
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    assert_same(bare_outputs(load_backbone(str(tmp_path / "merged")).double(), kind, batch)[real], expected[real])
    if kind in DECODERS:
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged") is not None
    assert json.loads((tmp_path / "merged" / TASK_FILE).read_text())["task"]["name"] == "mood"
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_a_task_of_a_checkpoint_is_exported_by_name_or_all_are(tmp_path: Path) -> None:
    name = str(save_backbone(tmp_path / "backbone", "gpt2"))
    config = ModelConfig(preset="paper", form="lora", lora_rank=2)
    HyperAdapterModel(load_backbone(name), TEXT_TASKS, config, name).save_pretrained(tmp_path / "run")
    assert export(tmp_path / "run", "peft-lora", tmp_path / "one", task="mood")
    export(tmp_path / "run", "peft-lora", tmp_path / "all", every=True)
    export(tmp_path / "run", "merged", tmp_path / "merged", every=True)
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {"colour", "size", "mood"}
    for options, message in (({}, "found neither"), ({"task": "mood", "every": True}, "found both")):
        with pytest.raises(TaskError, match=message):
            export(tmp_path / "run", "merged", tmp_path / "x", **options)
    with pytest.raises(OutputError, match=r"Unknown format 'peft'.*Did you mean 'peft-lora'"):
        export(tmp_path / "run", "peft", tmp_path / "x", task="mood")
    assert not (tmp_path / "x").exists()
    assert set(FORMATS) >= {"peft-lora", "merged"}


def test_a_backbone_that_transformers_cannot_write_is_refused(tmp_path: Path) -> None:
    model = make_model("llama", "lora")
    model.backbone = nn.Linear(2, 2)
    with pytest.raises(BackboneError, match="expected a transformers model to write, found Linear"):
        export_merged(model, "mood", tmp_path / "x")


def test_peft_takes_no_methods_from_outside() -> None:
    """Once this fails, `get_peft_model(model, PhaConfig(...))` can be offered; docs/export.md says why it is not."""
    with pytest.raises(ValueError, match="Unknown PEFT type PHA"):
        peft.utils.register_peft_method(name="pha", config_cls=peft.LoraConfig, model_cls=peft.LoraModel)
