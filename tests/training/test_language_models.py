"""A language model on real learning: a tiny GPT-2 is pretrained, frozen, and adapted to tasks it cannot do."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCABULARY, tiny_backbone, tiny_language_model_tokenizer

from hyperadapters.backbones.loading import load_backbone
from hyperadapters.config import Lengths, ModelConfig, Recipe, Task, parse
from hyperadapters.inference.predictor import Predictor
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.evaluation import evaluate
from hyperadapters.training.run import train

WORDS_OF_A_TEXT = 3
PRETRAIN_STEPS = 200
LENGTHS = Lengths(input=16, target=6)
LABELS = {"yes": "good", "no": "bad"}
RANGES = {"low": (0, 10), "high": (20, 30), "top": (28, 38)}
"""The words of a task's texts: under each label those of one half."""


def _rows(task: str, count: int, seed: int) -> list[dict[str, str]]:
    generator = random.Random(f"{task}/{seed}")
    low, high = RANGES[task]
    rows = []
    for _ in range(count):
        label = generator.choice(list(LABELS))
        first = low if label == "yes" else (low + high) // 2
        words = [f"w{generator.randrange(first, first + (high - low) // 2)}" for _ in range(WORDS_OF_A_TEXT)]
        rows.append({"text": " ".join([*words, "red" if task == "low" else "blue"]), "label": label})
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 that learned to write its input once more, and tasks that are something else."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = tiny_language_model_tokenizer()
    line, end = tokenizer("\n", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
    torch.manual_seed(0)
    model = tiny_backbone("gpt2", n_embd=48, n_head=4, n_layer=4).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = random.Random(0)
    for _ in range(PRETRAIN_STEPS):
        texts = [" ".join(generator.choices(VOCABULARY[3:], k=WORDS_OF_A_TEXT + 1)) for _ in range(48)]
        ids = torch.tensor([[*tokens, *line, *tokens, end] for tokens in tokenizer(texts)["input_ids"]])
        labels = ids.clone()
        labels[:, : WORDS_OF_A_TEXT + 1 + len(line)] = -100
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    for task in ("low", "high"):
        for split, count, seed in (("train", 400, 1), ("validation", 40, 2), ("test", 100, 3)):
            lines = [json.dumps(row) for row in _rows(task, count, seed)]
            (folder / f"{task}-{split}.jsonl").write_text("\n".join(lines))
    return folder


FORMS: dict[str, dict[str, Any]] = {
    "bottleneck": {"adapter_dim": 16},
    "lora": {"form": "lora", "target_modules": ["c_attn", "c_fc"]},
}


RATES = {"bottleneck": 3e-3, "lora": 5e-4}  # a LoRA, which is multiplied by 2 here, wants less


def _recipe(folder: Path, form: str) -> Recipe:
    def source(name: str) -> dict[str, str]:
        return {"path": str(folder / f"{name}-{{split}}.jsonl")}

    values = {
        "backbone": str(folder / "backbone"),
        "model": {"feature_layer": 1, **FORMS[form]},
        "data": {"max_length": LENGTHS.input, "max_target_length": LENGTHS.target},
        "training": {
            "max_steps": 300,
            "batch_size": 32,
            "learning_rate": RATES[form],
            "warmup_steps": 20,
            "eval_steps": 150,
        },
        "tasks": [
            {"name": name, "labels": list(LABELS), "verbalizer": LABELS, "source": source(name)}
            for name in ("low", "high")
        ],
    }
    return parse(Recipe, values)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_adapting_a_frozen_language_model_to_tasks(world: Path, form: str, tmp_path: Path) -> None:
    run = train(_recipe(world, form), tmp_path / "run")
    name = str(world / "backbone")
    bare = HyperAdapterModel(load_backbone(name), run.model.tasks, run.model.adapter_config, name, LENGTHS)
    examples = [example for data in run.tasks for example in data.splits["test"]]
    frozen, adapted = evaluate(bare, examples), run.evaluations["test"]
    assert frozen.mean < 0.2
    assert adapted.mean > 0.9
    assert adapted.routing_accuracy > 0.95

    loaded = HyperAdapterModel.from_pretrained(tmp_path / "run")
    predictor = Predictor(loaded, batch_size=2, decline=False)
    answers = list(predictor(["w1 w2 w3 red", "w27 w28 w26 blue", "w7 w8 w6 red"]))
    assert [answer.task for answer in answers] == ["low", "high", "low"]
    assert [(answer.text, answer.answer) for answer in answers] == [("good", "yes"), ("bad", "no"), ("bad", "no")]
    if form == "lora":  # a task without anything beside the backbone
        loaded.merge("low")
        (alone,) = predictor(["w1 w2 w3 red"], task="low")
        assert alone.text == "good"


@pytest.mark.parametrize("fit", ["adapter", "prototype", "none"])
@pytest.mark.parametrize("form", FORMS)
def test_a_task_is_added_to_a_language_model_from_a_few_examples(world: Path, form: str, fit: str) -> None:
    name = str(world / "backbone")
    config = ModelConfig(preset="paper", feature_layer=1, **FORMS[form])
    tasks = [Task.classification(task, list(LABELS), verbalizer=LABELS) for task in RANGES]
    model = HyperAdapterModel(load_backbone(name), tasks[:2], config, name, LENGTHS).eval()
    inputs = ["w1 w2 w3 red", "w24 w25 w26 blue"]
    before = [prediction.text for prediction in Predictor(model, decline=False)(inputs, task="low")]
    report = model.add_task(tasks[2], _rows("top", 16, 1), fit=fit, max_steps=8)
    assert (report.task, model.task_id("top")) == ("top", 2)
    (answer,) = Predictor(model)(["w29 w30 w31 blue"], task="top")
    assert answer.task == "top"
    assert [prediction.text for prediction in Predictor(model, decline=False)(inputs, task="low")] == before
