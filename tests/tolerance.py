"""The tolerance of comparisons whose numbers are in float32."""

import torch


def rounding(operations: int, largest: float = 1.0) -> float:
    """Ten times the bound on the rounding error of a chain or sum of float32 operations.

    Each operation rounds its result by at most half of eps, so after `operations` of these on numbers up to `largest`
    the result is off by at most `operations * eps / 2 * largest`, in whatever order a processor adds. The factor of ten
    is the margin that every comparison of the suite has.

    Args:
        operations: on the longest way from the inputs to a result.
        largest: magnitude of the largest number on that way; 1 for a relative tolerance.
    """
    return 10 * operations * torch.finfo(torch.float32).eps / 2 * largest
