"""Every architecture and both forms of adapters: promises 2, 4, 5 and 8, and what only language models have."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import (
    DECODERS,
    FORM_SETTINGS,
    FORMS,
    FROZEN_TEXTS,
    HEAD_TASKS,
    MAKERS,
    TEXT_TASKS,
    VOCABULARY,
    assert_same,
    bare_outputs,
    kind_of,
    make_batch,
    make_model,
    pairwise,
    save_backbone,
    select_rows,
    tiny_backbone,
    tiny_language_model_tokenizer,
)
from tolerance import rounding
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from hyperadapters.backbones.architectures import ARCHITECTURES, resolve_architecture
from hyperadapters.config import Lengths, ModelConfig, ModuleNames, Recipe, Task, parse
from hyperadapters.data.collate import make_collator
from hyperadapters.data.examples import Example
from hyperadapters.errors import BackboneError, CheckpointError, RecipeError, TaskError
from hyperadapters.inference.predictor import Predictor
from hyperadapters.methods.objective import text_loss
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.run import train

KINDS = tuple(MAKERS)
WRITING = [kind for kind in KINDS if ARCHITECTURES.get(kind, ARCHITECTURES["t5"]).kind != "encoder"]
NOT_IN_FLOAT64 = ("gemma2",)  # rows of nothing but padding are not numbers there: transformers' softmax is in float32
each = pytest.mark.parametrize("kind", KINDS)
each_form = pytest.mark.parametrize("form", FORMS)


@each
@each_form
def test_a_mixed_batch_gives_each_row_what_a_batch_of_its_own_task_gives(kind: str, form: str) -> None:
    model, batch = make_model(kind, form).double(), make_batch(kind)
    mixed = model(**batch)
    real = batch["attention_mask"].bool()
    for rows in (*((batch["task_ids"] == task).nonzero()[:, 0] for task in range(3)), torch.tensor([4])):
        own = model(**select_rows(batch, rows))
        found, size = mixed.logits[rows], own.logits.shape[-1]  # a mixed batch is as wide as its largest head
        if kind in DECODERS:  # what comes after a row's end is never read
            assert_same(found[real[rows]], own.logits[real[rows]])
        else:
            assert_same(found[..., :size], own.logits)
            assert torch.isneginf(found[..., size:]).all()
        assert_same(mixed.instances[rows], own.instances)
        assert own.loss.isfinite()


@each
@each_form
def test_adapters_differ_by_task_and_switched_off_leave_the_bare_backbone(kind: str, form: str) -> None:
    batch = make_batch(kind)
    before = bare_outputs(tiny_backbone(kind), kind, batch)
    model, seen = make_model(kind, form), []
    with model.adapters_disabled():
        assert torch.equal(bare_outputs(model.backbone, kind, batch), before)
    layer = model._architecture.generated.layers[-1]
    handle = layer.register_forward_hook(lambda _, __, output: seen.append(output))
    if kind_of(kind) == "encoder":
        del batch["labels"]  # which are of other tasks
    for task_id in range(3):
        model(**{**batch, "task_ids": torch.full((6,), task_id)})
    handle.remove()
    states = [output if isinstance(output, Tensor) else output[0] for output in seen]
    assert (states[0] - states[1]).abs().max() > 1e-3
    assert (states[1] - states[2]).abs().max() > 1e-3


@each
@each_form
def test_only_declared_parameters_receive_gradients_and_detaching_restores(kind: str, form: str) -> None:
    batch, backbone = make_batch(kind), tiny_backbone(kind)
    names = [name for name, _ in backbone.named_modules()]
    classes = [type(module) for module in backbone.modules()]
    before, state = (
        bare_outputs(backbone, kind, batch),
        {name: value.clone() for name, value in backbone.state_dict().items()},
    )
    tasks = HEAD_TASKS if kind_of(kind) == "encoder" else TEXT_TASKS
    config = ModelConfig(preset="paper", **FORM_SETTINGS[form])
    model = HyperAdapterModel(backbone.train(), tasks, config).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model.training_loss(batch).total.backward()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (not name.startswith("backbone.")), name
            assert (parameter.grad is not None) == parameter.requires_grad, name
        optimizer.step()
    assert [name for name, _ in backbone.named_modules()] == names
    assert model.detach() is backbone
    assert all(parameter.requires_grad and parameter.grad is None for parameter in backbone.parameters())
    assert [type(module) for module in backbone.modules()] == classes
    assert not any("beside" in vars(module) for module in backbone.modules())
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())
    assert torch.equal(bare_outputs(backbone.eval(), kind, batch), before)


@each
@each_form
def test_a_checkpoint_gives_the_same_outputs_bit_for_bit(kind: str, form: str, tmp_path: Path) -> None:
    model, batch = make_model(kind, form), make_batch(kind)
    model.save_pretrained(tmp_path)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone(kind)).eval()
    assert loaded.adapter_config == model.adapter_config
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert not any(name.startswith("backbone") for name in model.adapter_state_dict())


@each
@each_form
def test_kept_states_of_frozen_layers_give_the_outputs_of_a_whole_pass(kind: str, form: str) -> None:
    settings = {"frozen_encoder_layers": 1} if kind_of(kind) == "encoder-decoder" else {}
    model, batch = make_model(kind, form, **settings).double(), make_batch(kind)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if kind in DECODERS:
        inputs["prompt_mask"] = ((batch["labels"] == -100) & batch["attention_mask"].bool()).long()
    whole = model(**batch)
    kept = model(**batch, frozen_output=model.forward_frozen_layers(**inputs))
    real = batch["attention_mask"].bool() if kind in DECODERS else torch.ones(6, dtype=torch.bool)
    assert_same(kept.logits[real], whole.logits[real])
    assert_same(kept.instances, whole.instances)
    assert_same(kept.loss, whole.loss)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mpnet"])  # which has none of its own
@each_form
def test_gradient_checkpointing_keeps_the_tasks(kind: str, form: str) -> None:
    batch, gradients = make_batch(kind), []
    for checkpointed in (False, True):
        model = make_model(kind, form).double().train()
        if checkpointed:
            model.activation_checkpointing_enable()
        model.training_loss(batch).total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_same(gradients[1][name], gradient)


@each
@each_form
def test_an_exception_in_a_forward_leaves_no_state_behind(kind: str, form: str) -> None:
    model, batch = make_model(kind, form), make_batch(kind)
    expected = model(**batch).logits
    handle = model._architecture.generated.layers[-1].register_forward_hook(_fail)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    handle.remove()
    with pytest.raises(RuntimeError, match="no task is active"):
        bare_outputs(model.backbone, kind, batch)
    assert torch.equal(model(**batch).logits, expected)


def _fail(*_: Any) -> None:
    raise ZeroDivisionError


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize(("kind", "form", "search"), pairwise(WRITING, FORMS, tuple(GENERATION)))
def test_generation_in_a_mixed_batch_equals_generation_row_by_row(kind: str, form: str, search: str) -> None:
    model, batch = make_model(kind, form), make_batch(kind, rows=4)
    if kind not in NOT_IN_FLOAT64:
        model = model.double()  # where rounding decides no token
    batch.pop("labels")
    options = {**GENERATION[search], "max_new_tokens": 5, "min_new_tokens": 5}
    together = model.generate(**batch, **options)
    returned = options.get("num_return_sequences", 1)
    for row in range(4):
        alone = select_rows(batch, torch.tensor([row]))
        if kind in DECODERS:
            length = int(alone["attention_mask"].sum())
            alone = {name: value[:, :length] if value.ndim > 1 else value for name, value in alone.items()}
        found = model.generate(**alone, **options)
        assert torch.equal(together[row * returned : (row + 1) * returned, -5:], found[:, -5:])


# Language models


@pytest.mark.parametrize("kind", DECODERS)
@each_form
def test_padding_on_the_left_gives_what_padding_on_the_right_gives(kind: str, form: str) -> None:
    model, right = make_model(kind, form), make_batch(kind)
    if kind not in NOT_IN_FLOAT64:
        model = model.double()
    real = right["attention_mask"].bool()
    order = right["attention_mask"].argsort(dim=1, stable=True)
    moved = {name: right[name].gather(1, order) for name in ("input_ids", "attention_mask", "labels")}
    left = {**right, **moved}
    found, expected = model(**left), model(**right)
    pairs = (
        (found.logits[left["attention_mask"].bool()], expected.logits[real]),
        (found.instances, expected.instances),
        (found.loss, expected.loss),
    )
    for one, other in pairs:
        if kind in NOT_IN_FLOAT64:  # about a hundred operations a layer, and four layers
            torch.testing.assert_close(
                one, other, atol=rounding(400, max(1.0, float(other.detach().abs().max()))), rtol=0
            )
        else:
            assert_same(one, other)


@pytest.mark.parametrize("kind", DECODERS)
def test_greedy_generation_with_a_cache_writes_what_the_forward_finds_most_likely(kind: str) -> None:
    model, batch = make_model(kind), make_batch(kind)
    if kind not in NOT_IN_FLOAT64:
        model = model.double()  # where rounding decides no token
    batch.pop("labels")
    written = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, suppress_tokens=None)
    prompts = (batch["attention_mask"].sum(dim=1)).tolist()
    for row, length in enumerate(prompts):
        ids = torch.cat([batch["input_ids"][row, :length], written[row, 7:]])[None]
        labels = ids.clone()
        labels[:, :length] = -100
        logits = model(ids, task_ids=batch["task_ids"][row : row + 1], labels=labels).logits[0]
        logits[:, 1] = -torch.inf  # min_new_tokens forbids the end of the text
        assert torch.equal(logits[length - 1 : -1].argmax(dim=-1), written[row, 7:])


def test_the_retriever_of_a_language_model_reads_the_prompt_and_the_loss_is_of_the_answer() -> None:
    model, batch = make_model("llama").double(), make_batch("llama")
    other = {**batch, "input_ids": batch["input_ids"].clone(), "labels": batch["labels"].clone()}
    answers = batch["labels"] != -100
    other["input_ids"][answers] = 3 + (other["input_ids"][answers] - 2) % 30
    other["labels"] = other["input_ids"].masked_fill(~answers, -100)
    first, second = model(**batch), model(**other)
    assert_same(second.instances, first.instances)
    assert abs(float((second.losses.task - first.losses.task).detach())) > 1e-4
    by_hand = [
        -first.logits[row, place - 1].log_softmax(-1)[batch["labels"][row, place]] for row, place in answers.nonzero()
    ]
    assert_same(first.losses.task, torch.stack(by_hand).mean().float())
    assert_same(text_loss(first.logits, batch["labels"], predicts_next=True).value, first.losses.task)


def test_labels_of_another_shape_than_the_input_are_refused() -> None:
    batch = make_batch("gpt2")
    with pytest.raises(TaskError, match=r"labels: expected the shape \(6, 7\) of input_ids.*found \(6, 4\)"):
        make_model("gpt2")(**{**batch, "labels": batch["labels"][:, :4]})


def test_batches_of_a_language_model_are_prompts_with_their_answers() -> None:
    tasks = [Task.classification("mood", ["bad", "good"]), Task.text_to_text("echo", template="w1 {text}")]
    tokenizer = tiny_language_model_tokenizer()
    collator = make_collator("decoder", tokenizer, tasks, max_length=4, max_target_length=3)
    line = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids = dict(
        zip(["w1", "w2", "w3", "good"], tokenizer.convert_tokens_to_ids(["w1", "w2", "w3", "good"]), strict=True)
    )
    batch = collator([Example(0, "w2", None, 1), Example(1, "w3 w3 w3 w3 w3", None, "w2 w2 w2 w2")])
    first = [ids["w2"], *line, ids["good"], 1]
    second = [ids["w1"], ids["w3"], ids["w3"], *line, ids["w2"], ids["w2"], 1]
    assert batch["input_ids"].tolist() == [first + [1] * (7 - len(first)), second]
    assert batch["attention_mask"].tolist() == [[1] * len(first) + [0] * (7 - len(first)), [1] * 7]
    assert batch["prompt_mask"].tolist() == [[1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, ids["good"], 1, *[-100] * 3], [-100] * 4 + second[4:]]
    assert collator.lengths([Example(0, "w2", None, 1)]) == [2]
    assert collator.lengths([Example(0, "w2", None, 1)], with_targets=True) == [4]
    prompts = collator.inputs([Example(0, "w2", None, 1)])
    assert (prompts["input_ids"].tolist(), set(prompts)) == ([first[:2]], {"input_ids", "attention_mask"})


def test_a_language_model_without_an_end_of_text_is_refused() -> None:
    tokenizer = tiny_language_model_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(BackboneError, match="no eos_token"):
        make_collator("decoder", tokenizer, TEXT_TASKS)


def test_the_answer_of_a_language_model_is_what_it_writes_after_the_input() -> None:
    model = make_model("gpt2")
    model.tokenizer = tiny_language_model_tokenizer()
    predictor = Predictor(model, batch_size=3, decline=False)
    texts = ["w1 w2 w3", "w4", "good w5", "w6 w7 w8 w9"]
    together = list(predictor(texts))
    assert all("w1 w2 w3" not in prediction.text for prediction in together)
    for text, prediction in zip(texts, together, strict=True):
        (alone,) = predictor([text])
        assert (alone.text, alone.task) == (prediction.text, prediction.task)


def test_an_answer_ends_where_the_tokenizer_ends_it_whatever_the_backbone_says() -> None:
    model = make_model("gpt2")
    model.tokenizer = tiny_language_model_tokenizer()
    model.backbone.generation_config.eos_token_id = None
    (endless,) = Predictor(model, decline=False)(["w4"])
    words = endless.text.split()
    end = next(index for index, word in enumerate(words) if word != words[0])
    model.tokenizer.eos_token = words[end]
    (ended,) = Predictor(model, decline=False)(["w4"])
    assert ended.text == " ".join(words[:end])


def test_lengths_leave_room_for_the_answer_of_a_language_model() -> None:
    sites = resolve_architecture(tiny_backbone("gpt2"))
    assert sites.max_length == 80
    model = make_model("gpt2")
    assert model.lengths == Lengths(input=60, target=20)
    assert model.max_tokens == 80
    with pytest.raises(RecipeError, match=r"max_length \+ data.max_target_length: .* at most 80 tokens, found 81"):
        HyperAdapterModel(tiny_backbone("gpt2"), TEXT_TASKS, lengths=Lengths(input=61, target=20))


# Settings and names


def test_settings_that_do_not_fit_an_architecture_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"head_inputs: 'pair_features' .* this backbone generates its answers"):
        make_model("gpt2", head_inputs="pair_features")
    with pytest.raises(RecipeError, match="shared_adapter_dim: decoder backbones have no shared adapters"):
        make_model("llama", shared_adapter_dim=4)
    with pytest.raises(RecipeError, match="adapter_norm_input: the setting is for T5"):
        make_model("modernbert", adapter_norm_input=False)
    with pytest.raises(RecipeError, match="preset 'official' is for T5"):
        HyperAdapterModel(tiny_backbone("bart"), TEXT_TASKS, ModelConfig(preset="official"))


def test_forms_refuse_each_others_settings() -> None:
    for settings, name in (
        ({"form": "lora", "adapter_dim": 8}, "adapter_dim: form 'lora'"),
        ({"lora_rank": 4}, "lora_rank: form 'bottleneck'"),
        ({"target_modules": ("q",)}, "target_modules: form 'bottleneck'"),
        ({"form": "lora", "preset": "official"}, "form: preset 'official'"),
    ):
        with pytest.raises(ValueError, match=name):
            ModelConfig(**settings)


def test_target_modules_are_found_before_anything_is_changed() -> None:
    backbone = tiny_backbone("llama")
    for targets, message in (
        (("q_porj",), r"Unknown module 'q_porj'. Did you mean 'q_proj'\? Known: down_proj, gate_proj, k_proj, "),
        (("q_proj", "input_layernorm"), "'input_layernorm' is LlamaRMSNorm 'input_layernorm'; expected a linear layer"),
    ):
        with pytest.raises(BackboneError, match=message):
            HyperAdapterModel(backbone, TEXT_TASKS, ModelConfig(form="lora", target_modules=targets))
    backbone.model.layers[3].self_attn.v_proj = nn.Linear(16, 24)
    with pytest.raises(BackboneError, match=r"model.layers.2 and model.layers.3 differ in self_attn.v_proj"):
        HyperAdapterModel(backbone, TEXT_TASKS, ModelConfig(form="lora"))
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert not any("beside" in vars(module) for module in backbone.modules())


def test_linear_maps_that_cannot_differ_by_row_are_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"'query_proj' of this backbone is also applied.*by default: value_proj, attention"
    ):
        HyperAdapterModel(
            tiny_backbone("deberta-v2"), HEAD_TASKS, ModelConfig(form="lora", target_modules=("query_proj",))
        )


def test_a_rank_above_the_width_of_a_linear_map_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"lora_rank: expected at most 8, .*'self_attn.v_proj' .*8 outputs\), found 9"
    ):
        HyperAdapterModel(tiny_backbone("llama"), TEXT_TASKS, ModelConfig(form="lora", lora_rank=9))


def test_default_target_modules_are_those_of_peft() -> None:
    constants = pytest.importorskip("peft.utils.constants", reason="peft is not installed")
    of_peft = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    shared = ARCHITECTURES.keys() & of_peft.keys()
    assert {"t5", "bart", "bert", "gpt2", "llama", "qwen3", "deberta-v2"} <= shared
    for name in shared - {"deberta-v2"}:  # see its row
        assert sorted(ARCHITECTURES[name].target_modules) == sorted(of_peft[name]), name


@pytest.mark.parametrize("targets", [("q", "v", "wo"), ("SelfAttention.q",)])
def test_form_lora_changes_the_linear_maps_that_are_named(targets: tuple[str, ...]) -> None:
    model, batch = make_model("t5", "lora", target_modules=targets), make_batch("t5")
    named = {tensor.name for tensor in model.method.hypernetwork.tensors}
    expected = {"layer_0_SelfAttention_q"}
    if len(targets) == 3:
        expected |= {"layer_0_SelfAttention_v", "layer_1_EncDecAttention_q", "layer_1_EncDecAttention_v"}
        expected |= {"layer_2_DenseReluDense_wo"}
    assert named == {f"{side}_{name}" for side in ("down", "up") for name in expected}
    assert model(**batch).loss.isfinite()


def test_form_lora_equals_the_change_of_the_weights() -> None:
    """x (W + s A B): the fused c_attn of GPT-2, whose weight has inputs first."""
    model, batch = make_model("gpt2", "lora", feature_layer=2).double(), make_batch("gpt2")
    expected = model(**{**batch, "task_ids": torch.full((6,), 2)}).logits
    weights = model.method.adapters(torch.tensor([2]))
    backbone = tiny_backbone("gpt2").double()
    with torch.no_grad():
        for site, block in enumerate(backbone.transformer.h[2:]):
            block.attn.c_attn.weight += 1.5 * weights["down_attn_c_attn"][site, 0] @ weights["up_attn_c_attn"][site, 0]
        found = backbone(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    real = batch["attention_mask"].bool()
    assert_same(found[real], expected[real])


@pytest.mark.parametrize("codes", ["trunk", "orthogonal"])
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_a_fresh_lora_is_its_backbone(kind: str, codes: str) -> None:
    batch, backbone = make_batch(kind), tiny_backbone(kind).double()
    expected = bare_outputs(backbone, kind, batch)
    config = ModelConfig(preset="paper", form="lora", lora_rank=2, codes=codes)
    with torch.no_grad():
        found = HyperAdapterModel(backbone, TEXT_TASKS, config).double().eval()(**batch).logits
    real = batch["attention_mask"].bool() if kind in DECODERS else torch.ones(6, dtype=torch.bool)
    assert_same(found[real], expected[real])


# Modules of one's own


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.mlp = nn.LayerNorm(16), nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.GELU())

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        mean = (hidden * mask[..., None]).sum(dim=1, keepdim=True) / mask.sum(dim=1)[:, None, None]
        hidden = hidden + self.mix(mean)
        return hidden + self.mlp(self.norm(hidden))


class OwnEncoder(nn.Module):
    """Nothing that transformers knows: it returns a tensor and has no config."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.blocks = nn.Embedding(60, 16), nn.ModuleList(_Block() for _ in range(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.words(input_ids)
        for block in self.blocks:
            hidden = block(hidden, attention_mask)
        return hidden


