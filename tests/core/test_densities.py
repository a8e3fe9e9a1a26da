"""Densities of the tasks' texts: their formula, their fit, and tasks that are added by their mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from hyperadapters.core import TaskDensities, cosine_similarity

OWNERS = torch.arange(60) % 3


def texts(seed: int = 0, nuisance: float = 0.0) -> Tensor:
    """States [60, 2, 8] of three tasks whose means differ a little, with one direction in which all rows vary much."""
    generator = torch.Generator().manual_seed(seed)
    means = 0.5 * torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(9))
    direction = torch.randn(2, 8, generator=torch.Generator().manual_seed(8))
    length = nuisance * torch.randn(60, 1, 1, generator=generator)
    return means[OWNERS] + length * direction + 0.1 * torch.randn(60, 2, 8, generator=generator)


def fitted(features: Tensor, **sizes: int) -> TaskDensities:
    densities = TaskDensities(3, features[0].numel(), **sizes).double()
    densities.fit(features, OWNERS, torch.ones(60), torch.full((3,), 20.0))
    return densities


def test_ratios_are_those_of_normal_densities() -> None:
    densities = fitted(texts())
    points = torch.randn(5, 16, dtype=torch.float64)
    counts = torch.tensor([1.0, 0.0, 7.0], dtype=torch.float64)
    known = counts[:, None] * densities.between
    means = known / (known + 1) * densities.means
    of_task = Normal(means, (1 + densities.between / (known + 1)).sqrt()).log_prob(points[:, None]).sum(dim=2)
    of_any = Normal(torch.zeros(16), (1 + densities.between).sqrt()).log_prob(points).sum(dim=1)
    torch.testing.assert_close(densities.ratios(points, densities.means, counts), of_task - of_any[:, None])


def test_a_task_without_texts_is_any_task() -> None:
    densities = fitted(texts())
    points, nothing = torch.randn(5, 16, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    ratios = densities.ratios(points, densities.means, nothing)
    torch.testing.assert_close(ratios, torch.zeros_like(ratios))


def test_the_basis_makes_the_covariance_within_tasks_the_identity() -> None:
    densities = fitted(texts(nuisance=1.0))
    points = densities.project(texts(nuisance=1.0))
    residuals = points - densities.means[OWNERS]
    torch.testing.assert_close(points[OWNERS == 1].mean(dim=0), densities.means[1], atol=1e-5, rtol=0)
    variances = residuals.square().mean(dim=0)
    assert (variances < 1.2).all()  # at most 1 / 0.9, because the covariance is shrunk, plus rounding
    assert (densities.between.diff() >= 0).all()


def test_what_all_tasks_vary_in_is_ignored() -> None:
    """Cosine similarity to the mean fails where all rows vary much in one direction, as texts do in length."""
    seen, unseen = texts(nuisance=2.0), texts(seed=1, nuisance=2.0)
    by_density = fitted(seen)(unseen).argmax(dim=1)
    means = torch.stack([seen.flatten(1)[task == OWNERS].mean(dim=0) for task in range(3)])
    by_cosine = cosine_similarity(unseen.flatten(1), means).argmax(dim=1)
    assert (by_density == OWNERS).all()
    assert (by_cosine == OWNERS).float().mean() < 0.75


def test_fewer_directions_are_those_that_tell_tasks_apart() -> None:
    features = texts(nuisance=1.0)
    densities = fitted(features, num_directions=2)
    assert densities.directions.shape == (16, 2)
    assert (densities(features).argmax(dim=1) == OWNERS).all()
    torch.testing.assert_close(densities.between, fitted(features).between[-2:])


def test_texts_of_no_task_are_less_likely_than_those_of_a_task() -> None:
    densities = fitted(texts())
    strange = densities(torch.randn(40, 2, 8, generator=torch.Generator().manual_seed(3))).amax(dim=1)
    assert densities(texts(seed=1)).amax(dim=1).min() > strange.max()


def test_a_weight_counts_as_often_as_its_text_is_repeated() -> None:
    features, rows = texts(), torch.cat([torch.arange(60), torch.arange(0, 60, 7)])
    once, twice = TaskDensities(3, 16).double(), TaskDensities(3, 16).double()
    weights = torch.ones(60)
    weights[::7] = 2.0
    once.fit(features, OWNERS, weights, torch.full((3,), 20.0))
    twice.fit(features[rows], OWNERS[rows], torch.ones(len(rows)), torch.full((3,), 20.0))
    torch.testing.assert_close(once(features), twice(features))


def test_the_ratios_of_other_tasks_do_not_change_when_a_task_is_added() -> None:
    densities, features = fitted(texts()), texts(seed=1)
    before = densities(features)
    new = densities.project(features[:4]).mean(dim=0, keepdim=True)
    densities.replace(torch.cat([densities.means, new]), torch.cat([densities.counts, torch.tensor([4.0])]))
    after = densities(features)
    torch.testing.assert_close(after[:, :3], before)  # A product with more columns adds in another order.
    assert after.shape == (60, 4)


@pytest.mark.parametrize(("num_tasks", "owners"), [(1, torch.zeros(6)), (3, torch.tensor([0, 0, 0, 2, 2, 2]))])
def test_a_fit_needs_texts_of_two_tasks_and_of_every_task(num_tasks: int, owners: Tensor) -> None:
    densities = TaskDensities(num_tasks, 16)
    with pytest.raises(ValueError, match="expected at least two tasks with texts, found texts by task: "):
        densities.fit(torch.randn(6, 2, 8), owners.long(), torch.ones(6), torch.ones(num_tasks))
    assert not densities.is_fitted


def test_equal_texts_give_finite_ratios() -> None:
    densities = TaskDensities(3, 16)
    densities.fit(torch.ones(60, 2, 8), OWNERS, torch.ones(60), torch.full((3,), 20.0))
    assert densities(torch.randn(4, 2, 8)).isfinite().all()
