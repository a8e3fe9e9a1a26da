"""Routing and prediction with a task store give what a model with all tasks gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import PAIR_TASKS, lived_in, make_plus_model, rows_of, stirred
from tolerance import rounding

from hyperadapters.checkpoints import task_store
from hyperadapters.checkpoints.task_store import TaskStore
from hyperadapters.checkpoints.task_store_files import OWNER
from hyperadapters.config import Task
from hyperadapters.data.examples import Example
from hyperadapters.errors import CheckpointError, DataError, NotFiniteError, TaskError
from hyperadapters.inference.predict_files import predict_file
from hyperadapters.inference.predictor import Prediction, Predictor
from hyperadapters.inference.routing import RoutingResult, calibrate
from hyperadapters.inference.stored_tasks import StorePredictor, route
from hyperadapters.model.model import HyperAdapterModel

TEXTS = ["good w1", "bad w2 w3", "red", "w4 blue w5 w6", "yes no", "</s>", "w30 w31"]
PAIRS = [("red w1", "red w1"), ("blue w2", "good")]
BLOCKS = (4, task_store.BLOCK)
"""Numbers of keys in a block: in the first case, each task of the tests is in several blocks."""


def _many_tasks(model: HyperAdapterModel) -> HyperAdapterModel:
    """Repeat the tasks of a model with other prototypes, centroids, densities and thresholds."""
    states = model.task_table.states()
    more = []
    for number in range(5):
        for state in states:
            density = state.density.clone()
            density[:-1] += 0.3 * torch.randn_like(density[:-1])
            more.append(
                type(state)(
                    **{
                        **vars(state),
                        "task": Task.model_validate({**state.task.model_dump(), "name": f"{state.task.name}{number}"}),
                        "prototype": torch.randn_like(state.prototype),
                        "centroids": torch.randn(number % 3, *state.centroids.shape[1:]),
                        "density": density,
                    }
                )
            )
    model.task_table.replace([*states, *more])
    return model


def _by_prototypes() -> HyperAdapterModel:
    return _many_tasks(lived_in("bert", own=("mood",)))


def _by_densities() -> HyperAdapterModel:
    model = stirred(make_plus_model(PAIR_TASKS))
    singles = [Example(i, row["text"]) for i in (1, 2) for row in rows_of(PAIR_TASKS[i], 4)]
    pairs = [Example(0, f"w{n} red", f"w{n} blue w{n + 1}") for n in range(8)]
    calibrate(model, [*singles, *pairs], [])
    return _many_tasks(model)


MODELS = {"prototypes": _by_prototypes, "densities": _by_densities}


def _store(folder: Path, model: HyperAdapterModel) -> TaskStore:
    store = TaskStore.create(folder, model)
    store.append(model)
    return store


def _assert_same_routing(found: RoutingResult | None, expected: RoutingResult | None) -> None:
    assert found is not None
    assert expected is not None
    assert (found.task, found.accepted) == (expected.task, expected.accepted)
    assert [candidate.task for candidate in found.candidates] == [candidate.task for candidate in expected.candidates]
    scale = max(1.0, *(abs(candidate.similarity) for candidate in expected.candidates))
    for one, other in zip(found.candidates, expected.candidates, strict=True):
        assert one.similarity == pytest.approx(other.similarity, abs=rounding(200, 10 * scale))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", MODELS)
def test_routing_over_a_store_is_that_of_a_model_with_all_tasks(
    kind: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_store, "BLOCK", block)
    monkeypatch.setattr(task_store.Column, "release", lambda *_: None)  # small blocks do not begin with a page
    model = MODELS[kind]()
    texts: list[Any] = [*TEXTS, *PAIRS]
    expected = model.route(texts)
    assert len({result.task for result in expected}) > 2
    store = _store(tmp_path / "store", model)
    store.load(model, [model.tasks[1].name])
    for found, other in zip(route(model, store, texts, batch_size=3), expected, strict=True):
        _assert_same_routing(found, other)


@pytest.mark.parametrize("kind", MODELS)
def test_removed_tasks_are_not_routed_to(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    store = _store(tmp_path / "store", model)
    gone = {result.candidates[0].task for result in model.route(TEXTS)}
    for name in gone:
        model.remove_task(name)
    store.remove(gone)
    for found, other in zip(route(model, store, TEXTS), model.route(TEXTS), strict=True):
        _assert_same_routing(found, other)


@pytest.mark.parametrize("owner", [1, 2**31])
def test_a_vector_of_another_task_is_damage(owner: int, tmp_path: Path) -> None:
    model = _by_prototypes()
    store = _store(tmp_path / "store", model)
    path = tmp_path / "store" / "owners.bin"
    owners = np.frombuffer(path.read_bytes(), OWNER).copy()
    owners["task"] = np.where(owners["task"] == 1, 0, owner)
    path.write_bytes(owners.tobytes())
    with pytest.raises(CheckpointError, match=r"owners\.bin.*a vector belongs to (another task|a task that does not)"):
        route(model, TaskStore.open(tmp_path / "store"), TEXTS)
    assert len(store) == len(model.tasks)


def test_a_predictor_with_a_store_has_no_other_route(tmp_path: Path) -> None:
    model = _by_prototypes()
    with pytest.raises(DataError, match="route: a predictor with a task store always uses the nearest task"):
        StorePredictor(model, _store(tmp_path / "store", model), route="soft")


def test_more_candidates_are_those_of_all_tasks_in_order(tmp_path: Path) -> None:
    model = _by_prototypes()
    store = _store(tmp_path / "store", model)
    [found] = route(model, store, ["good w1"], num_candidates=100)
    assert sorted(candidate.task for candidate in found.candidates) == sorted(task.name for task in model.tasks)
    similarities = [candidate.similarity for candidate in found.candidates]
    assert similarities == sorted(similarities, reverse=True)


def test_among_equal_tasks_the_first_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_store, "BLOCK", 2)
    monkeypatch.setattr(task_store.Column, "release", lambda *_: None)
    model = lived_in("bert")
    states = model.task_table.states()
    for state in states:
        # Products with a unit vector are exact, so that all similarities are equal in blocks of any size.
        for vectors in (state.prototype, state.centroids):
            vectors.zero_()[..., 0] = 1
    model.task_table.replace(states)
    [found] = route(model, _store(tmp_path / "store", model), ["good w1"])
    assert found.candidates[0].task == model.tasks[0].name


def test_a_store_without_tasks_and_one_that_is_not_finite_are_refused(tmp_path: Path) -> None:
    model = lived_in("bert")
    store = TaskStore.create(tmp_path / "empty", model)
    with pytest.raises(TaskError, match="has no tasks to which inputs could be routed; append"):
        route(model, store, ["good"])
    states = model.task_table.states()
    states[1].centroids = torch.full_like(states[1].centroids, torch.nan)
    model.task_table.replace(states)
    with pytest.raises(NotFiniteError, match=r"input 1 \('good'\)"):
        route(model, _store(tmp_path / "store", model), ["good"])


# Prediction


def _assert_same_prediction(found: Prediction, expected: Prediction, is_routed: bool) -> None:
    assert (found.task, found.answer, found.target) == (expected.task, expected.answer, expected.target)
    assert (found.probabilities is None) == (expected.probabilities is None)
    for label, probability in (expected.probabilities or {}).items():
        assert found.probabilities is not None
        assert found.probabilities[label] == pytest.approx(probability, abs=1e-5)
    if is_routed:
        _assert_same_routing(found.routing, expected.routing)
    else:
        assert found.routing is None


@pytest.mark.parametrize("max_tasks", [1, 2, 1000])
@pytest.mark.parametrize("decline", [True, False])
def test_a_predictor_with_a_store_answers_like_one_with_all_tasks(
    decline: bool, max_tasks: int, tmp_path: Path
) -> None:
    model = _by_prototypes()
    rows: list[Any] = [*TEXTS, *({"text": f"w{n} red", "task": f"mood{n}"} for n in range(5)), "good"]
    expected = list(Predictor(model, decline=decline)(rows))
    predictor = StorePredictor(model, _store(tmp_path / "store", model), 4, decline, max_tasks)
    found = list(predictor(iter(rows)))
    assert len(model.tasks) <= max_tasks
    for one, other, row in zip(found, expected, rows, strict=True):
        if isinstance(other.answer, float):
            assert one.answer == pytest.approx(other.answer, abs=1e-5)
            assert one.task == other.task
        else:
            _assert_same_prediction(one, other, is_routed=isinstance(row, str))
    assert any(prediction.task is None for prediction in found)


def test_an_unknown_task_is_named_with_its_row_and_can_be_skipped(tmp_path: Path) -> None:
    model = _by_prototypes()
    store = _store(tmp_path / "store", model)
    (tmp_path / "rows.jsonl").write_text('{"text": "good", "task": "mood1"}\n{"text": "bad", "task": "mod"}\n')
    predictor = StorePredictor(model, store)
    with pytest.raises(TaskError, match=r"input 2: Unknown task 'mod': it is none of the 18 tasks"):
        list(predictor([{"text": "good", "task": "mood1"}, {"text": "bad", "task": "mod"}]))
    with pytest.raises(TaskError, match=r"line 2: Unknown task 'mod'"):
        predict_file(predictor, tmp_path / "rows.jsonl", None, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    predict_file(predictor, tmp_path / "rows.jsonl", None, tmp_path / "out.jsonl", on_bad_row="skip")
    [line] = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["task"] == "mood1"


def test_one_task_for_all_rows_and_rows_of_a_wrong_form(tmp_path: Path) -> None:
    model = _by_prototypes()
    expected = [prediction.answer for prediction in Predictor(model)(TEXTS[:3], task="colour2")]
    predictor = StorePredictor(model, _store(tmp_path / "store", model))
    assert [prediction.answer for prediction in predictor(TEXTS[:3], task="colour2")] == expected
    with pytest.raises(DataError, match="input 2: expected a string"):
        list(predictor(["good", 3]))
    with pytest.raises(TaskError, match="one task for each input"):
        predictor.predict_tasks(["good"], ["mood1"])
