"""Texts that are longer than a model reads: one warning, and no second pass of the tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_backbone, tiny_backbone, tiny_language_model_tokenizer, tiny_tokenizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from hyperadapters import HyperAdapterModel, Task, Trainer, TrainingArguments
from hyperadapters.config import Lengths, ModelConfig
from hyperadapters.data.collate import make_collator
from hyperadapters.data.examples import Example
from hyperadapters.errors import RecipeError
from hyperadapters.inference.batches import batches_by_length

TASKS = [Task.classification("mood", ["bad", "good"])]
LONGEST = 8
WARNING = (
    "a text has more than 8 tokens and is truncated, as all longer texts are; to read more of them, create the "
    "model with a larger max_length (in a recipe: data.max_length), up to the maximum length of the backbone"
)


def make_model(kind: str) -> HyperAdapterModel:
    config = ModelConfig(preset="paper", adapter_dim=4, prototype_dim=8, hidden_dim=8)
    model = HyperAdapterModel(tiny_backbone(kind), TASKS, config, lengths=Lengths(input=LONGEST))
    model.tokenizer = tiny_language_model_tokenizer() if kind == "gpt2" else tiny_tokenizer()
    return model.eval()


def text_of(model: HyperAdapterModel, tokens: int) -> str:
    """A text that the backbone reads as so many tokens: with one more at its end, of a decoder with a new line."""
    return " ".join(["w1"] * (tokens - 1))


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "truncated" in record.getMessage()]


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt2"])
@pytest.mark.parametrize("use", ["predict", "encode", "route"])
def test_a_truncated_text_is_warned_of_once(kind: str, use: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(kind)
    uses: dict[str, Callable[[list[str]], Any]] = {
        "predict": lambda texts: model.predict(texts, task="mood"),
        "encode": model.encode,
        "route": model.route,
    }
    with caplog.at_level(logging.WARNING):
        uses[use](["w1", text_of(model, LONGEST)])
        assert warned(caplog) == []
        uses[use](["w1", text_of(model, LONGEST + 1)])
        uses[use]([text_of(model, LONGEST + 2)])
    assert warned(caplog) == [WARNING]
    other = make_model(kind)
    other.encode([text_of(other, LONGEST + 1)])
    assert warned(caplog) == [WARNING] * 2


def test_a_trainer_warns_of_truncated_rows(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("bert")
    rows = [{"text": text_of(model, LONGEST + row), "label": ("bad", "good")[row % 2]} for row in range(4)]
    trainer = Trainer(model, {"mood": rows}, args=TrainingArguments(max_steps=1))
    trainer.train()
    assert warned(caplog) == [WARNING]


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_truncated_target_texts_are_warned_of(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tasks = [Task.text_to_text("copy")]
    folder = str(save_backbone(tmp_path, kind))
    model = HyperAdapterModel.from_backbone(folder, tasks, max_length=16, max_target_length=4)
    rows = [{"text": "w1", "label": " ".join(["w2"] * words)} for words in (3, 4, 5)]
    Trainer(model, {"copy": rows[:1]})
    assert warned(caplog) == []
    Trainer(model, {"copy": rows})
    assert warned(caplog) == [
        "task 'copy': 2 of 3 target texts have more than 4 tokens and are truncated, and generated texts end there as "
        "well; the first is 'w2 w2 w2 w2'; create the model with a larger max_target_length (in a recipe: "
        "data.max_target_length) to keep them whole"
    ]


def test_lengths_out_of_range_are_named_as_the_arguments(tmp_path: Path) -> None:
    folder = str(save_backbone(tmp_path, "bert"))
    with pytest.raises(RecipeError, match=r"from_backbone: 2 fault.*\n  max_length: .*4; found 0\n  max_target_length"):
        HyperAdapterModel.from_backbone(folder, TASKS, max_length=0, max_target_length=0)


class Counting:
    """A tokenizer that counts the texts that it reads; if not fast, without `encodings` as tokenizers in Python."""

    def __init__(self, is_fast: bool) -> None:
        self._tokenizer, self.is_fast, self.texts = tiny_tokenizer(), is_fast, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, texts: Any, *pair: str, **options: Any) -> Any:
        self.texts += len(texts) if isinstance(texts, list) else 1
        found = self._tokenizer(texts, *pair, **options)
        if not self.is_fast:
            found._encodings = None
        return found


def test_no_text_is_read_twice() -> None:
    model = make_model("bert")
    model.tokenizer = Counting(is_fast=True)
    model.encode([text_of(model, length) for length in range(2, 12)])
    assert model.tokenizer.texts == 10


def test_without_a_fast_tokenizer_texts_of_the_largest_length_are_read_again(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("bert")
    model.tokenizer = Counting(is_fast=False)
    model.encode([text_of(model, LONGEST - 1)] * 3)
    assert model.tokenizer.texts == 3
    model.encode([text_of(model, LONGEST)])
    assert warned(caplog) == []
    model.encode([("w1", text_of(model, LONGEST))])
    model.encode([text_of(model, LONGEST + 1)])
    assert warned(caplog) == [WARNING]
    assert model.tokenizer.texts == 3 + 2 + 2 + 1


def bert_tokenizer() -> Any:
    """The tiny tokenizer, but splitting texts into words as BERT's does."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer


@pytest.mark.parametrize(
    "texts",
    [
        ["w1 w2 " * 100, "w3 w4, " * 50],  # cut and truncated
        ["w1" + " " * 200 + "w2", "w3 " * 100],  # cut before the words that are read
        ["w1" * 100 + " w2 w3", "w4"],  # without a space to cut at
    ],
)
def test_tokens_of_long_texts_are_those_of_the_whole_texts(texts: list[str]) -> None:
    tokenizer = bert_tokenizer()
    expected = tokenizer(texts, truncation=True, max_length=LONGEST, padding=True, return_tensors="pt")
    found = make_collator("encoder", tokenizer, TASKS, LONGEST).inputs([Example(0, text) for text in texts])
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(("side", "is_cut"), [("right", True), ("left", False)])
def test_long_texts_are_not_tokenised_as_a_whole(side: str, is_cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = bert_tokenizer()
    tokenizer.truncation_side = side
    collator = make_collator("encoder", tokenizer, TASKS, LONGEST)
    read: list[str] = []
    truncated = type(collator)._truncated

    def noting(self: Any, texts: list[str], *args: Any, **options: Any) -> Any:
        read.extend(texts)
        return truncated(self, texts, *args, **options)

    monkeypatch.setattr(type(collator), "_truncated", noting)
    collator.inputs([Example(0, "w1 w2 " * 1000)])
    (text,) = read
    assert (len(text) < 100) == is_cut


def test_truncated_texts_are_batched_by_task() -> None:
    long = "w1 " * 1000
    examples = [Example(index % 2, long[: len(long) - 3 * index]) for index in range(6)] + [Example(1, "w1")]
    assert list(batches_by_length(examples, 4, max_tokens=LONGEST)) == [[6, 0, 2, 4], [1, 3, 5]]
    assert list(batches_by_length(examples, 4)) == [[6, 5, 4, 3], [2, 1, 0]]
