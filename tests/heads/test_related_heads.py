"""Heads of trained tasks that are fitted together, so that tasks with the same labels learn from each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

from hyperadapters.config import Task
from hyperadapters.errors import DataError
from hyperadapters.heads import regression, trained_heads
from hyperadapters.heads.new_heads import fit_new_head
from hyperadapters.heads.regression import (
    DEFAULT_PENALTY,
    FOLDS,
    MANY_ROWS,
    MAX_GRADIENT,
    TaskRows,
    head_losses,
    left_out_rows,
    pair_scales,
    penalized_logistic_head,
)
from hyperadapters.heads.task_heads import Head, target_losses
from hyperadapters.heads.trained_heads import PENALTY_FACTORS, POOLED_PENALTY, fit_head, fit_related_heads

SIZE = 6
PAIR = ("text", "text_pair")


def mood(name: str, labels: Sequence[str] = ("bad", "good"), **options: object) -> Task:
    return Task.classification(name, list(labels), **options)


def rows_along(task: Task, direction: Tensor, count: int, seed: int) -> TaskRows:
    """Rows of unit length whose label "good" is likelier the further they lie along a direction."""
    generator = torch.Generator().manual_seed(seed)
    inputs = F.normalize(torch.randn(count, SIZE, generator=generator, dtype=torch.float64), dim=1)
    is_good = torch.rand(count, generator=generator, dtype=torch.float64) < (8 * inputs @ direction).sigmoid()
    is_good[:2] = torch.tensor([False, True])
    good, bad = task.labels.index("good"), task.labels.index("bad")
    return TaskRows(task, inputs, torch.where(is_good, good, bad).tolist())


def axis(index: int) -> Tensor:
    return torch.eye(SIZE, dtype=torch.float64)[index]


def margin(head: Head, task: Task) -> Tensor:
    """Weight of "good" minus that of "bad"."""
    return head.weight[task.labels.index("good")] - head.weight[task.labels.index("bad")]


def cosine(first: Tensor, second: Tensor) -> float:
    return float(F.cosine_similarity(first, second, dim=0))


def softmax_regression(rows: TaskRows, penalty: float) -> LogisticRegression:
    """The same fit by scikit-learn, which counts the weights of two labels as one vector w, with the norm of w² / 2."""
    strength = (2 if len(rows.task.labels) == 2 else 1) / penalty
    return LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(rows.inputs.numpy(), rows.targets)


@pytest.mark.parametrize("labels", [("bad", "good"), ("bad", "good", "mixed")])
def test_a_task_without_relatives_gets_a_plain_logistic_regression(labels: tuple[str, ...]) -> None:
    inputs = rows_along(mood("unused"), axis(0), 60, seed=0).inputs
    targets = [row % len(labels) for row in range(60)]
    alone = TaskRows(mood("alone", labels), inputs, targets)
    others = [mood("pairs", labels, fields=PAIR), mood("fewer", (*labels[:1], "other")), Task.regression("number")]
    data = [alone, *(TaskRows(task, inputs, [row % 2 for row in range(60)]) for task in others[1:])]
    head = fit_related_heads([*data, TaskRows(others[0], inputs, targets)])[0]
    expected = softmax_regression(alone, DEFAULT_PENALTY).predict_proba(inputs.numpy())
    found = (inputs @ head.weight.T + head.bias).softmax(dim=1)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=0)


def test_a_task_with_few_rows_gets_the_weights_of_its_relatives() -> None:
    few = rows_along(mood("few"), axis(1), 2, seed=0)
    data = [few, *(rows_along(mood(f"rich {seed}"), axis(0), 200, seed) for seed in (1, 2, 3))]
    heads = fit_related_heads(data)
    pooled = TaskRows(
        few.task, torch.cat([rows.inputs for rows in data]), [target for rows in data for target in rows.targets]
    )
    weight = torch.tensor(softmax_regression(pooled, POOLED_PENALTY).coef_[0])
    assert cosine(margin(heads[0], few.task), weight) > 0.98
    assert cosine(margin(fit_related_heads([few])[0], few.task), weight) < 0.9


def test_a_task_with_many_rows_keeps_its_own_direction() -> None:
    rich = rows_along(mood("rich"), axis(1), 4000, seed=0)
    data = [rich, *(rows_along(mood(f"other {seed}"), axis(0), 4000, seed) for seed in (1, 2, 3))]
    own, alone = fit_related_heads(data)[0], fit_related_heads([rich])[0]
    assert cosine(margin(own, rich.task), margin(alone, rich.task)) > 0.99
    assert cosine(margin(own, rich.task), axis(1)) > 0.98


def test_labels_are_matched_by_name() -> None:
    first = rows_along(mood("first"), axis(0), 20, seed=0)
    second = rows_along(mood("second"), axis(0), 20, seed=1)
    turned = TaskRows(mood("second", ("good", "bad")), second.inputs, [1 - target for target in second.targets])
    expected, found = fit_related_heads([first, second]), fit_related_heads([first, turned])
    torch.testing.assert_close(found[0].weight, expected[0].weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1].weight, expected[1].weight.flip(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1].bias, expected[1].bias.flip(0), atol=1e-4, rtol=0)


def test_the_order_of_the_tasks_does_not_matter() -> None:
    data = [rows_along(mood(f"task {seed}"), axis(seed), 20, seed) for seed in range(3)]
    for found, expected in zip(fit_related_heads(data[::-1])[::-1], fit_related_heads(data), strict=True):
        torch.testing.assert_close(found.weight, expected.weight, atol=1e-4, rtol=0)


def test_a_fit_repeats_itself_bit_for_bit() -> None:
    data = [rows_along(mood(f"task {seed}"), axis(seed), 20, seed) for seed in range(3)]
    for found, expected in zip(fit_related_heads(data), fit_related_heads(data), strict=True):
        assert torch.equal(found.weight, expected.weight)
        assert torch.equal(found.bias, expected.bias)


def left_out_losses(data: list[TaskRows]) -> dict[float, float]:
    """Sum of the losses of rows that are left out in turn, for penalties times each factor."""
    losses = dict.fromkeys(PENALTY_FACTORS, 0.0)
    folds = [list(left_out_rows(rows, FOLDS)) for rows in data]
    for fold in range(FOLDS):
        kept = [rows.subset(folds[task][fold][0]) for task, rows in enumerate(data)]
        for factor in losses:
            for head, rows, indices in zip(with_factor(kept, factor), data, folds, strict=True):
                losses[factor] += float(head_losses(head, rows.subset(indices[fold][1])).sum())
    return losses


def with_factor(data: list[TaskRows], factor: float) -> list[Head]:
    """Heads with penalties times a factor."""
    names = ("DEFAULT_PENALTY", "POOLED_PENALTY", "DISTANCE_PENALTY")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(trained_heads, name, factor * getattr(trained_heads, name))
        return fit_related_heads(data)


def numbers() -> TaskRows:
    rows = rows_along(mood("unused"), axis(0), 60, seed=0)
    noise = torch.randn(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TaskRows(Task.regression("number"), rows.inputs.float(), (10 + 3 * rows.inputs[:, 0] + noise).tolist())


def several() -> TaskRows:
    rows = rows_along(mood("unused"), axis(0), 60, seed=0)
    return TaskRows(
        Task.multi_label("topics", ["a", "b"]), rows.inputs, [(0,) if one else (0, 1) for one in rows.targets]
    )


CASES: dict[str, list[TaskRows]] = {
    "alone": [rows_along(mood("alone"), axis(0), 60, seed=0)],
    "scaled": [rows_along(mood("alone"), axis(0), 60, seed=0)._replace(scales=torch.linspace(2.0, 8.0, SIZE))],
    "related": [rows_along(mood(f"task {seed}"), axis(seed), 20, seed) for seed in range(3)],
    "number": [numbers()],
    "several labels": [several()],
}


@pytest.mark.parametrize("case", CASES)
def test_heads_of_frozen_features_have_the_factor_of_the_penalties_that_predicts_left_out_rows_best(case: str) -> None:
    losses = left_out_losses(CASES[case])
    expected = with_factor(CASES[case], min(losses, key=losses.__getitem__))
    for found, head in zip(fit_related_heads(CASES[case], frozen=True), expected, strict=True):
        torch.testing.assert_close(found.weight, head.weight, atol=1e-5, rtol=0)
    fixed = fit_related_heads(CASES[case])
    assert any(
        not torch.allclose(one.weight, head.weight, atol=1e-3) for one, head in zip(fixed, expected, strict=True)
    )


def test_labels_that_weigh_the_same_do_so_among_left_out_rows() -> None:
    rows = imbalanced("macro_f1")
    head = fit_head(rows)
    losses, is_good = head_losses(head, rows), torch.tensor(rows.targets) == 1
    expected = 50 * (losses[is_good].mean() + losses[~is_good].mean())
    assert trained_heads._weighted_loss(head, rows) == pytest.approx(float(expected))


def test_a_head_of_frozen_features_that_tell_nothing_answers_with_the_most_frequent_label() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = 3 * F.normalize(torch.randn(1000, 200, generator=generator), dim=1)
    rows = TaskRows(mood("noise"), inputs[:100], [0.0 if row % 10 < 7 else 1.0 for row in range(100)])
    shares = []
    for frozen in (True, False):
        head = fit_related_heads([rows], frozen)[0]
        shares.append(float((F.linear(inputs[100:], head.weight, head.bias).argmax(dim=1) == 0).float().mean()))
    assert shares[0] > 0.95 > 0.85 > shares[1]


@pytest.mark.parametrize("count", [2, MANY_ROWS + 1])
def test_penalties_are_not_chosen_by_no_rows_or_many(count: int) -> None:
    rows = rows_along(mood("alone"), axis(0), count, seed=0)
    [found], [expected] = fit_related_heads([rows], frozen=True), fit_related_heads([rows])
    assert torch.equal(found.weight, expected.weight)


def imbalanced(metric: str) -> TaskRows:
    """100 rows of which only every tenth has the label "good", with little in them that tells the labels apart."""
    rows = rows_along(mood("rare", metrics=[metric]), 0.2 * axis(0), 100, seed=0)
    return rows._replace(targets=[1.0 if row % 10 == 0 else 0.0 for row in range(100)])


@pytest.mark.parametrize(("metric", "expected"), [("accuracy", 0.1), ("macro_f1", 0.5), ("balanced_accuracy", 0.5)])
def test_labels_weigh_the_same_if_the_score_is_balanced(metric: str, expected: float) -> None:
    rows = imbalanced(metric)
    head = fit_related_heads([rows])[0]
    found = F.linear(rows.inputs, head.weight, head.bias).softmax(dim=1)[:, 1]
    is_good = torch.tensor(rows.targets) == 1
    mean = found.mean() if metric == "accuracy" else (found[is_good].mean() + found[~is_good].mean()) / 2
    assert float(mean) == pytest.approx(expected, abs=1e-4)  # the bias has no penalty


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    rows = imbalanced("macro_f1")
    balanced = LogisticRegression(C=2 / DEFAULT_PENALTY, tol=1e-10, max_iter=10_000, class_weight="balanced")
    expected = balanced.fit(rows.inputs.numpy(), rows.targets).coef_[0]
    head = fit_related_heads([rows])[0]
    torch.testing.assert_close(margin(head, rows.task), torch.tensor(expected), atol=1e-5, rtol=0)


def test_one_row_of_each_label_is_enough() -> None:
    task = mood("tiny", ("bad", "good", "mixed"))
    rows = TaskRows(task, torch.eye(3, SIZE), [2, 0, 1])
    head = fit_related_heads([rows])[0]
    assert (rows.inputs @ head.weight.T + head.bias).argmax(dim=1).tolist() == rows.targets


def test_a_label_without_a_row_is_named() -> None:
    rows = TaskRows(mood("tiny"), torch.eye(2, SIZE), [1, 1])
    with pytest.raises(DataError, match="task 'tiny': expected a training example of each label, found none of bad"):
        fit_related_heads([rows])


def test_numbers_are_fitted_by_a_ridge_regression_of_standardised_targets() -> None:
    inputs = rows_along(mood("unused"), axis(0), 50, seed=0).inputs
    targets = (30 + 5 * inputs[:, 1]).tolist()
    first, second = Task.regression("first"), Task.regression("second")
    heads = fit_related_heads([TaskRows(first, inputs, targets), TaskRows(second, inputs, targets[::-1])])
    for head, values in zip(heads, (targets, targets[::-1]), strict=True):
        standardized = (np.array(values) - np.mean(values)) / np.std(values)
        expected = Ridge(DEFAULT_PENALTY).fit(inputs.numpy(), standardized)
        assert (head.target_mean, head.target_std) == pytest.approx((np.mean(values), np.std(values)))
        torch.testing.assert_close(head.weight[0], torch.tensor(expected.coef_, dtype=torch.float32))


@pytest.mark.parametrize("targets", [[0.1] * 3, [1e9] * 7, [3.7]])
def test_constant_numbers_are_predicted(targets: list[float]) -> None:
    inputs = torch.randn(len(targets), SIZE, generator=torch.Generator().manual_seed(0))
    head = fit_related_heads([TaskRows(Task.regression("flat"), inputs, targets)])[0]
    assert head.logits(inputs, inputs)[:, 0].tolist() == pytest.approx(targets, rel=1e-6)


SCALES = torch.linspace(0.5, 4.0, SIZE, dtype=torch.float64)


def scaled(rows: TaskRows) -> TaskRows:
    return rows._replace(scales=SCALES)


def times(rows: TaskRows) -> TaskRows:
    return rows._replace(inputs=rows.inputs * SCALES)


def assert_reads_inputs_as_they_are(found: Head, expected: Head) -> None:
    """Whether a head of scaled rows is that of rows whose inputs are multiplied by the scales."""
    torch.testing.assert_close(found.weight, expected.weight * SCALES, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.bias, expected.bias, atol=1e-4, rtol=1e-4)


def test_scales_change_what_is_penalised_and_not_what_heads_read() -> None:
    data = [rows_along(mood(f"task {seed}"), axis(seed), 20, seed) for seed in range(3)]
    number = TaskRows(Task.regression("number"), data[0].inputs, data[0].inputs[:, 0].tolist())
    data += [
        number,
        rows_along(mood("alone", ("good", "bad", "mixed")), axis(1), 20, 3)._replace(targets=[0, 1, 2, 0] * 5),
    ]
    heads = zip(fit_related_heads(list(map(scaled, data))), fit_related_heads(list(map(times, data))), strict=True)
    for found, expected in heads:
        assert_reads_inputs_as_they_are(found, expected)
    related = Head(torch.randn(2, SIZE, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    on_scaled = related._replace(weight=related.weight / SCALES)
    assert_reads_inputs_as_they_are(fit_new_head(scaled(data[0]), related), fit_new_head(times(data[0]), on_scaled))
    assert_reads_inputs_as_they_are(fit_new_head(scaled(number)), fit_new_head(times(number)))
    assert scaled(data[0]).subset([3, 1]).scales is SCALES


def test_the_comparison_of_a_pair_counts_more_than_the_sum_of_its_texts() -> None:
    """Labels that depend on u . v alone, with features as those of a sentence encoder."""
    generator = torch.Generator().manual_seed(0)
    first, other = F.normalize(torch.randn(2, 240, 64, generator=generator), dim=2)
    second = F.normalize(first + 0.8 * torch.linspace(0.5, 2, 240)[:, None] * other, dim=1)
    product = (first * second).sum(dim=1, keepdim=True)
    inputs = torch.cat([first + second, (first - second).abs(), product], dim=1)
    targets = (product[:, 0] > product.median()).long().tolist()
    task = mood("same", fields=PAIR)
    few = TaskRows(task, inputs[::8], targets[::8], scales=pair_scales(task, inputs))
    assert pair_scales(mood("single"), inputs) is None
    right = [
        float((inputs @ head.weight.T + head.bias).argmax(dim=1).eq(torch.tensor(targets)).float().mean())
        for head in (fit_related_heads([few])[0], fit_related_heads([few._replace(scales=None)])[0])
    ]
    assert right[0] > 0.9 > right[1]


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("count", [5, 40])
def test_a_fitted_head_is_where_the_cost_has_no_slope(
    count: int, multi_label: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer rows than elements and with more, in several blocks; computed once more by autograd, in float64."""
    monkeypatch.setattr(regression, "BLOCK_ROWS", 16)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, SIZE, generator=generator)
    labels = torch.arange(count) % 3
    if multi_label:
        labels = F.one_hot(labels, 3).float()
    start, penalty = Head(torch.randn(3, SIZE, generator=generator), torch.zeros(3)), 0.5
    head = penalized_logistic_head(inputs, labels, start, penalty)
    weight, bias = head.weight.double().requires_grad_(), head.bias.double().requires_grad_()
    loss = target_losses(F.linear(inputs.double(), weight, bias), labels, reduction="sum")
    cost = loss + penalty / 2 * (weight - start.weight.double()).square().sum()
    if multi_label:
        cost = cost + DEFAULT_PENALTY / 2 * bias.square().sum()
    # The head is rounded to float32, and the slope changes with it by the curvature, which is N |x|^2 / 2 at most.
    largest = float(head.weight.abs().max()) * torch.finfo(torch.float32).eps
    tolerance = MAX_GRADIENT + largest * (penalty + float(inputs.square().sum()) / 2) * SIZE
    for slope in torch.autograd.grad(cost, [weight, bias]):
        assert float(slope.abs().max()) <= tolerance
