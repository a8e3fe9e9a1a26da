"""Pairs of texts that spell the tokenizer's special tokens: each text is still read by itself."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers import HIDDEN_SIZE, PAIR_TASKS, make_plus_model, tiny_backbone, tokenizer_of
from torch import Tensor

from hyperadapters.backbones.text_features import split_pairs
from hyperadapters.data.examples import Example
from hyperadapters.errors import TaskError
from hyperadapters.inference.predictor import Predictor
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.text_heads import fit_text_heads

STYLES = ("plain", "bert", "roberta")
SPELT = {"plain": "</s>", "bert": "[SEP]", "roberta": "</s>"}


def model_of(style: str) -> HyperAdapterModel:
    model = make_plus_model()
    model.tokenizer = tokenizer_of(style)
    return model


def product_of(model: HyperAdapterModel, inputs: dict[str, Tensor]) -> Tensor:
    """u . v of a batch of pairs [B]."""
    rows = len(inputs["input_ids"])
    return model.head_features(inputs, torch.empty(0), [True] * rows)[:, 2 * HIDDEN_SIZE]


@pytest.mark.parametrize("style", STYLES)
def test_equal_texts_that_spell_a_separator_are_equal(style: str) -> None:
    model = model_of(style).double()
    text = f"red w1 {SPELT[style]} size w7"
    rows = [Example(0, text, text), Example(0, "red w3", "red w3"), Example(1, text)]
    inputs = model.collator.inputs(rows)
    found = model.head_features(inputs, torch.empty(0), [True, True, False])
    torch.testing.assert_close(found[:2, 2 * HIDDEN_SIZE].double(), torch.ones(2).double(), atol=1e-6, rtol=0)
    alone = model.head_features(model.collator.inputs(rows[2:]), torch.empty(0), [False])
    torch.testing.assert_close(found[0, :HIDDEN_SIZE], 2 * alone[0, :HIDDEN_SIZE], atol=1e-6, rtol=0)  # u + v, and u


@pytest.mark.parametrize("style", STYLES)
def test_the_split_is_what_the_tokenizer_makes_of_each_text(style: str) -> None:
    drawn, model = random.Random(0), model_of(style)
    words = ["red", "w1", "w2", "w3", SPELT[style], SPELT[style], "<pad>", model.tokenizer.cls_token or "<unk>"]

    def text() -> str:
        return " ".join(drawn.choices(words, k=drawn.randint(1, 8)))

    for _ in range(60):
        rows = [Example(0, text(), text() if drawn.random() < 0.8 else None) for _ in range(5)]
        is_pair = torch.tensor([row.text_pair is not None for row in rows])
        batch = model.collator.inputs(rows)
        ids, mask = split_pairs(batch["input_ids"], batch["attention_mask"], is_pair, batch["sequence_ids"])
        expected = [row.text for row in rows] + [row.text_pair for row in rows if row.text_pair is not None]
        assert [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)] == [
            model.tokenizer(text)["input_ids"] for text in expected
        ]


@pytest.mark.parametrize("style", ["bert", "roberta"])
@pytest.mark.parametrize("texts", [("", "w1 w2"), ("w1 w2", ""), ("", "")])
def test_an_empty_text_of_a_pair_is_split_off_too(style: str, texts: tuple[str, str]) -> None:
    model = model_of(style)
    batch = model.collator.inputs([Example(0, *texts), Example(0, "w1 w2 w3", "w4")])
    ids, mask = split_pairs(
        batch["input_ids"], batch["attention_mask"], torch.tensor([True, True]), batch["sequence_ids"]
    )
    found = [ids[row][mask[row].bool()].tolist() for row in (0, 2)]
    assert found == [model.tokenizer(text)["input_ids"] for text in texts]


def test_truncated_pairs_are_split() -> None:
    model = model_of("roberta")
    text = " ".join(["w1 </s>"] * 60)
    batch = model.collator.inputs([Example(0, text, "w2 </s> w3")])
    assert batch["input_ids"].shape[1] == model.lengths.input
    ids, mask = split_pairs(batch["input_ids"], batch["attention_mask"], torch.tensor([True]), batch["sequence_ids"])
    assert ids[1][mask[1].bool()].tolist() == model.tokenizer("w2 </s> w3")["input_ids"]


def test_a_model_is_fitted_and_answers_the_same_in_any_batch() -> None:
    model = model_of("bert")
    pairs = [("red [SEP] w1", "red [SEP] w1"), ("red w2 [SEP]", "w5 [SEP] w6"), ("w3", "w3"), ("[SEP] w3", "w8")]
    rows = [Example(0, *texts, index % 2) for index, texts in enumerate(pairs * 4)]
    rows += [Example(1, f"w{index} [SEP]", None, float(index)) for index in range(8)]
    rows += [Example(2, f"w{index} [SEP]", None, index % 2) for index in range(8)]
    fit_text_heads(model, rows, rows, batch_size=8)
    predictor = Predictor(model)
    together = predictor([Example(None, *texts) for texts in pairs], task="same")
    for texts, among in zip(pairs, together, strict=True):
        (alone,) = predictor([Example(None, *texts)], task="same")
        assert among.probabilities is not None
        assert alone.probabilities == pytest.approx(among.probabilities, abs=1e-5)


# Callers that tokenise by themselves


def own_batch(style: str) -> tuple[HyperAdapterModel, dict[str, Tensor]]:
    model = model_of(style)
    text = f"red {SPELT[style]} w7"
    lower_output: Any = model.tokenizer([text, "w1"], [text, "w1"], padding=True, return_tensors="pt")
    return model, dict(lower_output)


def test_token_types_tell_the_texts_apart() -> None:
    model, inputs = own_batch("bert")
    torch.testing.assert_close(product_of(model, inputs), torch.ones(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("style", ["plain", "roberta"])
def test_without_anything_that_tells_the_texts_apart_an_error_says_what_to_pass(style: str) -> None:
    model, inputs = own_batch(style)
    with pytest.raises(TaskError, match=r"found neither; make the batch with model\.collator, or pass sequence_ids"):
        product_of(model, inputs)
    zeros = torch.zeros_like(inputs["input_ids"])
    with pytest.raises(TaskError, match="found token_type_ids without a 1 in a row"):
        product_of(model, {**inputs, "token_type_ids": zeros})


def test_sequence_ids_of_another_shape_are_refused() -> None:
    model, inputs = own_batch("bert")
    with pytest.raises(TaskError, match=r"sequence_ids: expected the shape \(2, 9\) of input_ids, found \(2, 3\)"):
        model(**inputs, task_ids=torch.tensor([0, 0]), sequence_ids=torch.zeros(2, 3, dtype=torch.long))


def test_a_single_text_that_goes_to_a_task_of_pairs_is_its_first_text() -> None:
    model = model_of("bert")
    inputs = model.collator.inputs([Example(None, "w1 [SEP] w2")])
    ids, mask = split_pairs(inputs["input_ids"], inputs["attention_mask"], torch.tensor([True]), inputs["sequence_ids"])
    assert mask.sum(dim=1).tolist() == [5, 1]
    assert ids[0].tolist() == inputs["input_ids"][0].tolist()


def test_models_without_tasks_of_pairs_get_no_sequence_ids() -> None:
    model = HyperAdapterModel(tiny_backbone("bert"), PAIR_TASKS[1:])
    model.tokenizer = tokenizer_of("bert")
    assert set(model.collator.inputs([Example(0, "w1")])) == {"input_ids", "attention_mask", "token_type_ids"}
