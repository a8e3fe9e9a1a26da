"""The prototypical hypernetwork: one network that writes the adapters of every task at every site."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperadapters.core.forms import BottleneckWeights, head_bound


class Hypernetwork(nn.Module, ABC):
    """What hypernetworks have in common: four linear heads from codes to weights.

    The weights are read row by row without a transpose: element i * a + j of `down_weight` goes from input i to
    bottleneck unit j. Subclasses make the codes.
    """

    def __init__(self, width: int, bottleneck_dim: int) -> None:
        """Args: width: d; bottleneck_dim: a."""
        super().__init__()
        self.width, self.bottleneck_dim = width, bottleneck_dim

    def _make_heads(self, prototype_dim: int, bias: bool) -> None:
        """Make the heads, after what a subclass draws at random before them."""
        width, bottleneck_dim = self.width, self.bottleneck_dim
        self.down_weight = nn.Linear(prototype_dim, width * bottleneck_dim, bias)
        self.down_bias = nn.Linear(prototype_dim, bottleneck_dim, bias)
        self.up_weight = nn.Linear(prototype_dim, bottleneck_dim * width, bias)
        self.up_bias = nn.Linear(prototype_dim, width, bias)

    @abstractmethod
    def codes(self, prototypes: Tensor) -> Tensor:
        """Return the codes [L, U, p] that the heads read, for the prototypes [U, p]."""

    def forward(self, prototypes: Tensor) -> BottleneckWeights:
        """Generate the adapters of U tasks at all L sites from their prototypes [U, p]."""
        codes = self.codes(prototypes)
        leading, d, a = codes.shape[:2], self.width, self.bottleneck_dim
        return BottleneckWeights(
            down_weight=self.down_weight(codes).view(*leading, d, a),
            down_bias=self.down_bias(codes),
            up_weight=self.up_weight(codes).view(*leading, a, d),
            up_bias=self.up_bias(codes),
        )


class PrototypicalHypernetwork(Hypernetwork):
    """H([k_t ; e_l]): weights of task t's adapter at site l (Zhao et al. 2023, section 3).

    The trunk maps the concatenated prototype and site embedding (prototype first, not normalised) to a code:
    linear, ReLU, linear, LayerNorm.

    Initialisation: site embeddings standard normal, trunk torch's default, head weights uniform within
    `forms.head_bound`, head biases 0.

    Differs from the released code: tasks are generated once each, not once a row.
    """

    def __init__(
        self,
        num_sites: int,
        width: int,
        bottleneck_dim: int,
        prototype_dim: int = 64,
        hidden_dim: int = 128,
    ) -> None:
        """Args: num_sites: L; width: d; bottleneck_dim: a; prototype_dim: p, also of site embeddings and codes;
        hidden_dim: of the trunk.
        """
        super().__init__(width, bottleneck_dim)
        self.site_embeddings = nn.Parameter(torch.randn(num_sites, prototype_dim))
        self.trunk = nn.Sequential(
            nn.Linear(2 * prototype_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, prototype_dim),
            nn.LayerNorm(prototype_dim, eps=1e-6),
        )
        self._make_heads(prototype_dim, bias=True)
        for head, fan_out in (
            (self.down_weight, width),
            (self.down_bias, 1),
            (self.up_weight, bottleneck_dim),
            (self.up_bias, 1),
        ):
            bound = head_bound(prototype_dim, fan_out)
            nn.init.uniform_(head.weight, -bound, bound)
            nn.init.zeros_(head.bias)

    def codes(self, prototypes: Tensor) -> Tensor:
        """Return the codes [L, U, p] that the heads read, for the prototypes [U, p]."""
        sites, tasks = len(self.site_embeddings), len(prototypes)
        pairs = torch.cat(
            [prototypes.expand(sites, -1, -1), self.site_embeddings[:, None].expand(-1, tasks, -1)], dim=-1
        )
        codes: Tensor = self.trunk(pairs)
        return codes


class OrthogonalHypernetwork(Hypernetwork):
    """Weights of task t's adapter at site l from the code c = sqrt(p) R_l k_t / |R_l k_t|.

    R_l is a learned matrix [p, p] for each site, orthogonal at the start. With orthogonal prototypes (see
    `PrototypeTable`) the codes of all tasks at a site start orthogonal, and those of different sites nearly so: a first
    step for one task hardly moves the adapters of the others, and tasks come to share weights as far as training moves
    their codes together.

    Initialisation: the generated down weights have the variance of `torch.nn.Linear`'s, everything else is 0, so that
    the model starts as its backbone.

    Differs from Zhao et al. (2023): no trunk, no site embeddings, heads without biases. There, the codes of tasks and
    sites start with a mean cosine of 0.6, so that the hypernetwork starts as nearly one adapter for all.
    """

    def __init__(self, num_sites: int, width: int, bottleneck_dim: int, prototype_dim: int = 64) -> None:
        """Args: num_sites: L; width: d; bottleneck_dim: a; prototype_dim: p, also of the codes."""
        super().__init__(width, bottleneck_dim)
        self.rotations = nn.Parameter(torch.empty(num_sites, prototype_dim, prototype_dim))
        for rotation in self.rotations.unbind():
            nn.init.orthogonal_(rotation)
        self._make_heads(prototype_dim, bias=False)
        # A generated weight sums over a code's p numbers, whose mean square is 1; Linear's have the variance 1 / (3 d).
        bound = 1.0 / math.sqrt(prototype_dim * width)
        nn.init.uniform_(self.down_weight.weight, -bound, bound)
        for head in (self.down_bias, self.up_weight, self.up_bias):
            nn.init.zeros_(head.weight)

    def codes(self, prototypes: Tensor) -> Tensor:
        """Return the codes [L, U, p] that the heads read, for the prototypes [U, p]."""
        turned = torch.einsum("lpq,uq->lup", self.rotations, prototypes)
        return math.sqrt(prototypes.shape[-1]) * F.normalize(turned, dim=-1)
