"""The last step of training heads that read adapted texts: regressions on the adapted features of all rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PAIR_TASKS, make_plus_model, pair_examples, stirred, tiny_backbone
from tolerance import rounding
from torch import Tensor, nn

from hyperadapters import HyperAdapterModel, Task, TrainingArguments
from hyperadapters.data.examples import Example, label_examples
from hyperadapters.errors import DataError, NotFiniteError
from hyperadapters.heads.regression import TaskRows, head_losses, pair_scales
from hyperadapters.heads.task_heads import Head
from hyperadapters.heads.trained_heads import fit_related_heads
from hyperadapters.inference.predictor import Predictor
from hyperadapters.training import text_heads
from hyperadapters.training.text_heads import TEMPERATURES, FittedHeads, HeadRows, choose_heads, fit_text_heads
from hyperadapters.training.trainer import Trainer

TOLERANCE: dict[str, Any] = {"atol": rounding(2**13), "rtol": rounding(2**13)}
"""Features of batches that are padded differently, after an iterative fit, and weights in float16."""


def fresh(tasks: list[Task] = PAIR_TASKS, **settings: Any) -> HyperAdapterModel:
    return stirred(make_plus_model(tasks, head_inputs="adapted_texts", **settings))


def data_of(rows: list[Example], tasks: list[Task] = PAIR_TASKS) -> dict[str, list[Example]]:
    return {task.name: [row for row in rows if row.task_id == index] for index, task in enumerate(tasks)}


def trained(model: HyperAdapterModel, folder: Path, eval_data: Any = None) -> HyperAdapterModel:
    args = TrainingArguments(output_dir=str(folder), max_steps=2, seed=3, report_to="none", eval_strategy="no")
    Trainer(model, data_of(pair_examples()), eval_data, args).train()
    return model


def adapted(model: HyperAdapterModel, rows: list[Example]) -> Tensor:
    inputs = model.collator.inputs(rows)
    with torch.no_grad():
        return model.eval().head_inputs(inputs, torch.tensor([row.task_id for row in rows]))


def weights(model: HyperAdapterModel) -> list[Tensor]:
    assert model.heads is not None
    return [tensor for head in model.heads.unpack() for tensor in (head.weight, head.bias)]


def rows_of_tasks(model: HyperAdapterModel) -> list[TaskRows]:
    data = []
    for task_id, task in enumerate(PAIR_TASKS):
        rows = [row for row in [*pair_examples(), *label_examples(PAIR_TASKS)] if row.task_id == task_id]
        inputs, targets = adapted(model, rows), [float(row.target or 0) for row in rows]
        data.append(TaskRows(task, inputs, targets, scales=pair_scales(task, inputs)))
    return data


def test_training_ends_with_regressions_on_adapted_features(tmp_path: Path) -> None:
    model = trained(fresh(), tmp_path)
    expected = fit_related_heads(rows_of_tasks(model))
    assert model.heads is not None
    for found, head in zip(model.heads.unpack(), expected, strict=True):
        torch.testing.assert_close(found.weight, head.weight, **TOLERANCE)
        torch.testing.assert_close(found.bias, head.bias, **TOLERANCE)
        assert (found.target_mean, found.target_std) == pytest.approx((head.target_mean, head.target_std))


def test_fit_heads_does_what_the_trainer_does_at_the_end(tmp_path: Path) -> None:
    expected = weights(trained(fresh(), tmp_path))
    model = fresh()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hyperadapters.training.trainer.fit_text_heads", lambda *arguments: None)
        trained(model, tmp_path)
    unfitted = weights(model)
    model.fit_heads(data_of(pair_examples()), batch_size=TrainingArguments().per_device_eval_batch_size)
    assert not any(map(torch.equal, weights(model), unfitted))
    assert all(map(torch.equal, weights(model), expected))


def test_tasks_whose_validation_rows_are_predicted_better_without_adapters_lose_them() -> None:
    train, validation = data_of(pair_examples()), data_of(pair_examples(36)[24:])
    with_adapters, without, chosen = fresh(), fresh(), fresh()
    for model in (with_adapters, chosen):
        model.pha.adapter_scales[1] = 30.0  # an adapter that is of no use
    without.pha.adapter_scales.zero_()
    with_adapters.fit_heads(train)
    without.task_table.set_heads(fit_related_heads(rows_of_tasks(without), frozen=True))
    chosen.fit_heads(train, validation)
    losses = [[loss(model, task, validation[task.name]) for task in PAIR_TASKS] for model in (with_adapters, without)]
    for task_id in range(len(PAIR_TASKS)):
        is_better = losses[0][task_id] <= losses[1][task_id]
        expected = with_adapters if is_better else without
        assert chosen.pha.adapter_scales[task_id] == expected.pha.adapter_scales[task_id]
        torch.testing.assert_close(weights(chosen)[2 * task_id], weights(expected)[2 * task_id], **TOLERANCE)
    assert chosen.pha.adapter_scales[1] == 0


def test_halved_adapters_have_the_heads_that_were_fitted_to_their_features(monkeypatch: pytest.MonkeyPatch) -> None:
    train, validation = data_of(pair_examples()), data_of(pair_examples(36)[24:])
    half, chosen = fresh(), fresh()
    half.pha.adapter_scales.fill_(0.5)
    half.fit_heads(train)
    monkeypatch.setattr(text_heads, "choose_heads", lambda tasks, candidates: [1] * len(tasks))
    chosen.fit_heads(train, validation)
    assert chosen.pha.adapter_scales.tolist() == [0.5] * len(PAIR_TASKS)
    assert all(map(torch.equal, weights(chosen), weights(half)))


def loss(model: HyperAdapterModel, task: Task, rows: list[Example]) -> float:
    """Squared error, or cross-entropy with the best temperature."""
    found = list(Predictor(model)(rows))
    if not task.labels:
        return sum((float(row.answer or 0) - float(one.target or 0)) ** 2 for row, one in zip(found, rows, strict=True))
    logits = torch.tensor([list((row.probabilities or {}).values()) for row in found]).log()
    labels = torch.tensor([int(one.target or 0) for one in rows])
    return min(float(nn.functional.cross_entropy(logits / one, labels, reduction="sum")) for one in TEMPERATURES)


def test_a_task_without_validation_rows_keeps_its_adapter() -> None:
    models = [fresh(), fresh()]
    models[0].fit_heads(data_of(pair_examples()))
    models[1].fit_heads(data_of(pair_examples()), {"same": data_of(pair_examples(36)[24:])["same"]})
    for task_id, task in enumerate(PAIR_TASKS):
        if task.name != "same":
            assert models[1].pha.adapter_scales[task_id] == 1
            assert torch.equal(weights(models[0])[2 * task_id], weights(models[1])[2 * task_id])


def test_a_model_can_be_fitted_and_trained_again(tmp_path: Path) -> None:
    model = trained(fresh(), tmp_path)
    before = weights(model)
    model.fit_heads(data_of(pair_examples()), batch_size=TrainingArguments().per_device_eval_batch_size)
    assert all(map(torch.equal, weights(model), before))
    trained(model, tmp_path)
    assert not any(map(torch.equal, weights(model), before))


def test_a_checkpoint_keeps_the_fitted_heads(tmp_path: Path) -> None:
    model = fresh()
    model.fit_heads(data_of(pair_examples()))
    model.save_pretrained(tmp_path)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, tiny_backbone("bert"))
    assert all(map(torch.equal, weights(loaded), weights(model)))


@pytest.mark.parametrize("label_names", [True, False])
def test_names_of_labels_are_rows(label_names: bool) -> None:
    model, by_hand = fresh(label_names=label_names), fresh(label_names=False)
    extra = label_examples(PAIR_TASKS) if label_names else []
    fit_text_heads(model, pair_examples(), [])
    fit_text_heads(by_hand, [*pair_examples(), *extra], [])
    assert all(map(torch.equal, weights(model), weights(by_hand)))


def test_tasks_with_the_same_labels_learn_from_each_other() -> None:
    tasks = [PAIR_TASKS[2], Task.classification("other mood", ["good", "bad"])]
    rows = [Example(0, row.text, None, row.target) for row in pair_examples() if row.task_id == 2]
    few = [Example(1, "w3 w4", None, 0), Example(1, "w4 w3", None, 1)]
    model = make_plus_model(tasks, head_inputs="adapted_texts", label_names=False)  # its adapters change nothing yet
    fit_text_heads(model, [*rows, *few], [])
    answers = [prediction.target for prediction in Predictor(model)([Example(1, row.text, None, None) for row in rows])]
    expected = [1 - row.target for row in rows]
    assert sum(map(int.__eq__, answers, expected)) > 0.8 * len(rows)


def test_a_label_without_a_row_is_named() -> None:
    rows = [row for row in pair_examples() if row.task_id or not row.target]
    with pytest.raises(DataError, match="task 'same': expected a training example of each label, found none of yes"):
        fit_text_heads(fresh(), rows, [])


def test_features_that_are_not_finite_are_reported() -> None:
    model = fresh()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("method.hypernetwork"):
                parameter.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match="the output of the adapted backbone"):
        fit_text_heads(model, pair_examples(), [])


def test_a_fit_that_is_interrupted_leaves_the_adapters_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = fresh(), []
    compute = text_heads._adapted_rows

    def interrupted(*arguments: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 3:  # the first without adapters
            raise KeyboardInterrupt
        return compute(*arguments)

    monkeypatch.setattr(text_heads, "_adapted_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.fit_heads(data_of(pair_examples()), data_of(pair_examples(36)[24:]))
    assert model.pha.adapter_scales.tolist() == [1.0] * len(PAIR_TASKS)


def test_heads_that_are_right_and_too_confident_are_chosen() -> None:
    """The rows of the adapted features are labelled rightly, but far too surely, and those of the others at random."""
    task = Task.classification("mood", ["no", "yes"])
    generator = torch.Generator().manual_seed(0)
    targets = [row % 2 for row in range(64)]
    signs = torch.tensor([1.0 if target else -1.0 for target in targets])
    signs[::8] *= -1  # an eighth is wrong
    examples = [Example(0, f"w{row}", None, target) for row, target in enumerate(targets)]
    train = [Example(0, "w", None, row % 2) for row in range(64)]
    sure = torch.tensor([[-1.0], [1.0]]).repeat(32, 1)

    def rows(features: Tensor, of: list[Example]) -> HeadRows:
        return HeadRows(of, features)

    adapted = FittedHeads.fit([task], rows(100 * sure, train), rows(100 * signs[:, None], examples))
    noise = 0.01 * torch.randn(64, 1, generator=generator)
    frozen = FittedHeads.fit([task], rows(noise, train), rows(noise, examples))
    assert choose_heads([task], [adapted, frozen]) == [0]
    plain = [float(head_losses(head, TaskRows(task, signs[:, None] * 100, targets)).sum()) for head in adapted.heads]
    assert plain[0] > 64 * 0.6931  # worse than guessing, unless its temperature is fitted


def test_related_tasks_are_chosen_for_together() -> None:
    tasks = [Task.classification(name, ["no", "yes"]) for name in ("seen", "unseen")]
    train = [Example(task_id, "w", None, row % 2) for task_id in (0, 1) for row in range(8)]
    validation = [Example(0, "w", None, row % 2) for row in range(8)]

    def rows(of: list[Example], sign: int) -> HeadRows:
        return HeadRows(of, torch.tensor([[sign * (2.0 * float(one.target or 0) - 1)] for one in of]))

    good, bad = (FittedHeads.fit(tasks, rows(train, 1), rows(validation, sign)) for sign in (1, -1))
    assert choose_heads(tasks, [good, bad]) == [0, 0]
    assert choose_heads(tasks, [bad, good]) == [1, 1]


def with_losses(sign: float, *samples: list[float]) -> FittedHeads:
    """Heads whose validation rows have the given losses times a sign at every temperature."""
    heads = [Head(torch.full((2, 1), sign), torch.zeros(2)) for _ in samples]
    return FittedHeads(heads, [sign * torch.tensor([sample] * len(TEMPERATURES)) for sample in samples])


GAINS = {
    "helps": [1.0, 1.2, 0.8, 1.1, 0.9, 1.0],
    "helps too": [0.7, 0.9, 0.8, 1.1, 0.5, 0.8],
    "uncertain": [-6.0, 5.0, -4.0, 4.0, -4.0, 4.0],
    "one row": [-0.1],
    "no rows": [],
    "harms": [-4.0, -4.1, -3.9, -4.0, -4.05, -3.95],
}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["uncertain"], [False]),
        (["helps", "helps too", "uncertain", "one row", "no rows"], [True] * 5),
        (["helps", "helps too", "harms"], [True, True, False]),
        (["harms", "harms", "uncertain", "no rows"], [False, False, False, True]),
        (["one row", "one row"], [False, False]),
        (["no rows"], [True]),
    ],
)
def test_what_adapters_do_for_most_tasks_decides_for_uncertain_ones(names: list[str], expected: list[bool]) -> None:
    tasks = [Task.classification(f"task {index}", ["no", f"yes {index}"]) for index in range(len(names))]
    samples = [GAINS[name] for name in names]
    assert sum(GAINS["uncertain"]) < 0
    adapted, frozen = with_losses(-0.5, *samples), with_losses(0.5, *samples)
    assert [index == 0 for index in choose_heads(tasks, [adapted, frozen])] == expected


def test_weaker_adapters_are_chosen_where_they_are_best() -> None:
    """The second candidate is best for most tasks, the first and the third for one task each."""
    tasks = [Task.classification(f"task {index}", ["no", f"yes {index}"]) for index in range(6)]
    losses = [[1.0, 0.5, 0.8]] * 4 + [[0.1, 2.5, 2.8], [2.8, 2.5, 0.1]]
    noise = torch.tensor([-0.02, 0.01, 0.03, -0.01, -0.02, 0.01])
    candidates = [
        with_losses(1.0, *[(losses[task_id][index] + noise).tolist() for task_id in range(6)]) for index in range(3)
    ]
    assert choose_heads(tasks, candidates) == [1, 1, 1, 1, 0, 2]
    assert choose_heads(tasks, [candidates[0]] * 3) == [0] * 6


def test_losses_of_numbers_do_not_depend_on_their_unit() -> None:
    tasks = [Task.regression("size"), Task.classification("mood", ["bad", "good"])]
    found = []
    for unit in (1.0, 1000.0):
        better, worse = ([unit**2 * 0.01 * row for row in range(9)], [unit**2 * 0.02 * row for row in range(9)])
        candidates = with_losses(1.0, worse, [0.1, 0.2]), with_losses(1.0, better, [0.1, 0.2])
        found.append(text_heads._losses_of_group(tasks, candidates, [0]))
    torch.testing.assert_close(found[0], found[1])
    assert found[0].sum(dim=1).tolist() == pytest.approx([9 / 2 * 2 / 1.5, 9 / 2 / 1.5])  # half of it at the mean
