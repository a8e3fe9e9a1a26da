"""Task heads, plain and wide, of different sizes in one batch; and the probe that few-shot fits are compared with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerance import rounding
from torch import Tensor

from hyperadapters.config import Task
from hyperadapters.heads.regression import few_shot_probe
from hyperadapters.heads.task_heads import Head, TaskHeads, wide_inputs

TASKS = [Task.classification("a", ["x", "y"]), Task.regression("b"), Task.classification("c", ["x", "y", "z"])]
PLAIN = Head(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.5, 0.0]))
WIDE_FIRST = Head(torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([0.5, 0.25]))
SCALED = Head(torch.tensor([[2.0, 0.0]]), torch.tensor([1.0]), target_mean=10.0, target_std=4.0)
WIDE = Head(torch.tensor([[1.0, 0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]]), torch.zeros(3))
POOLED = torch.tensor([[3.0, 4.0], [1.0, 2.0], [6.0, 8.0]])
FEATURES = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 5.0]])


def test_each_row_is_read_by_its_own_head() -> None:
    heads = TaskHeads.of(TASKS, [PLAIN, SCALED, WIDE])
    logits = heads(POOLED, FEATURES, torch.tensor([0, 1, 2]))
    none = -torch.inf
    expected = [[3.5, 4.0, none], [(2 * 1.0 + 1) * 4 + 10, none, none], [0.0, 0.6, 0.8]]
    torch.testing.assert_close(logits, torch.tensor(expected))


def test_a_batch_is_as_wide_as_its_largest_head() -> None:
    heads = TaskHeads.of(TASKS, [PLAIN, SCALED, WIDE])
    assert heads(POOLED, FEATURES, torch.tensor([0, 1, 1])).shape == (3, 2)
    assert heads(POOLED, FEATURES, torch.tensor([1, 1, 1])).shape == (3, 1)


def test_a_wide_head_reads_directions_only() -> None:
    near, far = wide_inputs(POOLED, FEATURES), wide_inputs(10 * POOLED, 3 * FEATURES)
    torch.testing.assert_close(near, far)
    torch.testing.assert_close(near[2], torch.tensor([0.0, 1.0, 0.6, 0.8]))


def test_a_head_is_given_back_as_it_was() -> None:
    heads = TaskHeads.of(TASKS, [WIDE_FIRST, SCALED, WIDE])
    for task_id, head in enumerate((WIDE_FIRST, SCALED, WIDE)):
        for found in (heads.head(task_id), heads.unpack()[task_id]):
            assert torch.equal(found.weight, head.weight)
            assert torch.equal(found.bias, head.bias)
            assert (found.target_mean, found.target_std) == (head.target_mean, head.target_std)


def test_a_head_given_back_is_no_copy() -> None:
    heads = TaskHeads.of(TASKS, [PLAIN, SCALED, WIDE])
    for task_id in range(3):
        for head in (heads.head(task_id), heads.unpack()[task_id]):
            head.bias.add_(1)
            head.weight.add_(1)
    assert torch.equal(heads.head(2).weight, WIDE.weight + 2)
    assert torch.equal(heads.head(1).bias, SCALED.bias + 2)


@pytest.mark.parametrize("weight", [torch.zeros(2, 2), torch.zeros(3, 3)])
def test_a_head_that_does_not_fit_its_task_is_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"task 2: expected a weight of shape \(3, 2\) or \(3, 4\) and a bias"):
        TaskHeads.of(TASKS, [PLAIN, SCALED, Head(weight, torch.zeros(3))], hidden_size=2)


# Against the same in a loop over tasks

MANY = [
    Task.regression(f"t{index}") if index % 4 == 0 else Task.classification(f"t{index}", list("abcdefgh"[: 2 + index]))
    for index in range(7)
]
MIXED = torch.tensor([3, 0, 5, 2, 3, 4, 5, 6, 0, 2])
TARGETS = torch.tensor([4.0, 0.3, 0.0, 3.0, 1.0, -7.0, 2.0, 7.0, 2.5, 0.0], dtype=torch.float64)


def _mixed_heads(wide: set[int]) -> list[Head]:
    """Random heads in float64."""
    sizes = [len(task.labels) or 1 for task in MANY]
    scales = [(3.0, 2.0) if task.kind == "regression" else (0.0, 1.0) for task in MANY]
    return [
        Head(torch.randn(size, 10 if index in wide else 5).double(), torch.randn(size).double(), *scale)
        for index, (size, scale) in enumerate(zip(sizes, scales, strict=True))
    ]


def _loop(
    heads: list[Head], pooled: Tensor, features: Tensor, task_ids: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Logits, and the sum of the rows' losses, computed row by row."""
    width = max(len(heads[task_id].bias) for task_id in task_ids.tolist())
    logits, total = [], torch.zeros((), dtype=torch.float64)
    for row, task_id in enumerate(task_ids.tolist()):
        head = heads[task_id]
        is_wide = head.weight.shape[1] > pooled.shape[1]
        inputs = (wide_inputs(pooled, features)[row] if is_wide else pooled[row]).to(head.weight.dtype)
        values = F.linear(inputs, head.weight, head.bias) * head.target_std + head.target_mean
        logits.append(F.pad(values, (0, width - len(values)), value=-torch.inf))
        if MANY[task_id].kind == "regression":
            total = total + ((values[0] - TARGETS[row]) / head.target_std).square()
        else:
            total = total + F.cross_entropy(values, TARGETS[row].long(), label_smoothing=label_smoothing)
    return torch.stack(logits), total


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal but for the roundings of wide inputs, which are normalized in float32; all else is in float64."""
    largest = max([1.0, *expected[expected.isfinite()].abs().flatten().tolist()])
    torch.testing.assert_close(found, expected, atol=rounding(20, largest), rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("wide", [set(), {0, 3, 5}, set(range(7))], ids=["plain", "mixed", "wide"])
def test_logits_losses_and_gradients_are_those_of_a_loop_over_rows(wide: set[int], smoothing: float) -> None:
    given = _mixed_heads(wide)
    heads = TaskHeads.of(MANY, given, hidden_size=5)
    alone = [h._replace(weight=h.weight.clone().requires_grad_(), bias=h.bias.clone().requires_grad_()) for h in given]
    pooled, features = torch.randn(10, 5).double().requires_grad_(), torch.randn(10, 5).double()
    expected, expected_loss = _loop(alone, pooled, features, MIXED, smoothing)
    logits = heads(pooled, features, MIXED)
    loss = heads.loss(logits, TARGETS, MIXED, smoothing, "sum")
    _assert_same(logits, expected)
    _assert_same(loss, expected_loss)
    _assert_same(heads.loss(logits, TARGETS, MIXED, smoothing), expected_loss / 10)

    (from_loop,) = torch.autograd.grad(expected_loss, pooled, retain_graph=True)
    (packed,) = torch.autograd.grad(loss, pooled, retain_graph=True)
    _assert_same(packed, from_loop)
    expected_loss.backward()
    loss.backward()
    assert alone[1].bias.grad is None
    gradients = TaskHeads.of(
        MANY, [Head(_gradient(head.weight), _gradient(head.bias)) for head in alone], hidden_size=5
    )
    for name, parameter in heads.named_parameters():
        if parameter.numel():
            _assert_same(parameter.grad, gradients.get_parameter(name).data)


def test_other_tasks_of_a_model_change_nothing() -> None:
    given, pooled, features = _mixed_heads({3}), torch.randn(4, 5).double(), torch.randn(4, 5).double()
    few = TaskHeads.of(MANY[2:4], given[2:4], hidden_size=5)
    rows = torch.tensor([1, 0, 0, 1])
    found = TaskHeads.of(MANY, given)(pooled, features, rows + 2)
    _assert_same(found, few(pooled, features, rows))


@pytest.mark.parametrize("label", [2.0, -1.0])
def test_a_label_that_the_task_does_not_have_is_refused(label: float) -> None:
    heads, rows = TaskHeads.of(TASKS, [PLAIN, SCALED, WIDE]), torch.tensor([0, 2])
    with pytest.raises(RuntimeError, match="out of bounds"):
        heads.loss(heads(POOLED[:2], FEATURES[:2], rows), torch.tensor([label, 0.0]), rows)


def test_the_few_shot_probe_learns_from_directions() -> None:
    generator = np.random.default_rng(0)
    directions = np.array([[1.0, 0.2, 0.0], [0.2, 1.0, 0.0]])
    labels = [0, 1] * 6
    examples = directions[labels] * generator.uniform(0.5, 20, (12, 1)) + generator.normal(0, 0.05, (12, 3))
    inputs = directions[[1, 0, 0, 1]] * np.array([[100.0], [0.1], [5.0], [2.0]])
    assert few_shot_probe(examples, labels, inputs) == [1, 0, 0, 1]
    assert few_shot_probe(examples[:2], labels[:2], inputs) == [1, 0, 0, 1]
