"""Heads of new tasks with fixed penalties, and the likelihood of examples that are left out of their fit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from hyperadapters.config import Task
from hyperadapters.heads import new_heads
from hyperadapters.heads.new_heads import RELATED_SCALE, fit_new_head, left_out_fits
from hyperadapters.heads.regression import DEFAULT_PENALTY, TaskRows, head_losses
from hyperadapters.heads.task_heads import Head

SIZE = 5
TASK = Task.classification("new", ["no", "yes"])


def rows_with(inputs: Tensor, targets: list[float], task: Task = TASK) -> TaskRows:
    return TaskRows(task, inputs, targets)


def random_inputs(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, SIZE, generator=generator, dtype=torch.float64), dim=1)


def along(axis: int, strength: float = 10.0) -> Head:
    """The head of a related task, whose "yes" lies along an axis."""
    direction = strength * torch.eye(SIZE, dtype=torch.float64)[axis]
    return Head(torch.stack([-direction, direction]) / 2, torch.zeros(2, dtype=torch.float64))


def labels_along(inputs: Tensor, axis: int) -> list[float]:
    return (inputs[:, axis] > 0).double().tolist()


def accuracy(head: Head, inputs: Tensor, targets: list[float]) -> float:
    answers = F.linear(inputs, head.weight, head.bias).argmax(dim=1)
    return float((answers == torch.tensor(targets)).double().mean())


def test_without_relatives_it_is_a_logistic_regression_with_a_penalty_on_weight_and_bias() -> None:
    inputs = random_inputs(30)
    targets = labels_along(inputs, 0)
    head = fit_new_head(rows_with(inputs, targets))
    with_bias = F.pad(inputs, (0, 1), value=1.0).numpy()
    expected = LogisticRegression(C=2 / DEFAULT_PENALTY, fit_intercept=False, tol=1e-10, max_iter=10_000)
    expected.fit(with_bias, targets)
    found = F.linear(inputs, head.weight, head.bias).softmax(dim=1)
    torch.testing.assert_close(found, torch.tensor(expected.predict_proba(with_bias)), atol=1e-4, rtol=0)


def test_a_related_head_that_is_right_is_followed() -> None:
    inputs, unseen = random_inputs(4), random_inputs(200, seed=1)
    targets = labels_along(inputs, 1)
    assert set(targets) == {0.0, 1.0}
    expected = labels_along(unseen, 1)
    informed, alone = (fit_new_head(rows_with(inputs, targets), related) for related in (along(1), None))
    assert accuracy(informed, unseen, expected) > accuracy(alone, unseen, expected) + 0.05
    assert accuracy(informed, unseen, expected) > 0.9


def test_a_related_head_that_is_wrong_is_ignored() -> None:
    inputs = random_inputs(60)
    targets, related = labels_along(inputs, 0), along(0)
    opposite = Head(-related.weight, related.bias)
    found, expected = fit_new_head(rows_with(inputs, targets), opposite), fit_new_head(rows_with(inputs, targets))
    assert accuracy(found, inputs, targets) == pytest.approx(accuracy(expected, inputs, targets), abs=0.02)
    own = new_heads._new_logistic_head(rows_with(inputs, targets), None, new_heads.RELATED_PENALTY)[0]
    assert torch.equal(found.weight, own.weight)
    assert torch.equal(found.bias, own.bias)


def test_without_evidence_the_related_head_has_its_prior_scale() -> None:
    related = along(0)
    head = fit_new_head(rows_with(torch.zeros(2, SIZE, dtype=torch.float64), [0, 1]), related)
    torch.testing.assert_close(head.weight, RELATED_SCALE * related.weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("related", [None, along(1)])
def test_left_out_examples_are_scored_by_heads_that_have_not_seen_them(related: Head | None) -> None:
    inputs = random_inputs(6)
    rows = rows_with(inputs, [0, 1, 0, 1, 0, 1])
    seen: list[list[int]] = []

    def record(kept: TaskRows, related: Head | None = None) -> Head:
        seen.append((inputs[:, None] == kept.inputs).all(dim=2).any(dim=1).nonzero()[:, 0].tolist())
        return fit_new_head(kept, related)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(new_heads, "fit_new_head", record)
        found = losses_of(left_out_fits(rows, 6, related, seed=3))
    expected = []
    for kept in seen:
        head = fit_new_head(rows.subset(kept), related)
        for row in sorted(set(range(6)) - set(kept)):
            probabilities = F.linear(inputs[row], head.weight, head.bias).softmax(dim=0)
            expected.append(-float(probabilities[int(rows.targets[row])].log()))
    assert [len(kept) for kept in seen] == [4, 4, 4]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def losses_of(fits: list[tuple[Head, TaskRows]]) -> Tensor:
    return torch.cat([head_losses(head, rows) for head, rows in fits])


def total(rows: TaskRows, num_examples: int, related: Head | None = None) -> float:
    losses = losses_of(left_out_fits(rows, num_examples, related))
    assert len(losses) == num_examples
    return float(losses.sum())


def test_a_related_head_that_is_right_lowers_the_losses_and_one_that_is_wrong_does_not() -> None:
    inputs = random_inputs(12)
    rows = rows_with(inputs, labels_along(inputs, 1))
    alone, right, wrong = (total(rows, 12, related) for related in (None, along(1), along(2)))
    assert right < alone - 1
    assert wrong > right + 1


def test_rows_that_are_no_examples_are_never_left_out() -> None:
    inputs = random_inputs(4)
    assert left_out_fits(rows_with(inputs[:2], [0, 1]), 2) == []  # the only rows of their labels
    rows = rows_with(inputs, [0, 1, 0, 1])
    head = fit_new_head(rows.subset([2, 3]))
    expected = F.cross_entropy(F.linear(inputs[:2], head.weight, head.bias), torch.tensor([0, 1]), reduction="sum")
    assert total(rows, 2) == pytest.approx(float(expected), rel=1e-9)


def test_numbers_that_follow_the_inputs_are_predicted_when_they_are_left_out() -> None:
    inputs, task = random_inputs(30).float(), Task.regression("number")
    for size in (100, 1e-6):
        follows = total(TaskRows(task, inputs, (size * inputs[:, 0]).tolist()), 30) / size**2
        noise = total(TaskRows(task, inputs, (size * random_inputs(30, seed=1)[:, 0]).tolist()), 30) / size**2
        assert follows < 0.1 * 30 * float(inputs[:, 0].var())
        assert noise > 0.8 * 30 * float(random_inputs(30, seed=1)[:, 0].var())
    assert left_out_fits(TaskRows(task, inputs[:1], [3.0]), 1) == []