@each_form
def test_a_module_of_ones_own_is_adapted_by_the_names_of_its_modules(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone, batch = OwnEncoder().eval(), make_batch("bert")
    modules = ModuleNames(layers="blocks", feed_forward="mlp", hidden_size=16)
    settings = {**FORM_SETTINGS[form], **({"target_modules": ("mlp.0",)} if form == "lora" else {})}
    model = HyperAdapterModel(backbone, HEAD_TASKS, ModelConfig(modules=modules, **settings)).eval()
    with torch.no_grad():
        for parameter in model.method.hypernetwork.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = model(**batch).logits
    exact = copy.deepcopy(model).double()
    mixed = exact(**batch)
    for row in range(6):
        alone = exact(**select_rows(batch, torch.tensor([row])))
        assert_same(mixed.logits[row, : alone.logits.shape[1]], alone.logits[0])
    model.save_pretrained(tmp_path)
    state = {name: value.clone() for name, value in model.detach().state_dict().items()}
    again = OwnEncoder().eval()
    again.load_state_dict(state)
    assert torch.equal(HyperAdapterModel.from_pretrained(tmp_path, backbone=again).eval()(**batch).logits, expected)


def test_modules_that_cannot_hold_adapters_are_refused_untouched() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    opt = OPTForCausalLM(
        OPTConfig(hidden_size=16, ffn_dim=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=40)
    )
    names = {"kind": "decoder", "layers": "model.decoder.layers", "feed_forward": "fc2"}
    with pytest.raises(
        BackboneError, match=r"layers\.0\.fc2' is a linear layer from 32 to 16; expected the one module"
    ):
        HyperAdapterModel(opt, TEXT_TASKS, ModelConfig(preset="paper", modules=names))
    llama = tiny_backbone("llama")
    llama.model.layers = nn.ModuleList([llama.model.layers[0]] * 4)
    with pytest.raises(BackboneError, match="are the same module"):
        HyperAdapterModel(llama, TEXT_TASKS, ModelConfig(preset="paper"))
    assert all(p.requires_grad for backbone in (opt, llama) for p in backbone.parameters())


def test_a_checkpoint_on_a_backbone_of_another_architecture_says_so(tmp_path: Path) -> None:
    make_model("llama", "lora").save_pretrained(tmp_path)
    for kind in ("gpt2", "t5"):
        with pytest.raises(CheckpointError, match="was trained on backbone"):
            HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone(kind))


