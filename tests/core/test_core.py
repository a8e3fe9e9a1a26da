"""Retriever, prototypes, hypernetwork and the bottleneck form."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hyperadapters.core import (
    AdapterWeights,
    Grouping,
    InstanceRetriever,
    LearnedBottleneck,
    OrthogonalHypernetwork,
    PrototypeTable,
    PrototypicalHypernetwork,
    bottleneck,
    bottleneck_tensors,
    masked_mean,
)
from hyperadapters.interop.official import load_official


def test_masked_mean_ignores_padding() -> None:
    hidden = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert masked_mean(hidden, torch.tensor([[1, 1, 0]])).item() == 2.0


def test_masked_mean_of_no_token_is_zero() -> None:
    assert masked_mean(torch.ones(1, 2, 3), torch.zeros(1, 2)).abs().max() == 0.0


def test_nearest_prototype_is_by_direction_not_by_length() -> None:
    table = PrototypeTable(2, 2)
    with torch.no_grad():
        table.weight.copy_(torch.tensor([[0.1, 0.0], [50.0, 50.0]]))
    assert table.nearest(torch.tensor([[9.0, 1.0], [1.0, 1.2]])).tolist() == [0, 1]
    assert table.similarity(torch.tensor([[2.0, 0.0]])).tolist() == [pytest.approx([1.0, math.sqrt(0.5)])]


def test_retriever_has_the_published_size() -> None:
    assert sum(p.numel() for p in InstanceRetriever(768).parameters()) == 106_688


def test_hypernetwork_has_the_published_size() -> None:
    network = PrototypicalHypernetwork(12, bottleneck_tensors(768, 64))
    assert sum(p.numel() for p in network.parameters()) == 768 + 24_896 + 2 * 3_194_880 + 49_920 + 4_160


def test_hypernetwork_starts_within_the_published_bounds() -> None:
    network = PrototypicalHypernetwork(2, bottleneck_tensors(768, 64))
    for head, bound in (
        (network.up_weight, 2.706e-5),
        (network.down_weight, 7.813e-6),
        (network.up_bias, 2.165e-4),
        (network.down_bias, 2.165e-4),
    ):
        largest = head.weight.abs().max().item()
        assert 0.95 * bound < largest <= 1.001 * bound
        assert head.bias.abs().max() == 0.0


def test_learned_adapter_starts_within_the_published_bound() -> None:
    adapter = LearnedBottleneck(768, 64)
    assert 8e-6 < adapter.down.weight.abs().max().item() <= 8.5e-6
    assert adapter.up.bias.abs().max() == 0.0


def test_generated_weights_and_hidden_codes_equal_the_golden_values(golden: Golden) -> None:
    model = load_official(golden.under("params/"), golden.facts["config"], golden.facts["tasks"])
    tasks = golden.tensors["inputs/task_ids"]
    prototypes = model.method.prototypes(tasks)
    codes, weights = model.method.hypernetwork.codes(prototypes), model.method.hypernetwork(prototypes)
    for site in range(len(codes)):
        torch.testing.assert_close(codes[site], golden.tensors[f"hyper/{site}/hidden"], atol=1e-5, rtol=0)
        for name, value in weights.layer(site).items():
            torch.testing.assert_close(value, golden.tensors[f"generated/{site}/{name}"], atol=1e-5, rtol=0)


def _weights(tasks: int, width: int = 5, size: int = 3) -> AdapterWeights:
    """Random weights in float64."""
    sizes = {"down_weight": (width, size), "down_bias": (size,), "up_weight": (size, width), "up_bias": (width,)}
    return AdapterWeights({name: torch.randn(tasks, *shape, dtype=torch.float64) for name, shape in sizes.items()})


def _grouped(weights: AdapterWeights, rows: Tensor, num_tasks: int) -> tuple[AdapterWeights, Grouping]:
    grouping = Grouping.of(rows, num_tasks)
    return AdapterWeights({name: tensor.index_select(0, grouping.tasks) for name, tensor in weights.items()}), grouping


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(
    "rows", [[0], [0, 0, 0], [2, 0, 0, 1, 2], [1, 0], [0, 0, 0, 0, 0, 0, 1], [3, 1, 4, 1, 0, 2, 1, 1], list(range(6))]
)
def test_mixed_rows_equal_a_loop_over_single_rows(rows: list[int], times: int) -> None:
    num_tasks = max(rows) + 1
    weights, inputs = _weights(num_tasks), torch.randn(len(rows) * times, 4, 5, dtype=torch.float64)
    together = bottleneck(inputs, *_grouped(weights, torch.tensor(rows), num_tasks))
    for index, row in enumerate(row for row in rows for _ in range(times)):
        down_weight, down_bias, up_weight, up_bias = (tensor[row] for tensor in weights.values())
        alone = torch.relu(inputs[index] @ down_weight + down_bias) @ up_weight + up_bias
        torch.testing.assert_close(together[index], alone)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=70).map(lambda rows: [sorted(set(rows)).index(r) for r in rows])
)
def test_every_row_has_a_place_in_a_group_of_its_task_and_little_is_left_over(rows: list[int]) -> None:
    num_tasks = max(rows) + 1
    grouping = Grouping.of(torch.tensor(rows), num_tasks)
    if num_tasks == 1:
        assert (grouping.tasks.tolist(), grouping.rows, grouping.slots) == ([0], None, None)
        return
    assert grouping.rows is not None
    assert grouping.slots is not None
    size = len(grouping.rows) // len(grouping.tasks)
    assert grouping.rows[grouping.slots].tolist() == list(range(len(rows)))
    assert grouping.tasks[grouping.slots // size].tolist() == rows
    # What is left over holds rows of the same task: weights of another could overflow on them, and spoil its gradient.
    assert [rows[row] for row in grouping.rows.tolist()] == grouping.tasks.repeat_interleave(size).tolist()
    assert len(grouping.tasks) < 2 * num_tasks
    assert len(grouping.rows) < 3 * len(rows)


@pytest.mark.parametrize("rows", [[0, 0], [2, 0, 0, 1, 2], [0, 0, 0, 0, 0, 0, 1]])
def test_gradients_through_a_grouping_are_those_of_finite_differences(rows: list[int]) -> None:
    num_tasks = max(rows) + 1
    names, tensors = zip(*_weights(num_tasks).items(), strict=True)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    inputs = torch.randn(2 * len(rows), 2, 5, dtype=torch.float64, requires_grad=True)

    def adapt(inputs: Tensor, *weights: Tensor) -> Tensor:
        named = AdapterWeights(zip(names, weights, strict=True))
        return bottleneck(inputs, *_grouped(named, torch.tensor(rows), num_tasks))

    assert torch.autograd.gradcheck(adapt, (inputs, *leaves))


def test_a_number_of_rows_that_fits_no_grouping_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"expected a multiple of 2 rows, .*found 5"):
        Grouping.of(torch.tensor([0, 1]), 2).gather(torch.zeros(5, 1, 3))


def test_bottleneck_by_hand() -> None:
    weights = AdapterWeights(
        down_weight=torch.tensor([[[1.0], [2.0]]]),
        down_bias=torch.tensor([[-1.0]]),
        up_weight=torch.tensor([[[3.0, -1.0]]]),
        up_bias=torch.tensor([[0.5, 0.0]]),
    )
    # relu(1 * 1 + 1 * 2 - 1) = 2, and relu(-1 - 2 - 1) = 0
    outputs = bottleneck(torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]]), weights, Grouping.of(torch.tensor([0]), 1))
    assert outputs.tolist() == [[[6.5, -2.0], [0.5, 0.0]]]


def test_gradients_of_generated_weights_repeat_bit_for_bit_on_several_threads() -> None:
    weights, rows, inputs = (
        _weights(3, width=64, size=32),
        torch.arange(96) % 3,
        torch.randn(96, 8, 64, dtype=torch.float64),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradients = []
        for _ in range(10):
            leaves = AdapterWeights({name: tensor.clone().requires_grad_() for name, tensor in weights.items()})
            bottleneck(inputs, *_grouped(leaves, rows, 3)).square().sum().backward()
            gradients.append([tensor.grad for tensor in leaves.values()])
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(one, other) for again in gradients[1:] for one, other in zip(again, gradients[0], strict=True)
    )


@pytest.mark.parametrize("network_class", [PrototypicalHypernetwork, OrthogonalHypernetwork])
def test_a_common_adapter_is_added_to_the_generated_one_of_every_task(network_class: type) -> None:
    torch.manual_seed(0)
    network = network_class(3, bottleneck_tensors(16, 4), 8).double()
    network.add_common_adapter(3)
    network.double()
    prototypes = torch.randn(5, 8, dtype=torch.float64)
    for tensor in network.tensors:
        torch.nn.init.normal_(network.head(tensor.name).weight)
    together = network(prototypes)
    common = {name: weight.detach().clone() for name, weight in network.common.items()}
    for weight in network.common.values():
        torch.nn.init.zeros_(weight)
    for name, generated in network(prototypes).items():
        assert generated.abs().max() > 0
        torch.testing.assert_close(together[name], generated + common[name][:, None])


def test_with_a_common_adapter_all_tasks_start_as_the_backbone_with_the_same_adapter() -> None:
    network = PrototypicalHypernetwork(3, bottleneck_tensors(16, 4), 8)
    network.add_common_adapter(3)
    weights = network(torch.randn(5, 8))
    assert weights["up_weight"].abs().max() == 0
    assert weights["up_bias"].abs().max() == 0
    for name, common in network.common.items():
        assert torch.equal(weights[name], common[:, None].expand_as(weights[name]))
    assert network.common["down_weight"].std() > 0
    assert network.common["down_weight"].shape == (3, 16, 4)
