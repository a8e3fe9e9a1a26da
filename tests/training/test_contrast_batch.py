"""With `contrast_batch="step"`, accumulated micro-batches have the gradients of one batch of all their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_backbone, tiny_tokenizer

from hyperadapters import HyperAdapterModel, Task, Trainer, TrainingArguments
from hyperadapters.config import ModelConfig, parse
from hyperadapters.errors import RecipeError

TASKS = [Task.classification("colour", ["blue", "red"]), Task.classification("mood", ["bad", "good"])]
ROWS = {
    "colour": [{"text": f"w{row} {word}", "label": word} for row, word in enumerate(["blue", "red"] * 6)],
    "mood": [{"text": f"w{row + 20} {word}", "label": word} for row, word in enumerate(["bad", "good"] * 6)],
}


def make_trainer(kind: str, preset: str, folder: Path, dropout: float = 0.0, **arguments: Any) -> Trainer:
    torch.manual_seed(1)
    sizes = {"hidden_dropout_prob": dropout} if dropout else {}
    settings: dict[str, Any] = {"adapter_dim": 4, "preset": preset, "token_dropout": 0.0}
    config = parse(ModelConfig, settings | ({"feature_layer": 1} if kind == "bert" else {}))
    model = HyperAdapterModel(tiny_backbone(kind, **sizes), TASKS, config).double()
    model.tokenizer = tiny_tokenizer()
    options = {"output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, **arguments}
    return Trainer(model, ROWS, None, TrainingArguments(**options))


def gradients(trainer: Trainer, parts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Return the gradients of a step whose micro-batches have the given rows."""
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = len(parts)
    batches, items = trainer.get_batch_samples(iter([trainer._batch(rows) for rows in parts]), len(parts), "cpu")
    for batch in batches:
        trainer.training_step(trainer.model, batch, items)
    named = trainer.model.named_parameters()
    return {name: value.grad.clone() for name, value in named if value.grad is not None}


@pytest.mark.parametrize(
    ("kind", "preset", "prefix_cache"),
    [
        ("bert", "paper", "none"),
        ("bert", "paper", "memory"),
        ("bert", "plus", "none"),
        ("bert", "plus", "memory"),
        ("t5", "paper", "none"),
    ],
)
def test_micro_batches_have_the_gradients_of_one_batch(
    kind: str, preset: str, prefix_cache: str, tmp_path: Path
) -> None:
    options = {"gradient_accumulation_steps": 3, "prefix_cache": prefix_cache}
    trainer = make_trainer(kind, preset, tmp_path, contrast_batch="step", **options)
    trainer.model.train()
    parts = [[0, 1, 12, 13], [2, 3, 4, 5], [6, 14, 15, 16]]
    found = gradients(trainer, parts)
    expected = gradients(trainer, [[row for part in parts for row in part]])
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        largest = float(expected[name].abs().max()) if len(gradient) else 0.0
        assert torch.allclose(gradient, expected[name], rtol=0, atol=1e-5 * largest), (
            name
        )  # similarities are in float32
    alone = gradients(make_trainer(kind, preset, tmp_path, **options), parts)
    retriever = next(name for name in found if "retriever" in name and name.endswith("weight"))
    assert not torch.allclose(alone[retriever], expected[retriever], rtol=0.01)


def test_a_failed_step_leaves_nothing_to_the_next_one(tmp_path: Path) -> None:
    trainer = make_trainer("bert", "paper", tmp_path, contrast_batch="step", gradient_accumulation_steps=2)
    parts = [[0, 1, 12, 13], [2, 3, 14, 15]]
    expected = gradients(trainer, parts)
    batches, items = trainer.get_batch_samples(iter([trainer._batch(rows) for rows in parts]), 2, "cpu")
    trainer.training_step(trainer.model, batches[0], items)  # and the second one fails
    found = gradients(trainer, parts)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_training_with_dropout_is_resumed_to_the_same_weights(tmp_path: Path) -> None:
    options = {"contrast_batch": "step", "gradient_accumulation_steps": 2, "max_steps": 6, "prefix_cache": "none"}
    saving = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "no"}
    states = []
    for resumed in (None, str(tmp_path / "checkpoint-3")):
        trainer = make_trainer("bert", "paper", tmp_path, dropout=0.2, **options, **saving)
        trainer.train(resumed)
        states.append({name: value.clone() for name, value in trainer.model.adapter_state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("arguments", "config"), [({}, {}), ({"gradient_accumulation_steps": 2}, {"contrast": "prototype"})]
)
def test_the_setting_is_refused_where_it_has_no_effect(
    arguments: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    model = HyperAdapterModel(tiny_backbone("bert"), TASKS, ModelConfig(adapter_dim=4, **config))
    model.tokenizer = tiny_tokenizer()
    options = TrainingArguments(output_dir=str(tmp_path), contrast_batch="step", **arguments)
    with pytest.raises(RecipeError, match="contrast_batch: has no effect"):
        Trainer(model, ROWS, None, options)
