"""A task as a pipeline of transformers: its answers are those of the model, in the pipeline's own form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import PAIR_TASKS, add_new, make_model, make_plus_model, stirred, tokenizer_of
from transformers import TextClassificationPipeline

from hyperadapters.config import Task
from hyperadapters.errors import BackboneError, DataError, HyperAdaptersError, TaskError
from hyperadapters.model.model import HyperAdapterModel

TEXTS = ["w1 w2 w3", "red", "w4 w5 w6 w7 good w8", "w9 " * 200]
PAIRS = [{"text": "w1 w2", "text_pair": "w3"}, {"text": "w4", "text_pair": "w5 w6 w7 w8 w9 w10"}]


@pytest.fixture(params=["plain", "bert"])
def model(request: pytest.FixtureRequest) -> HyperAdapterModel:
    """Texts of pairs are separated by sequence ids, or are one sequence with token types."""
    made = make_plus_model(preset="plus" if request.param == "plain" else "paper")
    made.tokenizer = tokenizer_of(request.param)
    assert made.heads is not None
    made.heads.set_target_scale(1, [1.0, 2.5, 7.0])
    return stirred(made).eval()


def scores(found: list[dict[str, Any]]) -> dict[str, float]:
    return {entry["label"]: entry["score"] for entry in found}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("task", "inputs"), [("mood", TEXTS), ("same", PAIRS)])
def test_every_label_has_the_probability_of_the_model(
    task: str, inputs: list[Any], batch_size: int, model: HyperAdapterModel
) -> None:
    pipe = model.to_pipeline(task)
    assert isinstance(pipe, TextClassificationPipeline)
    expected = model.predict(inputs, task=task)
    found = pipe(inputs, top_k=None, batch_size=batch_size)
    assert [scores(entry) for entry in found] == [pytest.approx(p.probabilities, abs=1e-5) for p in expected]
    assert [entry[0]["label"] for entry in found] == [prediction.answer for prediction in expected]


def test_one_text_gets_a_list_with_the_best_label(model: HyperAdapterModel) -> None:
    pipe = model.to_pipeline("mood")
    [expected] = model.predict(TEXTS[:1], task="mood")
    assert pipe(TEXTS[0]) == [
        {"label": expected.answer, "score": pytest.approx(max((expected.probabilities or {}).values()))}
    ]
    assert [entry["label"] for entry in pipe(TEXTS)] == [p.answer for p in model.predict(TEXTS, task="mood")]
    assert [len(entry) for entry in model.to_pipeline("mood", top_k=2)(TEXTS)] == [2] * len(TEXTS)
    assert "TaskPipeline" in repr(pipe)


def test_a_number_is_the_score_of_its_task(model: HyperAdapterModel) -> None:
    found = model.to_pipeline("size")(TEXTS)
    assert [entry["label"] for entry in found] == ["size"] * len(TEXTS)
    numbers = [prediction.answer for prediction in model.predict(TEXTS, task="size")]
    assert [entry["score"] for entry in found] == [pytest.approx(number, abs=1e-5, rel=1e-5) for number in numbers]


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "c"]])
def test_labels_that_do_not_exclude_each_other_have_their_own_probabilities(labels: list[str]) -> None:
    several = stirred(make_plus_model([Task.multi_label("topics", labels)]))
    found = several.to_pipeline("topics", top_k=None)(TEXTS)
    expected = several.predict(TEXTS, task="topics")
    assert [scores(entry) for entry in found] == [pytest.approx(p.probabilities, abs=1e-5) for p in expected]


def test_tasks_can_be_added_and_removed_meanwhile() -> None:
    model = stirred(make_plus_model()).eval()
    pipe = model.to_pipeline("mood", top_k=None)
    before = pipe(TEXTS)
    add_new(model)
    model.remove_task("same")
    assert [scores(entry) for entry in pipe(TEXTS)] == [pytest.approx(scores(entry), abs=1e-6) for entry in before]
    model.remove_task("mood")
    with pytest.raises(TaskError, match="Unknown task 'mood'"):
        pipe(TEXTS)


def test_the_model_is_shared_and_keeps_its_mode(model: HyperAdapterModel) -> None:
    side = model.tokenizer.padding_side
    pipe = model.train().to_pipeline("mood")
    first, second = pipe(TEXTS), pipe(TEXTS)
    assert first == second
    assert model.training
    assert pipe.model.model is model
    assert model.tokenizer.padding_side == side


@pytest.mark.parametrize(
    ("task", "inputs", "options", "message"),
    [
        ("mood", [1], {}, "expected a text or a mapping with text and text_pair, found int"),
        ("mood", PAIRS[0], {}, "a text_pair, which task 'mood' does not read"),
        ("same", "w1", {}, "no column 'text_pair'"),
        ("mood", "w1", {"max_length": 4}, "max_length: the model truncates and pads texts itself"),
    ],
)
def test_inputs_of_another_form_are_refused(
    task: str, inputs: Any, options: dict[str, Any], message: str, model: HyperAdapterModel
) -> None:
    with pytest.raises(DataError, match=message):
        model.to_pipeline(task)(inputs, **options)


def _without_config() -> HyperAdapterModel:
    model = make_plus_model(PAIR_TASKS)
    model.backbone.config = None
    return model


@pytest.mark.parametrize(
    ("make", "task", "error", "message"),
    [
        (lambda: make_model("t5"), "mood", TaskError, "found a backbone that generates text; use predict"),
        (make_plus_model, "mod", TaskError, "Unknown task 'mod'. Did you mean 'mood'"),
        (_without_config, "mood", BackboneError, "expected a transformers model, found BertModel"),
    ],
)
def test_what_cannot_be_a_pipeline_is_refused(
    make: Any, task: str, error: type[HyperAdaptersError], message: str
) -> None:
    torch.manual_seed(0)
    with pytest.raises(error, match=message):
        make().to_pipeline(task)
