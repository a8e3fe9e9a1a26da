"""Thresholds with a guarantee for finite samples: split conformal prediction (Vovk, Gammerman and Shafer 2005).

If N inputs and a further one are exchangeable, that is if their order says nothing, the similarity of the further one
is below the k-th smallest of the N with a probability of at most k / (N + 1). This holds for any model and any
distribution. The inputs must not have been used to fit the similarities, and later inputs must come from the same
source. The thresholds are chosen separately for the inputs that are most similar to each task (Mondrian classes), so
that the bound holds for each task and not only on average.
"""

from __future__ import annotations

import math

from torch import Tensor

EPSILON = 1e-9
"""Correction of products that are rounded, such as 0.05 * 20."""


def conformal_threshold(similarities: Tensor, rate: float) -> tuple[float, float]:
    """Compute the highest threshold below which at most a given share of exchangeable inputs lies.

    Args:
        similarities: Similarities of shape [N], with N at least 1.
        rate: Maximum share of inputs below the threshold, in [0, 1).

    Returns:
        The threshold, and the bound k / (N + 1) on the share. If fewer than 1 / `rate` - 1 similarities are given, the
        threshold is the smallest of them and the bound is 1 / (N + 1), which is above `rate`.
    """
    rank = max(1, math.floor(rate * (len(similarities) + 1) + EPSILON))
    return float(similarities.sort().values[rank - 1]), rank / (len(similarities) + 1)


def rejecting_threshold(excesses: Tensor, rate: float) -> float:
    """Compute the lowest threshold that at most a given share of exchangeable inputs exceeds.

    Args:
        excesses: Excesses of similarities over thresholds, of shape [N].
        rate: Maximum share of inputs above the threshold, in [0, 1).

    Returns:
        The threshold; infinity if fewer than 1 / `rate` - 1 excesses are given.
    """
    rank = math.floor(rate * (len(excesses) + 1) + EPSILON)
    return float(excesses.sort(descending=True).values[rank - 1]) if rank else math.inf
