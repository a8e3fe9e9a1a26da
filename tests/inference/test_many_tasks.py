"""Several tasks answered for each input, with one pass through the layers below the adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import make_frozen_texts_model, make_model, make_plus_model, pair_examples, stirred, tiny_tokenizer
from tolerance import rounding

from hyperadapters import HyperAdapterModel, Task
from hyperadapters.data.examples import Example
from hyperadapters.errors import DataError, NotFiniteError, TaskError
from hyperadapters.inference.predictor import CHUNK_BATCHES, Prediction, Predictor

TASKS = [
    Task.classification("colour", ["red", "blue", "green"]),
    Task.classification("same", ["no", "yes"], fields=("text", "text_pair")),
    Task.regression("size"),
    Task.classification("mood", ["bad", "good"]),
    Task.classification("order", ["first", "second", "none"], fields=("text", "text_pair")),
]
SINGLE = ["w1 w2 good", "w3", "w4 w5 w6 w7 w8 w9", "w1 red w2", "w30 w31", "w12 w13 w14"]
PAIRS = [("w1 w2", "w3"), ("w4 w5 w6 w7", "red blue"), ("w8", "w8")]


def fitted_plus() -> HyperAdapterModel:
    model = stirred(make_plus_model(TASKS))
    rows = pair_examples()
    model.fit_heads(
        {
            "colour": [Example(0, e.text, None, i % 3) for i, e in enumerate(rows)],
            "same": [Example(1, e.text, e.text_pair, e.target) for e in rows[::3]],
            "size": [Example(2, e.text, None, e.target) for e in rows[1::3]],
            "mood": [Example(3, e.text, None, e.target) for e in rows[2::3]],
            "order": [Example(4, e.text, e.text_pair, i % 3) for i, e in enumerate(rows[::3])],
        }
    )
    return model


def with_tokenizer(model: HyperAdapterModel) -> HyperAdapterModel:
    model.tokenizer = tiny_tokenizer()
    return model


MODELS: dict[str, Any] = {
    "plus": fitted_plus,
    "paper": lambda: stirred(make_plus_model(TASKS, preset="paper", **PAPER)),
    "frozen texts": lambda: stirred(make_frozen_texts_model(TASKS)),
    "all features": lambda: stirred(make_plus_model(TASKS, features="backbone")),
    "no lower layers": lambda: stirred(make_plus_model(TASKS, feature_layer=0)),
    "lora": lambda: stirred(make_plus_model(TASKS, form="lora", adapter_dim=64)),
    "shared adapter": lambda: stirred(make_plus_model(TASKS, method="shared_adapter", preset="paper", **PAPER)),
    "t5": lambda: with_tokenizer(stirred(make_model("t5"))),
}
PAPER: dict[str, Any] = {"head_inputs": "adapted", "label_names": False}


def assert_close(found: Prediction, expected: Prediction) -> None:
    atol = rounding(2000)
    assert (found.task, found.text) == (expected.task, expected.text)
    assert (found.routing is None) == (expected.routing is None)
    if isinstance(expected.answer, float):
        assert found.answer == pytest.approx(expected.answer, rel=atol, abs=atol)
    elif expected.probabilities is not None:
        assert found.probabilities == pytest.approx(expected.probabilities, abs=atol)
    if found.routing is not None and expected.routing is not None:
        scale = max(1.0, abs(expected.routing.similarity))
        assert found.routing.similarity == pytest.approx(expected.routing.similarity, abs=atol * scale)
    if expected.instance is not None:
        assert found.instance == pytest.approx(expected.instance, rel=atol, abs=atol)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("batch_size", [64, 2])
def test_answers_are_those_of_each_task_by_itself(name: str, batch_size: int) -> None:
    model = MODELS[name]()
    predictor = Predictor(model, batch_size)
    names = [task.name for task in model.tasks if not task.is_pair]
    found = list(predictor.predict_tasks(SINGLE, names[::-1]))
    for place, task in enumerate(names[::-1]):
        for ours, expected in zip(found, predictor(SINGLE, task=task), strict=True):
            assert_close(ours[place], expected)


@pytest.mark.parametrize("name", ["plus", "paper", "frozen texts", "all features", "lora"])
def test_pairs_and_single_texts_may_be_mixed_and_all_tasks_are_those_that_read_them(name: str) -> None:
    model = MODELS[name]()
    inputs: Sequence[Any] = [SINGLE[0], PAIRS[0], SINGLE[1], PAIRS[1], PAIRS[2]]
    found = model.predict(inputs, tasks="*")
    assert [[one.task for one in of_input] for of_input in found] == [
        ["same", "order"] if isinstance(value, tuple) else ["colour", "size", "mood"] for value in inputs
    ]
    for value, of_input in zip(inputs, found, strict=True):
        for one in of_input:
            assert_close(one, model.predict([value], task=one.task)[0])


def test_the_lower_layers_run_once_for_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fitted_plus()
    rows = []
    layers = model.backbone.encoder.layer
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda _, inputs, __, number=number: rows.append((number, len(inputs[0]))))
    model.predict(SINGLE, tasks=["colour", "size", "mood"])
    m = model.adapter_config.feature_layer
    of_lower = [count for number, count in rows if number < m]
    of_upper = [count for number, count in rows if number == m]
    assert of_lower == [len(SINGLE)] * m
    assert sum(of_upper) == 3 * len(SINGLE)


def test_inputs_are_read_in_chunks() -> None:
    model, read = fitted_plus(), []

    def endless() -> Any:
        while True:
            read.append(1)
            yield "w1 w2"

    first = next(Predictor(model, 2).predict_tasks(endless(), "*"))
    assert [one.task for one in first] == ["colour", "size", "mood"]
    assert len(read) == 2 * (CHUNK_BATCHES // len(TASKS))


@pytest.mark.parametrize(
    ("inputs", "tasks", "error", "message"),
    [
        (["w1"], ["colour", "mod"], TaskError, "Unknown task 'mod'"),
        (["w1"], ["mood", "mood"], TaskError, "'mood' is named twice"),
        (["w1"], [], TaskError, "expected names of tasks, or '\\*'"),
        (["w1"], "mood", TaskError, "expected names of tasks, or '\\*' for all of them, found 'mood'"),
        (["w1"], 5, TaskError, "expected names of tasks, or '\\*' for all of them, found 5"),
        (["w1"], ["same"], DataError, "input 1: no column 'text_pair'"),
        (["w1", ("w1", "w2")], ["mood"], DataError, "input 2: found a text_pair, which task 'mood' does not read"),
        (["w1"], ["mood", "same"], TaskError, "'same' reads pairs of texts and 'mood' single texts"),
        ([{"text": "w1", "task": "mood"}], "*", DataError, "input 1: names the task 'mood'"),
    ],
)
def test_wrong_tasks_and_inputs_are_named(inputs: Any, tasks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fitted_plus().predict(inputs, tasks=tasks)


def test_one_task_and_several_tasks_exclude_each_other() -> None:
    with pytest.raises(TaskError, match="expected one of them, found both"):
        fitted_plus().predict(SINGLE, task="mood", tasks="*")  # type: ignore[call-overload]


def test_an_input_that_no_task_reads_is_named() -> None:
    model = stirred(make_plus_model(TASKS[1:2]))
    with pytest.raises(DataError, match="input 1: expected a pair of texts, which all tasks of the model read"):
        model.predict(["w1"], tasks="*")


def test_values_that_are_not_finite_are_refused() -> None:
    model = fitted_plus()
    with torch.no_grad():
        model.method.hypernetwork.common["up_bias"].fill_(torch.nan)
    with pytest.raises(NotFiniteError, match="input 1"):
        model.predict(["w1"], tasks=["mood", "size"])


@pytest.mark.parametrize("container", [tuple, set, np.array, pd.Series, iter, dict.fromkeys])
def test_names_may_be_in_any_container(container: Any) -> None:
    model = fitted_plus()
    found = model.predict(["w1"], tasks=container(["mood", "size"]))
    assert {one.task for one in found[0]} == {"mood", "size"}


@pytest.mark.parametrize("feature_layer", [0, 1])
def test_an_input_whose_values_are_not_finite_is_named_by_its_number(
    feature_layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stirred(make_plus_model(TASKS, feature_layer=feature_layer))
    with torch.no_grad():
        model.backbone.embeddings.word_embeddings.weight[model.tokenizer("green")["input_ids"][0]] = torch.nan
    with pytest.raises(NotFiniteError, match="input 3"):
        model.predict(["w1", "w2", "w3 green"], tasks=["mood", "size"])


def test_a_pair_with_an_empty_second_text_is_read_as_with_one_task() -> None:
    model = fitted_plus()
    assert_close(model.predict([("w3", "")], tasks=["same"])[0][0], model.predict([("w3", "")], task="same")[0])
