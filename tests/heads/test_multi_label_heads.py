"""Heads of multi-label tasks: their loss in mixed batches, their fits, and their thresholds."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from torch import Tensor

from hyperadapters.config import Task
from hyperadapters.heads.calibration import LabelledLogits, fit_temperature, no_rows
from hyperadapters.heads.new_heads import fit_new_head, left_out_fits, make_head
from hyperadapters.heads.regression import DEFAULT_PENALTY, TaskRows, head_losses, label_tensor, standardized_regression
from hyperadapters.heads.task_heads import Head, TaskHeads, target_losses
from hyperadapters.heads.thresholds import PRIOR_ROWS, fit_thresholds
from hyperadapters.heads.trained_heads import fit_feature_head, fit_head, fit_related_heads, related_tasks

SIZE = 4
PAIR = Task.multi_label("pair", ["a", "b"])
TOPICS = Task.multi_label("topics", ["a", "b", "c"])
TASKS = [Task.classification("mood", ["bad", "good"]), TOPICS, Task.regression("size"), Task.multi_label("d", ["d"])]
LOGITS = torch.tensor([[0.5, -1.0, 2.0], [0.3, -0.2, -torch.inf], [1.5, -torch.inf, -torch.inf]])


def heads_of(tasks: list[Task]) -> TaskHeads:
    torch.manual_seed(0)
    return TaskHeads(SIZE, tasks, [index % 2 == 1 for index in range(len(tasks))])


def random_rows(count: int = 60, task: Task = TOPICS, seed: int = 0) -> TaskRows:
    """Rows whose labels lie along the first axes of their inputs, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    inputs = F.normalize(torch.randn(count, SIZE, generator=generator, dtype=torch.float64), dim=1)
    noisy = inputs[:, : len(task.labels)] + 0.3 * torch.randn(
        count, len(task.labels), generator=generator, dtype=torch.float64
    )
    return TaskRows(task, inputs, [tuple(row.nonzero()[:, 0].tolist()) for row in noisy > 0.2])


# The loss


def test_the_loss_of_a_row_is_the_mean_binary_cross_entropy_of_its_labels() -> None:
    heads = heads_of(TASKS)
    labels = torch.tensor([[1.0, 0, 1], [1, 0, 0], [1, 0, 0]])

    def loss(rows: list[int], ids: list[int]) -> float:
        return float(heads.loss(LOGITS[rows], labels[rows], torch.tensor(ids)))

    def softplus(value: float) -> float:
        return math.log1p(math.exp(value))

    topics = (softplus(-0.5) + softplus(-1.0) + softplus(-2.0)) / 3
    mood = math.log1p(math.exp(0.3 - (-0.2)))
    assert loss([0], [1]) == pytest.approx(topics, rel=1e-6)
    assert loss([2], [3]) == pytest.approx(softplus(-1.5), rel=1e-6)
    assert loss([0, 1, 2], [1, 0, 3]) == pytest.approx((topics + mood + softplus(-1.5)) / 3, rel=1e-6)