def test_wrong_names_of_modules_are_refused_with_the_nearest() -> None:
    for modules, message in (
        (
            ModuleNames(layers="block", feed_forward="mlp", hidden_size=16),
            r"at 'block'.*OwnEncoder has: words, blocks. Did you",
        ),
        (ModuleNames(layers="blocks", feed_forward="mpl", hidden_size=16), r"at 'blocks.0.mpl'.*Did you mean 'mlp'\?"),
        (ModuleNames(layers="words", feed_forward="mlp", hidden_size=16), "expected a list of layers at 'words'"),
        (ModuleNames(layers="blocks", feed_forward="mlp"), "hidden_size of the backbone's hidden states is unknown"),
    ):
        with pytest.raises(BackboneError, match=message):
            HyperAdapterModel(OwnEncoder(), HEAD_TASKS, ModelConfig(modules=modules))
    modules = ModuleNames(layers="blocks", feed_forward="mlp", hidden_size=16)
    with pytest.raises(RecipeError, match="target_modules: there is no default for this backbone"):
        HyperAdapterModel(OwnEncoder(), HEAD_TASKS, ModelConfig(modules=modules, form="lora", preset="paper"))


def test_a_transformers_model_without_a_row_trains_and_loads_by_the_names_of_its_modules(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    name = str(tmp_path / "backbone")
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(VOCABULARY), **sizes)).save_pretrained(name)
    tiny_language_model_tokenizer().save_pretrained(name)
    rows = [{"text": f"w{index}", "label": ["yes", "no"][index % 2]} for index in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": {"train": str(tmp_path / "train.jsonl")}, "label_names": {"yes": "good", "no": "bad"}}
    values = {
        "backbone": name,
        "backbone_dtype": "bfloat16",
        "model": {"modules": {"kind": "decoder", "layers": "gpt_neox.layers", "feed_forward": "mlp"}},
        "training": {"max_steps": 2, "batch_size": 4},
        "tasks": [{"name": "mood", "kind": "text-to-text", "source": source}],
    }
    with pytest.raises(BackboneError, match=r"Unknown architecture 'gpt_neox'.* Name its modules"):
        train(parse(Recipe, {**values, "model": {}}), tmp_path / "run")
    model = train(parse(Recipe, values), tmp_path / "run").model
    assert next(model.backbone.parameters()).dtype == torch.bfloat16
    assert len(list(Predictor.from_pretrained(tmp_path / "run", decline=False)(["w1", "w2 w3"]))) == 2


# Merging


@each
def test_a_merged_task_is_in_the_weights_and_comes_out_bit_for_bit(kind: str) -> None:
    model, batch = make_model(kind, "lora").double(), make_batch(kind)
    batch["task_ids"] = torch.full((6,), 2)
    batch["labels"] = batch["labels"].round().clamp(0, 1) if kind_of(kind) == "encoder" else batch["labels"]
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    expected = model(**batch).logits
    real = batch["attention_mask"].bool() if kind in DECODERS else torch.ones(6, dtype=torch.bool)
    model.merge("mood")
    assert_same(model(**batch).logits[real], expected[real])
    merged = bare_outputs(model.backbone, kind, batch)
    with pytest.raises(TaskError, match="task 'mood' is merged into the backbone, so the model cannot"):
        model(**{**batch, "task_ids": torch.tensor([2, 2, 2, 2, 2, 1])})
    model.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    assert torch.equal(model(**batch).logits, expected)
    model.merge("mood")
    assert torch.equal(bare_outputs(model.detach(), kind, batch), merged)


def test_while_a_task_is_merged_nothing_is_changed() -> None:
    model, batch = make_model("llama", "lora"), make_batch("llama")
    with pytest.raises(TaskError, match="no task is merged"):
        model.unmerge()
    with pytest.raises(TaskError, match=r"Unknown task 'modo'. Did you mean 'mood'"):
        model.merge("modo")
    model.merge("mood")
    for attempt in (
        lambda: model.merge("size"),
        lambda: model.train(),
        lambda: model.remove_task("size"),
        lambda: model.rename_task("size", "other"),
        lambda: model.adapters_disabled(),
    ):
        with pytest.raises(TaskError, match=r"task 'mood' is merged: call unmerge\(\) first"):
            attempt()
    with pytest.raises(TaskError, match="cannot compute other tasks"):
        model.generate(batch["input_ids"], batch["attention_mask"])
    written = model.generate(batch["input_ids"], batch["attention_mask"], torch.full((6,), 2), max_new_tokens=3)
    model.unmerge()
    apart = model.generate(batch["input_ids"], batch["attention_mask"], torch.full((6,), 2), max_new_tokens=3)
    assert torch.equal(written, apart)


def test_what_cannot_be_merged_is_refused() -> None:
    backbone = tiny_backbone("llama")
    backbone.model.layers[3].self_attn.q_proj.weight = backbone.model.layers[2].self_attn.q_proj.weight
    tied = HyperAdapterModel(backbone, TEXT_TASKS, ModelConfig(preset="paper", **FORM_SETTINGS["lora"]))
    with pytest.raises(BackboneError, match=r"layers\.2\.self_attn\.q_proj' and .*3.* of the backbone share a weight"):
        tied.merge("mood")
    with pytest.raises(TaskError, match="expected a model of form 'lora', found form 'bottleneck'"):
        make_model("gpt2").merge("mood")
    with pytest.raises(TaskError, match="with features 'backbone' the model also reads the frozen backbone"):
        make_model("bert", "lora", features="backbone").merge("mood")
    settings = {**FROZEN_TEXTS, "form": "lora", "lora_rank": 2}
    reader = HyperAdapterModel(tiny_backbone("bert"), HEAD_TASKS, ModelConfig(**settings))
    with torch.no_grad():
        reader.heads.wide_weight.fill_(0.1)
    with pytest.raises(TaskError, match="with head_inputs 'pair_features' the model also reads the frozen backbone"):
        reader.merge("mood")


# Documentation


def test_the_table_of_backbones_has_every_row() -> None:
    text = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text(encoding="utf-8")
    lines = [line.split("|")[1:5] for line in text.splitlines() if line.startswith("| `")]
    table = {name: targets for names, _, _, targets in lines for name in re.findall(r"`(\S+)`", names)}
    assert table.keys() == ARCHITECTURES.keys()
    for name, targets in table.items():
        assert re.findall(r"`(\S+)`", targets) == list(ARCHITECTURES[name].target_modules)


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bert", "t5", "llama", "gpt2"])
@each_form
def test_a_backbone_in_half_precision_has_a_hypernetwork_in_full(kind: str, form: str, dtype: torch.dtype) -> None:
    expected, batch = make_model(kind, form)(**make_batch(kind)), make_batch(kind)
    reference = make_model(kind, form)
    backbone = tiny_backbone(kind).to(dtype)
    model = HyperAdapterModel(backbone, reference.tasks, reference.adapter_config).eval()
    model.load_adapter_state_dict(reference.adapter_state_dict())
    assert {parameter.dtype for parameter in model.method.hypernetwork.parameters()} == {torch.float32}
    found = model(**batch)
    assert found.instances.dtype == torch.float32
    real = batch["attention_mask"].bool() if kind in DECODERS else torch.ones(6, dtype=torch.bool)
    known = expected.logits[real].isfinite()
    exact = expected.logits[real][known]
    error = (found.logits[real].float()[known] - exact).norm() / exact.norm()
    assert error.item() == pytest.approx(0.0, abs=64 * torch.finfo(dtype).eps)  # as after 128 roundings one way
    model.train().training_loss(batch).total.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if not name.startswith("backbone.")]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    if form == "lora":
        before = [parameter.clone() for parameter in model.backbone.parameters()]
        model.eval().merge("mood")
        model.unmerge()
        assert all(map(torch.equal, model.backbone.parameters(), before))


