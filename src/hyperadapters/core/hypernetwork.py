"""The prototypical hypernetwork: one network that writes the adapters of every task at every site."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperadapters.core.forms import BottleneckWeights, head_bound


class PrototypicalHypernetwork(nn.Module):
    """H([k_t ; e_l]): weights of task t's adapter at site l (Zhao et al. 2023, section 3).

    The trunk maps the concatenated prototype and site embedding (prototype first, not normalised) to a code:
    linear, ReLU, linear, LayerNorm. Four linear heads map the code to the weights, read row by row without a
    transpose: element i * a + j of `down_weight` goes from input i to bottleneck unit j.

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
        super().__init__()
        self.width, self.bottleneck_dim = width, bottleneck_dim
        self.site_embeddings = nn.Parameter(torch.randn(num_sites, prototype_dim))
        self.trunk = nn.Sequential(
            nn.Linear(2 * prototype_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, prototype_dim),
            nn.LayerNorm(prototype_dim, eps=1e-6),
        )
        self.down_weight = nn.Linear(prototype_dim, width * bottleneck_dim)
        self.down_bias = nn.Linear(prototype_dim, bottleneck_dim)
        self.up_weight = nn.Linear(prototype_dim, bottleneck_dim * width)
        self.up_bias = nn.Linear(prototype_dim, width)
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