def test_label_smoothing_moves_every_label_towards_one_half() -> None:
    targets = torch.tensor([[1.0, 0.0, 1.0]])
    expected = F.binary_cross_entropy_with_logits(LOGITS[:1], torch.tensor([[0.9, 0.1, 0.9]]))
    found = heads_of(TASKS).loss(LOGITS[:1], targets, torch.tensor([1]), label_smoothing=0.2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_losses_and_gradients_of_other_tasks_are_the_same_bit_for_bit_in_such_batches(label_smoothing: float) -> None:
    """The last row is that of a multi-label task; without it, labels are a vector as they are without such tasks."""
    heads = heads_of(TASKS)
    ids, values = torch.tensor([0, 2, 0, 3]), torch.tensor([1.0, 2.5, 0.0, 1.0])

    def computed(labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each of the first three rows, and the gradient of the sum of all of them."""
        count = len(labels)
        logits = torch.tensor([[0.3, -0.2], [1.7, -torch.inf], [0.1, 0.4], [0.9, -torch.inf]], requires_grad=True)
        each = [heads.loss(logits[[row]], labels[[row]], ids[[row]], label_smoothing) for row in range(3)]
        heads.loss(logits[:count], labels, ids[:count], label_smoothing, "sum").backward()
        assert logits.grad is not None
        return torch.stack(each).detach(), logits.grad[:3]

    for one, other in zip(computed(values[:3]), computed(values[:, None]), strict=True):
        assert torch.equal(one, other)


def test_columns_of_other_tasks_have_no_gradient() -> None:
    heads = heads_of(TASKS)
    pooled, features = torch.randn(3, SIZE), torch.randn(3, SIZE)
    logits = heads(pooled, features, torch.tensor([3, 1, 0]))
    assert torch.equal(logits.isinf(), torch.tensor([[False, True, True], [False] * 3, [False, False, True]]))
    heads.loss(logits, torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]]), torch.tensor([3, 1, 0])).backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in heads.parameters() if parameter.grad is not None)


def test_the_likelihood_of_a_row_is_that_of_all_its_labels() -> None:
    labels = label_tensor(TOPICS, [(0, 2)])
    assert labels.tolist() == [[1, 0, 1]]
    expected = F.binary_cross_entropy_with_logits(LOGITS[:1], labels, reduction="sum")
    torch.testing.assert_close(target_losses(LOGITS[:1], labels)[0], expected)
    torch.testing.assert_close(target_losses(LOGITS[:1], labels, reduction="sum"), expected)


# Fits


def test_labels_are_fitted_independently_of_each_other() -> None:
    rows = random_rows()
    whole, labels = fit_head(rows), label_tensor(TOPICS, rows.targets)
    for label in range(3):
        alone = fit_head(TaskRows(TASKS[3], rows.inputs, [(0,) if one else () for one in labels[:, label]]))
        torch.testing.assert_close(whole.weight[label], alone.weight[0], atol=2e-3, rtol=0)
        with_bias = F.pad(rows.inputs, (0, 1), value=1.0).numpy()
        expected = LogisticRegression(C=1 / DEFAULT_PENALTY, fit_intercept=False, tol=1e-10, max_iter=10_000)
        expected.fit(with_bias, labels[:, label].numpy())
        found = torch.cat([whole.weight[label], whole.bias[label, None]])
        torch.testing.assert_close(found, torch.tensor(expected.coef_[0]), atol=2e-3, rtol=0)


FITS: dict[str, Any] = {
    "fit_feature_head": lambda rows: fit_feature_head(rows.task, rows.inputs.numpy(), rows.targets),
    "fit_head": fit_head,
    "fit_new_head": fit_new_head,
    "make_head": lambda rows: make_head(rows.task, rows.inputs, rows.targets, range(len(rows.targets))),
    "class means": lambda rows: make_head(rows.task, rows.inputs, rows.targets, range(len(rows.targets)), False),
}


def scores(head: Head, rows: TaskRows) -> float:
    found = F.linear(rows.inputs.to(head.weight), head.weight, head.bias) > 0
    return float(f1_score(label_tensor(rows.task, rows.targets), found, average="micro"))


@pytest.mark.parametrize("fit", FITS)
def test_every_fit_learns_the_labels(fit: str) -> None:
    head = FITS[fit](random_rows(200))
    assert (head.weight.shape, head.bias.shape) == ((3, SIZE), (3,))
    assert scores(head, random_rows(400, seed=1)) > 0.7


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("count", [1, 2, 6])
def test_labels_that_all_rows_or_none_have_get_a_finite_head(fit: str, count: int) -> None:
    inputs = random_rows(count).inputs
    targets = [(0,) if row % 2 else (0, 1) for row in range(count)]  # none has c
    head = FITS[fit](TaskRows(TOPICS, inputs, targets))
    logits = F.linear(inputs.to(head.weight), head.weight, head.bias)
    assert logits.isfinite().all()
    assert float(logits.abs().max()) < 30
    assert (logits[:, 0] > 0).all()
    assert (logits[:, 2] < 0).all()


def test_tasks_with_the_same_labels_learn_from_each_other_only_if_they_are_of_the_same_kind() -> None:
    other = Task.multi_label("more", ["c", "a", "b"])
    single = Task.classification("single", ["a", "b", "c"])
    assert related_tasks([TOPICS, single, other]) == [[0, 2], [1]]
    large, few = random_rows(300), random_rows(4, seed=3)
    order = [1, 2, 0]  # places of a, b and c in the other task
    few = TaskRows(other, few.inputs, [tuple(sorted(order[label] for label in row)) for row in few.targets])
    [_, related], alone = fit_related_heads([large, few]), fit_head(few)
    test = random_rows(400, seed=4)
    test = TaskRows(other, test.inputs, [tuple(sorted(order[label] for label in row)) for row in test.targets])
    assert scores(related, test) > scores(alone, test)


def test_macro_f1_does_not_weigh_labels_because_they_have_thresholds() -> None:
    rows = random_rows()
    by_label = TaskRows(Task.multi_label("topics", ["a", "b", "c"], metrics=("macro_f1",)), rows.inputs, rows.targets)
    assert torch.equal(fit_head(rows).weight, fit_head(by_label).weight)


def test_a_new_head_uses_heads_with_the_same_labels() -> None:
    rows, test = random_rows(3), random_rows(400, seed=1)
    related = fit_head(random_rows(300, seed=2))
    with_relatives = head_losses(fit_new_head(rows, related), test).mean()
    assert with_relatives < head_losses(fit_new_head(rows), test).mean()


def test_every_example_is_left_out_once_whatever_its_labels() -> None:
    rows = TaskRows(TOPICS, random_rows(7).inputs, [(0,), (), (1,), (0, 1), (2,), (), (0,)])
    fits = left_out_fits(rows, num_examples=6)
    left_out = torch.cat([found.inputs for _, found in fits])
    assert sorted(map(tuple, left_out.tolist())) == sorted(map(tuple, rows.inputs[:6].tolist()))
    assert left_out_fits(TaskRows(TOPICS, rows.inputs[:1], [(0,)]), 1) == []


def test_the_baseline_fits_each_label_and_accepts_labels_that_all_or_none_have() -> None:
    rows = random_rows(100)
    sets = np.hstack([label_tensor(TOPICS, rows.targets).numpy(), np.zeros((100, 1)), np.ones((100, 1))])
    found = standardized_regression(rows.inputs.numpy(), sets, 1.0, False).predict(rows.inputs.numpy())
    assert found.shape == (100, 5)
    assert f1_score(sets[:, :3], found[:, :3], average="micro") > 0.7
    assert (found[:, 3:] == [0, 1]).all()


# Calibration


def test_the_temperature_is_that_of_the_binary_cross_entropies() -> None:
    rows = random_rows(200)
    truth, labels = 6.0 * rows.inputs[:, :3], label_tensor(TOPICS, rows.targets)
    found = fit_temperature(LabelledLogits(8.0 * truth, labels), [])
    grid = torch.linspace(0.5, 40.0, 2000, dtype=torch.float64)
    losses = torch.stack([target_losses(8.0 * truth / one, labels, reduction="sum") for one in grid])
    assert found == pytest.approx(float(grid[losses.argmin()]), rel=0.1)  # the prior moves it a little
    assert fit_temperature(no_rows(TOPICS), [3.0]) == pytest.approx(3.0)


def best_f1(values: Tensor, is_target: Tensor) -> float:
    return max(
        f1_score(is_target.flatten().numpy(), (values > limit).flatten().numpy(), zero_division=0.0)
        for limit in [*values.flatten().tolist(), 0.0]
    )


@pytest.mark.parametrize("seed", range(4))
def test_with_many_rows_the_thresholds_have_the_best_f1_of_each_label(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperadapters.heads.thresholds.PRIOR_ROWS", 0.0)
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(50, 3, generator=generator).round(decimals=1)  # with equal ones
    sets = (torch.rand(50, 3, generator=generator) < values * torch.tensor([1.0, 0.5, 0.2])).float()
    sets[0] = 1
    thresholds = fit_thresholds(TOPICS, values, sets)
    for label in range(3):
        above = values[:, label] > thresholds[label]
        found = f1_score(sets[:, label].numpy(), above.numpy(), zero_division=0.0)
        assert found == pytest.approx(best_f1(values[:, label], sets[:, label]))


def test_the_fewer_rows_a_label_has_the_nearer_its_threshold_is_to_simpler_ones() -> None:
    none = torch.empty(0, 3)
    assert fit_thresholds(TOPICS, none, none).tolist() == [0.5] * 3
    assert fit_thresholds(PAIR, torch.full((4, 2), 0.3), torch.zeros(4, 2)).tolist() == [0.5] * 2
    # Label a is always found at 0.1, b never occurs, and no other probability is higher.
    values = torch.tensor([[0.2, 0.01], [0.2, 0.01], [0.01, 0.01], [0.01, 0.01]])
    sets = torch.tensor([[1.0, 0], [1, 0], [0, 0], [0, 0]])
    best = (0.2 + 0.01) / 2
    common = (2 * best + PRIOR_ROWS / 2) / (2 + PRIOR_ROWS)
    expected = [(2 * best + PRIOR_ROWS * common) / (2 + PRIOR_ROWS), common]
    torch.testing.assert_close(fit_thresholds(PAIR, values, sets), torch.tensor(expected))
    repeated = fit_thresholds(PAIR, values.repeat(1000, 1), sets.repeat(1000, 1))
    assert repeated[0] == pytest.approx(best, abs=1e-2)
    of_subsets = Task.multi_label("pair", ["a", "b"], metrics=["subset_accuracy"])
    assert fit_thresholds(of_subsets, values, sets).tolist() == [0.5] * 2


# Storage


def test_thresholds_belong_to_the_head_of_their_task_in_any_order() -> None:
    heads = heads_of(TASKS)
    assert heads.thresholds.eq(0.5).all()
    limits = {1: torch.tensor([0.1, 0.2, 0.3]), 3: torch.tensor([0.9])}
    for task_id, of_task in limits.items():
        heads.thresholds[heads.outputs_of(task_id)] = of_task
    for task_id, one in enumerate(heads.unpack()):
        assert one.thresholds is not None
        assert torch.equal(one.thresholds, limits.get(task_id, torch.full_like(one.bias, 0.5)))
        single = heads.head(task_id)
        assert single.thresholds is not None
        assert torch.equal(single.thresholds, one.thresholds)
    found = heads.unpack()
    for order in itertools.permutations(range(4)):
        again = TaskHeads.of([TASKS[place] for place in order], [found[place] for place in order])
        for place, task_id in enumerate(order):
            own = again.head(place).thresholds
            assert own is not None
            assert torch.equal(own, limits.get(task_id, torch.full_like(own, 0.5)))
