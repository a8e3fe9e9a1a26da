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

from hyperadapters.core.grouping import Grouping


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

    def tasks(self, indices: Tensor) -> BottleneckWeights:
        """Return the weights of some of the U tasks, in any order and number."""
        return BottleneckWeights(*(tensor.index_select(1, indices) for tensor in self))

    def to(self, dtype: torch.dtype) -> BottleneckWeights:
        """Return the weights in another floating-point type."""
        return BottleneckWeights(*(tensor.to(dtype) for tensor in self))

    @classmethod
    def cat(cls, parts: Sequence[BottleneckWeights]) -> BottleneckWeights:
        """Join the tasks of several sets of weights, in their order."""
        return cls(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))


def bottleneck(inputs: Tensor, weights: BottleneckWeights, grouping: Grouping) -> Tensor:
    """Apply to each row the bottleneck adapter of its task: `relu(x W_down + b_down) W_up + b_up`.

    Args:
        inputs: [n B, S, d], n as in `Grouping.gather`.
        weights: of one site, for each of the G groups: [G, d, a], [G, a], [G, a, d], [G, d].
        grouping: of the B rows.

    Returns:
        [n B, S, d]: what is added to the feed-forward's output. No residual, no scale, no dropout; the activation is
        ReLU whatever the backbone's is (Zhao et al. 2023; the released code).
    """
    grouped = grouping.gather(inputs)
    if len(grouped) == 1:  # a plain product uses all threads, a batched one of a single matrix may not
        down_weight, down_bias, up_weight, up_bias = (tensor[0] for tensor in weights)
        hidden = torch.relu(torch.addmm(down_bias, grouped[0], down_weight))
        return torch.addmm(up_bias, hidden, up_weight).view(inputs.shape)
    down_weight, down_bias, up_weight, up_bias = weights
    hidden = torch.relu(torch.baddbmm(down_bias[:, None], grouped, down_weight))
    return grouping.scatter(torch.baddbmm(up_bias[:, None], hidden, up_weight), inputs)


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
