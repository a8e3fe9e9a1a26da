"""The runner of a backbone by itself, and the plan that a model is made from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import HEAD_TASKS, TEXT_TASKS, make_batch, make_model, tiny_backbone
from torch import Tensor

from hyperadapters.backbones import checks
from hyperadapters.backbones.active import BatchState
from hyperadapters.backbones.encoder_decoder import EncoderDecoderRunner
from hyperadapters.backbones.passes import PassRunner
from hyperadapters.config import ModelConfig
from hyperadapters.errors import BackboneError, RecipeError, TaskError
from hyperadapters.model.model import HyperAdapterModel


def _parts(kind: str, **settings: Any) -> tuple[HyperAdapterModel, PassRunner, dict[str, Tensor], dict[str, Tensor]]:
    model, batch = make_model(kind, **settings), make_batch(kind)
    return model, model.passes, batch, {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize(
    ("kind", "runner"), [("bert", PassRunner), ("gpt2", PassRunner), ("bart", EncoderDecoderRunner)]
)
def test_a_backbone_gets_the_runner_of_its_kind(kind: str, runner: type[PassRunner]) -> None:
    assert type(make_model(kind).passes) is runner


@pytest.mark.parametrize(
    ("kind", "settings", "passes"),
    [
        ("bert", {}, "one"),
        ("gpt2", {}, "one"),
        ("bert", {"features": "backbone"}, "two"),
        ("t5", {}, "two"),
        ("t5", {"frozen_encoder_layers": 1}, "two"),
        ("t5", {"frozen_encoder_layers": 2}, "two"),
    ],
)
@torch.no_grad()
def test_a_batch_runs_as_the_models_forward_does(kind: str, settings: dict[str, Any], passes: str) -> None:
    model, runner, batch, inputs = _parts(kind, **settings)
    pooled: list[Tensor] = []

    def choose(features: Tensor) -> BatchState:
        pooled.append(features)
        _, weights, grouping = model.method.select(batch["task_ids"], model.method.instance_vectors(features))
        return BatchState(weights, grouping)

    decoder_input_ids = runner.default_decoder_input_ids(batch["labels"])
    output, lower = runner.run_batch(inputs, choose, decoder_input_ids)
    expected = model(
        **inputs, task_ids=batch["task_ids"], decoder_input_ids=decoder_input_ids, output_hidden_states=True
    )
    found = output.logits if model.text_to_text else output.last_hidden_state
    wanted = expected.logits if model.text_to_text else expected.encoder_hidden_states[-1]
    assert torch.equal(found, wanted)
    assert (lower is None) == (passes == "one")
    assert len(pooled) == 1
    given = runner.forward_lower_layers(inputs)
    assert torch.equal(given.pooled, pooled[0])
    again, returned = runner.run_batch(inputs, choose, decoder_input_ids, lower_output=given)
    assert returned is given
    assert torch.equal(again.logits if model.text_to_text else again.last_hidden_state, found)


@torch.no_grad()
def test_an_encoder_whose_hidden_states_were_not_kept_runs_again_if_they_are_asked_for() -> None:
    model, runner, batch, inputs = _parts("t5")

    def choose(features: Tensor) -> BatchState:
        _, weights, grouping = model.method.select(batch["task_ids"], model.method.instance_vectors(features))
        return BatchState(weights, grouping)

    given = runner.forward_lower_layers(inputs)
    ids = runner.default_decoder_input_ids(batch["labels"])
    _, lower = runner.run_batch(inputs, choose, ids, output_hidden_states=True, lower_output=given)
    assert given.hidden_states is None
    assert lower is not None
    assert lower.hidden_states is not None
    assert torch.equal(lower.hidden_states[-1], given.hidden)


def test_decoder_inputs_are_made_from_labels_where_there_is_a_decoder_to_read_them() -> None:
    labels = torch.tensor([[5, 6, 1, -100]])
    assert make_model("bert").passes.default_decoder_input_ids(labels) is None
    runner = make_model("t5").passes
    assert runner.default_decoder_input_ids(labels).tolist() == [[0, 5, 6, 1]]
    with pytest.raises(TaskError, match="forward of an encoder-decoder needs labels or decoder_input_ids"):
        runner.default_decoder_input_ids(None)


@pytest.mark.parametrize(
    ("kind", "settings", "num_layers", "num_shared", "linears"),
    [
        ("bert", {}, 2, 0, (0, 0)),
        ("bert", {"feature_layer": 1, "form": "lora"}, 3, 0, (2, 0)),
        ("gpt2", {"form": "lora"}, 2, 0, (1, 0)),
        ("t5", {"frozen_encoder_layers": 1}, 3, 1, (0, 0)),
        ("t5", {"form": "lora"}, 3, 2, (4, 2)),
        ("t5", {"form": "lora", "frozen_encoder_layers": 2}, 3, 0, (4, 0)),
    ],
)
def test_a_plan_resolves_all_defaults_and_changes_nothing(
    kind: str, settings: dict[str, Any], num_layers: int, num_shared: int, linears: tuple[int, int]
) -> None:
    backbone = tiny_backbone(kind)
    classes, names = [type(module) for module in backbone.modules()], set(vars(backbone))
    plan = checks.plan(backbone, HEAD_TASKS if kind == "bert" else TEXT_TASKS, ModelConfig(**settings))
    assert (plan.num_layers, plan.num_shared) == (num_layers, num_shared)
    assert (len(plan.linears.generated), len(plan.linears.shared)) == linears
    assert plan.config.preset == ("plus" if kind == "bert" else "paper")
    assert (plan.config.feature_layer is None) == (kind == "t5")
    assert (plan.config.target_modules is not None) == (settings.get("form") == "lora")
    assert plan.device == torch.device("cpu")
    assert isinstance(plan.tasks, tuple)
    assert [type(module) for module in backbone.modules()] == classes
    assert set(vars(backbone)) == names
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_a_plan_that_cannot_be_made_names_what_does_not_fit() -> None:
    with pytest.raises(TaskError, match="'colour' is text-to-text, which needs an encoder-decoder"):
        checks.plan(tiny_backbone("bert"), TEXT_TASKS)
    with pytest.raises(RecipeError, match=r"features: 'backbone' is for encoders, .* remove it"):
        checks.plan(tiny_backbone("t5"), TEXT_TASKS, ModelConfig(features="backbone"))
    with pytest.raises(BackboneError, match="already contains adapters of another HyperAdapterModel"):
        checks.plan(make_model("bert").backbone, HEAD_TASKS)
