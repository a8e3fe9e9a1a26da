"""The bottleneck adapter, with weights generated for several tasks or learned once for all.

Shapes: B rows, S positions, d width of the backbone, a bottleneck, L sites, U generated tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BottleneckWeights(NamedTuple):
    """Weights of U tasks at L sites: down_weight [L, U, d, a], down_bias [L, U, a], up_weight [L, U, a, d],
    up_bias [L, U, d]. `weights.site(l)` drops the first dimension.
    """

    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor

    def site(self, index: int) -> BottleneckWeights:
        """Return the weights of one site, without the dimension L."""
        return BottleneckWeights(*(tensor[index] for tensor in self))

    def task(self, index: int) -> BottleneckWeights:
        """Return the weights of one of the U tasks, the dimension U kept with size 1."""
        return BottleneckWeights(*(tensor[:, index : index + 1] for tensor in self))

    def to(self, dtype: torch.dtype) -> BottleneckWeights:
        """Return the weights in another floating-point type."""
        return BottleneckWeights(*(tensor.to(dtype) for tensor in self))

    @classmethod
    def cat(cls, parts: Sequence[BottleneckWeights]) -> BottleneckWeights:
        """Join the tasks of several sets of weights, in their order."""
        return cls(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))


def bottleneck(inputs: Tensor, weights: BottleneckWeights, rows: Tensor) -> Tensor:
    """Apply to each row the bottleneck adapter of its task: `relu(x W_down + b_down) W_up + b_up`.

    Args:
        inputs: [B, S, d].
        weights: of one site: [U, d, a], [U, a], [U, a, d], [U, d].
        rows: for each row the index of its task in U, [B].

    Returns:
        [B, S, d]: what is added to the feed-forward's output. No residual, no scale, no dropout; the activation is
        ReLU whatever the backbone's is (Zhao et al. 2023; the released code).
    """
    if len(weights.down_weight) == 1:
        down_weight, down_bias, up_weight, up_bias = (tensor[0] for tensor in weights)
        hidden = torch.relu(inputs @ down_weight + down_bias)
        return hidden @ up_weight + up_bias
    # index_select and not weight[rows]: the gradient of the latter adds up in an order that varies from run to run.
    down_weight, down_bias, up_weight, up_bias = (tensor.index_select(0, rows) for tensor in weights)
    hidden = torch.relu(torch.baddbmm(down_bias[:, None], inputs, down_weight))
    return torch.baddbmm(up_bias[:, None], hidden, up_weight)


class OwnBottleneck(nn.Module):
    """Adapters that a task has of its own at all L sites: once generated, then trained apart from the hypernetwork."""

    def __init__(self, weights: BottleneckWeights) -> None:
        """Args: weights: to start from, of one task (U = 1); copied."""
        super().__init__()
        for name, tensor in zip(BottleneckWeights._fields, weights, strict=True):
            self.register_parameter(name, nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format)))

    def forward(self) -> BottleneckWeights:
        """Return the weights, U = 1."""
        return BottleneckWeights(*(getattr(self, name) for name in BottleneckWeights._fields))


class LearnedBottleneck(nn.Module):
    """A bottleneck adapter with weights of its own, shared by all tasks (the encoder side of an encoder-decoder).

    Both weights start Xavier-uniform with gain 1e-4, the biases at 0, so that it begins close to no change.
    """

    def __init__(self, width: int, bottleneck_dim: int) -> None:
        """Args: width: d; bottleneck_dim: a."""
        super().__init__()
        self.down = nn.Linear(width, bottleneck_dim)
        self.up = nn.Linear(bottleneck_dim, width)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight, gain=1e-4)
            nn.init.zeros_(linear.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., d] to [..., d], in the inputs' floating-point type."""
        hidden = torch.relu(_linear(inputs, self.down))
        return _linear(hidden, self.up)


def _linear(inputs: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(inputs, layer.weight.to(inputs.dtype), layer.bias.to(inputs.dtype))


def head_bound(fan_in: int, fan_out: int) -> float:
    """Bound of the uniform initialisation of a hypernetwork head, `1e-3 * sqrt(3 / (fan_in * fan_out))`.

    `fan_in` is the size of the code that enters the head, `fan_out` the input size of the generated linear map
    (1 for a bias). Source: the released code; the generated adapter starts close to zero.
    """
    return 1e-3 * math.sqrt(3.0 / (fan_in * fan_out))
