"""Values that are not finite numbers: no answer, no finished training and no fitted task comes of them."""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    DECODERS,
    FROZEN_TEXTS,
    VOCABULARY,
    save_backbone,
    tiny_backbone,
    tiny_language_model_tokenizer,
    tiny_tokenizer,
)
from tolerance import rounding
from torch import nn

from hyperadapters import cli
from hyperadapters.config import ModelConfig, Recipe, Task, parse
from hyperadapters.data.examples import Example
from hyperadapters.errors import NotFiniteError
from hyperadapters.heads.new_heads import make_head
from hyperadapters.heads.task_heads import Head
from hyperadapters.inference.predict_files import predict_file
from hyperadapters.inference.predictor import Predictor
from hyperadapters.inference.routing import calibrate
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.probes import frozen_features
from hyperadapters.training.run import evaluate_splits, rows_by_task, train, training_arguments
from hyperadapters.training.text_heads import fit_text_heads
from hyperadapters.training.trainer import Trainer

KINDS = ["bert", "t5", "gpt2"]
SIZES: dict[str, Any] = {"preset": "paper", "adapter_dim": 4, "prototype_dim": 8, "hidden_dim": 8}
INPUTS = ["red red", "w7 red", "blue w1"]


def make_model(kind: str, **settings: Any) -> HyperAdapterModel:
    tasks = [Task.classification("mood", ["bad", "good"]), Task.regression("size")]
    model = HyperAdapterModel(tiny_backbone(kind), tasks, parse(ModelConfig, {**SIZES, **settings}))
    model.tokenizer = tiny_language_model_tokenizer() if kind in DECODERS else tiny_tokenizer()
    return model.eval()


@torch.no_grad()
def spoil_a_word(model: HyperAdapterModel, value: float = torch.nan) -> None:
    """Give the word w7 a vector that is not finite, where it is read and not where answers are written."""
    if (output := model.backbone.get_output_embeddings()) is not None:  # type: ignore[operator]
        output.weight = nn.Parameter(output.weight.clone(), requires_grad=False)
    model.backbone.get_input_embeddings().weight[VOCABULARY.index("w7")] = value  # type: ignore[operator]


@torch.no_grad()
def overflow(kind: str) -> HyperAdapterModel:
    """A model in float16 whose feed-forward exceeds the range of float16 for every input."""
    model = make_model(kind)
    model.backbone.half()
    for name, parameter in model.backbone.named_parameters():
        if parameter.ndim == 2 and not any(part in name for part in ("embed", "shared", "wte", "wpe", "lm_head")):
            parameter.fill_(1e4)
    return model


# Prediction


