"""Task heads, plain and wide, of different sizes in one batch; and the probe that few-shot fits are compared with."""

from __future__ import annotations

import numpy as np
import torch

from hyperadapters.config import Task
from hyperadapters.hosts.heads import Head, TaskHeads, wide_inputs
from hyperadapters.training.baselines import few_shot_probe

TASKS = [Task.classification("a", ["x", "y"]), Task.regression("b"), Task.classification("c", ["x", "y", "z"])]
PLAIN = Head(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.5, 0.0]))
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
    heads = TaskHeads.of(TASKS, [PLAIN, SCALED, WIDE])
    for task_id, head in enumerate((PLAIN, SCALED, WIDE)):
        found = heads.head(task_id)
        assert torch.equal(found.weight, head.weight)
        assert (found.target_mean, found.target_std) == (head.target_mean, head.target_std)


def test_the_few_shot_probe_learns_from_directions() -> None:
    generator = np.random.default_rng(0)
    directions = np.array([[1.0, 0.2, 0.0], [0.2, 1.0, 0.0]])
    labels = [0, 1] * 6
    examples = directions[labels] * generator.uniform(0.5, 20, (12, 1)) + generator.normal(0, 0.05, (12, 3))
    inputs = directions[[1, 0, 0, 1]] * np.array([[100.0], [0.1], [5.0], [2.0]])
    assert few_shot_probe(examples, labels, inputs) == [1, 0, 0, 1]
    assert few_shot_probe(examples[:2], labels[:2], inputs) == [1, 0, 0, 1]
