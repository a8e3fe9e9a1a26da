"""The prototypical hypernetwork: one network that writes the adapters of every task at every layer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperadapters.core.forms import AdapterTensor, AdapterWeights, fill_uniform, head_bound


class Hypernetwork(nn.Module, ABC):
    """What hypernetworks have in common: a linear head from codes to weights for each tensor of an adapter.

    The weights are read row by row without a transpose: element i * a + j of `down_weight` goes from input i to
    bottleneck unit j. Subclasses make the codes.
    """

    def __init__(self, tensors: Sequence[AdapterTensor]) -> None:
        """Args: tensors: of the adapters' form; the heads have their names."""
        super().__init__()
        self.tensors = tuple(tensors)

    def head(self, name: str) -> nn.Linear:
        """The head that writes the tensor of this name."""
        found = self.get_submodule(name)
        assert isinstance(found, nn.Linear)
        return found

    def _make_heads(self, prototype_dim: int, bias: bool) -> None:
        """Make the heads, after what a subclass draws at random before them."""
        for tensor in self.tensors:
            self.add_module(tensor.name, nn.Linear(prototype_dim, math.prod(tensor.shape), bias))

    def _start_as_backbone(self, prototype_dim: int) -> None:
        """Initialise the heads so that generated weights start as learned ones would: what writes the output at 0."""
        for tensor in self.tensors:
            head = self.head(tensor.name)
            # A generated weight sums over a code's p numbers, whose mean square is 1.
            fill_uniform(head.weight, tensor.bound / math.sqrt(prototype_dim) if len(tensor.shape) > 1 else 0.0)
            if head.bias is not None:
                nn.init.zeros_(head.bias)

    @abstractmethod
    def codes(self, prototypes: Tensor) -> Tensor:
        """Return the codes [L, U, p] that the heads read, for the prototypes [U, p]."""

    def forward(self, prototypes: Tensor) -> AdapterWeights:
        """Generate the adapters of U tasks at all L layers from their prototypes [U, p]."""
        codes = self.codes(prototypes)
        return AdapterWeights(
            {
                tensor.name: self.head(tensor.name)(codes).view(*codes.shape[:2], *tensor.shape)
                for tensor in self.tensors
            }
        )


class PrototypicalHypernetwork(Hypernetwork):
    """H([k_t ; e_l]): weights of task t's adapter at layer l (Zhao et al. 2023, section 3).

    The trunk maps the concatenated prototype and layer embedding (prototype first, not normalised) to a code:
    linear, ReLU, linear, LayerNorm.

    Initialisation: layer embeddings standard normal, trunk torch's default, head weights uniform within
    `forms.head_bound`, head biases 0; or all heads as those of `OrthogonalHypernetwork`.

    Differs from the released code: tasks are generated once each, not once a row.
    """

    def __init__(
        self,
        num_layers: int,
        tensors: Sequence[AdapterTensor],
        prototype_dim: int = 64,
        hidden_dim: int = 128,
        starts_as_backbone: bool = False,
    ) -> None:
        """Args: num_layers: L; tensors: of the adapters' form; prototype_dim: p, also of layer embeddings and codes;
        hidden_dim: of the trunk; starts_as_backbone: whether the generated adapters start at exactly no effect.
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
            self._start_as_backbone(prototype_dim)
            return
        for tensor in self.tensors:
            head = self.head(tensor.name)
            fill_uniform(head.weight, head_bound(prototype_dim, tensor.fan_in))
            nn.init.zeros_(head.bias)

    def codes(self, prototypes: Tensor) -> Tensor:
        """Return the codes [L, U, p] that the heads read, for the prototypes [U, p]."""
        layers, tasks = len(self.layer_embeddings), len(prototypes)
        pairs = torch.cat(
            [prototypes.expand(layers, -1, -1), self.layer_embeddings[:, None].expand(-1, tasks, -1)], dim=-1
        )
        codes: Tensor = self.trunk(pairs)
        return codes


class OrthogonalHypernetwork(Hypernetwork):
    """Weights of task t's adapter at layer l from the code c = sqrt(p) R_l k_t / |R_l k_t|.

    R_l is a learned matrix [p, p] for each layer, orthogonal at the start. With orthogonal prototypes (see
    `PrototypeTable`) the codes of all tasks at a layer start orthogonal, and those of different layers nearly so: a
    first step for one task hardly moves the adapters of the others, and tasks come to share weights as far as training
    moves their codes together.

    Initialisation: the generated down weights have the variance of `torch.nn.Linear`'s, everything else is 0, so that
    the model starts as its backbone.

    Differs from Zhao et al. (2023): no trunk, no layer embeddings, heads without biases. There, the codes of tasks and
    layers start with a mean cosine of 0.6, so that the hypernetwork starts as nearly one adapter for all.
    """

    def __init__(self, num_layers: int, tensors: Sequence[AdapterTensor], prototype_dim: int = 64) -> None:
        """Args: num_layers: L; tensors: of the adapters' form; prototype_dim: p, also of the codes."""
        super().__init__(tensors)
        self.rotations = nn.Parameter(torch.empty(num_layers, prototype_dim, prototype_dim))
        for rotation in self.rotations.unbind():
            nn.init.orthogonal_(rotation)
        self._make_heads(prototype_dim, bias=False)
        self._start_as_backbone(prototype_dim)

    def codes(self, prototypes: Tensor) -> Tensor:
        """Return the codes [L, U, p] that the heads read, for the prototypes [U, p]."""
        turned = torch.einsum("lpq,uq->lup", self.rotations, prototypes)
        return math.sqrt(prototypes.shape[-1]) * F.normalize(turned, dim=-1)
