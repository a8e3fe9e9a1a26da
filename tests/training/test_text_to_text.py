"""The text-to-text path on real learning: a tiny T5 is pretrained, frozen, and adapted to tasks it cannot do."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from helpers import VOCABULARY, tiny_backbone, tiny_tokenizer
from torch import nn

from hyperadapters.config import ModelConfig, Recipe, Task, parse
from hyperadapters.data.examples import Example
from hyperadapters.inference.predictor import Predictor
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.evaluation import evaluate
from hyperadapters.training.run import train

PRETRAIN_STEPS = 300
COPY = 3


def _words(generator: random.Random, low: int, high: int, count: int = COPY) -> list[str]:
    return [f"w{generator.randrange(low, high)}" for _ in range(count)]


def _pretrained(folder: Path) -> nn.Module:
    """A small T5 trained to copy its input, which is what a language model is to these tasks."""
    tokenizer = tiny_tokenizer()
    model = tiny_backbone("t5", d_model=48, d_ff=96, d_kv=12, num_heads=4, num_layers=2, num_decoder_layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = random.Random(0)
    model.train()
    for _ in range(PRETRAIN_STEPS):
        texts = [" ".join(generator.choices(VOCABULARY[3:], k=COPY)) for _ in range(48)]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        loss = model(**tokens, labels=tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def _rows(task: str, count: int, seed: int) -> list[dict[str, str]]:
    """`last` writes the last word, `first` the first, `side` names the half of the vocabulary the words are from."""
    generator = random.Random(f"{task}/{seed}")
    rows = []
    for _ in range(count):
        if task == "side":
            label = generator.choice(["yes", "no"])
            words = _words(generator, *((0, 10) if label == "yes" else (10, 20)))
            rows.append({"text": ": " + " ".join(words), "label": label})
        else:
            words = _words(generator, 0, 40)
            marker = "red" if task == "first" else "blue"
            rows.append({"text": " ".join([marker, *words]), "label": words[0 if task == "first" else -1]})
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    _pretrained(folder / "backbone")
    for task in ("first", "last", "side"):
        for split, count, seed in (("train", 400, 1), ("validation", 40, 2), ("test", 100, 3)):
            lines = [json.dumps(row) for row in _rows(task, count, seed)]
            (folder / f"{task}-{split}.jsonl").write_text("\n".join(lines))
    return folder


def _recipe(folder: Path) -> Recipe:
    def source(name: str) -> dict[str, str]:
        return {"path": str(folder / f"{name}-{{split}}.jsonl")}

    return parse(
        Recipe,
        {
            "backbone": str(folder / "backbone"),
            "model": {"adapter_dim": 16},
            "data": {"max_length": 16, "max_target_length": 4},
            "training": {
                "max_steps": 150,
                "batch_size": 48,
                "learning_rate": 3e-3,
                "warmup_steps": 20,
                "label_smoothing": 0.1,
                "eval_steps": 75,
            },
            "tasks": [
                {"name": "first", "kind": "text-to-text", "source": source("first")},
                {"name": "last", "kind": "text-to-text", "source": source("last")},
                {
                    "name": "side",
                    "labels": ["yes", "no"],
                    "verbalizer": {"yes": "good", "no": "bad"},
                    "source": source("side"),
                },
            ],
        },
    )


@pytest.mark.slow
def test_adapting_a_frozen_t5_to_further_tasks(world: Path, tmp_path: Path) -> None:
    recipe = _recipe(world)
    run = train(recipe, tmp_path / "run")

    bare = HyperAdapterModel(
        _bare(world), run.model.tasks, ModelConfig(adapter_dim=16), str(world / "backbone"), run.model.lengths
    )
    examples = [example for data in run.tasks for example in data.splits["test"]]
    frozen = evaluate(bare, examples)
    adapted = run.evaluations["test"]
    assert frozen.mean < 0.2
    assert adapted.mean > frozen.mean + 0.5
    assert adapted.routing_accuracy > 0.95

    loaded = HyperAdapterModel.from_pretrained(tmp_path / "run")
    inputs = [Example(None, "red w1 w2 w3"), Example(None, ": w11 w12 w13"), Example(1, "blue w1 w2 w3")]
    predictor = Predictor(loaded, batch_size=2)
    answers = list(predictor(inputs))
    assert [answer.task for answer in answers] == [loaded.tasks[index].name for index in (0, 2, 1)]
    assert answers[1].answer in ("yes", "no")
    assert answers[1].target in (0, 1)
    assert answers[1].text in ("good", "bad")
    (alone,) = predictor(inputs[:1])
    assert alone.text == answers[0].text


def _bare(folder: Path) -> nn.Module:
    from hyperadapters.backbones.loading import load_backbone

    return load_backbone(str(folder / "backbone"))


def test_a_text_to_text_answer_that_is_no_label_word_is_no_answer(world: Path) -> None:
    name = str(world / "backbone")
    model = HyperAdapterModel(_bare(world), [Task.classification("side", ["yes", "no"])], backbone_name=name)
    (prediction,) = Predictor(model)([Example(0, "w1 w2 w3")])
    assert prediction.text
    assert prediction.answer is None
