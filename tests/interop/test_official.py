"""Promise 1: the preset "official" equals the released implementation, number by number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Golden
from tolerance import rounding
from torch import Tensor

from hyperadapters.errors import CheckpointError
from hyperadapters.interop.official import load_official, official_parameters
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.optimizers import OfficialAdamW

REDUCTIONS = ("mean", "sum")
SCALING = {"mean": "loss_scaling_true", "sum": "loss_scaling_false"}


def _model(golden: Golden) -> HyperAdapterModel:
    model = load_official(golden.under("params/"), golden.facts["config"], golden.facts["tasks"])
    return model.double().train()


def _gradients(model: HyperAdapterModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in official_parameters(model).items() if p.grad is not None}


def _check(found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5, which is the promise.

    `found` is computed in float64. What is left is the rounding of the recorded float32 numbers, so the difference, up
    to 0.7 of the tolerance, is the same on every processor.
    """
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-5, rtol=0)


def _check_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient.to(found[name].dtype), atol=tolerance, rtol=0)


def test_logits_instances_and_hidden_states(golden: Golden) -> None:
    model = _model(golden)
    output = model(**golden.batch)
    _check(output.logits, golden.tensors["logits"])
    _check(output.instances, golden.tensors["retriever/instance"])


def test_hidden_states_of_both_stacks(golden: Golden) -> None:
    output = _model(golden)(**golden.batch, output_hidden_states=True)
    compared = 0
    for side in ("encoder", "decoder"):
        for index, found in enumerate(output[f"{side}_hidden_states"]):
            expected = golden.tensors[f"{side}/hidden_states/{index}"]
            _check(found, expected)
            compared += 1
    assert compared == sum("/hidden_states/" in name for name in golden.tensors)


