"""Promise 2 and its edges: mixed batches, beams, exceptions, checkpointing, autocast; and the arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    ENCODER_DECODERS,
    ENCODERS_AND_ENCODER_DECODERS,
    HEAD_TASKS,
    TEXT_TASKS,
    assert_same,
    make_batch,
    make_model,
    select_rows,
    tiny_backbone,
)
from torch import Tensor

from hyperadapters.errors import TaskError
from hyperadapters.model.model import HyperAdapterModel


@pytest.mark.parametrize("kind", ENCODERS_AND_ENCODER_DECODERS)
def test_a_mixed_batch_gives_each_row_what_a_batch_of_its_own_task_gives(kind: str) -> None:
    model, batch = make_model(kind).double(), make_batch(kind, rows=8)
    mixed = model(**batch)
    for task_id in range(3):
        rows = (batch["task_ids"] == task_id).nonzero()[:, 0]
        own = model(**select_rows(batch, rows))
        size = own.logits.shape[-1]  # a mixed batch is as wide as the largest head in it
        assert_same(mixed.logits[rows][..., :size], own.logits)
        assert torch.isneginf(mixed.logits[rows][..., size:]).all()
        assert_same(mixed.instances[rows], own.instances)


@pytest.mark.parametrize("kind", ENCODERS_AND_ENCODER_DECODERS)
def test_a_batch_of_one_row_gives_what_the_row_gives_in_a_mixed_batch(kind: str) -> None:
    model, batch = make_model(kind).double(), make_batch(kind, rows=8)
    mixed = model(**batch)
    for row in range(8):
        single = model(**select_rows(batch, torch.tensor([row])))
        assert_same(mixed.logits[row : row + 1, ..., : single.logits.shape[-1]], single.logits)
        assert single.loss.isfinite()


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "beams, several returned": {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
}


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION.keys())
def test_generation_in_a_mixed_batch_equals_generation_row_by_row(kind: str, options: dict[str, Any]) -> None:
    model, batch = make_model(kind).double(), make_batch(kind, rows=5)  # in float64, where rounding decides no token
    batch.pop("labels")
    options = {
        **options,
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    together = model.generate(**batch, **options)
    returned = options.get("num_return_sequences", 1)
    for row in range(5):
        alone = model.generate(**select_rows(batch, torch.tensor([row])), **options)
        assert torch.equal(together.sequences[row * returned : (row + 1) * returned], alone.sequences)


def test_tasks_matter_in_generation() -> None:
    model, batch = make_model("t5"), make_batch("t5", rows=5)
    texts = {
        tuple(
            model.generate(
                batch["input_ids"], batch["attention_mask"], torch.full((5,), task), max_new_tokens=6, do_sample=False
            )
            .flatten()
            .tolist()
        )
        for task in range(3)
    }
    assert len(texts) == 3


def test_sampling_repeats_itself_for_a_fixed_seed_and_gives_several_sequences() -> None:
    model, batch = make_model("t5"), make_batch("t5", rows=3)
    batch.pop("labels")
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(
            model.generate(**batch, do_sample=True, num_return_sequences=2, max_new_tokens=5, min_new_tokens=5)
        )
    assert torch.equal(*drawn)
    assert len(drawn[0]) == 6


def test_encoder_retriever_and_hypernetwork_run_once_in_generation() -> None:
    model, batch = make_model("t5"), make_batch("t5")
    batch.pop("labels")
    calls: dict[str, int] = {}
    for name, module in (
        ("encoder", model.backbone.encoder),
        ("retriever", model.method.retriever),
        ("hypernetwork", model.method.hypernetwork),
        ("decoder", model.backbone.decoder),
    ):
        module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls.get(name, 0) + 1))
    model.generate(**batch, max_new_tokens=6, min_new_tokens=6, num_beams=2, do_sample=False)
    assert calls == {"encoder": 1, "retriever": 1, "hypernetwork": 1, "decoder": 6}


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_rows_without_a_task_go_to_the_nearest_prototype(kind: str) -> None:
    model, batch = make_model(kind), make_batch(kind)
    nearest = model.method.prototypes.nearest(model.instance_vectors(batch["input_ids"], batch["attention_mask"]))
    told = {**batch, "task_ids": nearest}
    for inputs in (batch, told):
        inputs.pop("labels")
    batch.pop("task_ids")
    if kind == "t5":
        for inputs in (batch, told):
            inputs["decoder_input_ids"] = torch.full((6, 3), 4)
    routed = model(**batch)
    assert torch.equal(routed.task_ids, nearest)
    assert torch.equal(routed.logits, model(**told).logits)


def test_routing_needs_one_pass_only() -> None:
    model, batch = make_model("bert"), make_batch("bert")
    calls: list[int] = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    model(batch["input_ids"], batch["attention_mask"])
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_an_exception_inside_a_forward_leaves_no_state_behind(kind: str) -> None:
    model, batch = make_model(kind), make_batch(kind)
    before = model(**batch).logits
    layers = model.backbone.encoder.layer if kind == "bert" else model.backbone.decoder.block

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    handle.remove()
    assert model.passes._active._state is None
    assert torch.equal(model(**batch).logits, before)


def _gradients(model: HyperAdapterModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model.training_loss(batch).total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ENCODERS_AND_ENCODER_DECODERS)
def test_gradient_checkpointing_changes_no_gradient(kind: str) -> None:
    model, batch = make_model(kind).double(), make_batch(kind)
    model.train()
    plain = _gradients(model, batch)
    model.activation_checkpointing_enable()
    checkpointed = _gradients(model, batch)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_checkpointed_layers_recompute_under_the_tasks_of_their_own_batch() -> None:
    """Two forwards before either backward: each must be recomputed with its own tasks."""
    model = make_model("t5").double()
    model.train()
    first, second = make_batch("t5", seed=1), make_batch("t5", seed=2)
    second["task_ids"] = second["task_ids"].flip(0)
    expected = [_gradients(model, batch) for batch in (first, second)]
    model.activation_checkpointing_enable()
    model.zero_grad()
    losses = [model.training_loss(batch).total for batch in (first, second)]
    sum(losses).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            total = expected[0][name] + expected[1][name]
            torch.testing.assert_close(parameter.grad, total, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_autocast_keeps_the_tasks_and_stays_near_full_precision(kind: str) -> None:
    model, batch = make_model(kind), make_batch(kind)
    full = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**batch)
    assert half.loss.isfinite()
    assert half.loss.item() == pytest.approx(full.loss.item(), rel=0.05)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_half_precision_backbone_trains_float32_adapters(kind: str) -> None:

    tasks = HEAD_TASKS if kind == "bert" else TEXT_TASKS
    model = HyperAdapterModel(tiny_backbone(kind).bfloat16(), tasks)
    model.train().training_loss(make_batch(kind)).total.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_head_logits_are_minus_infinity_beyond_the_tasks_labels() -> None:
    model, batch = make_model("bert"), make_batch("bert")
    logits = model(**batch).logits
    assert logits.shape == (6, 3)
    for row, size in enumerate({0: 3, 1: 1, 2: 2}[task] for task in batch["task_ids"].tolist()):
        assert logits[row, :size].isfinite().all()
        assert (logits[row, size:] == -torch.inf).all()


def test_regression_heads_answer_in_the_units_of_their_targets() -> None:
    model, batch = make_model("bert").double(), make_batch("bert")
    rows = batch["task_ids"] == 1
    before = model(**batch).logits[rows, 0]
    assert model.heads is not None
    model.heads.set_target_scale(1, [100.0, 300.0])
    torch.testing.assert_close(model(**batch).logits[rows, 0], before * 100.0 + 200.0)


def test_labels_without_tasks_are_refused() -> None:
    batch = make_batch("bert")
    batch.pop("task_ids")
    with pytest.raises(TaskError, match="labels need task_ids"):
        make_model("bert")(**batch)


@pytest.mark.parametrize(
    ("task_ids", "message"),
    [
        (torch.tensor([0, 1, 2, 0, 1, 3]), r"expected 0 to 2 \(3 tasks\), found 3"),
        (torch.tensor([0, 1, 2, 0, 1, -1]), r"expected 0 to 2 \(3 tasks\), found -1"),
        (torch.tensor([0, 1]), r"expected a LongTensor of shape \(6,\).*found torch\.int64 of shape \(2,\)"),
        (torch.zeros(6), r"found torch\.float32 of shape \(6,\)"),
        ([0, 1, 2, 0, 1, 2], r"found \[0, 1, 2, 0, 1, 2\]"),
    ],
)
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_wrong_task_ids_are_refused_with_what_was_expected(kind: str, task_ids: Any, message: str) -> None:
    model, batch = make_model(kind), make_batch(kind)
    with pytest.raises(TaskError, match=message):
        model(**{**batch, "task_ids": task_ids})
    if kind == "t5":
        with pytest.raises(TaskError, match=message):
            model.generate(batch["input_ids"], batch["attention_mask"], task_ids)


def test_generate_on_heads_and_forward_without_targets_say_what_to_do() -> None:
    batch = make_batch("bert")
    with pytest.raises(TaskError, match="found an encoder with task heads; use forward"):
        make_model("bert").generate(batch["input_ids"])
    with pytest.raises(TaskError, match="needs labels or decoder_input_ids; or use generate"):
        make_model("t5")(batch["input_ids"], task_ids=batch["task_ids"])


def test_two_models_with_one_seed_are_equal_and_with_another_differ() -> None:
    states = [make_model("bert", seed=seed).adapter_state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["method.prototypes.weight"], states[2]["method.prototypes.weight"])


def test_gradient_checkpointing_leaves_the_layers_below_the_features_without_a_backward_pass() -> None:
    model = make_model("bert", feature_layer=2)
    model.activation_checkpointing_enable()
    inputs: list[Tensor] = []
    model.backbone.encoder.layer[2].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.train().training_loss(make_batch("bert")).total.backward()
    assert not inputs[0].requires_grad


def test_a_detached_model_says_so() -> None:
    for kind in ("bert", "t5"):
        model, batch = make_model(kind), make_batch(kind)
        model.detach()
        with pytest.raises(RuntimeError, match="the adapters have been detached"):
            model(**batch)
        with pytest.raises(RuntimeError, match="the adapters have been detached"):
            model.instance_vectors(batch["input_ids"])


def test_a_batch_of_no_rows_is_refused() -> None:
    model, batch = make_model("bert"), make_batch("bert")
    with pytest.raises(TaskError, match="expected at least one row"):
        model(**{name: value[:0] for name, value in batch.items()})


@pytest.mark.parametrize("kind", ["bert", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_converted_as_a_whole_runs(kind: str, dtype: torch.dtype) -> None:
    model, batch = make_model(kind), make_batch(kind)
    full = model(**batch).loss.item()
    assert model.to(dtype)(**batch).loss.item() == pytest.approx(full, rel=0.05)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"num_beams": 3, "use_cache": False}])
def test_generation_without_a_cache_equals_generation_with_one(options: dict[str, Any]) -> None:
    model, batch = make_model("t5").double(), make_batch("t5")  # in float64, where rounding decides no token
    batch.pop("labels")
    settings = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    cached = model.generate(**batch, **settings, **{**options, "use_cache": True})
    assert torch.equal(model.generate(**batch, **settings, **options), cached)
