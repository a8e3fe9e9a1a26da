"""Regressions are fitted by Newton's method, whose second derivatives are products with a direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadapters.config import Task
from hyperadapters.data.examples import Example
from hyperadapters.heads import new_heads, regression
from hyperadapters.heads.new_heads import fit_new_head
from hyperadapters.heads.regression import MAX_GRADIENT, Products, TaskRows, minimize, penalized_logistic_head
from hyperadapters.heads.task_heads import Head
from hyperadapters.training import text_heads
from hyperadapters.training.text_heads import HeadRows, _shares

ROUNDING = 1e-9
"""Of sums of hundreds of float64 products up to 100, with a wide margin."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def task_of(kind: str) -> Task:
    if kind == "regression":
        return Task.regression("t")
    return getattr(Task, kind)("t", ["a", "b", "c"])  # type: ignore[no-any-return]


def labels_of(logits: Tensor, kind: str) -> Tensor:
    return (logits > 0).double() if kind == "multi_label" else logits.argmax(dim=1)


def targets_of(answers: Tensor, kind: str) -> list[Any]:
    if kind == "regression":
        return answers[:, 0].tolist()
    labels = labels_of(answers, kind)
    return labels.tolist() if kind == "classification" else [tuple(row.nonzero()[:, 0].tolist()) for row in labels]


def fit_penalized(kind: str) -> None:
    labels, factors = labels_of(normal(9, 3, seed=1), kind), normal(3, seed=5).exp()
    start = Head(normal(3, 4, seed=2), normal(3, seed=3))
    penalized_logistic_head(normal(9, 4, seed=4), labels, start, 0.3, None if kind == "multi_label" else factors)


def fit_beside_related(kind: str) -> None:
    rows = TaskRows(
        task_of(kind), normal(9, 4, seed=4), targets_of(normal(9, 3, seed=1), kind), normal(9, seed=5).exp()
    )
    fit_new_head(rows, Head(normal(3, 4, seed=2), normal(3, seed=3)))


def choose_shares(kind: str) -> None:
    size, features = 1 if kind == "regression" else 3, normal(9, 4, seed=4)
    found, trained = (Head(normal(size, 4, seed=seed).float(), torch.zeros(size)) for seed in (2, 6))
    answers = F.linear(features, found.weight.double()) + normal(9, size, seed=7)
    examples = [Example(0, "text", target=target) for target in targets_of(answers, kind)]
    _shares(task_of(kind), HeadRows(examples, features.float(), list(answers.float())), found, trained, 1)


@pytest.mark.parametrize(
    ("module", "fit", "kind"),
    [
        (regression, fit_penalized, "classification"),
        (regression, fit_penalized, "multi_label"),
        (new_heads, fit_beside_related, "classification"),
        (new_heads, fit_beside_related, "multi_label"),
        (text_heads, choose_shares, "classification"),
        (text_heads, choose_shares, "multi_label"),
        (text_heads, choose_shares, "regression"),
    ],
)
def test_derivatives_are_those_of_the_cost(
    module: ModuleType, fit: Callable[[str], None], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Callable[..., Any], Sequence[Tensor]]] = []

    def kept(cost: Callable[..., Any], start: Sequence[Tensor]) -> list[Tensor]:
        seen.append((cost, start))
        return minimize(cost, start)

    monkeypatch.setattr(module, "minimize", kept)
    monkeypatch.setattr(regression, "BLOCK_ROWS", 4)
    fit(kind)
    cost, start = seen[0]
    values = tuple(normal(*value.shape, seed=8 + i) for i, value in enumerate(start))
    direction = tuple(normal(*value.shape, seed=18 + i) for i, value in enumerate(start))
    _, gradients, products = cost(*values)
    _, expected = torch.autograd.functional.vjp(lambda *at: cost(*at)[0], values)
    torch.testing.assert_close(tuple(gradients), expected, rtol=0, atol=ROUNDING)
    _, expected = torch.autograd.functional.hvp(lambda *at: cost(*at)[0], values, direction)
    torch.testing.assert_close(tuple(products(*direction)), expected, rtol=0, atol=ROUNDING)


def gradient_at_the_fitted_head(inputs: Tensor, labels: Tensor, start: Head, penalty: float) -> float:
    """Norm of the derivatives of the cost of a softmax regression at the head that is fitted to it."""
    head = penalized_logistic_head(inputs, labels, start, penalty)

    def cost(weight: Tensor, bias: Tensor) -> Tensor:
        losses = F.cross_entropy(F.linear(inputs, weight, bias), labels, reduction="sum")
        return losses + penalty / 2 * (weight - start.weight).square().sum()

    _, gradients = torch.autograd.functional.vjp(cost, (head.weight, head.bias))
    return float(torch.cat([gradient.flatten() for gradient in gradients]).norm())


@pytest.mark.parametrize("scale", [1e-4, 10.0, 1e4])
def test_a_feature_of_another_scale(scale: float) -> None:
    """The first steps go along this feature only and are small, which is no sign that the cost is minimised."""
    inputs = normal(200, 20, seed=5)
    labels = (F.linear(inputs, normal(4, 20, seed=6)) / 5 + normal(200, 4, seed=7)).argmax(dim=1)
    inputs[:, 0] = scale * (1 + 0.1 * inputs[:, 0])
    start = Head(inputs.new_zeros(4, 20), inputs.new_zeros(4))
    assert gradient_at_the_fitted_head(inputs, labels, start, 0.1) <= MAX_GRADIENT


def test_a_start_whose_answers_are_certain_and_wrong() -> None:
    """The curvature is nearly zero there, so that the first step is far too long."""
    inputs, labels = normal(200, 20, seed=5), torch.arange(200) % 4
    start = Head(inputs.new_zeros(4, 20), 30 * normal(4, seed=8))
    assert gradient_at_the_fitted_head(inputs, labels, start, 0.1) <= MAX_GRADIENT


def fourth_powers(value: Tensor) -> tuple[Tensor, list[Tensor], Products]:
    return (value**4).sum(), [4 * value**3], lambda change: [12 * value**2 * change]


def test_second_derivatives_are_those_of_the_values_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is taken back has evaluated the cost elsewhere."""
    found = []

    def solve(cost: Any, start: Any, *, hessp: Any, **options: Any) -> SimpleNamespace:
        cost(start + 1)
        found.append(hessp(start, np.ones(2)))
        return SimpleNamespace(x=start)

    monkeypatch.setattr(regression, "scipy_minimize", solve)
    minimize(fourth_powers, [torch.tensor([1.0, 2.0])])
    for values in found:
        assert values.tolist() == [12, 48]
    assert found


def test_the_result_has_the_type_of_the_start() -> None:
    (found,) = minimize(fourth_powers, [torch.zeros(2)])
    assert found.tolist() == [0, 0]
    assert found.dtype == torch.float32


def test_a_start_that_is_not_finite_is_left_as_it_is() -> None:
    """The products of conjugate gradients would not end for a long time."""
    (found,) = minimize(fourth_powers, [torch.tensor([float("nan"), 1.0])])
    assert found.isnan().tolist() == [True, False]