def test_float32_is_near_float64(golden: Golden) -> None:
    """A result passes through about thirty products of matrices whose sums have up to 64 terms."""
    exact, single = _model(golden), _model(golden).float()
    expected, found = exact(**golden.batch), single(**golden.batch)
    for one, other in ((found.logits, expected.logits), (found.instances, expected.instances)):
        torch.testing.assert_close(one.double(), other.double(), atol=rounding(1000, other.abs().max().item()), rtol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_losses(golden: Golden, reduction: Any) -> None:
    losses = _model(golden).training_loss(golden.batch, reduction=reduction)
    expected = golden.facts["losses"]
    assert losses.total.item() == pytest.approx(expected[f"total_{SCALING[reduction]}"], rel=1e-5)
    assert losses.task.item() == pytest.approx(expected[f"seq2seq_{reduction}"], rel=1e-5)
    assert losses.instance.item() == pytest.approx(expected["instance_instance"], rel=1e-5)
    assert losses.prototype.item() == pytest.approx(expected["prototype_instance"], rel=1e-5)
    plain = _model(golden).training_loss(golden.batch, reduction=reduction, label_smoothing=0.0)
    assert plain.task.item() == pytest.approx(expected[f"nll_{reduction}"], rel=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_the_total(golden: Golden, reduction: Any) -> None:
    model = _model(golden)
    model.training_loss(golden.batch, reduction=reduction).total.backward()
    found = _gradients(model)
    _check_gradients(found, golden.under(f"grad_total_{reduction}/"))
    norm = torch.stack([gradient.norm() for gradient in found.values()]).norm().item()
    assert norm == pytest.approx(golden.facts["grad_norms"][f"total_{reduction}"], rel=1e-4)


@pytest.mark.parametrize("term", ["instance", "prototype"])
def test_gradients_of_each_contrast_alone(golden: Golden, term: str) -> None:
    model = _model(golden)
    getattr(model.training_loss(golden.batch), term).backward()
    _check_gradients(_gradients(model), golden.under(f"grad_{term}/"))


def _step(model: HyperAdapterModel, optimizer: OfficialAdamW, golden: Golden, reduction: Any) -> tuple[float, float]:
    optimizer.zero_grad()
    loss = model.training_loss(golden.batch, reduction=reduction).total
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item(), norm.item()


def _optimizer(model: HyperAdapterModel, golden: Golden) -> OfficialAdamW:
    return OfficialAdamW([p for p in model.parameters() if p.requires_grad], lr=golden.facts["optimizer"]["lr"])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_optimizer_step(golden: Golden, reduction: Any) -> None:
    """Where a gradient is rounding noise Adam moves by its sign; those elements are left out (see the reference)."""
    model = _model(golden)
    _step(model, _optimizer(model, golden), golden, reduction)
    compared = 0
    for name, expected in golden.under(f"step1_{reduction}/").items():
        gradient = golden.tensors[f"grad_total_{reduction}/{name}"]
        clipped = gradient / (golden.facts["grad_norms"][f"total_{reduction}"] + 1e-6)
        clear = (clipped.abs() > 1e-5) | (gradient == 0)
        found = official_parameters(model)[name].detach()
        torch.testing.assert_close(found[clear], expected[clear].to(found.dtype), atol=1e-6, rtol=0)
        compared += int(clear.sum())
    total = sum(value.numel() for value in golden.under(f"step1_{reduction}/").values())
    assert compared > 0.9 * total


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_six_optimizer_steps(golden: Golden, reduction: Any) -> None:
    model = _model(golden)
    optimizer = _optimizer(model, golden)
    steps = [_step(model, optimizer, golden, reduction) for _ in range(6)]
    expected = golden.facts["six_steps_same_batch_constant_lr"][SCALING[reduction]]
    assert [loss for loss, _ in steps] == pytest.approx(expected["loss_before_each_step"], rel=1e-4)
    assert [norm for _, norm in steps] == pytest.approx(expected["grad_norm_before_clip"], rel=1e-3)


def test_greedy_decoding_under_every_task(golden: Golden) -> None:
    model = _model(golden).eval()
    rows = len(golden.batch["input_ids"])
    for task_id in range(len(golden.facts["tasks"])):
        tokens = model.generate(
            golden.batch["input_ids"],
            golden.batch["attention_mask"],
            torch.full((rows,), task_id),
            min_length=2,
            max_length=8,
            num_beams=1,
            do_sample=False,
        )
        assert torch.equal(tokens, golden.tensors[f"generate_greedy/{task_id}"])


def test_evaluation_logits_under_every_task(golden: Golden) -> None:
    model = _model(golden).eval()
    for task_id in range(len(golden.facts["tasks"])):
        batch = {**golden.batch, "task_ids": torch.full_like(golden.batch["task_ids"], task_id)}
        expected = golden.tensors[f"eval_logits_all_rows_as_task/{task_id}"]
        _check(model(**batch).logits, expected)


def test_parameter_names_and_counts(golden: Golden) -> None:
    model = _model(golden)
    parameters = official_parameters(model)
    assert parameters.keys() == golden.under("params/").keys()
    assert {name for name, p in parameters.items() if p.requires_grad} == set(golden.facts["trainable"])
    assert model.num_trainable_parameters() == golden.facts["trainable_count"]
    assert sum(p.numel() for p in model.parameters()) == golden.facts["total_count"]


def test_the_paper_preset_has_no_unused_parameters_and_another_loss(golden: Golden) -> None:
    official = _model(golden)
    settings = official.adapter_config.model_copy(update={"preset": "paper"})
    paper = HyperAdapterModel(official.detach(), official.tasks, settings)
    state = official.adapter_state_dict()
    paper.load_adapter_state_dict({k: v for k, v in state.items() if not k.startswith("unused_adapters.")})
    unused = golden.facts["trainable_without_gradient_count"]
    assert paper.num_trainable_parameters() == golden.facts["trainable_count"] - unused
    batch = {**golden.batch, "labels": golden.batch["labels"].masked_fill(golden.batch["labels"] == 0, -100)}
    losses = paper.train().training_loss(batch)
    real = int((golden.batch["labels"] != 0).sum())
    assert losses.task.item() == pytest.approx(golden.facts["losses"]["seq2seq_sum"] / real, rel=1e-5)
    assert losses.instance.item() == pytest.approx(golden.facts["losses"]["instance_instance"], rel=1e-5)
    assert losses.prototype.item() > golden.facts["losses"]["prototype_instance"]


def _loaded(golden: Golden, **changes: Any) -> HyperAdapterModel:
    arguments: dict[str, Any] = {
        "state_dict": golden.under("params/"),
        "config": golden.facts["config"],
        "tasks": golden.facts["tasks"],
    }
    return load_official(**{**arguments, **changes})


def test_tied_copies_of_a_real_checkpoint_are_accepted(golden: Golden) -> None:
    state = golden.under("params/")
    for copy in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        state[copy] = state["shared.weight"]
    state.setdefault("lm_head.weight", state["shared.weight"])
    output = _loaded(golden, state_dict=state).double().train()(**golden.batch)
    _check(output.logits, golden.tensors["logits"])


def test_wrong_checkpoints_are_refused_with_the_name_of_what_is_wrong(golden: Golden) -> None:
    state = golden.under("params/")
    with pytest.raises(CheckpointError, match="expected 4 tasks, one for each prototype, found 2"):
        _loaded(golden, tasks=["cola", "rte"])
    with pytest.raises(CheckpointError, match="expected decoder_adapter to be 'pro-hyper', found 'task'"):
        _loaded(golden, config={**golden.facts["config"], "decoder_adapter": "task"})
    with pytest.raises(CheckpointError, match=r"unknown tensor 'decoder\.mlp\.3\.bias'.*Did you mean"):
        _loaded(golden, state_dict={**state, "decoder.mlp.3.bias": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"expected a tensor 'decoder\.mlp\.2\.bias'"):
        _loaded(golden, state_dict={k: v for k, v in state.items() if k != "decoder.mlp.2.bias"})
    with pytest.raises(CheckpointError, match=r"'decoder\.mlp\.2\.bias': expected shape \(64,\), found \(3,\)"):
        _loaded(golden, state_dict={**state, "decoder.mlp.2.bias": torch.zeros(3)})


def test_a_loaded_official_checkpoint_can_be_saved_and_loaded_again(golden: Golden, tmp_path: Path) -> None:
    model = _model(golden).float().eval()
    expected = model(**golden.batch).logits
    model.save_pretrained(tmp_path)
    backbone = model.detach()
    with pytest.raises(CheckpointError, match="passed in memory and has no name; pass it as backbone="):
        HyperAdapterModel.from_pretrained(tmp_path)
    again = HyperAdapterModel.from_pretrained(tmp_path, backbone=backbone)
    assert torch.equal(again(**golden.batch).logits, expected)


def test_config_and_tasks_of_a_wrong_type_are_refused(golden: Golden) -> None:
    with pytest.raises(CheckpointError, match=r"expected config as a mapping .* found dict and str"):
        _loaded(golden, tasks="cola")


def test_an_output_layer_of_its_own_under_a_tied_config_is_refused(golden: Golden) -> None:
    state = golden.under("params/")
    state["lm_head.weight"] = state["shared.weight"] + 1.0
    with pytest.raises(CheckpointError, match="sets tie_word_embeddings to true for T5, set it to false"):
        _loaded(golden, state_dict=state, config={**golden.facts["config"], "tie_word_embeddings": True})
