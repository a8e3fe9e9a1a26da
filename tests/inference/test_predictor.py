"""Answers, whatever the form, batch and number of inputs; streams, the cache, own adapters, files and the command."""

from __future__ import annotations

import contextlib
import csv
import datetime
import gc
import io
import itertools
import json
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import (
    SPECIAL,
    VOCABULARY,
    empty_centroids,
    make_batch,
    make_model,
    save_backbone,
    tiny_backbone,
    tiny_tokenizer,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hyperadapters import cli
from hyperadapters.config import Lengths, ModelConfig, Task
from hyperadapters.core import AdapterWeights
from hyperadapters.data.examples import Example
from hyperadapters.data.sources import Row, iterate_file
from hyperadapters.errors import DataError, HyperAdaptersError, TaskError
from hyperadapters.inference.batches import best_device
from hyperadapters.inference.cache import AdapterCache
from hyperadapters.inference.predict_files import predict_file
from hyperadapters.inference.predictor import CHUNK_BATCHES, Prediction, Predictor
from hyperadapters.model.model import HyperAdapterModel

KINDS = ("bert", "t5")
HEAD_TASKS_WITH_PAIR = (
    Task.classification("colour", ["red", "blue", "green"]),
    Task.regression("size"),
    Task.classification("mood", ["bad", "good"], fields=["text", "text_pair"]),
)
TEXT_TASKS_WITH_PAIR = (
    Task.text_to_text("colour"),
    Task.regression("size"),
    Task.classification("mood", ["bad", "good"], fields=["text", "text_pair"]),
)
INPUTS: tuple[Any, ...] = (
    "w1 w2 good",
    ("w3 w4 w5 w6 w7 w8", "red blue"),
    {"text": "w9"},
    {"text": "w1 red w2", "task": "colour"},
    {"text": "w1 yes w2 w3 w4 w5 w6", "task": "size"},
    {"text": "w30 w31", "text_pair": "bad w1", "task": "mood"},
    {"text": "w12 w13 w14", "task": None},
    {"text": "w15 w16 w17 w18 w19", "task": "", "text_pair": ""},
    Example(None, "w20 w21 w22 w23"),
    Example(1, "w24 no no"),
    Example(2, "w25", "w26 w27 w28"),
    Example(0, "blue w29", None, 1),
    "w30 w31 w32 w33 w34 w35 w36",
    ["w37", "w38 w39"],
    {"text": "w1 w2 good", "task": "colour"},
)


def predictor_model(kind: str, tasks: tuple[Task, ...] | None = None, **sizes: Any) -> HyperAdapterModel:
    """A tiny model in float64 for pairs too, its adapters and prototypes large enough to show, its answers short."""
    backbone = tiny_backbone(kind, **{"initializer_range": 0.2} if kind == "bert" else {}, **sizes)
    torch.manual_seed(1)
    lengths = Lengths(input=32, target=3)
    tasks = tasks or (HEAD_TASKS_WITH_PAIR if kind == "bert" else TEXT_TASKS_WITH_PAIR)
    model = HyperAdapterModel(backbone, tasks, ModelConfig(adapter_dim=4), lengths=lengths)
    with torch.no_grad():
        for module in (model.method.hypernetwork, model.shared_adapters):
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    if model.heads is not None:
        model.heads.set_target_scale(1, [100.0, 300.0])
    model.tokenizer = tiny_tokenizer()
    return model.double().eval()


def decline_half(model: HyperAdapterModel) -> None:
    """Set the thresholds so that half of the inputs without a task are declined."""
    found = sorted(result.similarity for result in model.route(_untold(INPUTS)))
    model.method.thresholds.fill_((found[len(found) // 2] + found[len(found) // 2 - 1]) / 2)


def _untold(inputs: Iterable[Any]) -> list[Any]:
    """The inputs without a task."""
    return [
        value
        for value in inputs
        if not (isinstance(value, dict) and value.get("task"))
        and not (isinstance(value, Example) and value.task_id is not None)
    ]


def assert_same(found: Iterable[Prediction], expected: Iterable[Prediction]) -> None:
    """Equal up to 1e-5: a hundred times what float32 rounds, which models loaded from a folder compute in."""
    for one, other in zip(found, expected, strict=True):
        assert (one.task, one.text, one.routing.task) == (other.task, other.text, other.routing.task)
        assert one.routing.similarity == pytest.approx(other.routing.similarity, abs=1e-5)
        assert one.instance == pytest.approx(other.instance, abs=1e-5)
        if isinstance(other.answer, float):
            assert one.answer == pytest.approx(other.answer, rel=1e-5, abs=1e-5)
        else:
            assert (one.answer, one.target) == (other.answer, other.target)
        assert (one.probabilities is None) == (other.probabilities is None)
        assert one.probabilities is None or one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def fail(*_: Any) -> None:
    raise ZeroDivisionError


def endless() -> Iterator[str]:
    for number in itertools.count():
        yield f"w{number % 40} w{number % 7}"


# Inputs and answers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ["nearest", "soft"])
def test_answers_come_in_order_and_equal_those_of_single_inputs(kind: str, route: Any) -> None:
    model = predictor_model(kind)
    decline_half(model)
    expected = [next(Predictor(model, route=route)([value])) for value in INPUTS]
    assert sum(prediction.task is None for prediction in expected) == 4
    assert len({prediction.task for prediction in expected}) == 4
    for batch_size in (1, 2, 5, 64):
        assert_same(Predictor(model, batch_size, route)(INPUTS), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_form_of_an_input_does_not_matter(kind: str) -> None:
    model = predictor_model(kind)
    forms: list[list[Any]] = [
        ["w1 w2", {"text": "w1 w2"}, {"text": "w1 w2", "other": 3, "task": None}, Example(None, "w1 w2")],
        [("w1", "w2"), ["w1", "w2"], {"text": "w1", "text_pair": "w2"}, Example(None, "w1", "w2")],
        [{"text": "w1", "text_pair": "w2", "task": "mood"}, Example(2, "w1", "w2"), Example(2, "w1", "w2", 1)],
        [{"text": "w1", "task": "size"}, {"text": "w1", "text_pair": None, "task": "size"}, Example(1, "w1")],
    ]
    for same in forms:
        found = list(Predictor(model)(same))
        assert_same(found[1:], found[:1] * (len(same) - 1))


@pytest.mark.parametrize("container", [list, tuple, iter, lambda values: (value for value in values)])
def test_any_iterable_is_answered(container: Callable[[Any], Iterable[Any]]) -> None:
    model = predictor_model("bert")
    assert_same(Predictor(model)(container(INPUTS)), Predictor(model)(INPUTS))


def test_no_inputs_have_no_answers_and_a_single_text_is_refused() -> None:
    predictor = Predictor(predictor_model("bert"))
    assert list(predictor([])) == []
    assert list(predictor(iter(()))) == []
    for single in ("w1", {"text": "w1"}, Example(None, "w1")):
        with pytest.raises(DataError, match="put it in a list"):
            list(predictor(single))


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_for_all_inputs_overrides_their_own(kind: str) -> None:
    model = predictor_model(kind)
    inputs = ["w1", {"text": "w1", "task": "colour"}, Example(0, "w1"), Example(None, "w1")]
    found = list(Predictor(model)(inputs, task="size"))
    assert {prediction.task for prediction in found} == {"size"}
    assert_same(found, list(Predictor(model)([{"text": "w1", "task": "size"}])) * 4)


@pytest.mark.parametrize("kind", KINDS)
def test_declined_inputs_have_no_answer_but_a_routing(kind: str) -> None:
    model = predictor_model(kind)
    decline_half(model)
    found = list(zip(INPUTS, Predictor(model)(INPUTS), strict=True))
    declined = [(value, prediction) for value, prediction in found if prediction.task is None]
    assert len(declined) == 4
    for value, prediction in declined:
        assert (prediction.answer, prediction.probabilities, prediction.text, prediction.target) == (None,) * 4
        assert prediction.routing.task is None
        assert not prediction.routing.accepted
        is_pair = isinstance(value, list | tuple) or (isinstance(value, dict) and bool(value.get("text_pair")))
        # an encoder with the preset `plus` only compares an input to tasks that read such inputs
        expected = 3 if kind == "t5" else sum(task.is_pair == is_pair for task in model.tasks)
        assert len(prediction.routing.candidates) == expected
        assert prediction.routing.similarity < model.method.thresholds[0]
        assert len(prediction.instance) == 64


@pytest.mark.parametrize("kind", KINDS)
def test_without_declining_every_input_is_answered_under_its_most_similar_task(kind: str) -> None:
    model = predictor_model(kind)
    model.method.thresholds.fill_(2.0)
    found = list(Predictor(model, decline=False)(_untold(INPUTS)))
    for prediction in found:
        assert not prediction.routing.accepted
        assert prediction.task == prediction.routing.candidates[0].task
        assert (prediction.text is not None) if kind == "t5" else (prediction.answer is not None)
    assert_same(model.predict(_untold(INPUTS), decline=False), found)
    model.method.thresholds.fill_(-2.0)
    accepted = list(Predictor(model)(_untold(INPUTS)))
    assert [(p.task, p.answer, p.text) for p in accepted] == [(p.task, p.answer, p.text) for p in found]


def test_a_printed_prediction_has_no_instance_vector() -> None:
    [prediction] = predictor_model("bert").predict(["w1"])
    assert prediction.instance is not None
    assert "answer=" in repr(prediction)
    assert "instance" not in repr(prediction)


@pytest.mark.parametrize("kind", KINDS)
def test_told_inputs_are_never_declined(kind: str) -> None:
    model = predictor_model(kind)
    model.method.thresholds.fill_(2.0)
    found = list(Predictor(model)(["w1 w2", "w3"], task="colour"))
    assert [prediction.task for prediction in found] == ["colour", "colour"]
    assert all(prediction.routing.task is None for prediction in found)


def test_probabilities_are_the_softmax_of_the_logits_by_label() -> None:
    model = predictor_model("bert")
    found = list(Predictor(model)(INPUTS))
    assert {prediction.task for prediction in found} == {"colour", "size", "mood"}
    for prediction in found:
        task = model.tasks[model.task_id(str(prediction.task))]
        if task.kind == "regression":
            assert prediction.probabilities is None
            continue
        assert prediction.probabilities is not None
        assert tuple(prediction.probabilities) == task.labels
        assert sum(prediction.probabilities.values()) == pytest.approx(1.0)
        assert prediction.answer == max(prediction.probabilities, key=prediction.probabilities.__getitem__)
        assert prediction.target == task.labels.index(str(prediction.answer))
    batch = model.collator([Example(0, "w1 red w2")])
    logits = model(**batch).logits[0]
    assert list((found[3].probabilities or {}).values()) == pytest.approx(logits.softmax(dim=0).tolist(), abs=1e-5)


def test_a_regression_head_answers_with_a_number_in_the_units_of_its_targets() -> None:
    model = predictor_model("bert")
    (prediction,) = Predictor(model)(["w1 w2"], task="size")
    logits = model(**model.collator([Example(1, "w1 w2")])).logits
    assert isinstance(prediction.answer, float)
    assert prediction.answer == prediction.target
    assert prediction.answer == pytest.approx(logits.item(), abs=1e-3)
    assert 100 < prediction.answer < 300


def test_a_text_to_text_model_answers_with_its_text() -> None:
    model = predictor_model("t5")
    (prediction,) = Predictor(model)(["w1 w2 w3"], task="colour")
    tokens = model.generate(
        **model.collator.inputs([Example(0, "w1 w2 w3")]), task_ids=torch.tensor([0]), max_new_tokens=3, do_sample=False
    )
    text = tiny_tokenizer().decode(tokens[0], skip_special_tokens=True)
    assert text
    assert prediction.text == prediction.answer == prediction.target == text
    assert prediction.probabilities is None


def test_a_text_is_read_by_the_label_words_and_what_is_none_of_them_is_no_answer() -> None:
    (written,) = Predictor(predictor_model("t5"))([("w1", "w2")], task="mood")
    assert (written.answer, written.target) == (None, None)
    assert written.text
    words = {"bad": "w1", "good": str(written.text)}
    mood = Task.classification("mood", ["bad", "good"], fields=["text", "text_pair"], verbalizer=words)
    (read,) = Predictor(predictor_model("t5", (*TEXT_TASKS_WITH_PAIR[:2], mood)))([("w1", "w2")], task="mood")
    assert (read.answer, read.target, read.text) == ("good", 1, written.text)
    assert read.probabilities is None


def _number_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the size of the tiny one whose words are numbers, but for two."""
    words = [*SPECIAL, *(str(index / 4) for index in range(len(VOCABULARY) - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def test_a_text_to_text_regression_is_read_as_a_number_or_not_at_all() -> None:
    model = predictor_model("t5")
    (unreadable,) = Predictor(model)(["w1 w2"], task="size")
    assert unreadable.text
    assert (unreadable.answer, unreadable.target) == (None, None)
    model.tokenizer = _number_tokenizer()
    model.lengths = Lengths(input=32, target=2)
    backbone: Any = model.backbone
    backbone.generation_config.forced_eos_token_id = 1  # one word is written, then the end
    (read,) = Predictor(model)(["0.25 0.5"], task="size")
    assert read.answer == read.target == float(str(read.text))


@pytest.mark.parametrize("kind", KINDS)
def test_the_routing_of_a_prediction_is_where_the_text_goes_by_itself(kind: str) -> None:
    model = predictor_model(kind)
    texts = ["w1 w2", "w3 w4 w5", "red"]
    expected = [result.similarity for result in model.route(texts)]
    for task in (None, "colour", "size"):
        found = [prediction.routing.similarity for prediction in Predictor(model)(texts, task)]
        assert found == pytest.approx(expected, abs=1e-5)


def test_the_routing_of_a_prediction_does_not_depend_on_the_prompt_of_its_task() -> None:
    model = predictor_model("t5", (Task.text_to_text("colour", template="red : {text}"), *TEXT_TASKS_WITH_PAIR[1:]))
    (routed,) = model.route(["w1 w2"])
    (told,) = Predictor(model)(["w1 w2"], task="colour")
    assert told.routing.similarity == pytest.approx(routed.similarity, abs=1e-5)


# Streams


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_answers_come_after_a_bounded_number_of_inputs(kind: str) -> None:
    taken: list[str] = []
    answers = Predictor(predictor_model(kind), batch_size=1)(taken.append(text) or text for text in endless())
    assert not taken
    assert next(answers).task is not None
    assert len(taken) <= CHUNK_BATCHES
    for _ in range(CHUNK_BATCHES):
        next(answers)
    assert len(taken) <= 2 * CHUNK_BATCHES


def test_a_long_stream_takes_no_more_memory_than_a_short_one() -> None:
    model = predictor_model("bert", num_hidden_layers=2)
    answers = Predictor(model, batch_size=4)(endless())
    tracemalloc.start()
    try:
        sizes = []
        for _ in range(3):
            for _ in range(4 * CHUNK_BATCHES):
                next(answers)
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[-1] - sizes[0] < 50_000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (7, "input 41: expected a string"),
        ({"txt": "w1"}, "input 41: no column 'text'"),
        ({"text": None}, "input 41: expected a string in 'text', found None"),
        ({"text": "w1", "task": "colours"}, "input 41: Unknown task 'colours'. Did you mean 'colour'"),
        ({"text": "w1", "task": 1}, "input 41: Unknown task '1'"),
        ({"text": "w1", "task": 0}, "input 41: Unknown task '0'"),
        ({"text": "w1", "task": "mood"}, "input 41: no column 'text_pair'"),
        ({"text": "w1", "text_pair": 0}, "input 41: expected a string in 'text_pair', found 0"),
        (("w1", "w2", "w3"), "input 41: expected a string, a pair"),
        ("w1 \ud800", "input 41: 'text' is not valid Unicode"),
        (Example(3, "w1"), "input 41: "),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_wrong_input_is_named_after_earlier_chunks_were_answered(wrong: Any, message: str) -> None:
    inputs = [*(["w1 w2"] * 40), wrong, "w1"]
    answers = Predictor(predictor_model("bert", num_hidden_layers=2), batch_size=1)(inputs)
    for _ in range(CHUNK_BATCHES):
        next(answers)
    with pytest.raises(HyperAdaptersError) as caught:
        next(answers)
    assert message in str(caught.value)


@pytest.mark.parametrize("task_id", [3, -1])
def test_an_example_of_an_unknown_task_is_refused_by_a_text_to_text_model_too(task_id: int) -> None:
    with pytest.raises(TaskError, match="input 2"):
        list(Predictor(predictor_model("t5"))(["w1", Example(task_id, "w1")]))


def test_an_unknown_task_for_all_is_refused() -> None:
    with pytest.raises(TaskError, match=r"Unknown task 'mod'. Did you mean 'mood'\?"):
        next(Predictor(predictor_model("bert"))(["w1"], task="mod"))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(batch_size: int) -> None:
    with pytest.raises((ValueError, HyperAdaptersError)):
        list(Predictor(predictor_model("bert"), batch_size=batch_size)(["w1"]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_mode_is_restored_also_when_the_stream_is_abandoned(kind: str) -> None:
    model = predictor_model(kind).train()
    modes = {name: module.training for name, module in model.named_modules()}
    answers = Predictor(model, batch_size=1)(endless())
    next(answers)
    assert {name: module.training for name, module in model.named_modules()} == modes
    del answers
    list(Predictor(model)(["w1"]))
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_in_a_batch_restores_mode_adapters_and_answers(kind: str) -> None:
    model, batch = predictor_model(kind), make_batch(kind)
    if kind == "bert":  # one of its tasks reads pairs
        batch["sequence_ids"] = torch.zeros_like(batch["input_ids"])
    predictor = Predictor(model, batch_size=4)
    expected = list(predictor(INPUTS))
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    layers: Any = model.backbone
    handle = (layers.decoder.block if kind == "t5" else layers.encoder.layer)[-1].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        list(predictor(INPUTS))
    handle.remove()
    assert {name: module.training for name, module in model.named_modules()} == modes
    calls: list[int] = []
    handle = model.method.hypernetwork.register_forward_hook(lambda *_: calls.append(1))
    model(**batch)
    handle.remove()
    assert calls == [1]  # and not from the predictor's cache
    assert_same(predictor(INPUTS), expected)


def test_answers_are_free_of_dropout() -> None:
    model = predictor_model("t5", dropout_rate=0.5)
    expected = list(Predictor(model)(INPUTS))
    assert_same(Predictor(model.train())(INPUTS), expected)


@pytest.mark.parametrize("inputs", [["w1", "w2"], iter(["w1", "w2"])], ids=["list", "iterator"])
def test_a_progress_bar_goes_to_the_error_stream(inputs: Iterable[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert len(list(Predictor(predictor_model("bert"))(inputs, progress=True))) == 2
    assert capfd.readouterr().out == ""


def test_a_stream_never_answers_under_another_task_when_one_is_removed_meanwhile() -> None:
    model = predictor_model("bert")
    inputs = [{"text": "w1 w2", "task": "size"}] * (CHUNK_BATCHES * 2)
    answers = Predictor(model, batch_size=1)(inputs)
    expected = next(answers)
    model.remove_task("colour")
    with contextlib.suppress(TaskError):  # to stop is as good as to go on
        for found in answers:
            assert_same([found], [expected])


# Cache


def _requests(model: HyperAdapterModel) -> list[list[int]]:
    """Fills with the task ids of every call of the hypernetwork."""
    requests: list[list[int]] = []
    model.method.prototypes.register_forward_pre_hook(lambda _, args: requests.append(args[0].tolist()))
    return requests


def _size(model: HyperAdapterModel) -> int:
    """Bytes of the adapters of one task."""
    return sum(tensor.nbytes for tensor in model.method.adapters(torch.tensor([0])).values())


def _assert_close(found: AdapterWeights, expected: AdapterWeights) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_hypernetwork_runs_once_a_task_over_many_batches(kind: str) -> None:
    model = predictor_model(kind)
    rows: list[int] = []
    model.method.hypernetwork.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    predictor = Predictor(model, batch_size=2)
    found = [*predictor(INPUTS), *predictor(INPUTS), *predictor(["w1 w2"] * 9, "colour")]
    assert sum(rows) == len({prediction.task for prediction in found}) == 3


def test_the_task_used_least_recently_goes_first() -> None:
    model = predictor_model("bert")
    cache = AdapterCache(model, 2 * _size(model))
    requests = _requests(model)
    for task_id in (0, 1, 0, 2, 0, 1, 2):
        cache(torch.tensor([task_id]))
    assert requests == [[0], [1], [2], [1], [2]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [0, 0.99, 1, 2.5, 10])
def test_the_cache_never_keeps_more_than_its_bound_and_gives_what_the_model_generates(kind: str, tasks: float) -> None:
    model = predictor_model(kind)
    bound = int(tasks * _size(model))
    cache = AdapterCache(model, bound)
    with torch.no_grad():
        for ids in ([0], [0, 1, 2], [2], [1, 2], [0, 2], [0, 1, 2], [1]):
            _assert_close(cache(torch.tensor(ids)), model.method.adapters(torch.tensor(ids)))
            assert cache.num_bytes <= bound
    assert cache.num_bytes == min(3, int(tasks)) * _size(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_predictor_without_room_for_adapters_still_answers(kind: str) -> None:
    model = predictor_model(kind)
    assert_same(Predictor(model, 3, cache_bytes=0)(INPUTS), Predictor(model, 3)(INPUTS))


def _examples(kind: str) -> list[dict[str, str]]:
    return [{"text": f"w{index} w{index + 1} {label}", "label": label} for index in range(3) for label in ("yes", "no")]


def _extra_task(kind: str) -> Task:
    return Task.classification("extra", ["no", "yes"]) if kind == "bert" else Task.text_to_text("extra")


def _refit_size(model: HyperAdapterModel) -> None:
    numbers = [50.0 * index for index in range(4)]
    model.tokenizer = tiny_tokenizer([*VOCABULARY[:-4], *map(str, numbers)])  # a text-to-text model must write them
    rows = [{"text": f"w{index}", "label": number} for index, number in enumerate(numbers)]
    model.refit_task("size", rows, fit="prototype", init="random", max_steps=2)


CHANGES: dict[str, Callable[[HyperAdapterModel, str], Any]] = {
    "add": lambda model, kind: model.add_task(_extra_task(kind), _examples(kind), max_steps=2),
    "remove": lambda model, _: model.remove_task("colour"),
    "rename": lambda model, _: model.rename_task("size", "length"),
    "refit": lambda model, _: _refit_size(model),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_of_tasks_the_cache_gives_the_new_adapters(kind: str, change: str) -> None:
    model = predictor_model(kind)
    cache = AdapterCache(model, 2**20)
    predictor = Predictor(model, batch_size=4)
    list(predictor(INPUTS))
    before = cache(torch.tensor([0, 1, 2]))
    CHANGES[change](model, kind)
    ids = torch.arange(len(model.tasks))
    with torch.no_grad():
        _assert_close(cache(ids), model.method.adapters(ids))
        changed = not torch.allclose(cache(torch.tensor([1]))["up_weight"], before.task(1)["up_weight"])
    assert changed == (change in ("remove", "refit"))
    inputs: list[Any] = [
        {"text": "w1 w2", "text_pair": "w3" if task.is_pair else None, "task": task.name} for task in model.tasks
    ]
    inputs += ["w1 w2", "w3"]
    found = list(predictor(inputs))
    assert [prediction.task for prediction in found[: len(ids)]] == [task.name for task in model.tasks]
    assert_same(found, Predictor(model, batch_size=4)(inputs))


def test_a_refitted_task_answers_anew_and_the_others_as_before() -> None:
    model = predictor_model("bert")
    predictor = Predictor(model)
    inputs = [{"text": "w1 w2", "text_pair": "w3" if task.is_pair else None, "task": task.name} for task in model.tasks]
    before = list(predictor(inputs))
    CHANGES["refit"](model, "bert")
    after = list(predictor(inputs))
    assert after[0].answer == before[0].answer
    assert after[0].probabilities == before[0].probabilities
    assert after[2].probabilities == before[2].probabilities
    assert after[1].answer != before[1].answer


# Mixed batches: a task with an adapter of its own, several options together


def own_model(kind: str) -> HyperAdapterModel:
    """A model whose last task (id 3) has an adapter of its own, unlike any generated one."""
    model = make_model(kind)
    model.tokenizer = tiny_tokenizer()
    model.add_task(_extra_task(kind), _examples(kind), fit="adapter", max_steps=4)
    assert list(model.method.own_adapters) == ["3"]
    with torch.no_grad():
        for parameter in model.method.own_adapters.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def own_batch(kind: str) -> dict[str, Tensor]:
    batch = make_batch(kind)
    batch["task_ids"] = torch.tensor([3, 0, 3, 2, 1, 3])
    if kind == "bert":
        batch["labels"] = torch.tensor([1.0, 2.0, 0.0, 1.0, -0.5, 1.0])
    return batch


def _row(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in batch.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_its_own_is_used_and_by_its_task_only(kind: str) -> None:
    model, batch = own_model(kind), own_batch(kind)
    before = model(**batch).logits.nan_to_num(neginf=0)
    with torch.no_grad():
        for parameter in model.method.own_adapters.parameters():
            parameter.zero_()
    changed = (model(**batch).logits.nan_to_num(neginf=0) - before).flatten(1).abs().amax(dim=1) > 1e-5
    assert changed.tolist() == [True, False, True, False, False, True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("told", "route"), [(True, "nearest"), (False, "nearest"), (False, "soft")])
def test_rows_mixed_with_a_task_of_its_own_adapter_equal_single_rows(kind: str, told: bool, route: Any) -> None:
    model, batch = own_model(kind).double(), own_batch(kind)
    if not told:
        for name in ("task_ids", "labels"):
            value = batch.pop(name)
        if kind == "t5":
            batch["decoder_input_ids"] = value
        keys = empty_centroids(model)
        instances = model.instance_vectors(batch["input_ids"], batch["attention_mask"]).detach()
        with torch.no_grad():  # some rows go to the task of its own adapter, some to others
            keys[3, 0] = instances[0]
            keys[0, 0] = instances[1]
    mixed = model(**batch, route=route)
    assert len(mixed.task_ids.unique()) > 1
    assert 3 in mixed.task_ids
    for row in range(6):
        alone = model(**_row(batch, row), route=route).logits
        together = mixed.logits[row : row + 1, ..., : alone.shape[-1]]
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_mixed_with_a_task_of_its_own_adapter_equal_single_rows_under_autocast(kind: str) -> None:
    model, batch = own_model(kind), own_batch(kind)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**batch).logits.float()
        for row in range(6):
            alone = model(**_row(batch, row)).logits.float()
            together = mixed[row : row + 1, ..., : alone.shape[-1]]
            largest = alone.abs()[alone.isfinite()].max().item()
            torch.testing.assert_close(together, alone, atol=0.05 * max(1.0, largest), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_mixed_batch_are_the_sum_over_its_rows_under_checkpointing(kind: str) -> None:
    model, batch = own_model(kind).double().train(), own_batch(kind)
    model.activation_checkpointing_enable()

    def add_gradients(rows: dict[str, Tensor]) -> None:
        model(**rows, reduction="sum").losses.task.backward()

    add_gradients(batch)
    mixed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any(
        name.startswith("method.own_adapters.3.") and gradient.abs().sum() > 0 for name, gradient in mixed.items()
    )
    model.zero_grad()
    for row in range(6):
        add_gradients(_row(batch, row))
    for name, parameter in model.named_parameters():
        if name in mixed:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, mixed[name], atol=1e-5, rtol=1e-4, msg=name)


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "beams, several returned": {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
}


@pytest.mark.parametrize(("told", "route"), [(True, "nearest"), (False, "nearest"), (False, "soft")])
@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION.keys())
def test_generation_from_encoded_with_own_adapters_equals_generation_row_by_row(
    told: bool, route: Any, options: dict[str, Any]
) -> None:
    model, batch = own_model("t5").double(), own_batch("t5")  # in float64, where rounding decides no token
    batch.pop("labels")
    batch = {name: value[:4] for name, value in batch.items()}
    if not told:
        batch.pop("task_ids")
        with torch.no_grad():
            empty_centroids(model)[3, 0] = model.instance_vectors(**batch)[0]
    options = {**options, "route": route, "max_new_tokens": 3, "min_new_tokens": 3}
    lower_output = model.forward_lower_layers(batch["input_ids"], batch["attention_mask"])
    together = model.generate(**batch, lower_output=lower_output, **options)
    assert torch.equal(model.generate(**batch, **options), together)
    returned = options.get("num_return_sequences", 1)
    assert len(together) == 4 * returned
    for row in range(4):
        alone = model.generate(**_row(batch, row), **options)
        assert torch.equal(together[row * returned : (row + 1) * returned], alone)


@pytest.mark.parametrize("route", ["nearest", "soft"])
def test_sampling_repeats_itself_for_a_fixed_seed_and_batch(route: Any) -> None:
    model, batch = own_model("t5").double(), own_batch("t5")  # as rounding could change what is drawn
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 5, "min_new_tokens": 5}
    drawn = []
    for seed, lower_output in ((3, None), (3, model.forward_lower_layers(**inputs)), (4, None)):
        torch.manual_seed(seed)
        drawn.append(model.generate(**inputs, route=route, lower_output=lower_output, **options))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert len({tuple(row) for row in drawn[0][:3].tolist()}) > 1


@pytest.mark.parametrize("calls", [1, 3])
def test_an_exception_in_the_middle_of_generate_leaves_nothing_behind(calls: int) -> None:
    model, batch = own_model("t5"), own_batch("t5")
    batch.pop("labels")
    options = {"num_beams": 2, "do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    before = model.generate(**batch, **options)
    seen: list[int] = []

    def fail_late(*_: Any) -> None:
        seen.append(1)
        if len(seen) == calls:
            raise ZeroDivisionError

    backbone: Any = model.backbone
    handle = backbone.decoder.block[1].register_forward_pre_hook(fail_late)
    with pytest.raises(ZeroDivisionError):
        model.generate(**batch, **options)
    handle.remove()
    with pytest.raises(RuntimeError, match="no task is active"):
        backbone.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=2)
    assert torch.equal(model.generate(**batch, **options), before)


# Making a predictor


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by backbone; no input reaches their thresholds."""
    folders = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        backbone = save_backbone(folder / "backbone", kind, **{"initializer_range": 0.2} if kind == "bert" else {})
        tasks = HEAD_TASKS_WITH_PAIR if kind == "bert" else TEXT_TASKS_WITH_PAIR
        torch.manual_seed(0)
        model = HyperAdapterModel.from_backbone(str(backbone), tasks, adapter_dim=4)
        with torch.no_grad():
            for parameter in model.method.hypernetwork.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.lengths = Lengths(input=32, target=3)
        model.method.thresholds.fill_(1.5)
        model.save_pretrained(folder / "run")
        folders[kind] = folder / "run"
    return folders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_a_predictor_is_loaded_onto_a_device(runs: dict[str, Path], kind: str, device: Any) -> None:
    predictor = Predictor.from_pretrained(runs[kind], device=device, batch_size=3, decline=False)
    assert {parameter.device.type for parameter in predictor.model.parameters()} == {
        best_device().type if device is None else "cpu"
    }
    model = HyperAdapterModel.from_pretrained(runs[kind])
    assert_same(predictor(INPUTS), Predictor(model, decline=False)(INPUTS))


def test_an_unknown_route_is_refused_at_once(runs: dict[str, Path]) -> None:
    with pytest.raises(TaskError, match=r"Unknown route 'sof'. Did you mean 'soft'\?"):
        Predictor(predictor_model("bert"), route="sof")  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="Unknown route 'hard'"):
        Predictor.from_pretrained(runs["bert"], route="hard")


# The command `predict`

TEXTS = (
    "w1 w2",
    'commas, semicolons; and "quotes", "" too',
    "two\nlines",
    "two\r\nlines",
    "tab\there",
    "grüße, 你好, 🦜, \u2028 separators \u0085",
    "'=1+1",
    "",
    "  spaces  ",
    "back\\slash \\n",
)


def predict(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["hyperadapters", "predict", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


ROWS: list[dict[str, Any]] = [
    *({"text": text} for text in TEXTS),
    *({"text": text, "task": "colour"} for text in TEXTS),
    *({"text": text, "text_pair": text[::-1], "task": "mood"} for text in TEXTS if text),
    {"text": "w1", "task": "size"},
    {"text": "w1", "text_pair": "w2, \n w3"},
]


@pytest.mark.parametrize("kind", KINDS)
def test_predict_writes_json_lines_with_the_answers_of_a_predictor(
    kind: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    assert predict(monkeypatch, runs[kind], "--input", source, "--output", output, "--batch-size", 4) == 0
    expected = Predictor.from_pretrained(runs[kind])(ROWS)
    for record, row, prediction in zip(read_jsonl(output), ROWS, expected, strict=True):
        assert record["text"] == row["text"]
        assert record.get("text_pair") == row.get("text_pair")
        assert record["routed"] == ("task" not in row)
        assert record["task"] == prediction.task == row.get("task")
        if isinstance(prediction.answer, float):
            assert record["answer"] == pytest.approx(prediction.answer, abs=1e-4)
        else:
            assert record["answer"] == prediction.answer
        assert record.get("output") == prediction.text
        assert record.get("probabilities") == (
            None if prediction.probabilities is None else pytest.approx(prediction.probabilities, abs=1e-5)
        )
        assert record["similarity"] == pytest.approx(prediction.routing.similarity, abs=1e-5)
        has_margin = len(prediction.routing.candidates) > 1
        assert record["margin"] == (pytest.approx(prediction.routing.margin, abs=1e-5) if has_margin else None)
        assert list(record["candidates"]) == [candidate.task for candidate in prediction.routing.candidates]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_predict_writes_csv_that_is_read_back_as_it_was(
    kind: str, ending: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / f"in.{ending}"
    if ending == "jsonl":
        write_jsonl(source, ROWS)
    elif ending == "csv":
        with source.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ("task", "text", "text_pair"))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        pq.write_table(pa.Table.from_pylist([{"text_pair": None, "task": None, **row} for row in ROWS]), source)
    for output in (tmp_path / "out.csv", tmp_path / "out.jsonl"):
        assert predict(monkeypatch, runs[kind], "-i", source, "-o", output, "--no-decline", "--batch-size", 4) == 0
    records, cells = read_jsonl(tmp_path / "out.jsonl"), read_csv(tmp_path / "out.csv")
    assert list(cells[0]) == [
        "text", "text_pair", "task", "routed", "answer", "probabilities", "output", "similarity", "margin", "candidates"
    ]  # fmt: skip
    for record, row, given in zip(records, cells, ROWS, strict=True):
        assert row["text"] == given["text"]
        assert row["text_pair"] == given.get("text_pair", "")
        for name in ("task", "routed", "answer", "output", "similarity", "margin"):
            value = record.get(name)
            assert row[name] == ("" if value is None else str(value)), name
        for name in ("probabilities", "candidates"):
            assert (json.loads(row[name]) if row[name] else None) == record.get(name)


def test_a_lone_carriage_return_survives_csv(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", [{"text": "w1\rw2"}, {"text": "w3"}]), tmp_path / "out.csv"
    assert predict(monkeypatch, runs["bert"], "--input", source, "--output", output) == 0
    assert [row["text"] for row in read_csv(output)] == ["w1\rw2", "w3"]


@pytest.mark.parametrize("kind", KINDS)
def test_predict_declines_unless_told_not_to(
    kind: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": "w1 w2"}, {"text": "w3", "task": "colour"}]
    source, output = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert predict(monkeypatch, runs[kind], "--input", source, "--output", output) == 0
    declined, told = read_jsonl(output)
    assert (declined["task"], declined["answer"], declined["routed"]) == (None, None, True)
    assert "probabilities" not in declined
    assert "output" not in declined
    assert len(declined["candidates"]) == (2 if kind == "bert" else 3)  # a task of pairs does not read it
    assert (told["task"], told["routed"]) == ("colour", False)
    assert predict(monkeypatch, runs[kind], "--input", source, "--output", output, "--no-decline") == 0
    answered = read_jsonl(output)
    assert answered[0]["task"] == next(iter(declined["candidates"]))
    assert answered[0].get("answer") or answered[0].get("output")
    assert answered[1] == told


def test_predict_with_a_soft_route_answers_from_mixtures(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"w{index} w{index + 1}"} for index in range(6)]
    source, output = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    found = {}
    for route in ("nearest", "soft"):
        arguments = ("--input", source, "--output", output, "--route", route, "--no-decline")
        assert predict(monkeypatch, runs["bert"], *arguments) == 0
        found[route] = read_jsonl(output)
        expected = Predictor.from_pretrained(runs["bert"], route=route, decline=False)(rows)
        for record, prediction in zip(found[route], expected, strict=True):
            assert record["task"] == prediction.task
            assert record["answer"] == pytest.approx(prediction.answer, abs=1e-4)
            if prediction.probabilities is not None:
                assert record["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-5)
    values = {name: [row.get("probabilities") or row["answer"] for row in rows] for name, rows in found.items()}
    assert values["soft"] != values["nearest"]


def test_a_wrong_route_ends_with_code_2_and_leaves_an_earlier_output(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", [{"text": "w1"}]), tmp_path / "out.jsonl"
    output.write_text("earlier")
    assert predict(monkeypatch, runs["bert"], "--input", source, "--output", output, "--route", "softt") == 2
    assert "Unknown route 'softt'. Did you mean 'soft'?" in capsys.readouterr().err
    assert output.read_text() == "earlier"


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
@pytest.mark.parametrize("earlier", [True, False])
def test_an_error_in_a_late_row_leaves_the_output_folder_as_it_was(
    ending: str,
    earlier: bool,
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"text": "w1 w2"}] * 139
    source = write_jsonl(tmp_path / "in.jsonl", [*rows, {"text": "w1", "task": "tint"}, *rows[:3]])
    folder = tmp_path / "answers"
    folder.mkdir()
    if earlier:
        (folder / f"out.{ending}").write_text("earlier")
    before = {path.name: path.read_text() for path in folder.iterdir()}
    seen: list[list[str]] = []
    original = Predictor.from_pretrained.__func__  # type: ignore[attr-defined]

    def watched(*arguments: Any, **options: Any) -> Predictor:
        predictor: Predictor = original(Predictor, *arguments, **options)
        predictor.model.register_forward_hook(lambda *_: seen.append(sorted(os.listdir(folder))))
        return predictor

    monkeypatch.setattr(Predictor, "from_pretrained", watched)
    code = predict(
        monkeypatch, runs["bert"], "--input", source, "--output", folder / f"out.{ending}", "--batch-size", 4
    )
    assert code == 2
    assert f"{source}, line 140: Unknown task 'tint'" in capsys.readouterr().err
    assert len(seen) == 32
    assert all((f"out.{ending}" in names) == earlier and len(names) == earlier + 1 for names in seen)
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


def test_the_output_may_be_the_input(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"w{index}"} for index in range(150)])
    arguments = ("--input", source, "--output", source, "--task", "colour", "--batch-size", 4)
    assert predict(monkeypatch, runs["bert"], *arguments) == 0
    assert [row["text"] for row in read_jsonl(source)] == [f"w{index}" for index in range(150)]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_answers_are_printed_as_they_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"w{index % 40} ü" for index in range(3 * CHUNK_BATCHES)]
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    model = predictor_model("bert")
    printed: list[str] = []
    pieces: list[int] = []

    def read(*_: Any) -> None:
        lines = capsys.readouterr().out.splitlines()
        printed.extend(lines)
        pieces.append(len(lines))

    model.register_forward_hook(read)
    predict_file(Predictor(model, batch_size=1), source, None, None)
    read()
    assert [json.loads(line)["text"] for line in printed] == texts
    assert [count for count in pieces if count] == [CHUNK_BATCHES] * 3


def test_a_large_file_is_answered_in_flat_memory(tmp_path: Path) -> None:
    predictor = Predictor(predictor_model("bert", num_hidden_layers=2), batch_size=32)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    peaks = []
    for rows in (32 * CHUNK_BATCHES, 3000):
        write_jsonl(source, ({"text": f"w{index % 40}"} for index in range(rows)))
        tracemalloc.start()
        try:
            predict_file(predictor, source, "colour", output)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert len(read_jsonl(output)) == rows
    assert peaks[1] < 1.5 * peaks[0], peaks


OTHERS = [{"id": 7, "text": "w1", "task": "colour", "meta": {"a": [1]}}, {"id": None, "text": "w2", "meta": {}}]


def test_predict_keeps_the_other_columns_of_its_input(tmp_path: Path) -> None:
    predictor, source = Predictor(predictor_model("bert")), write_jsonl(tmp_path / "in.jsonl", OTHERS)
    predict_file(predictor, source, None, tmp_path / "out.jsonl")
    assert [(row["id"], row["meta"]) for row in read_jsonl(tmp_path / "out.jsonl")] == [(7, {"a": [1]}), (None, {})]
    predict_file(predictor, source, None, tmp_path / "out.csv")
    assert [(row["id"], row["meta"]) for row in read_csv(tmp_path / "out.csv")] == [("7", '{"a": [1]}'), ("", "{}")]
    assert list(read_csv(tmp_path / "out.csv")[0])[-2:] == ["id", "meta"]


def test_other_columns_of_parquet_are_valid_json(tmp_path: Path) -> None:
    columns = {"text": ["w1", "w2"], "score": [float("nan"), 0.5], "day": [datetime.date(2024, 1, 2)] * 2}
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    predict_file(Predictor(predictor_model("bert")), tmp_path / "in.parquet", "colour", tmp_path / "out.jsonl")
    found = [(row["score"], row["day"]) for row in read_jsonl(tmp_path / "out.jsonl")]
    assert found == [(None, "2024-01-02"), (0.5, "2024-01-02")]


@pytest.mark.parametrize("name", ["answer", "routed", "candidates"])
def test_other_column_with_the_name_of_an_output_is_refused(tmp_path: Path, name: str) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "w1", name: "x"}])
    with pytest.raises(
        DataError, match=f"in.jsonl, line 1: the column '{name}' is also a column of the output; rename it"
    ):
        predict_file(Predictor(predictor_model("bert")), source, None, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_column_that_a_csv_output_has_no_place_for_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "w1"}, {"text": "w2", "id": 1}])
    with pytest.raises(DataError, match=r"row 2: the column 'id' is not in the first row.*choose .* \.jsonl"):
        predict_file(Predictor(predictor_model("bert")), source, None, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_predict_reads_json_lines_from_standard_input(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def give(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))

    give('{"text": "w1 ü"}\n\n{"text": "w2"}\n'.encode())
    assert predict(monkeypatch, runs["bert"], "-i", "-", "-o", tmp_path / "out.jsonl") == 0
    assert [row["text"] for row in read_jsonl(tmp_path / "out.jsonl")] == ["w1 ü", "w2"]
    give(b"text,label\nw1,a\n")
    assert predict(monkeypatch, runs["bert"], "-i", "-") == 2
    assert "standard input, line 1: expected a JSON object on each line" in capsys.readouterr().err
    give(b'{"text": "\xff"}')
    assert predict(monkeypatch, runs["bert"], "-i", "-") == 2
    assert "standard input, line 1: not UTF-8" in capsys.readouterr().err
    assert predict(monkeypatch, runs["bert"], "-i", "-", "--delimiter", ";") == 2
    assert "standard input is read as JSON-lines" in capsys.readouterr().err


def test_predict_reads_a_file_with_another_delimiter(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_text("id;text\n1;w1, w2\n")
    assert predict(monkeypatch, runs["bert"], "-i", source, "-o", output) == 2
    assert "seems to be delimited by ';'" in capsys.readouterr().err
    assert predict(monkeypatch, runs["bert"], "-i", source, "-o", output, "--delimiter", ";") == 0
    assert [(row["id"], row["text"]) for row in read_jsonl(output)] == [("1", "w1, w2")]
    assert predict(monkeypatch, runs["bert"], "-i", source, "-o", output, "--delimiter", ";;") == 2
    assert "delimiter: expected one character" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_each_line_gets_an_answer(tmp_path: Path, ending: str) -> None:
    texts = ["w1", "", 'w2 "', "w3\u2028w4", "w5\x85", "w6\x00"]
    source, output = tmp_path / "in.csv", tmp_path / f"out.{ending}"
    source.write_text("text\n" + "".join(f"{text}\n" for text in texts), encoding="utf-8", newline="")
    predict_file(Predictor(predictor_model("bert")), source, "colour", output)
    assert [row["text"] for row in (read_csv if ending == "csv" else read_jsonl)(output)] == texts


# Files row by row


def test_json_lines_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "w1"}\n\n{"text": "w2"}\n{"text": \n')
    rows = iterate_file(path)
    assert [next(rows).values["text"], next(rows).values["text"]] == ["w1", "w2"]
    with pytest.raises(DataError, match=f"^{path}, line 4: expected a JSON object on each line"):
        next(rows)


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_csv_rows_are_read_one_by_one(tmp_path: Path, ending: str, delimiter: str) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_text('text,label\nw1,a\n"w2\nw3",b\nw4\n'.replace(",", delimiter))
    rows = iterate_file(path)
    assert [next(rows).values["text"], next(rows).values["text"]] == ["w1", "w2\nw3"]
    with pytest.raises(DataError, match=f"^{path}, line 5: expected 2 cells"):
        next(rows)


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_late_line_that_is_not_utf8_is_named_after_the_rows_before_it(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    lines = [b'{"text": "%b"}' % (b"w" * 90) if ending == "jsonl" else b"w" * 90] * 4000
    lines[0] = lines[0] if ending == "jsonl" else b"text"
    lines[3000] = lines[3000].replace(b"www", b"w\xffw", 1)
    path.write_bytes(b"\n".join(lines) + b"\n")
    read: list[Row] = []
    with pytest.raises(DataError, match=f"^{path}, line 3001: not UTF-8: invalid start byte; save the file as UTF-8"):
        read.extend(iterate_file(path))
    assert 2500 < len(read) <= 3000


def test_parquet_rows_are_read_before_a_later_part_that_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": [f"w{index} " * 20 for index in range(8000)]})
    pq.write_table(table, path, row_group_size=500, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[-43_000:-40_000] = b"\xff" * 3000
    path.write_bytes(content)
    rows = iterate_file(path)
    first = next(rows)
    assert (first.values["text"], first.place) == ("w0 " * 20, f"{path}, row 1")
    with pytest.raises(DataError, match=f"^{path}: not a readable Parquet file"):
        list(rows)


def test_a_large_parquet_file_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": [f"w{index}" for index in range(30_000)]}), path, row_group_size=2000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in iterate_file(path)) == 30_000
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reading fails")
def test_an_input_that_cannot_be_read_is_named_and_not_the_output(
    tmp_path: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.symlink_to("/proc/self/mem")  # a regular file that gives an input/output error
    assert predict(monkeypatch, runs["bert"], "--input", source, "--output", tmp_path / "out.jsonl") == 2
    message = capsys.readouterr().err
    assert str(source) in message
    assert "out.jsonl" not in message
    assert not (tmp_path / "out.jsonl").exists()
