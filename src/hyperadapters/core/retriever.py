"""The instance-dense retriever, which maps pooled hidden states to instance vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def masked_mean(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Compute the mean of the hidden states over the tokens of each row that are not padding.

        h_i = sum over s of mask_is * hidden_is / sum over s of mask_is

    Source: Zhao et al. 2023, section 3, where h_i is the input of the retriever. Difference from the released code: it
    divides by zero for a row that consists of padding only.

    Args:
        hidden: Hidden states [B, S, d].
        attention_mask: Mask [B, S], 1 for tokens and 0 for padding.

    Returns:
        Means [B, d] in float32. A row that consists of padding only gives zeros.
    """
    mask = attention_mask.to(torch.float32)[..., None]
    return (hidden.float() * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)


class InstanceRetriever(nn.Module):
    """The function G in z = G(h): linear layer, ReLU, linear layer (Zhao et al. 2023, section 3).

    The contrastive losses and the choice of a prototype read the instance vector z. The outputs of the model depend on
    z only through that choice. The module does not normalise z, because the losses and the similarity do so.
    """

    def __init__(self, hidden_size: int, hidden_dim: int = 128, instance_dim: int = 64) -> None:
        """Initialise the weights at random, as `torch.nn.Linear` does.

        Args:
            hidden_size: Size d of the hidden states.
            hidden_dim: Number of hidden units. Default: 128.
            instance_dim: Size p of the instance vectors and of the prototypes. Default: 64.
        """
        super().__init__()
        self.down = nn.Linear(hidden_size, hidden_dim)
        self.up = nn.Linear(hidden_dim, instance_dim)

    def forward(self, pooled: Tensor) -> Tensor:
        """Compute instance vectors.

        Args:
            pooled: Pooled hidden states [B, d].

        Returns:
            Instance vectors [B, p].
        """
        vectors: Tensor = self.up(torch.relu(self.down(pooled.to(self.down.weight.dtype))))
        return vectors
