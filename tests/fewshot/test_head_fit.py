"""Adding a task without a gradient step, to models whose heads read adapted texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PAIR_TASKS, make_frozen_texts_model, make_plus_model, pair_examples, stirred, tiny_backbone
from tolerance import rounding
from torch import Tensor

from hyperadapters import HyperAdapterModel, Task, Trainer, TrainingArguments
from hyperadapters.checkpoints.format import stored_state
from hyperadapters.data.examples import Example
from hyperadapters.errors import TaskError
from hyperadapters.fewshot import head_fit
from hyperadapters.fewshot.fit import DAMPING
from hyperadapters.heads.regression import TaskRows
from hyperadapters.heads.task_heads import Head
from hyperadapters.inference.predictor import Predictor

NEW = Task.classification("new", ["no", "yes"])


def fresh(**settings: Any) -> HyperAdapterModel:
    return with_fitted_heads(stirred(make_plus_model(head_inputs="adapted_texts", **settings)))


def with_fitted_heads(model: HyperAdapterModel) -> HyperAdapterModel:
    rows = pair_examples()
    model.fit_heads({task.name: [row for row in rows if row.task_id == i] for i, task in enumerate(PAIR_TASKS)})
    return model


def rows_of(labels: tuple[str, str] = ("no", "yes"), count: int = 16) -> list[dict[str, str]]:
    """Rows like those of the task `mood` in `pair_examples`."""
    found = [row for row in pair_examples(count) if row.task_id == 2]
    return [{"text": row.text, "label": labels[int(row.target or 0)]} for row in found]


def frozen_features(model: HyperAdapterModel, rows: list[dict[str, str]]) -> Tensor:
    inputs = model.collator.inputs([Example(None, row["text"]) for row in rows])
    with torch.no_grad():
        return model.head_features(inputs, torch.empty(0), False)


def read(model: HyperAdapterModel, rows: list[dict[str, str]], name: str) -> Tensor:
    inputs = model.collator.inputs([Example(None, row["text"]) for row in rows])
    with torch.no_grad():
        return model.head_inputs(inputs, torch.full((len(rows),), model.task_id(name)))


def test_it_is_the_default_of_these_models_only() -> None:
    report = fresh().add_task(NEW, rows_of())
    assert (report.fit, report.steps, report.stopping) == ("head", 0, "none")
    assert report.adapter_scale in (0.0, DAMPING, 1.0)
    model = make_frozen_texts_model()
    report = model.add_task(NEW, rows_of(), max_steps=0)
    assert (report.fit, report.adapter_scale) == ("adapter", None)
    with pytest.raises(TaskError, match="fit 'head': expected a model with head_inputs 'adapted_texts', found 'pair_"):
        model.refit_task("new", rows_of(), fit="head")
    with pytest.raises(TaskError, match=r"Unknown fit 'heads'\. Did you mean 'head'"):
        fresh().add_task(NEW, rows_of(), fit="heads")  # type: ignore[arg-type]


def always(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    monkeypatch.setattr(head_fit, "_choose_effect", lambda *arguments: scale)


@pytest.mark.parametrize("scale", [1.0, DAMPING, 0.0])
def test_a_task_gets_the_adapter_of_the_nearest_one_or_half_of_it_or_none(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, scale)
    model, rows = fresh(), rows_of()
    report = model.add_task(NEW, rows)
    assert report.adapter_scale == scale
    nearest = model.task_id(report.neighbours[0].task)
    expected = model.method.adapters(torch.tensor([nearest])).scaled(scale)
    own = model.method.adapters(torch.tensor([model.task_id("new")]))
    assert all(torch.equal(own[name], expected[name]) for name in expected)
    assert torch.equal(model.pha.prototypes.weight[-1], model.pha.prototypes.weight[nearest])
    assert not len(model.pha.own_adapters)
    if not scale:
        torch.testing.assert_close(read(model, rows, "new"), frozen_features(model, rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("labels", [("bad", "good"), ("good", "bad")])
def test_labels_of_known_tasks_are_believed(labels: tuple[str, str]) -> None:
    """One uninformative example of each label: only the head of `mood` can tell the labels apart."""
    model = with_fitted_heads(make_plus_model(head_inputs="adapted_texts", label_names=False))
    few = [{"text": "w1 w2", "label": "good"}, {"text": "w2 w1", "label": "bad"}]
    report = model.add_task(Task.classification("tone", list(labels)), few)
    assert report.adapter_scale == 1.0
    unseen = rows_of(("bad", "good"), 24)
    answers = [prediction.answer for prediction in model.predict([row["text"] for row in unseen], task="tone")]
    assert sum(answer == row["label"] for answer, row in zip(answers, unseen, strict=True)) > 0.9 * len(unseen)


@pytest.mark.parametrize("init", ["mixture", "mean_instance", "random"])
def test_only_the_adapter_of_a_task_with_the_same_labels_is_trusted(init: str) -> None:
    model = with_fitted_heads(make_plus_model(head_inputs="adapted_texts", label_names=False))
    few = [{"text": "w1 w2", "label": "good"}, {"text": "w2 w1", "label": "bad"}]
    assert model.add_task(Task.classification("tone", ["bad", "good"]), few, init=init).adapter_scale == 0.0


def test_without_relatives_and_without_left_out_examples_the_frozen_backbone_is_kept() -> None:
    few = [{"text": "w1 w2", "label": "no"}, {"text": "w3 w4", "label": "yes"}]
    assert fresh(label_names=False).add_task(NEW, few).adapter_scale == 0.0


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([0.5] * 8, True),
        ([0.2] * 8, False),  # 1.6 nats
        ([4.0, -1.0, 0.5, -0.5], False),  # 3 nats, but no two standard errors
        ([-0.5] * 8, False),
        ([0.0], False),
    ],
)
def test_a_gain_is_clear_if_it_is_large_and_not_due_to_a_few_examples(gains: list[float], expected: bool) -> None:
    assert head_fit._is_clear(torch.tensor(gains)) is expected


@pytest.mark.parametrize(
    ("gains", "of_related", "of_own", "of_others"),
    [
        ([0.5] * 8, 1.0, 1.0, 1.0),
        ([0.2] * 8, 1.0, 1.0, DAMPING),
        ([0.0], 1.0, 1.0, 0.0),
        ([-0.2] * 8, 1.0, 1.0, 0.0),
        ([-4.0, 1.0, -0.5, 0.5], DAMPING, 1.0, 0.0),
        ([-0.5] * 8, 0.0, 0.0, 0.0),
    ],
)
def test_the_effect_of_an_adapter_follows_from_its_gains_and_from_related_tasks(
    gains: list[float], of_related: float, of_own: float, of_others: float
) -> None:
    found = torch.tensor(gains)
    assert head_fit._choose_effect(found, is_related=True, is_own=False) == of_related
    assert head_fit._choose_effect(found, is_related=False, is_own=True) == of_own
    assert head_fit._choose_effect(found, is_related=False, is_own=False) == of_others


def test_heads_that_are_too_confident_are_compared_at_the_best_temperature() -> None:
    """Twice the logits are the same answers: a comparison at the temperature 1 would prefer one of the two."""
    rows = TaskRows(NEW, torch.tensor([[1.0], [-1.0], [1.0], [1.0]]), [1, 0, 1, 0])
    head = Head(torch.tensor([[-1.0], [1.0]]), torch.zeros(2))
    confident = head._replace(weight=2 * head.weight)
    gains = head_fit._gains([(head, rows)], [(confident, rows)])
    torch.testing.assert_close(gains, torch.zeros(4), atol=rounding(16), rtol=0.0)


def test_examples_suffice_for_unseen_rows() -> None:
    model, rows = fresh(), rows_of(count=36)
    model.add_task(NEW, rows[:24])
    answers = [prediction.answer for prediction in model.predict([row["text"] for row in rows[24:]], task="new")]
    assert sum(answer == row["label"] for answer, row in zip(answers, rows[24:], strict=True)) > 0.8 * len(answers)


def test_numbers_are_predicted() -> None:
    model, rows = fresh(), [row for row in pair_examples() if row.task_id == 1]
    examples = [{"text": row.text, "label": row.target} for row in rows]
    model.add_task(Task.regression("count"), examples)
    found = [prediction.answer for prediction in model.predict([row.text for row in rows], task="count")]
    assert torch.corrcoef(torch.tensor([found, [row.target for row in rows]]))[0, 1] > 0.9  # type: ignore[list-item]


def test_other_tasks_stay_as_they_are_bit_for_bit() -> None:
    model, rows = fresh(), pair_examples(6)
    before = [prediction.probabilities for prediction in Predictor(model)(rows)]
    model.add_task(NEW, rows_of())
    assert [prediction.probabilities for prediction in Predictor(model)(rows)] == before


def test_the_same_call_gives_the_same_model_bit_for_bit() -> None:
    states = []
    for _ in range(2):
        model = fresh()
        model.add_task(NEW, rows_of(), seed=5)
        states.append(model.adapter_state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_refitted_task_keeps_its_adapter_at_full_effect_or_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    before = model.method.adapters(torch.tensor([2]))
    monkeypatch.setattr(head_fit, "MARGIN", 1e9)
    assert model.refit_task("mood", rows_of(("bad", "good"))).adapter_scale == 1.0
    assert not len(model.pha.own_adapters)
    after = model.method.adapters(torch.tensor([2]))
    assert all(torch.equal(after[name], before[name]) for name in before)
    monkeypatch.setattr(head_fit, "_is_clear", lambda gains: True)
    assert model.refit_task("mood", rows_of(("bad", "good"))).adapter_scale == 0.0


def test_an_added_task_costs_a_scale_a_prototype_a_density_and_a_head(tmp_path: Path) -> None:
    model = fresh(adapter_dim=64)
    adapter = sum(tensor.nbytes for tensor in model.method.adapters(torch.tensor([0])).values())
    before = sum(tensor.nbytes for tensor in stored_state(model).values())
    model.add_task(NEW, rows_of())
    added = sum(tensor.nbytes for tensor in stored_state(model).values()) - before
    assert added < adapter / 4
    model.save_pretrained(tmp_path)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone("bert"))
    for name, tensor in model.adapter_state_dict().items():
        assert torch.equal(loaded.adapter_state_dict()[name], tensor)


def test_scales_multiply_from_task_to_task_and_go_with_their_task(monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, DAMPING)
    model = fresh()
    model.add_task(NEW, rows_of())
    model.pha.prototypes.weight.data[:-1] *= -1  # "new" is the nearest task now
    report = model.add_task(Task.classification("newer", ["off", "on"]), rows_of(("off", "on")))
    assert report.neighbours[0].task == "new"
    assert model.pha.adapter_scales.tolist() == [1.0, 1.0, 1.0, DAMPING, DAMPING**2]
    assert report.adapter_scale == DAMPING**2
    model.refit_task("newer", rows_of(("off", "on")), fit="none")
    assert float(model.pha.adapter_scales[4]) == DAMPING**2
    model.remove_task("new")
    assert model.pha.adapter_scales.tolist() == [1.0, 1.0, 1.0, DAMPING**2]
    model.refit_task("newer", rows_of(("off", "on")), fit="prototype", max_steps=1)
    assert model.pha.adapter_scales.tolist() == [1.0] * 4


def test_a_task_near_one_that_keeps_the_frozen_backbone_may_use_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    with monkeypatch.context() as patch:
        always(patch, 0.0)
        assert model.add_task(NEW, rows_of()).adapter_scale == 0.0
        always(patch, DAMPING)
        model.pha.prototypes.weight.data[:-1] *= -1  # "new" is the nearest task now
        report = model.add_task(Task.classification("newer", ["off", "on"]), rows_of(("off", "on")))
    assert report.neighbours[0].task == "new"
    assert report.adapter_scale == float(model.pha.adapter_scales[4]) == DAMPING


@pytest.mark.parametrize(("gain", "scale"), [(-0.1, 0.0), (0.1, DAMPING), (10.0, 1.0)])
def test_a_refit_to_the_same_examples_gives_the_same_task(
    gain: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_fit, "_gains", lambda *_: torch.full((4,), gain))
    model = fresh()
    assert model.add_task(NEW, rows_of()).adapter_scale == scale
    before = model.heads.head(3)
    assert model.refit_task("new", rows_of()).adapter_scale == float(model.pha.adapter_scales[3]) == scale
    torch.testing.assert_close(model.heads.head(3).weight, before.weight, atol=0, rtol=0)


def test_further_training_gives_an_added_task_its_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, 0.0)
    model = fresh()
    model.add_task(NEW, rows_of())
    rows = pair_examples(8)
    data = {task.name: [row for row in rows if row.task_id == i] for i, task in enumerate(PAIR_TASKS)}
    arguments = TrainingArguments(max_steps=2, disable_tqdm=True)
    Trainer(model, {**data, "new": rows_of(count=8)}, args=arguments).train()
    assert model.pha.adapter_scales.tolist() == [1.0] * 4
    assert model.method.adapters(torch.tensor([3]))["up_weight"].abs().max() > 0
