"""Routing by densities: on whole models, with added tasks, in checkpoints, and for texts without words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PAIR_TASKS, make_frozen_texts_model, make_model, make_plus_model, save_backbone, tiny_tokenizer
from tolerance import rounding

from hyperadapters.config import Task
from hyperadapters.data.examples import Example
from hyperadapters.inference.predictor import Predictor
from hyperadapters.inference.routing import calibrate
from hyperadapters.model.model import HyperAdapterModel

KINDS = ("bert", "t5", "llama")
WORDS = (("w1", "w2", "w3"), ("w11", "w12", "w13"), ("w21", "w22", "w23"))
"""Words of the texts of each of the three tasks of a model."""
EMPTY = ("", "  ", "\n", "</s>", "<pad></s>")


def rows_of_words(count: int = 24, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        words = WORDS[index % 3]
        length = int(torch.randint(3, 9, (1,), generator=generator))
        rows.append(Example(index % 3, " ".join(words[i] for i in torch.randint(0, 3, (length,), generator=generator))))
    return rows


def routed_model(kind: str = "bert", **settings: Any) -> HyperAdapterModel:
    model = make_model(kind, routing="densities", **settings)
    model.tokenizer = tiny_tokenizer()
    calibrate(model, rows_of_words(60), rows_of_words(30, seed=1))
    return model


def nearest(model: HyperAdapterModel, rows: list[Example]) -> list[str]:
    return [result.candidates[0].task for result in model.route(rows)]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_find_their_task_by_their_words_alone(kind: str) -> None:
    model, rows = routed_model(kind), rows_of_words(30, seed=2)
    names = [model.tasks[row.task_id or 0].name for row in rows]
    assert nearest(model, rows) == names
    short = [Example(None, " ".join(row.text.split()[:2])) for row in rows]
    assert sum(a == b for a, b in zip(nearest(model, short), names, strict=True)) >= 28


@pytest.mark.parametrize("kind", KINDS)
def test_without_validation_rows_texts_like_the_training_rows_are_accepted(kind: str) -> None:
    model = make_model(kind, routing="densities")
    model.tokenizer = tiny_tokenizer()
    shares = []
    for seed in range(5):
        calibrate(model, rows_of_words(12, seed=100 + seed), [], false_decline_rate=0.1)
        accepted = [result.accepted for result in model.route(rows_of_words(100, seed=2))]
        shares.append(sum(accepted) / len(accepted))
    # By the ratios of the training rows themselves, about half of such texts would be declined.
    assert sum(shares) / len(shares) >= 0.75


@pytest.mark.parametrize("routing", ["densities", "prototypes"])
def test_a_model_of_one_task_declines_nothing_but_texts_without_words(routing: str) -> None:
    model = make_model("bert", routing=routing)
    model.tokenizer = tiny_tokenizer()
    for task in model.tasks[1:]:
        model.remove_task(task.name)
    calibrate(model, [Example(0, f"w{i} red") for i in range(8)], [Example(0, f"w{i} red") for i in range(8, 16)])
    assert [found.accepted for found in model.route(["w1 red", "good blue", "yes"])] == [True] * 3
    assert [found.task for found in model.predict(["good blue", " "])] == [model.tasks[0].name, None]


def test_the_only_row_of_a_task_is_not_left_out() -> None:
    rows = [*rows_of_words(60)[:40], Example(2, "w21 w22 w23")]
    rows = [row for row in rows[:-1] if row.task_id != 2] + rows[-1:]
    model = make_model("bert", routing="densities")
    model.tokenizer = tiny_tokenizer()
    calibrate(model, rows, [])
    assert model.pha.thresholds.isfinite().all()
    assert model.route([rows[-1]])[0].task == model.tasks[2].name


@pytest.mark.parametrize("kind", KINDS)
def test_forward_generation_route_and_predictor_agree(kind: str) -> None:
    model, rows = routed_model(kind), rows_of_words(12, seed=2)
    texts = [row.text for row in rows]
    found = model.route(texts)
    told = [result.candidates[0].task for result in found]
    for prediction, result in zip(Predictor(model, decline=False)(texts), found, strict=True):
        assert prediction.task == result.candidates[0].task
        assert prediction.routing is not None
        assert prediction.routing.similarity == pytest.approx(result.similarity, rel=1e-4, abs=1e-4)
    batch = model.collator.inputs([Example(None, text) for text in texts])
    if kind == "bert":
        output = model(**batch)
        assert [model.tasks[task].name for task in output.task_ids.tolist()] == told
        assert output.similarity.shape == (12, 3)
    assert [model.tasks[task].name for task in model.task_similarity(batch).argmax(dim=1).tolist()] == told


def test_adapters_do_not_change_where_an_input_is_routed() -> None:
    model, texts = routed_model(), [row.text for row in rows_of_words(6, seed=2)]
    batch = model.collator.inputs([Example(None, text) for text in texts])
    free, told = model(**batch), model(**batch, task_ids=torch.tensor([2] * 6))
    torch.testing.assert_close(free.similarity, told.similarity, rtol=0, atol=0)


@pytest.mark.parametrize("route", ["nearest", "soft"])
def test_the_layers_below_run_as_often_as_with_prototypes(route: Any) -> None:
    """The input of the first layer is read without running a layer."""
    model, calls = routed_model(), []
    layers = model.backbone.get_submodule("encoder.layer")
    for layer in layers:
        layer.get_submodule("attention").register_forward_hook(lambda *_: calls.append(1))
    batch = model.collator.inputs([Example(None, "w1 w2")])
    model(**batch, route=route)
    assert len(calls) == len(layers)


def test_a_forward_pass_embeds_its_tokens_once() -> None:
    model, calls = routed_model(), []
    model.backbone.get_submodule("embeddings").register_forward_hook(lambda *_: calls.append(1))
    model(**model.collator.inputs([Example(None, "w1 w2"), Example(None, "w11")]))
    assert len(calls) == 1


def test_a_model_without_frozen_layers_reads_the_input_of_its_first_layer() -> None:
    model = routed_model(feature_layer=0)
    rows = rows_of_words(30, seed=2)
    assert nearest(model, rows) == [model.tasks[row.task_id or 0].name for row in rows]


def test_densities_need_training_rows_of_every_task() -> None:
    model = make_model("bert", routing="densities")
    model.tokenizer = tiny_tokenizer()
    calibrate(model, [row for row in rows_of_words() if row.task_id != 1], rows_of_words(seed=1))
    assert not model.pha.routes_by_densities
    batch = model.collator.inputs(rows_of_words(6))
    expected = model.pha.prototypes.similarity(model.instance_vectors(**batch))
    assert torch.equal(model.task_similarity(batch), expected)


# Added, removed and saved tasks


NEW = Task.classification("new", ["x", "y"])
NEW_TEXTS = ("w31 w32 w33", "w33 w31", "w32 w33 w31 w32")
NEW_ROWS = [{"text": text, "label": label} for text, label in zip(NEW_TEXTS, "xyx", strict=True)]


def test_an_added_task_gets_its_texts_and_the_others_keep_their_similarities() -> None:
    model, rows = routed_model(), rows_of_words(12, seed=2)
    before = model.task_similarity(model.collator.inputs(rows))
    model.add_task(NEW, NEW_ROWS, fit="none")
    after = model.task_similarity(model.collator.inputs(rows))
    # A product with another column adds in another order.
    torch.testing.assert_close(after[:, :3], before, rtol=rounding(64), atol=rounding(64, largest=100))
    assert nearest(model, [Example(None, "w33 w32"), rows[0], rows[1]]) == ["new", *nearest(model, rows[:2])]
    assert all(result.accepted for result in model.route(NEW_TEXTS))
    model.remove_task("new")
    assert torch.equal(model.task_similarity(model.collator.inputs(rows)), before)


def test_a_task_of_one_example_gets_the_mean_threshold() -> None:
    model = routed_model()
    known = model.pha.thresholds.mean()
    model.add_task(Task.regression("new"), [{"text": "w31 w32", "label": 1.0}], fit="none")
    assert float(model.pha.thresholds[-1]) == pytest.approx(float(known))


def test_a_checkpoint_contains_fitted_densities(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "backbone")
    tasks = [Task.classification(name, ["x", "y"]) for name in ("a", "b", "c")]
    model = HyperAdapterModel.from_backbone(str(folder), tasks, adapter_dim=4)
    assert model.adapter_config.routing == "densities"
    model.save_pretrained(tmp_path / "untrained")
    loaded = HyperAdapterModel.from_pretrained(tmp_path / "untrained")
    assert not loaded.pha.routes_by_densities
    calibrate(model, rows_of_words(60), rows_of_words(30, seed=1))
    model.save_pretrained(tmp_path / "trained")
    loaded = HyperAdapterModel.from_pretrained(tmp_path / "trained")
    assert loaded.route(rows_of_words(9)) == model.route(rows_of_words(9))


# Texts without words


@pytest.mark.parametrize("decline", [True, False])
@pytest.mark.parametrize("routing", ["densities", "prototypes"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_words_is_never_answered(kind: str, routing: str, decline: bool) -> None:
    model = make_model(kind, routing=routing)
    model.tokenizer = tiny_tokenizer()
    calibrate(model, rows_of_words(30), rows_of_words(30, seed=1))
    model.pha.thresholds.fill_(-torch.inf)
    predictions = list(Predictor(model, decline=decline)([*EMPTY, "w1 w2"]))
    assert [prediction.task for prediction in predictions[:-1]] == [None] * len(EMPTY)
    assert [prediction.answer for prediction in predictions[:-1]] == [None] * len(EMPTY)
    assert predictions[-1].task is not None
    assert [result.accepted for result in model.route([*EMPTY, "w1 w2"])] == [False] * len(EMPTY) + [True]


def test_a_text_without_words_is_answered_if_its_task_is_given() -> None:
    model = routed_model()
    assert all(prediction.task == "mood" for prediction in Predictor(model)(EMPTY, task="mood"))


MIXED: list[Any] = ["w1 w2", ("w1 w2", "w3"), "w4 w5 w6", ("w1", "w1"), ("w7", "")]


@pytest.mark.parametrize("routing", ["densities", "prototypes"])
def test_pairs_and_single_texts_are_routed_among_the_tasks_that_read_them(routing: str) -> None:
    tasks = [*PAIR_TASKS, Task.classification("order", ["first", "second"], fields=("text", "text_pair"))]
    model = make_plus_model(tasks, routing=routing)
    examples = [
        Example(task_id, f"w{row % 9} w{task_id}", f"w{row % 7}" if task.is_pair else None, 0)
        for row in range(12)
        for task_id, task in enumerate(tasks)
    ]
    calibrate(model, examples, [])
    assert model.pha.thresholds.isfinite().all()
    expected = [{"size", "mood"}, {"same", "order"}, {"size", "mood"}, {"same", "order"}, {"size", "mood"}]
    assert [{candidate.task for candidate in result.candidates} for result in model.route(MIXED)] == expected
    found = [prediction.task for prediction in Predictor(model, decline=False)(MIXED)]
    assert all(name in names for name, names in zip(found, expected, strict=True))
    single = model(**model.collator.inputs([Example(None, "w1 w2")]))
    assert single.similarity.isneginf().tolist() == [[True, False, False, True]]


def test_where_no_task_reads_such_inputs_all_tasks_are_candidates() -> None:
    results = make_plus_model(PAIR_TASKS[1:], routing="prototypes").route(MIXED)
    assert [{candidate.task for candidate in result.candidates} for result in results] == [{"size", "mood"}] * 5
    assert all(result.margin < float("inf") for result in results)


def test_one_candidate_has_an_infinite_margin() -> None:
    (result,) = make_plus_model(routing="prototypes").route([("w1", "w2")])
    assert [candidate.task for candidate in result.candidates] == ["same"]
    assert result.margin == float("inf")


def test_models_that_read_pairs_as_one_sequence_compare_inputs_to_all_tasks() -> None:
    results = make_frozen_texts_model().route(MIXED)
    assert all(len(result.candidates) == len(PAIR_TASKS) for result in results)
