"""The objective by hand, on golden values, and where it must stay finite."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import Golden
from tolerance import rounding
from torch import Tensor

from hyperadapters.core import instance_contrastive_loss, prototype_contrastive_loss, sequence_loss, total_loss

RIGHT, UP = [1.0, 0.0], [0.0, 1.0]


def test_instance_loss_by_hand_on_three_vectors() -> None:
    instances = torch.tensor([RIGHT, [2.0, 0.0], UP])
    # rows 0 and 1 are each other's positive with similarity 1, row 2 is their negative with similarity 0
    expected = -(1.0 - math.log(math.exp(1.0) + math.exp(0.0)))
    loss = instance_contrastive_loss(instances, torch.tensor([0, 0, 1]), temperature=1.0)
    assert loss.item() == pytest.approx(expected, abs=rounding(10, math.e))


def test_prototype_loss_by_hand_with_and_without_the_positive_in_the_denominator() -> None:
    instances, prototypes, tasks = torch.tensor([RIGHT]), torch.tensor([RIGHT, UP]), torch.tensor([0])
    standard = prototype_contrastive_loss(instances, prototypes, tasks, temperature=0.5)
    assert standard.item() == pytest.approx(-(2.0 - math.log(math.exp(2.0) + 1.0)), abs=rounding(10, math.exp(2.0)))
    released = prototype_contrastive_loss(instances, prototypes, tasks, 0.5, positive_in_denominator=False)
    assert released.item() == pytest.approx(-2.0, abs=rounding(10, math.exp(2.0)))


def test_sequence_loss_equals_torchs_label_smoothing_over_real_tokens() -> None:
    logits, labels = torch.randn(3, 4, 7), torch.randint(0, 7, (3, 4))
    labels[0, 2:] = -100
    expected = F.cross_entropy(logits.reshape(-1, 7), labels.reshape(-1), ignore_index=-100, label_smoothing=0.1)
    assert sequence_loss(logits, labels, 0.1).value.item() == pytest.approx(expected.item(), rel=1e-6)
    total = sequence_loss(logits, labels, 0.1, reduction="sum")
    assert total.value.item() == pytest.approx(expected.item() * 10, rel=1e-6)
    counted = sequence_loss(logits, labels, 0.1, count_ignored=True)
    assert counted.value.item() == pytest.approx(expected.item() * 10 / 12, rel=1e-6)


def test_total_is_task_plus_weighted_contrast() -> None:
    losses = total_loss(torch.tensor(2.0), torch.tensor(3.0), torch.tensor(5.0), weight=0.1)
    assert [term.item() for term in losses] == pytest.approx([2.8, 2.0, 0.3, 0.5])


def test_contrastive_losses_equal_the_golden_values(golden: Golden) -> None:
    instances, tasks = golden.tensors["retriever/instance"], golden.tensors["inputs/task_ids"]
    instance = 0.1 * instance_contrastive_loss(instances, tasks)
    prototype = 0.1 * prototype_contrastive_loss(
        instances, golden.tensors["prototypes"], tasks, positive_in_denominator=False
    )
    assert instance.item() == pytest.approx(golden.facts["losses"]["instance_instance"], rel=1e-5)
    assert prototype.item() == pytest.approx(golden.facts["losses"]["prototype_instance"], rel=1e-5)


def _losses_and_gradients(instances: Tensor, prototypes: Tensor, tasks: Tensor, standard: bool) -> list[Tensor]:
    instances, prototypes = instances.clone().requires_grad_(), prototypes.clone().requires_grad_()
    instance = instance_contrastive_loss(instances, tasks)
    prototype = prototype_contrastive_loss(instances, prototypes, tasks, positive_in_denominator=standard)
    (instance + prototype).backward()
    assert instances.grad is not None
    assert prototypes.grad is not None
    return [instance, prototype, instances.grad, prototypes.grad]


OPPOSITE = torch.tensor([RIGHT, [-1.0, 0.0]])


@pytest.mark.parametrize("standard", [True, False])
@pytest.mark.parametrize(
    ("instances", "prototypes", "tasks"),
    [
        pytest.param(torch.randn(3, 2), torch.randn(3, 2), [0, 1, 2], id="no row has a positive"),
        pytest.param(torch.randn(4, 2), torch.randn(3, 2), [1, 1, 1, 1], id="a batch of one task"),
        pytest.param(torch.randn(4, 2), torch.randn(1, 2), [0, 0, 0, 0], id="a recipe of one task"),
        pytest.param(torch.randn(1, 2), torch.randn(3, 2), [2], id="a batch of one row"),
        pytest.param(torch.randn(1, 2), torch.randn(1, 2), [0], id="one row of one task"),
        pytest.param(torch.zeros(3, 2), torch.randn(2, 2), [0, 0, 1], id="zero vectors"),
        pytest.param(1e6 * OPPOSITE, 1e6 * OPPOSITE, [0, 1], id="perfectly separated"),
        pytest.param(1e6 * OPPOSITE, -1e6 * OPPOSITE, [0, 1], id="perfectly wrong"),
    ],
)
def test_losses_and_gradients_are_always_finite(
    instances: Tensor, prototypes: Tensor, tasks: list[int], standard: bool
) -> None:
    for value in _losses_and_gradients(instances, prototypes, torch.tensor(tasks), standard):
        assert value.isfinite().all()


def test_rows_without_a_positive_serve_as_negatives_only() -> None:
    lonely = torch.tensor([RIGHT, RIGHT, UP])
    pair = torch.tensor([RIGHT, RIGHT])
    with_negative = instance_contrastive_loss(lonely, torch.tensor([0, 0, 1]))
    alone = instance_contrastive_loss(pair, torch.tensor([0, 0]))
    assert alone.item() == pytest.approx(0.0, abs=1e-6)
    assert with_negative.item() > alone.item()


def test_one_task_has_nothing_to_be_told_from() -> None:
    for standard in (True, False):
        values = _losses_and_gradients(torch.randn(4, 2), torch.randn(1, 2), torch.zeros(4, dtype=torch.long), standard)
        assert values[1].item() == 0.0
        assert values[3].abs().max() == 0.0


def test_sequence_loss_of_nothing_but_padding_is_zero() -> None:
    assert sequence_loss(torch.randn(1, 2, 5), torch.full((1, 2), -100), 0.1).value.item() == 0.0


def test_well_separated_prototypes_keep_their_precision() -> None:
    """Where subtracting the positive's term from the full sum loses every digit."""
    prototypes = torch.eye(3)
    instances = torch.eye(3) * 5
    loss = prototype_contrastive_loss(instances, prototypes, torch.arange(3), positive_in_denominator=False)
    assert loss.item() == pytest.approx(-(10.0 - math.log(2.0)), rel=1e-6)


def test_losses_are_computed_in_float32_whatever_comes_in() -> None:
    instances, tasks = torch.randn(6, 8), torch.tensor([0, 0, 1, 1, 2, 2])
    half = instance_contrastive_loss(instances.bfloat16(), tasks)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(instance_contrastive_loss(instances, tasks).item(), rel=0.05)
