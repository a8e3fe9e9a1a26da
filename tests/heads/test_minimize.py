"""Regressions are fitted by Newton's method, whose second derivatives are products with a direction."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadapters.config import Task
from hyperadapters.heads.new_heads import RELATED_PENALTY, RELATED_SCALE, RELATED_SCALE_PENALTY, fit_new_head
from hyperadapters.heads.regression import (
    DEFAULT_PENALTY,
    MEAN_CHANGE,
    Products,
    TaskRows,
    label_cost,
    minimize,
    penalized_logistic_head,
)
from hyperadapters.heads.task_heads import Head, target_losses

ROUNDING = 1e-10
"""Of sums of tens of float64 products near 1, with a wide margin."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(logits: Tensor, is_multi_label: bool) -> Tensor:
    return (logits > 0).double() if is_multi_label else logits.argmax(dim=1)


@pytest.mark.parametrize("is_multi_label", [False, True])
def test_derivatives_of_the_losses_of_rows(is_multi_label: bool) -> None:
    logits, direction = normal(7, 3, seed=1), normal(7, 3, seed=2)
    labels, factors = labels_of(normal(7, 3, seed=3), is_multi_label), normal(7, seed=4).exp()

    def loss(at: Tensor) -> Tensor:
        return (target_losses(at, labels) * factors).sum()

    found = label_cost(logits, labels, factors)
    _, gradient = torch.autograd.functional.vjp(loss, logits)
    _, product = torch.autograd.functional.hvp(loss, logits, direction)
    torch.testing.assert_close(found.loss, loss(logits), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(found.of_logits, gradient, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(found.products(direction), product, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("is_multi_label", [False, True])
def test_the_gradient_is_zero_at_the_fitted_head(is_multi_label: bool) -> None:
    """The features of pairs have scales as different as these."""
    rows, num_labels, penalty = 60, 3, 0.1
    inputs = normal(rows, 8, seed=5) * torch.tensor([0.3] * 4 + [1.0] * 3 + [10.0])
    labels = labels_of(normal(rows, num_labels, seed=6), is_multi_label)
    zeros = inputs.new_zeros
    head = penalized_logistic_head(inputs, labels, Head(zeros(num_labels, 8), zeros(num_labels)), penalty)

    def cost(weight: Tensor, bias: Tensor) -> Tensor:
        of_bias = DEFAULT_PENALTY / 2 * bias.square().sum() if is_multi_label else bias.new_zeros(())
        losses = target_losses(F.linear(inputs, weight, bias), labels)
        return losses.sum() + penalty / 2 * weight.square().sum() + of_bias

    gradients = torch.autograd.functional.jacobian(cost, (head.weight, head.bias))
    # The last step changed the values by at most this, and the gradient by at most that times the largest curvature.
    last_step = MEAN_CHANGE * (head.weight.numel() + head.bias.numel())
    curvature = (inputs.square().sum() + rows) / 2 + penalty + DEFAULT_PENALTY
    for gradient in gradients:
        assert gradient.abs().max() <= curvature * last_step


def test_the_gradient_is_zero_at_a_new_head_beside_related_tasks() -> None:
    task = Task.classification("t", ["a", "b"])
    inputs, related = normal(9, 4, seed=7), Head(normal(2, 4, seed=8), normal(2, seed=9))
    labels = labels_of(F.linear(inputs, related.weight, related.bias) + normal(9, 2, seed=10), False)
    head = fit_new_head(TaskRows(task, inputs, labels.tolist()), related)

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        return target_losses(F.linear(inputs, weight, bias), labels).sum()

    of_weight, of_bias = torch.autograd.functional.jacobian(loss, (head.weight, head.bias))
    # The derivative with respect to the factor is zero at this value of it.
    along = (of_weight * related.weight).sum() + (of_bias * related.bias).sum()
    factor = RELATED_SCALE - along / RELATED_SCALE_PENALTY
    assert 0 < factor < RELATED_SCALE + 1
    tolerance = MEAN_CHANGE * 11 * (inputs.square().sum() + 9 + RELATED_PENALTY) * related.weight.abs().sum()
    for gradient, own in (
        (of_weight, head.weight - factor * related.weight),
        (of_bias, head.bias - factor * related.bias),
    ):
        assert (gradient + RELATED_PENALTY * own).abs().max() <= tolerance


def test_second_derivatives_are_those_of_the_values_that_are_asked_for() -> None:
    """The line search may end with other values than it has evaluated last."""
    seen = []

    def cost(value: Tensor) -> tuple[Tensor, list[Tensor], Products]:
        at = value.clone()

        def products(change: Tensor) -> list[Tensor]:
            seen.append((at, value))
            return [(12 * at.square() + 2) * change]

        return (value**4 + value.square() - value).sum(), [4 * value**3 + 2 * value - 1], products

    (found,) = minimize(cost, [torch.tensor([3.0, -2.0], dtype=torch.float64)])
    assert all(torch.equal(*pair) for pair in seen)
    torch.testing.assert_close(4 * found**3 + 2 * found, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-7)
    assert found.dtype == torch.float64


def test_start_at_the_minimum() -> None:
    def cost(value: Tensor) -> tuple[Tensor, list[Tensor], Products]:
        return value.square().sum(), [2 * value], lambda change: [2 * change]

    (found,) = minimize(cost, [torch.zeros(2)])
    assert found.tolist() == [0, 0]
    assert found.dtype == torch.float32