@pytest.mark.parametrize("task", ["mood", "size", None])
@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_is_given_and_the_input_is_named(kind: str, task: str | None) -> None:
    model = make_model(kind)
    spoil_a_word(model)
    message = r"input 2 \('w7 red'\): what the model computes is not a finite number; the weights of the backbone"
    with pytest.raises(NotFiniteError, match=message):
        list(Predictor(model, batch_size=2)(INPUTS, task=task))
    assert len(list(Predictor(model)(["red red", "blue w1"], task=task))) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_mixtures_and_similarities_are_not_given_either(kind: str) -> None:
    model = make_model(kind)
    spoil_a_word(model, torch.inf)
    with pytest.raises(NotFiniteError, match=r"input 2 \('w7 red'\)"):
        list(Predictor(model, route="soft")(INPUTS))
    with pytest.raises(NotFiniteError, match=r"input 2 \('w7 red'\): the similarity to the tasks is not a finite"):
        model.route(INPUTS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_that_exceeds_float16_is_the_likely_cause(kind: str) -> None:
    with pytest.raises(
        NotFiniteError, match=r"computes in float16, whose largest number is 65,504; load it with dtype='bfloat"
    ):
        list(Predictor(overflow(kind))(INPUTS, task="mood"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["prototypes", "hypernetwork", "retriever", "heads"])
@torch.no_grad()
def test_weights_of_a_diverged_training_are_the_likely_cause(kind: str, part: str) -> None:
    model = make_model(kind)
    if part == "heads" and model.heads is None:
        part = "hypernetwork"
    for parameter in (model.heads if part == "heads" else getattr(model.method, part)).parameters():
        parameter.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match="the trained weights are not finite, because training diverged"):
        list(Predictor(model)(INPUTS, task="mood"))


@torch.no_grad()
def test_one_label_that_is_not_a_number_is_no_answer() -> None:
    model = make_model("bert")
    assert model.heads is not None
    model.heads.bias[1] = torch.nan
    with pytest.raises(NotFiniteError, match=r"input 1 \('red red'\)"):
        list(Predictor(model)(INPUTS, task="mood"))
    assert all(isinstance(found.answer, float) for found in Predictor(model)(INPUTS, task="size"))


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_an_output_file_stays_as_it_was(name: str, tmp_path: Path) -> None:
    model = make_model("bert")
    spoil_a_word(model)
    (tmp_path / "in.csv").write_text("text\n" + "\n".join(INPUTS) + "\n")
    (tmp_path / name).write_text("before")
    with pytest.raises(NotFiniteError, match="input 2"):
        predict_file(Predictor(model, batch_size=1), tmp_path / "in.csv", "mood", tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"in.csv", name}
    assert (tmp_path / name).read_text() == "before"


# Training


def make_recipe(folder: Path, splits: tuple[str, ...] = ("train", "validation", "test"), **changes: Any) -> Recipe:
    save_backbone(folder / "bert")
    rows = [{"text": f"w{row % 9} {('bad', 'good')[row % 2]}", "label": "ny"[row % 2]} for row in range(24)]
    for split in splits:
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    sections: dict[str, Any] = {
        "model": {**SIZES},
        "data": {"max_length": 32},
        "training": {"max_steps": 6, "batch_size": 8, "eval_steps": 2},
    }
    for section, values in changes.items():
        sections[section].update(values)
    source = {"path": {split: f"{folder}/{split}.jsonl" for split in splits}}
    return parse(Recipe, {"backbone": str(folder / "bert"), **sections, "tasks": [{"name": "mood", "source": source}]})


def assert_unfinished(folder: Path) -> None:
    assert not (folder / "metrics.json").exists()
    assert not (folder / "hyperadapter.json").exists()
    assert not list(folder.glob("adapters-*"))


@pytest.mark.parametrize("preset", ["paper", "plus"])
@pytest.mark.parametrize("method", ["pha", "hyperformer", "shared_adapter"])
def test_a_training_that_diverges_ends_with_its_step_task_and_rows(preset: str, method: str, tmp_path: Path) -> None:
    if preset == "plus" and method != "pha":
        preset = "paper"
    rates = {"learning_rate": 1e25, "head_learning_rate": 1e25, "eval_steps": 100}
    recipe = make_recipe(tmp_path, model={"preset": preset, "method": method}, training=rates)
    message = r"training step 2: the loss is (nan|inf), in a batch of task 'mood' \(rows \d+: 'w\d \w+'"
    with pytest.raises(NotFiniteError, match=message):
        train(recipe, tmp_path / "run")
    assert_unfinished(tmp_path / "run")


def test_evaluation_after_a_step_that_diverged_ends_the_training(tmp_path: Path) -> None:
    rates = {"learning_rate": 1e25, "head_learning_rate": 1e25, "eval_steps": 1}
    with pytest.raises(NotFiniteError, match=r"evaluation after training step 1: input 1 \('w0 bad'\).*learning_rate"):
        train(make_recipe(tmp_path, training=rates), tmp_path / "run")
    assert_unfinished(tmp_path / "run")


@pytest.mark.parametrize("method", ["pha", "hyperformer"])
def test_a_diverged_last_step_is_noticed_without_rows_to_score(method: str, tmp_path: Path) -> None:
    rates = {"learning_rate": 1e25, "head_learning_rate": 1e25, "max_steps": 1}
    recipe = make_recipe(tmp_path, ("train",), model={"method": method}, training=rates)
    with pytest.raises(NotFiniteError, match=r"(is not a finite number|are not finite); "):
        train(recipe, tmp_path / "run")
    assert_unfinished(tmp_path / "run")


def test_the_command_ends_with_a_message_and_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(tmp_path, training={"learning_rate": 1e25})
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json", by_alias=True, exclude_none=True)))
    monkeypatch.setattr(sys, "argv", ["hyperadapters", "train", f"{tmp_path}/recipe.yaml", "-o", f"{tmp_path}/run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "error: training step 2: the loss is" in capsys.readouterr().err
    assert_unfinished(tmp_path / "run")


def make_trainer(folder: Path, **training: Any) -> Trainer:
    from hyperadapters.data.loading import load_tasks

    recipe = make_recipe(folder, training=training)
    tasks = load_tasks(recipe.tasks, recipe.data, recipe.seed)
    model = HyperAdapterModel(
        tiny_backbone("bert"), [data.task for data in tasks], recipe.model, recipe.backbone, recipe.data.lengths
    )
    return Trainer(model, rows_by_task(tasks, "train"), args=training_arguments(recipe, folder / "run"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_that_are_not_finite_end_the_training(value: float, accumulation: int, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=accumulation)
    trainer.model.method.prototypes.weight.register_hook(lambda gradient: gradient + value)
    before = copy.deepcopy(trainer.model.adapter_state_dict())
    rows = 8 * accumulation - 3
    with pytest.raises(
        NotFiniteError, match=rf"training step 1: the norm of the gradients is .*\(rows .*and {rows} more"
    ):
        trainer.train()
    for name, tensor in trainer.model.adapter_state_dict().items():
        assert torch.equal(tensor, before[name]), name


def make_not_finite(trainer: Trainer, what: str, steps: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    """Let the loss or gradients of some steps not be finite, and return the weights before each step and at the end."""
    states: list[dict[str, torch.Tensor]] = []

    def after_forward(module: Any, arguments: Any, output: Any) -> Any:
        if len(states) == trainer.state.global_step:
            states.append(copy.deepcopy(module.adapter_state_dict()))
        if what == "loss" and trainer.state.global_step + 1 in steps:
            output.loss = output.loss / 0
        return output

    def in_backward(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.inf if what == "gradients" and trainer.state.global_step + 1 in steps else gradient

    trainer.model.register_forward_hook(after_forward)
    trainer.model.method.prototypes.weight.register_hook(in_backward)
    return states


@pytest.mark.parametrize("what", ["loss", "gradients"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_that_are_not_finite_can_be_skipped(
    what: str, accumulation: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(
        tmp_path, max_steps=4, skip_nonfinite=1, gradient_accumulation_steps=accumulation, logging_steps=1
    )
    states = make_not_finite(trainer, what, (2,))
    trainer.train()
    name = "method.prototypes.weight"
    moved = [not torch.equal(before[name], after[name]) for before, after in itertools.pairwise(states)]
    assert moved == [True, False, True, True]
    assert all(torch.equal(states[1][name], states[2][name]) for name in states[1])
    (warning,) = [record.message for record in caplog.records if "skipped" in record.message]
    assert warning.startswith("training step 2: ")
    assert warning.endswith("The step is skipped (1 of 1).")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("skipped_steps", 0) for entry in logs] == [0, 1, 1, 1]
    assert all(math.isfinite(value) for entry in logs for value in entry.values())


def test_the_logged_loss_is_the_sum_of_its_terms_after_a_step_whose_gradients_were_not_finite(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=4, skip_nonfinite=1, logging_steps=4)
    make_not_finite(trainer, "gradients", (2,))
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    terms = [entry[f"loss_{name}"] for name in ("task", "instance", "prototype")]
    assert entry["loss"] == pytest.approx(sum(terms), rel=rounding(16))


def test_one_step_more_than_may_be_skipped_ends_the_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=4, skip_nonfinite=1)
    make_not_finite(trainer, "loss", (2, 3))
    with pytest.raises(NotFiniteError, match=r"training step 3: the loss is .*learning_rate"):
        trainer.train()


def test_steps_that_the_gradient_scaler_skips_are_normal(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    seen = []

    def overflow_at_first(gradient: torch.Tensor) -> torch.Tensor:
        seen.append(len(seen))
        return gradient + torch.inf if len(seen) <= 2 else gradient

    before = trainer.model.method.prototypes.weight.detach().clone()
    trainer.model.method.prototypes.weight.register_hook(overflow_at_first)
    trainer.train()
    assert len(seen) == trainer.state.global_step == 4
    assert all(value.isfinite().all() for value in trainer.model.method.prototypes.state_dict().values())
    assert not torch.equal(trainer.model.method.prototypes.weight, before)


# What is fitted after training


def unchanged(model: HyperAdapterModel) -> Callable[[], None]:
    before, tasks = copy.deepcopy(model.adapter_state_dict()), model.tasks

    def check() -> None:
        assert model.tasks == tasks
        found = model.adapter_state_dict()
        assert found.keys() == before.keys()
        assert all(torch.equal(found[name].nan_to_num(), before[name].nan_to_num()) for name in before)

    return check


@pytest.mark.parametrize("fit", ["prototype", "adapter", "shared", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_task_is_added_from_values_that_are_not_finite(kind: str, fit: str) -> None:
    rows = [{"text": text, "label": label} for text, label in zip(INPUTS * 2, ["yes", "no"] * 3, strict=True)]
    spoilt = make_model(kind)
    spoil_a_word(spoilt)
    check = unchanged(spoilt)
    message = r"input 2 \('w7 red'\): the output of the frozen layers is not a finite number"
    with pytest.raises(NotFiniteError, match=message):
        spoilt.add_task(Task.classification("new", ["yes", "no"]), rows, fit=fit)
    check()


@pytest.mark.parametrize("fit", ["prototype", "adapter", "shared", "none"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_no_task_is_added_to_a_model_that_diverged(kind: str, fit: str) -> None:
    rows = [{"text": text, "label": label} for text, label in zip(INPUTS * 2, ["yes", "no"] * 3, strict=True)]
    model = make_model(kind)
    for parameter in model.method.hypernetwork.parameters():
        parameter.fill_(torch.nan)
    check = unchanged(model)
    with pytest.raises(NotFiniteError, match="the trained weights are not finite, because training diverged"):
        model.add_task(Task.classification("new", ["yes", "no"]), rows, fit=fit)
    check()


@torch.no_grad()
def test_known_heads_that_are_not_finite_teach_nothing() -> None:
    inputs, labels = torch.randn(6, 4), [0, 1] * 3
    task = Task.classification("new", ["x", "y"])
    plain = make_head(task, inputs, labels, range(6))
    taught = make_head(task, inputs, labels, range(6), known=[torch.full((2, 4), torch.nan)])
    assert isinstance(plain, Head)
    assert isinstance(taught, Head)
    assert torch.equal(taught.weight, plain.weight)


@torch.no_grad()
def test_a_trained_head_that_is_not_finite_has_no_share_in_a_text_head() -> None:
    model = make_model("bert", **FROZEN_TEXTS)
    assert model.heads is not None
    model.heads.bias.fill_(torch.nan)
    rows = [Example(task, f"w{row} red", None, row % 2) for row in range(6) for task in (0, 1)]
    fit_text_heads(model, rows, [])
    assert all(value.isfinite().all() for value in model.heads.state_dict().values())


@pytest.mark.parametrize(("settings", "backbone"), [({"preset": "plus"}, "adapted"), (FROZEN_TEXTS, "frozen")])
def test_text_heads_and_thresholds_are_not_fitted_to_values_that_are_not_finite(
    settings: dict[str, Any], backbone: str
) -> None:
    model = make_model("bert", **settings)
    spoil_a_word(model)
    rows = [Example(task, f"w{row} red", None, row % 2) for row in range(8) for task in (0, 1)]
    check = unchanged(model)
    with pytest.raises(NotFiniteError, match=rf"\('w7 red'\): the output of the {backbone} backbone is not a finite"):
        fit_text_heads(model, rows, [])
    with pytest.raises(NotFiniteError, match=r"input 8 \('w7 red'\): the output of the frozen backbone"):
        frozen_features(model, rows[::2])
    fitted_to = "the frozen hidden states of training rows" if backbone == "adapted" else "the similarities of inputs"
    with pytest.raises(NotFiniteError, match=f"{fitted_to} .*are not finite"):
        calibrate(model, rows, [])
    with pytest.raises(NotFiniteError, match="similarities of inputs to the tasks are not finite"):
        calibrate(model, rows[:7:2], rows)
    check()


def test_scores_of_a_run_are_valid_json(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    run = train(make_recipe(tmp_path, training={"max_steps": 1}), tmp_path / "run")
    assert evaluate_splits(run.model, run.tasks, 4).keys() == {"validation", "test"}
    for path in (tmp_path / "run").glob("*.json"):
        json.loads(path.read_text(), parse_constant=refuse)