def test_a_backbone_is_loaded_in_half_precision_where_that_is_asked_for(tmp_path: Path) -> None:
    name = save_backbone(tmp_path / "backbone", "bert")

    def dtype_of(model: HyperAdapterModel) -> torch.dtype:
        return next(model.backbone.parameters()).dtype

    for first, second in (("bfloat16", "float32"), ("float32", "float16"), ("float16", "float32")):
        model = HyperAdapterModel.from_backbone(str(name), HEAD_TASKS, dtype=first)
        assert dtype_of(model) == getattr(torch, first)
        model.save_pretrained(tmp_path / first)
        predictor = Predictor.from_pretrained(tmp_path / first, dtype=second)
        assert dtype_of(predictor.model) == getattr(torch, second)
    with pytest.raises(BackboneError, match="Unknown dtype 'bf16'"):
        HyperAdapterModel.from_backbone(str(name), HEAD_TASKS, dtype="bf16")  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_backbone_quantised_by_bitsandbytes(bits: int, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("bitsandbytes quantises on a CUDA GPU, and there is none")
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_backbone("llama", hidden_size=64, intermediate_size=128, head_dim=32).save_pretrained(tmp_path)
    quantisation = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation, device_map="cuda")
    for form in FORMS:
        model = HyperAdapterModel(backbone, TEXT_TASKS, ModelConfig(preset="paper", **FORM_SETTINGS[form]))
        batch = {name: tensor.cuda() for name, tensor in make_batch("llama").items()}
        losses = model.train().training_loss(batch)
        losses.total.backward()
        assert losses.total.isfinite()
        assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("backbone."))
        if form == "lora":
            with pytest.raises(BackboneError, match="merging: expected plain weights"):
                model.eval().merge("mood")
        model.detach()


