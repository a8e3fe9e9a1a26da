"""The prototypical hypernetwork, one network that generates the adapters of every task at every layer.

Shapes: L layers, U tasks, p size of a prototype.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperadapters.core.forms import AdapterTensor, AdapterWeights, fill_uniform, head_bound


class Hypernetwork(nn.Module, ABC):
    """Base class: a linear head for each tensor of an adapter, which maps a code to the elements of the tensor.

    The output of a head is reshaped in row-major order: element i * a + j of `down_weight` connects input i with
    bottleneck unit j. Subclasses compute the codes.
    """

    def __init__(self, tensors: Sequence[AdapterTensor]) -> None:
        """Store the shapes of the tensors.

        Args:
            tensors: Tensors of an adapter. The heads have the same names.
        """
        super().__init__()
        self.tensors = tuple(tensors)
        self.common = nn.ParameterDict()

    def add_common_adapter(self, num_layers: int) -> None:
        """Add a learned adapter, to whose weights those of the heads are added in every task.

            w_tl = common_l + H([k_t ; e_l])

        What all tasks have in common can then be learned at the learning rate of an adapter. Each generated weight
        depends on p weights of a head, so the heads need a much smaller rate. The weights are initialised as those of
        an adapter that is learned for one task, whose outputs are 0 at first. The heads are initialised with zeros, so
        that all tasks start with the same adapter and become different only as far as their rows ask for it.

        Args:
            num_layers: Number of layers L.
        """
        for tensor in self.tensors:
            weight = torch.empty(num_layers, *tensor.shape)
            fill_uniform(weight, tensor.bound if len(tensor.shape) > 1 else 0.0)
            self.common[tensor.name] = nn.Parameter(weight)
            for parameter in self.head(tensor.name).parameters():
                nn.init.zeros_(parameter)

    def head(self, name: str) -> nn.Linear:
        """Return the head that generates a tensor.

        Args:
            name: Name of the tensor.
        """
        found = self.get_submodule(name)
        assert isinstance(found, nn.Linear)
        return found

    def _make_heads(self, prototype_dim: int, bias: bool) -> None:
        """Create the heads. Subclasses draw their own random numbers first, which fixes the order of the draws."""
        for tensor in self.tensors:
            self.add_module(tensor.name, nn.Linear(prototype_dim, math.prod(tensor.shape), bias))

    def _start_as_backbone(self) -> None:
        """Initialise the heads so that the generated weights have the distribution of learned ones; outputs are 0."""
        for tensor in self.tensors:
            head = self.head(tensor.name)
            prototype_dim = head.in_features
            # A generated weight is a sum over the p elements of a code, whose mean square is 1.
            fill_uniform(head.weight, tensor.bound / math.sqrt(prototype_dim) if len(tensor.shape) > 1 else 0.0)
            if head.bias is not None:
                nn.init.zeros_(head.bias)

    @abstractmethod
    def codes(self, prototypes: Tensor) -> Tensor:
        """Compute the codes, which are the inputs of the heads.

        Args:
            prototypes: Prototypes [U, p].

        Returns:
            Codes [L, U, p].
        """

    def forward(self, prototypes: Tensor) -> AdapterWeights:
        """Generate the adapters of U tasks at all L layers.

        Args:
            prototypes: Prototypes of the tasks [U, p].

        Returns:
            Weights [L, U, ...] by the names of the tensors.
        """
        codes = self.codes(prototypes)
        generated = AdapterWeights(
            {
                tensor.name: self.head(tensor.name)(codes).view(*codes.shape[:2], *tensor.shape)
                for tensor in self.tensors
            }
        )
        if not len(self.common):
            return generated
        return AdapterWeights({name: self.common[name][:, None] + weight for name, weight in generated.items()})


class PrototypicalHypernetwork(Hypernetwork):
    """The network H([k_t ; e_l]), which generates the adapter of task t at layer l (Zhao et al. 2023, section 3).

    The trunk (linear layer, ReLU, linear layer, LayerNorm) maps the concatenation of the prototype k_t and the layer
    embedding e_l to a code. Neither of them is normalised.

    Initialisation: layer embeddings standard normal, trunk as PyTorch initialises its layers, weights of the heads
    uniform within `forms.head_bound`, biases of the heads 0.

    Difference from the released code: an adapter is generated once for each task, not once for each row.
    """

    def __init__(
        self,
        num_layers: int,
        tensors: Sequence[AdapterTensor],
        prototype_dim: int = 64,
        hidden_dim: int = 128,
        starts_as_backbone: bool = False,
    ) -> None:
        """Initialise the weights at random.

        Args:
            num_layers: Number of layers L.
            tensors: Tensors of an adapter.
            prototype_dim: Size p of prototypes, layer embeddings and codes. Default: 64.
            hidden_dim: Number of hidden units of the trunk. Default: 128.
            starts_as_backbone: If True, the heads are initialised like those of `OrthogonalHypernetwork`, so that the
                outputs of the generated adapters are exactly 0 at first. Default: False.
        """
        super().__init__(tensors)
        self.layer_embeddings = nn.Parameter(torch.randn(num_layers, prototype_dim))
        self.trunk = nn.Sequential(
            nn.Linear(2 * prototype_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, prototype_dim),
            nn.LayerNorm(prototype_dim, eps=1e-6),
        )
        self._make_heads(prototype_dim, bias=True)
        if starts_as_backbone:
            self._start_as_backbone()
            return
        for tensor in self.tensors:
            head = self.head(tensor.name)
            fill_uniform(head.weight, head_bound(prototype_dim, tensor.fan_in))
            nn.init.zeros_(head.bias)

    def codes(self, prototypes: Tensor) -> Tensor:
        """Compute the codes. The arguments and result are those of `Hypernetwork.codes`."""
        layers, tasks = len(self.layer_embeddings), len(prototypes)
        pairs = torch.cat(
            [prototypes.expand(layers, -1, -1), self.layer_embeddings[:, None].expand(-1, tasks, -1)], dim=-1
        )
        codes: Tensor = self.trunk(pairs)
        return codes


class OrthogonalHypernetwork(Hypernetwork):
    """A hypernetwork that generates the adapter of task t at layer l from the code c = sqrt(p) R_l k_t / |R_l k_t|.

    R_l is a learned matrix [p, p] for each layer, which is orthogonal at first. With orthogonal prototypes (see
    `PrototypeTable`) the codes of different tasks at a layer are orthogonal at first, and those of different layers
    are nearly orthogonal. The first steps for one task therefore hardly change the adapters of other tasks. Tasks share
    weights to the degree that training makes their codes similar.

    Initialisation: the generated down weights have the variance of those of `torch.nn.Linear`, and all other generated
    weights are 0, so that the outputs of the model are those of its backbone at first.

    Difference from Zhao et al. (2023): there are no trunk, no layer embeddings and no biases of the heads. In the
    published network the codes of tasks and layers have a mean cosine similarity of 0.6 at first, so that it generates
    nearly the same adapter for all of them.
    """

    def __init__(self, num_layers: int, tensors: Sequence[AdapterTensor], prototype_dim: int = 64) -> None:
        """Initialise the weights at random.

        Args:
            num_layers: Number of layers L.
            tensors: Tensors of an adapter.
            prototype_dim: Size p of prototypes and codes. Default: 64.
        """
        super().__init__(tensors)
        self.rotations = nn.Parameter(torch.empty(num_layers, prototype_dim, prototype_dim))
        for rotation in self.rotations.unbind():
            nn.init.orthogonal_(rotation)
        self._make_heads(prototype_dim, bias=False)
        self._start_as_backbone()

    def codes(self, prototypes: Tensor) -> Tensor:
        """Compute the codes. The arguments and result are those of `Hypernetwork.codes`."""
        rotated = torch.einsum("lpq,uq->lup", self.rotations, prototypes)
        return math.sqrt(prototypes.shape[-1]) * F.normalize(rotated, dim=-1)
