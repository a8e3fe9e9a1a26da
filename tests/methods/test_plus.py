"""The preset `plus`: a common adapter, heads that read adapted texts, and names of labels as examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ENCODERS,
    HEAD_TASKS,
    HIDDEN_SIZE,
    PAIR_TASKS,
    SIZES,
    make_batch,
    make_plus_model,
    pair_examples,
    pair_recipe,
    tiny_backbone,
)

from hyperadapters.checkpoints.conversion import complete_state, stored_state
from hyperadapters.config import ModelConfig, Task, parse
from hyperadapters.core import masked_mean
from hyperadapters.data.examples import Example, label_examples
from hyperadapters.errors import RecipeError
from hyperadapters.inference.predictor import Predictor
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.run import load_run, train
from hyperadapters.training.text_heads import fit_text_heads


def settings_of(config: ModelConfig) -> tuple[object, ...]:
    return config.codes, config.common_adapter, config.head_inputs, config.label_names, config.token_dropout


PLUS = ("trunk", True, "adapted_texts", True, 0.3)
PAPER = ("trunk", False, "adapted", False, 0.0)


def test_the_preset_sets_what_is_not_given() -> None:
    assert settings_of(parse(ModelConfig, {"preset": "plus"})) == PLUS
    kept = parse(ModelConfig, {"preset": "plus", "common_adapter": False, "codes": "orthogonal"})
    assert settings_of(kept) == ("orthogonal", False, "adapted_texts", True, 0.3)
    assert settings_of(ModelConfig()) == PAPER


def test_it_is_the_default_of_encoders_only() -> None:
    bert = HyperAdapterModel(tiny_backbone("bert"), PAIR_TASKS, ModelConfig(adapter_dim=4)).adapter_config
    assert (bert.preset, bert.adapter_dim, *settings_of(bert)) == ("plus", 4, *PLUS)
    t5 = HyperAdapterModel(tiny_backbone("t5"), [Task.text_to_text("a")], ModelConfig(adapter_dim=4)).adapter_config
    assert (t5.preset, t5.adapter_dim, *settings_of(t5)) == ("paper", 4, *PAPER)
    other = HyperAdapterModel(tiny_backbone("bert"), PAIR_TASKS, ModelConfig(method="hyperformer"))
    assert (other.adapter_config.preset, *settings_of(other.adapter_config)) == ("paper", *PAPER)
    given = HyperAdapterModel(tiny_backbone("bert"), PAIR_TASKS, ModelConfig(common_adapter=False)).adapter_config
    assert (given.preset, *settings_of(given)) == ("plus", "trunk", False, "adapted_texts", True, 0.3)


def test_a_backbone_without_heads_is_refused() -> None:
    config = parse(ModelConfig, {"preset": "plus"})
    with pytest.raises(RecipeError, match=r"head_inputs: 'adapted_texts' \(preset 'plus' sets it\) is for encoders"):
        HyperAdapterModel(tiny_backbone("t5"), [Task.text_to_text("a")], config)


def test_what_takes_the_preset_back_is_in_the_recipe_of_a_run(tmp_path: Path) -> None:
    model = {"preset": "plus", "common_adapter": False, "head_inputs": "adapted", **SIZES}
    run = train(pair_recipe(tmp_path, model), tmp_path / "run")
    _, recipe = load_run(tmp_path / "run")
    assert recipe.model == run.model.adapter_config.model_copy(update={"feature_layer": None})


@pytest.mark.parametrize("kind", ENCODERS)
def test_heads_of_a_fresh_model_read_the_directions_of_the_backbone(kind: str) -> None:
    model, batch = make_plus_model(HEAD_TASKS, kind).double(), make_batch(kind)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), model.adapters_disabled():
        pooled = masked_mean(model.backbone(**inputs).last_hidden_state, inputs["attention_mask"])
    expected = F.pad(F.normalize(pooled, dim=1), (0, HIDDEN_SIZE + 1))
    weights = model.method.adapters(torch.tensor([1]))
    found, _ = model.forward_with_adapter(inputs, weights, model.forward_lower_layers(**inputs))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("has_validation", [True, False])
def test_training_ends_with_heads_that_compare_the_texts_of_a_pair(has_validation: bool, tmp_path: Path) -> None:
    recipe = pair_recipe(tmp_path, {"preset": "plus", **SIZES}, has_validation)
    described = Task.classification("colour", {"red": "it is red", "blue": "it is blue"})
    run = train(recipe.model_copy(update={"described_tasks": (described,)}), tmp_path / "run")
    assert run.model.tasks[1:] == (described,)
    assert run.model.heads is not None
    assert run.model.heads.head(0).weight[:, HIDDEN_SIZE:].any()
    assert run.evaluations["test"].mean > 0.9  # equal or different texts, which the backbone represents already
    loaded, stored = load_run(tmp_path / "run")
    assert stored.described_tasks == (described,)
    rows = [Example(0, e.text, e.text_pair, e.target) for e in pair_examples(4)[::3]]
    answers = [[prediction.target for prediction in Predictor(model)(rows)] for model in (loaded, run.model)]
    assert answers[0] == answers[1]


# Names of labels


def test_names_of_labels_are_examples_of_single_texts_only() -> None:
    tasks = [*PAIR_TASKS, Task.classification("rating", ["1", "2"]), Task.classification("topic", ["new_card", "pin"])]
    assert label_examples(tasks) == [
        Example(2, "bad", None, 0),
        Example(2, "good", None, 1),
        Example(4, "new card", None, 0),
        Example(4, "pin", None, 1),
    ]


@pytest.mark.parametrize("label_names", [True, False])
def test_a_task_with_one_example_a_label_can_learn_from_their_names(label_names: bool) -> None:
    model = make_plus_model(label_names=label_names)
    report = model.add_task(
        Task.classification("colour", ["red", "blue"]),
        [{"text": "w1 w2", "label": "red"}, {"text": "w3 w4", "label": "blue"}],
        fit="adapter",
    )
    assert report.examples == 2
    # With one row a label nothing can be left out to choose a number of steps.
    assert report.stopping == ("leave-one-out" if label_names else "fixed")


# What a checkpoint keeps of heads


def fitted() -> HyperAdapterModel:
    model = make_plus_model()
    fit_text_heads(model, pair_examples(), [])
    return model


def add_colours(model: HyperAdapterModel, name: str) -> None:
    rows = [{"text": f"w{n} w{n + 1}", "label": ("red", "blue")[n % 2]} for n in range(8)]
    model.add_task(Task.classification(name, ["red", "blue"]), rows, fit="prototype", max_steps=2)


def assert_kept(model: HyperAdapterModel, folder: Path) -> None:
    model.save_pretrained(folder)
    loaded = HyperAdapterModel.from_pretrained(folder, backbone=tiny_backbone("bert"))
    assert model.heads is not None
    assert loaded.heads is not None
    for name, value in model.heads.state_dict().items():
        assert torch.equal(value, loaded.heads.state_dict()[name]), name


def test_a_checkpoint_keeps_heads_in_half_the_bytes_and_without_zeros(tmp_path: Path) -> None:
    model = fitted()
    add_colours(model, "colour")
    state = stored_state(model)
    pairs, single = state["heads.weight"], state["heads.single_weight"]
    assert (pairs.shape, pairs.dtype) == ((2, 2 * HIDDEN_SIZE + 1), torch.float16)
    assert (single.shape, single.dtype) == ((5, HIDDEN_SIZE), torch.float16)
    assert_kept(model, tmp_path)


def test_heads_of_a_training_loop_are_kept_as_they_are(tmp_path: Path) -> None:
    model = make_plus_model()
    assert stored_state(model)["heads.weight"].dtype == torch.float32
    assert_kept(model, tmp_path)


def test_the_bytes_of_an_added_task_are_those_of_its_numbers() -> None:
    model = fitted()
    add_colours(model, "first")  # the routing centroids of a task are stored from the first added task on
    before = sum(tensor.nbytes for tensor in stored_state(model).values())
    add_colours(model, "second")
    added = sum(tensor.nbytes for tensor in stored_state(model).values()) - before
    of_head = 2 * (2 * HIDDEN_SIZE + 4 + 1)  # for each label the weight, the bias, and whether it compares texts
    of_task = 8 + 4 + 4 + 4  # the place of its head, the mean and the deviation of its targets, its threshold
    prototype_and_centroid = 2 * 4 * SIZES["prototype_dim"]
    assert added == of_head + of_task + prototype_and_centroid


def test_a_damaged_part_of_the_heads_is_refused() -> None:
    model = fitted()
    state = stored_state(model)
    complete_state(model, dict(state))
    with pytest.raises(
        ValueError, match=r"the heads have shapes \(2, 33\) and \(3, 15\), not \(\(2, 33\), \(3, 16\)\)"
    ):
        complete_state(model, {**state, "heads.single_weight": state["heads.single_weight"][:, 1:]})


@pytest.mark.parametrize("fit", ["head", "prototype", "adapter", "none"])
def test_the_head_of_an_added_task_is_kept_in_half_the_bytes(fit: Any, tmp_path: Path) -> None:
    model = fitted()
    rows = [{"text": f"w{n} w{n + 1}", "label": ("red", "blue")[n % 2]} for n in range(8)]
    model.add_task(
        Task.classification("colour", ["red", "blue"]), rows, fit=fit, max_steps=2 if fit != "head" else None
    )
    assert stored_state(model)["heads.single_weight"].dtype == torch.float16
    assert_kept(model, tmp_path)
