"""The forms of an adapter, with weights generated for several tasks or learned once for all.

Shapes: B rows, S positions, d hidden_size of the backbone, a bottleneck, r rank, L layers, U generated tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperadapters.core.grouping import Grouping


class AdapterTensor(NamedTuple):
    """One of the tensors that make up an adapter.

    Attributes:
        name: begins with "down" for what reads the adapter's input, with "up" for what writes its output.
        shape: at one layer, of one task.
        fan_in: size of the input of the linear layer that the tensor is; 1 for a bias.
        bound: of the uniform distribution that it starts from where it is learned as it is; 0: it starts at zero.
    """

    name: str
    shape: tuple[int, ...]
    fan_in: int
    bound: float


def bottleneck_tensors(hidden_size: int, bottleneck_dim: int) -> tuple[AdapterTensor, ...]:
    """The tensors of a bottleneck adapter: down_weight [d, a], down_bias [a], up_weight [a, d], up_bias [d]."""
    bound = hidden_size**-0.5
    return (
        AdapterTensor("down_weight", (hidden_size, bottleneck_dim), hidden_size, bound),
        AdapterTensor("down_bias", (bottleneck_dim,), 1, bound),
        AdapterTensor("up_weight", (bottleneck_dim, hidden_size), bottleneck_dim, 0.0),
        AdapterTensor("up_bias", (hidden_size,), 1, 0.0),
    )


def fill_uniform(tensor: Tensor, bound: float) -> None:
    """Fill a tensor in place from the uniform distribution within a bound; with zeros, and nothing drawn, for 0."""
    if bound:
        nn.init.uniform_(tensor, -bound, bound)
    else:
        nn.init.zeros_(tensor)


def lora_tensors(linears: Mapping[str, tuple[int, int]], rank: int) -> tuple[AdapterTensor, ...]:
    """The tensors of a LoRA: for each linear layer a down [inputs, r] and an up [r, outputs].

    Args:
        linears: inputs and outputs of each map, by its name.
        rank: r.
    """
    return tuple(
        tensor
        for name, (inputs, outputs) in linears.items()
        for tensor in (
            AdapterTensor(f"down_{name}", (inputs, rank), inputs, inputs**-0.5),
            AdapterTensor(f"up_{name}", (rank, outputs), rank, 0.0),
        )
    )


class AdapterWeights(dict[str, Tensor]):
    """Weights of U tasks at L layers, each tensor [L, U, ...], by the names of its form."""

    @property
    def num_tasks(self) -> int:
        """U."""
        return next(iter(self.values())).shape[1]

    def layer(self, index: int) -> AdapterWeights:
        """Return the weights of one layer, without the dimension L."""
        return AdapterWeights({name: tensor[index] for name, tensor in self.items()})

    def task(self, index: int) -> AdapterWeights:
        """Return the weights of one of the U tasks, the dimension U kept with size 1."""
        return AdapterWeights({name: tensor[:, index : index + 1] for name, tensor in self.items()})

    def tasks(self, indices: Tensor) -> AdapterWeights:
        """Return the weights of some of the U tasks, in any order and number."""
        return AdapterWeights({name: tensor.index_select(1, indices) for name, tensor in self.items()})

    def to(self, target: torch.dtype | torch.device) -> AdapterWeights:
        """Return the weights in another floating-point type, or on another device."""
        return AdapterWeights({name: tensor.to(target) for name, tensor in self.items()})

    def detach(self) -> AdapterWeights:
        """Return the weights without their history."""
        return AdapterWeights({name: tensor.detach() for name, tensor in self.items()})

    def scaled(self, factor: float) -> AdapterWeights:
        """Return the weights of an adapter whose output is `factor` times as large."""
        return AdapterWeights(
            {name: factor * tensor if name.startswith("up") else tensor for name, tensor in self.items()}
        )

    @classmethod
    def cat(cls, parts: Sequence[AdapterWeights]) -> AdapterWeights:
        """Join the tasks of several sets of weights, in their order."""
        return cls({name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]})


def bottleneck(inputs: Tensor, weights: Mapping[str, Tensor], grouping: Grouping) -> Tensor:
    """Apply to each row the bottleneck adapter of its task: `relu(x W_down + b_down) W_up + b_up`.

    Args:
        inputs: [n B, S, d], n as in `Grouping.gather`.
        weights: of one layer, for each of the G groups: down_weight [G, d, a], down_bias [G, a], up_weight [G, a, d],
            up_bias [G, d].
        grouping: of the B rows.

    Returns:
        [n B, S, d]: what is added to the feed-forward's output. No residual, no scale, no dropout; the activation is
        ReLU whatever the backbone's is (Zhao et al. 2023; the released code).
    """
    down_weight, down_bias = weights["down_weight"], weights["down_bias"]
    up_weight, up_bias = weights["up_weight"], weights["up_bias"]
    grouped = grouping.gather(inputs)
    if len(grouped) == 1:  # a plain product uses all threads, a batched one of a single matrix may not
        hidden = torch.relu(torch.addmm(down_bias[0], grouped[0], down_weight[0]))
        return torch.addmm(up_bias[0], hidden, up_weight[0]).view(inputs.shape)
    hidden = torch.relu(torch.baddbmm(down_bias[:, None], grouped, down_weight))
    return grouping.scatter(torch.baddbmm(up_bias[:, None], hidden, up_weight), inputs)


def lora(inputs: Tensor, down: Tensor, up: Tensor, grouping: Grouping) -> Tensor:
    """Apply to each row the low-rank map of its task: `x W_down W_up` (Hu et al. 2021, LoRA, with A and B transposed).

    Args:
        inputs: [n B, S, i], n as in `Grouping.gather`.
        down, up: of one linear layer at one layer, for each of the G groups [G, i, r] and [G, r, o].
        grouping: of the B rows.

    Returns:
        [n B, S, o], before LoRA's scale.
    """
    grouped = grouping.gather(inputs)
    if len(grouped) == 1:  # as in `bottleneck`
        return (grouped[0] @ down[0] @ up[0]).view(*inputs.shape[:-1], -1)
    return grouping.scatter(grouped @ down @ up, inputs)


class OwnAdapter(nn.Module):
    """An adapter that a task has of its own at all L layers: once generated, then trained apart from others."""

    def __init__(self, weights: AdapterWeights) -> None:
        """Args: weights: to start from, of one task (U = 1); copied."""
        super().__init__()
        for name, tensor in weights.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format)))

    def forward(self) -> AdapterWeights:
        """Return the weights, U = 1."""
        return AdapterWeights(self.named_parameters())


class LearnedBottleneck(nn.Module):
    """A bottleneck adapter with weights of its own, shared by all tasks (the encoder side of an encoder-decoder).

    Both weights start Xavier-uniform with gain 1e-4, the biases at 0, so that it begins close to no change.
    """

    def __init__(self, hidden_size: int, bottleneck_dim: int) -> None:
        """Args: hidden_size: d; bottleneck_dim: a."""
        super().__init__()
        self.down = nn.Linear(hidden_size, bottleneck_dim)
        self.up = nn.Linear(bottleneck_dim, hidden_size)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight, gain=1e-4)
            nn.init.zeros_(linear.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., d] to [..., d], in the inputs' floating-point type."""
        hidden = torch.relu(_linear(inputs, self.down))
        return _linear(hidden, self.up)


