"""The two forms of an adapter, bottleneck and LoRA, with generated weights for each task or learned shared weights.

Shapes: B rows, S positions, d hidden size of the backbone, a size of the bottleneck, r rank, L layers, U tasks whose
adapters are generated, G groups of rows (see `Grouping`).
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
    """Description of one of the tensors of an adapter.

    Attributes:
        name: Name, which begins with "down" for a linear layer that is applied to the adapter's input, and with "up"
            for one that computes its output.
        shape: Shape of the tensor for one task at one layer.
        fan_in: Input size of the linear layer; 1 for a bias.
        bound: Bound of the uniform distribution that initialises the tensor where it is a parameter itself. A tensor
            with bound 0 is initialised with zeros.
    """

    name: str
    shape: tuple[int, ...]
    fan_in: int
    bound: float


def bottleneck_tensors(hidden_size: int, bottleneck_dim: int) -> tuple[AdapterTensor, ...]:
    """Return the descriptions of the tensors of a bottleneck adapter.

    Args:
        hidden_size: Hidden size d of the backbone.
        bottleneck_dim: Size a of the bottleneck.

    Returns:
        The tensors down_weight [d, a], down_bias [a], up_weight [a, d] and up_bias [d].
    """
    bound = hidden_size**-0.5
    return (
        AdapterTensor("down_weight", (hidden_size, bottleneck_dim), hidden_size, bound),
        AdapterTensor("down_bias", (bottleneck_dim,), 1, bound),
        AdapterTensor("up_weight", (bottleneck_dim, hidden_size), bottleneck_dim, 0.0),
        AdapterTensor("up_bias", (hidden_size,), 1, 0.0),
    )


def fill_uniform(tensor: Tensor, bound: float) -> None:
    """Fill a tensor in place with values from the uniform distribution on [-bound, bound].

    Args:
        tensor: Tensor to fill.
        bound: Bound of the distribution. If it is 0, the tensor is filled with zeros and no random number is drawn.
    """
    if bound:
        nn.init.uniform_(tensor, -bound, bound)
    else:
        nn.init.zeros_(tensor)


def lora_tensors(linears: Mapping[str, tuple[int, int]], rank: int) -> tuple[AdapterTensor, ...]:
    """Return the descriptions of the tensors of a LoRA.

    Args:
        linears: Input size i and output size o of each linear layer, by its name.
        rank: Rank r.

    Returns:
        The tensors down_NAME [i, r] and up_NAME [r, o] for each linear layer.
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
    """Adapter weights of U tasks at L layers: a mapping from the name of each tensor to its values [L, U, ...]."""

    @property
    def num_tasks(self) -> int:
        """Number of tasks U."""
        return next(iter(self.values())).shape[1]

    def layer(self, index: int) -> AdapterWeights:
        """Return the weights [U, ...] of one layer.

        Args:
            index: Index of the layer.
        """
        return AdapterWeights({name: tensor[index] for name, tensor in self.items()})

    def task(self, index: int) -> AdapterWeights:
        """Return the weights [L, 1, ...] of one task.

        Args:
            index: Index of the task among the U tasks.
        """
        return AdapterWeights({name: tensor[:, index : index + 1] for name, tensor in self.items()})

    def tasks(self, indices: Tensor) -> AdapterWeights:
        """Return the weights [L, V, ...] of V of the tasks, of which one may occur several times.

        Args:
            indices: Indices [V] among the U tasks.
        """
        return AdapterWeights({name: tensor.index_select(1, indices) for name, tensor in self.items()})

    def to(self, target: torch.dtype | torch.device) -> AdapterWeights:
        """Return the weights converted to another data type or moved to another device.

        Args:
            target: Data type or device.
        """
        return AdapterWeights({name: tensor.to(target) for name, tensor in self.items()})

    def detach(self) -> AdapterWeights:
        """Return the weights detached from the autograd graph."""
        return AdapterWeights({name: tensor.detach() for name, tensor in self.items()})

    def scaled(self, factors: float | Tensor) -> AdapterWeights:
        """Return the weights of adapters whose outputs are multiplied by a factor.

        Args:
            factors: Factor of the outputs: one for all tasks, or one for each of them [U].
        """

        def scale(tensor: Tensor) -> Tensor:
            if isinstance(factors, Tensor):
                return factors.to(tensor).view(-1, *[1] * (tensor.ndim - 2)) * tensor
            return factors * tensor

        return AdapterWeights(
            {name: scale(tensor) if name.startswith("up") else tensor for name, tensor in self.items()}
        )

    @classmethod
    def cat(cls, parts: Sequence[AdapterWeights]) -> AdapterWeights:
        """Return the concatenation of several weights along the dimension U of tasks.

        Args:
            parts: Weights with the same tensors and the same number of layers.
        """
        return cls({name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]})


