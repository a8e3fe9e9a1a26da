"""The instance-dense retriever: pooled hidden states to instance vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def masked_mean(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of the hidden states over the real tokens of each row.

    Args:
        hidden: hidden states [B, S, d].
        attention_mask: 1 for real tokens, 0 for padding [B, S].

    Returns:
        [B, d] in float32: h_i = sum over s of mask_is * hidden_is / sum over s of mask_is. A row without any real
        token gives zeros.

    Source: Zhao et al. 2023, section 3, where h_i is the input of the retriever. Differs from the released code: that
    one divides by zero for a row without real tokens.
    """
    mask = attention_mask.to(torch.float32)[..., None]
    return (hidden.float() * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)


class InstanceRetriever(nn.Module):
    """G in z = G(h): linear, ReLU, linear (Zhao et al. 2023, section 3, instance-dense retriever).

    The instance vector feeds the contrastive losses and the choice of a prototype; the outputs of the model depend
    on it only through that choice. It is not normalised here: the losses and the similarity do that.
    """

    def __init__(self, hidden_size: int, hidden_dim: int = 128, instance_dim: int = 64) -> None:
        """Make a retriever with fresh weights.

        Args:
            hidden_size: size d of the hidden states.
            hidden_dim: number of hidden units.
            instance_dim: size p of the instance vectors, which is that of the prototypes.
        """
        super().__init__()
        self.down = nn.Linear(hidden_size, hidden_dim)
        self.up = nn.Linear(hidden_dim, instance_dim)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map pooled hidden states [B, d] to instance vectors [B, p]."""
        vectors: Tensor = self.up(torch.relu(self.down(pooled.to(self.down.weight.dtype))))
        return vectors