def _linear(inputs: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(inputs, layer.weight.to(inputs.dtype), layer.bias.to(inputs.dtype))


class LearnedLora(nn.Module):
    """A LoRA for the linear layers of one backbone layer, shared by all tasks; it starts as no change."""

    def __init__(self, linears: Mapping[str, tuple[int, int]], rank: int) -> None:
        """Args: linears, rank: see `lora_tensors`."""
        super().__init__()
        for tensor in lora_tensors(linears, rank):
            parameter = nn.Parameter(torch.empty(tensor.shape))
            fill_uniform(parameter, tensor.bound)
            self.register_parameter(tensor.name, parameter)

    def forward(self, inputs: Tensor, name: str) -> Tensor:
        """Map the inputs [..., i] of a linear layer to [..., o], in their floating-point type, before LoRA's scale."""
        down, up = self.get_parameter(f"down_{name}"), self.get_parameter(f"up_{name}")
        return inputs @ down.to(inputs.dtype) @ up.to(inputs.dtype)


def head_bound(fan_in: int, fan_out: int) -> float:
    """Bound of the uniform initialisation of a hypernetwork head, `1e-3 * sqrt(3 / (fan_in * fan_out))`.

    `fan_in` is the size of the code that enters the head, `fan_out` the input size of the generated linear layer
    (1 for a bias). Source: the released code; the generated adapter starts close to zero.
    """
    return 1e-3 * math.sqrt(3.0 / (fan_in * fan_out))