def bottleneck(inputs: Tensor, weights: Mapping[str, Tensor], grouping: Grouping) -> Tensor:
    """Apply to each row the bottleneck adapter of its task, `relu(x W_down + b_down) W_up + b_up`.

    There is no residual connection, no scale and no dropout. The activation is ReLU, whatever the backbone's
    activation is (Zhao et al. 2023; the released code).

    Args:
        inputs: Inputs [n B, S, d], with n as in `Grouping.gather`.
        weights: Weights of one layer for each group: down_weight [G, d, a], down_bias [G, a], up_weight [G, a, d] and
            up_bias [G, d].
        grouping: Grouping of the B rows.

    Returns:
        Outputs [n B, S, d], which are to be added to the output of the feed-forward block.
    """
    down_weight, down_bias = weights["down_weight"], weights["down_bias"]
    up_weight, up_bias = weights["up_weight"], weights["up_bias"]
    grouped = grouping.gather(inputs)
    if grouped.shape[0] == 1:  # a matrix product uses all threads, a batched product of a single matrix may not
        hidden = torch.relu(torch.addmm(down_bias[0], grouped[0], down_weight[0]))
        return torch.addmm(up_bias[0], hidden, up_weight[0]).view(inputs.shape)
    hidden = torch.relu(torch.baddbmm(down_bias[:, None], grouped, down_weight))
    return grouping.scatter(torch.baddbmm(up_bias[:, None], hidden, up_weight), inputs)


def lora(inputs: Tensor, down: Tensor, up: Tensor, grouping: Grouping) -> Tensor:
    """Apply to each row the low-rank update of its task, `x W_down W_up`.

    Source: Hu et al. 2021 (LoRA), whose matrices A and B are the transposes of W_down and W_up.

    Args:
        inputs: Inputs [n B, S, i] of a linear layer, with n as in `Grouping.gather`.
        down: Matrix W_down of each group [G, i, r].
        up: Matrix W_up of each group [G, r, o].
        grouping: Grouping of the B rows.

    Returns:
        Outputs [n B, S, o], which are to be scaled and added to the output of the linear layer.
    """
    grouped = grouping.gather(inputs)
    if grouped.shape[0] == 1:  # as in `bottleneck`
        return (grouped[0] @ down[0] @ up[0]).view(*inputs.shape[:-1], -1)
    return grouping.scatter(grouped @ down @ up, inputs)


class OwnAdapter(nn.Module):
    """An adapter of a single task at all L layers, whose weights are parameters instead of being generated."""

    def __init__(self, weights: AdapterWeights) -> None:
        """Copy initial weights.

        Args:
            weights: Initial weights [L, 1, ...].
        """
        super().__init__()
        for name, tensor in weights.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format)))

    def forward(self) -> AdapterWeights:
        """Return the weights [L, 1, ...]."""
        return AdapterWeights(self.named_parameters())


class LearnedBottleneck(nn.Module):
    """A bottleneck adapter with learned weights, shared by all tasks, as in the encoder of an encoder-decoder.

    Initialisation: weights Xavier-uniform with gain 1e-4 and biases 0, so that the outputs are close to 0 at first.
    """

    def __init__(self, hidden_size: int, bottleneck_dim: int) -> None:
        """Initialise the weights at random.

        Args:
            hidden_size: Hidden size d of the backbone.
            bottleneck_dim: Size a of the bottleneck.
        """
        super().__init__()
        self.down = nn.Linear(hidden_size, bottleneck_dim)
        self.up = nn.Linear(bottleneck_dim, hidden_size)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight, gain=1e-4)
            nn.init.zeros_(linear.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute the outputs, which are to be added to the output of the feed-forward block.

        Args:
            inputs: Inputs [..., d].

        Returns:
            Outputs [..., d] in the data type of the inputs.
        """
        hidden = torch.relu(_linear(inputs, self.down))
        return _linear(hidden, self.up)


def _linear(inputs: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(inputs, layer.weight.to(inputs.dtype), layer.bias.to(inputs.dtype))


class LearnedLora(nn.Module):
    """A LoRA with learned weights for the linear layers of one backbone layer, shared by all tasks.

    Its outputs are 0 at first.
    """

    def __init__(self, linears: Mapping[str, tuple[int, int]], rank: int) -> None:
        """Initialise the weights at random. The arguments are those of `lora_tensors`."""
        super().__init__()
        for tensor in lora_tensors(linears, rank):
            parameter = nn.Parameter(torch.empty(tensor.shape))
            fill_uniform(parameter, tensor.bound)
            self.register_parameter(tensor.name, parameter)

    def forward(self, inputs: Tensor, name: str) -> Tensor:
        """Compute the outputs for one linear layer, which are to be scaled and added to the layer's output.

        Args:
            inputs: Inputs [..., i] of the linear layer.
            name: Name of the linear layer.

        Returns:
            Outputs [..., o] in the data type of the inputs.
        """
        down, up = self.get_parameter(f"down_{name}"), self.get_parameter(f"up_{name}")
        return inputs @ down.to(inputs.dtype) @ up.to(inputs.dtype)


def head_bound(fan_in: int, fan_out: int) -> float:
    """Return the bound of the uniform initialisation of a hypernetwork head, `1e-3 * sqrt(3 / (fan_in * fan_out))`.

    With it the outputs of a generated adapter are close to 0 at first. Source: the released code.

    Args:
        fan_in: Size of the code, which is the input of the head.
        fan_out: Input size of the generated linear layer; 1 for a bias.
    """
    return 1e-3 * math.sqrt(3.0 / (fan_in * fan_out))