@each_form
def test_a_backbone_quantised_to_int8_answers_as_before(form: str) -> None:
    quantisation: Any = pytest.importorskip(
        "torchao.quantization", reason="torchao has an environment of its own: make interop-torchao"
    )

    model, batch = make_model("llama", form), make_batch("llama")
    expected, real = model(**batch), batch["attention_mask"].bool()
    quantisation.quantize_(model.backbone, quantisation.Int8DynamicActivationInt8WeightConfig())
    found = model(**batch)
    assert not torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(found.logits[real], expected.logits[real], atol=0.1, rtol=0.1)
    for row in range(6):
        alone = model(**select_rows(batch, torch.tensor([row])))
        # Activations are rounded to 256 steps, which a last bit can tip.
        torch.testing.assert_close(alone.logits[0, real[row]], found.logits[row, real[row]], atol=0.03, rtol=0)
    if form == "lora":
        with pytest.raises(BackboneError, match="merging: expected plain weights, found Int8Tensor at"):
            model.merge("mood")
    assert HyperAdapterModel(model.detach(), model.tasks, model.adapter_config).fingerprint.bfloat16


# Compiled


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), [("bert", "bottleneck"), ("bart", "bottleneck"), ("llama", "lora")])
def test_compiled_layers_give_the_same_and_are_not_compiled_again_for_another_task(kind: str, form: str) -> None:
    model, batch = make_model(kind, form).double(), make_batch(kind)
    if kind_of(kind) == "encoder":
        del batch["labels"]
    ids = [torch.full((6,), task_id) for task_id in range(3)]
    with torch.no_grad():
        expected = [model(**{**batch, "task_ids": of_task}).logits for of_task in ids]
        mixed = model(**batch)
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        model.compile(backend=counter)
        frames = []
        for of_task, known in zip(ids, expected, strict=True):
            found = model(**{**batch, "task_ids": of_task}).logits
            assert_same(found, known)
            frames.append(counter.frame_count)
        assert frames[0] > 0
        assert frames[1:] == frames[:1] * 2
        again = model(**batch, lower_output=model.forward_lower_layers(batch["input_ids"], batch["attention_mask"]))
    real = batch["attention_mask"].bool() if kind in DECODERS else torch.ones(6, dtype=torch.bool)
    assert_same(again.logits[real], mixed.logits[real])
    torch._dynamo.reset()


@each_form
def test_compiled_layers_of_a_deep_backbone_share_their_code(form: str) -> None:
    """There may be more layers than torch.compile keeps versions of one piece of code."""
    backbone = tiny_backbone("llama", num_hidden_layers=12).double()
    config = ModelConfig(preset="paper", feature_layer=1, **FORM_SETTINGS[form])
    model, batch = HyperAdapterModel(backbone, TEXT_TASKS, config).double().eval(), make_batch("llama")
    with torch.no_grad():
        expected = model(**batch).logits
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        model.compile(backend=counter)
        found = model(**batch).logits
    real = batch["attention_mask"].bool()
    assert_same(found[real], expected[real])
    assert counter.frame_count == 2  # layers with adapters, and the one without
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_model_compiled_as_a_whole_gives_the_same() -> None:
    """Layers with and without adapters have the same code: what was compiled for one must not be used for the other."""
    model, batch = make_model("bert").double(), make_batch("bert")
    with torch.no_grad():
        expected = model(**batch).logits
        torch._dynamo.reset()
        found = torch.compile(model, backend="eager")(**batch).logits
    assert_same(found, expected)
    torch._dynamo.reset()
