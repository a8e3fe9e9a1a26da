"""Calibration of a model: temperatures, error bounds, thresholds of routing, and answers that are left out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_method_model, make_model, make_plus_model, pair_examples, pair_recipe, stirred, tiny_tokenizer
from tolerance import rounding

from hyperadapters import HyperAdapterModel, Predictor, Task
from hyperadapters.errors import DataError, HyperAdaptersError, TaskError
from hyperadapters.heads.calibration import with_temperature
from hyperadapters.training.calibration import calibrate_heads
from hyperadapters.training.evaluation import evaluate
from hyperadapters.training.run import train

LABELLED = [row for row in pair_examples(120) if row.task_id != 1]
NUMBERS = [row for row in pair_examples(12) if row.task_id == 1]
DATA = {name: [row for row in LABELLED if row.task_id == task_id] for name, task_id in (("same", 0), ("mood", 2))}
FOREIGN = [f"w{i} w{i + 1} zebra w{i}" for i in range(40)]


def model_of_three() -> HyperAdapterModel:
    return stirred(make_plus_model(head_inputs="adapted_texts"))


def answers_of(model: HyperAdapterModel, **options: Any) -> list[Any]:
    return [found.answer for found in Predictor(model, **options)(LABELLED)]


def logits_of(model: HyperAdapterModel) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.tensor([row.task_id for row in LABELLED])
        return model.eval()(**model.collator.inputs(LABELLED), task_ids=ids).logits


# Probabilities


def test_temperatures_divide_logits_and_change_no_answer() -> None:
    model = model_of_three()
    before, answers = logits_of(model), answers_of(model)
    calibrate_heads(model, LABELLED)
    assert model.heads is not None
    temperatures = model.heads.temperature
    assert temperatures[1] == 1  # a regression task
    assert (temperatures[[0, 2]] != 1).all()
    expected = before / temperatures[[row.task_id for row in LABELLED]][:, None]
    largest = float(expected.abs().masked_fill(expected.isinf(), 0).max())
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=rounding(4, largest))
    assert answers_of(model) == answers


def test_a_calibration_does_not_depend_on_the_one_before() -> None:
    model = model_of_three()
    calibrate_heads(model, LABELLED)
    assert model.heads is not None
    first = model.heads.temperature.clone(), model.heads.error_bounds.clone()
    calibrate_heads(model, LABELLED)
    # Logits are recovered from probabilities in float32, and the minimum is found to a relative 1e-5.
    torch.testing.assert_close(model.heads.temperature, first[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(model.heads.error_bounds[:, 1], first[1][:, 1])


def test_calibration_lowers_the_brier_score_of_the_rows_and_evaluate_reports_both() -> None:
    model = model_of_three()
    calibrate_heads(model, LABELLED)
    found = evaluate(model, LABELLED).calibration
    assert set(found) == {"same", "mood"}
    for name, task_id in (("same", 0), ("mood", 2)):
        assert model.heads is not None
        assert found[name].temperature == float(model.heads.temperature[task_id])
        rows = [row for row in LABELLED if row.task_id == task_id]
        labels = np.array([row.target for row in rows])
        after = model.predict_proba([(r.text, r.text_pair) if r.text_pair else r.text for r in rows], name)
        before = with_temperature(after, 1 / found[name].temperature)
        score = np.square(before - np.eye(2)[labels]).sum(axis=1).mean()
        assert found[name].brier_score_before == pytest.approx(score, rel=1e-5)
    assert found["mood"].brier_score < found["mood"].brier_score_before


def test_a_checkpoint_keeps_temperatures_and_bounds(tmp_path: Path) -> None:
    model = model_of_three()
    calibrate_heads(model, LABELLED)
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    again = HyperAdapterModel.from_pretrained(tmp_path, backbone=model.detach())
    again.tokenizer = tiny_tokenizer()
    assert again.heads is not None
    assert model.heads is not None
    assert torch.equal(again.heads.temperature, model.heads.temperature)
    assert torch.equal(again.heads.error_bounds, model.heads.error_bounds)
    assert torch.equal(logits_of(again), expected)


def test_training_calibrates_and_the_results_say_how_well(tmp_path: Path) -> None:
    run = train(pair_recipe(tmp_path, {"preset": "plus", "feature_layer": 1}), tmp_path / "run")
    assert run.model.heads is not None
    [temperature] = run.model.heads.temperature.tolist()
    assert temperature != 1
    measures = json.loads((tmp_path / "run" / "metrics.json").read_text())["calibration"]["same"]
    assert set(measures) == {"validation", "test"}
    assert measures["test"]["temperature"] == temperature
    assert 0 <= measures["test"]["calibration_error"] <= 1
    card = (tmp_path / "run" / "README.md").read_text()
    error = measures["test"]["calibration_error_before"], measures["test"]["calibration_error"]
    assert "{:.3f} → {:.3f}".format(*error) in card


def test_an_added_task_gets_a_temperature_between_the_examples_and_the_known_tasks() -> None:
    model = model_of_three()
    calibrate_heads(model, LABELLED)
    assert model.heads is not None
    known = model.heads.temperature.clone()
    rows = [{"text": f"w{i} {'red' if i % 2 else 'blue'}", "label": "ab"[i % 2]} for i in range(12)]
    model.add_task(Task.classification("new", ["a", "b"]), rows)
    assert torch.equal(model.heads.temperature[:3], known)
    assert model.heads.temperature[3] not in (1.0, float(known.log()[[0, 2]].mean().exp()))


# Answers that are left out


def test_only_answers_with_a_supported_error_are_given() -> None:
    model = model_of_three()
    calibrate_heads(model, LABELLED)
    assert model.heads is not None
    bounds = model.heads.error_bounds
    place = int(bounds[2, 1].argmin())
    limit, level = float(bounds[2, 1, place]), float(bounds[2, 0, place])
    assert (bounds[2, 1] <= limit).sum() == 1
    found = list(Predictor(model, max_error=limit)(LABELLED))
    every = list(Predictor(model)(LABELLED))
    assert len({row.answer is None for row in found if row.task == "mood"}) == (2 if level > 0 else 1)
    for row, whole in zip(found, every, strict=True):
        assert (row.task, row.probabilities) == (whole.task, whole.probabilities)
        assert row.answer in (None, whole.answer)
        if row.task == "mood" and row.probabilities:
            assert (row.answer is not None) == (max(row.probabilities.values()) > level)
            assert (row.target is None) == (row.answer is None)


def test_without_bounds_and_for_numbers_nothing_is_answered() -> None:
    model = model_of_three()
    assert {found.answer for found in model.predict(LABELLED + NUMBERS, max_error=0.9)} == {None}
    calibrate_heads(model, LABELLED)
    assert {found.answer for found in model.predict(NUMBERS, max_error=0.9)} == {None}
    [answers] = model.predict(["w1 good"], tasks=["mood"], max_error=1e-6)
    assert [found.answer for found in answers] == [None]


@pytest.mark.parametrize("max_error", [0, 1, -0.1, 1.5, "0.1", True, float("nan")])
def test_an_impossible_max_error_is_refused(max_error: Any) -> None:
    with pytest.raises(DataError, match="max_error: expected a number between 0 and 1"):
        Predictor(model_of_three(), max_error=max_error)


def test_models_that_generate_text_cannot_bound_errors() -> None:
    with pytest.raises(TaskError, match="max_error: only for models with task heads"):
        Predictor(make_model("t5"), max_error=0.1)


# Routing


def accepted_and_nearest(model: HyperAdapterModel, texts: Any) -> list[tuple[bool, str]]:
    return [(found.accepted, found.candidates[0].task) for found in model.route(texts)]


def test_thresholds_keep_their_promise_for_the_rows_and_the_report_states_it() -> None:
    model = make_model("bert")
    model.tokenizer = tiny_tokenizer()
    data = {task.name: [f"w{i} w{2 * i % 19} {task.name}" for i in range(60)] for task in model.tasks}
    rows = {name: [{"text": text} for text in texts] for name, texts in data.items()}
    report = model.calibrate(rows, false_decline_rate=0.1)
    found = accepted_and_nearest(model, [text for texts in data.values() for text in texts])
    for name, calibration in report.tasks.items():
        nearest = [accepted for accepted, task in found if task == name]
        if not nearest:
            assert calibration.decline_bound is None
            continue
        count = len(nearest)
        assert calibration.decline_bound == pytest.approx(max(1, math.floor(0.1 * (count + 1) + 1e-9)) / (count + 1))
        assert sum(not accepted for accepted in nearest) <= calibration.decline_bound * (count + 1) - 1
        assert calibration.rows == 60
        assert calibration.temperature is None
    assert report.declined == pytest.approx(np.mean([not accepted for accepted, _ in found]))


def test_tasks_without_rows_keep_their_thresholds() -> None:
    model = make_model("bert")
    model.tokenizer = tiny_tokenizer()
    rows = {task.name: [{"text": f"w{i} w{2 * i % 19} {task.name}"} for i in range(60)] for task in model.tasks}
    model.calibrate(rows)
    before = model.pha.thresholds.clone()
    name = accepted_and_nearest(model, [row["text"] for row in rows["mood"]])[0][1]
    kept = [task.name for task in model.tasks if task.name != name]
    report = model.calibrate({name: [row for of_task in rows.values() for row in of_task][:50]}, false_decline_rate=0.2)
    assert len({task for _, task in accepted_and_nearest(model, [row["text"] for row in rows["mood"]])}) > 1
    changed = (model.pha.thresholds != before).tolist()
    assert changed == [task.name == name for task in model.tasks]
    assert {report.tasks[task].decline_bound for task in kept} == {None}


def test_foreign_inputs_raise_all_thresholds_until_few_enough_are_accepted() -> None:
    model = make_model("bert")
    model.tokenizer = tiny_tokenizer()
    rows = {task.name: [{"text": f"w{i} {task.name}"} for i in range(40)] for task in model.tasks}
    plain = model.calibrate(rows)
    assert plain.foreign_accepted is None
    report = model.calibrate(rows, FOREIGN, false_accept_rate=0.1)
    accepted = [accepted for accepted, _ in accepted_and_nearest(model, FOREIGN)]
    assert sum(accepted) <= math.floor(0.1 * 41) - 1 + 1
    assert report.foreign_accepted == pytest.approx(np.mean(accepted))
    assert report.declined is not None
    assert plain.declined is not None
    assert report.declined >= plain.declined
    shifts = [
        after.threshold - before.threshold
        for before, after in zip(plain.tasks.values(), report.tasks.values(), strict=True)
        if before.threshold is not None and after.threshold is not None and math.isfinite(before.threshold)
    ]
    assert max(shifts) - min(shifts) <= rounding(4)
    assert min(shifts) > 0
    assert {task.decline_bound for task in report.tasks.values()} == {None}


def test_a_method_without_routing_calibrates_heads_only() -> None:
    model = make_method_model("bert", "hyperformer")
    model.tokenizer = tiny_tokenizer()
    name = next(task.name for task in model.tasks if task.labels)
    labels = model.tasks[model.task_id(name)].labels
    rows = [{"text": f"w{i}", "label": labels[i % len(labels)]} for i in range(30)]
    report = model.calibrate({name: rows})
    assert report.declined is None
    assert report.tasks[name].threshold is None
    assert report.tasks[name].temperature is not None
    with pytest.raises(TaskError):
        model.calibrate({name: rows}, FOREIGN, false_accept_rate=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.calibrate({}), "data: expected at least one row"),
        (lambda model: model.calibrate({"mood": [{"text": " "}]}), "expected rows that contain words"),
        (lambda model: model.calibrate(DATA, FOREIGN), "expected both or neither"),
        (lambda model: model.calibrate(DATA, false_accept_rate=0.1), "expected both or neither"),
        (lambda model: model.calibrate(DATA, FOREIGN[:18], false_accept_rate=0.05), "give 19 or more"),
        (lambda model: model.calibrate(DATA, ["", " "], false_accept_rate=0.05), "0 inputs with words"),
        (lambda model: model.calibrate(DATA, FOREIGN, false_accept_rate=0), "any number of them cannot show it"),
        (
            lambda model: model.calibrate(DATA, false_decline_rate=1.0),
            r"false_decline_rate: expected a number in \[0, 1",
        ),
        (lambda model: model.calibrate({"unknown": ["a"]}), "Unknown task 'unknown'"),
        (lambda model: model.calibrate({"mood": [{"text": "a", "label": "x"}]}), "unknown label 'x'"),
    ],
)
def test_what_cannot_be_calibrated_changes_nothing(change: Callable[[HyperAdapterModel], Any], message: str) -> None:
    model = model_of_three()
    before = {name: tensor.clone() for name, tensor in model.adapter_state_dict().items()}
    with pytest.raises(HyperAdaptersError, match=message):
        change(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.adapter_state_dict().items())
