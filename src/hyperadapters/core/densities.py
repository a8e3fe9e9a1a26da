"""Densities of the tasks' texts, by which inputs are routed: probabilistic linear discriminant analysis."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WITHIN_SHRINKAGE = 0.1
"""Share of the covariance within tasks that is replaced by a multiple of the identity matrix."""
BETWEEN_SHRINKAGE = 0.3
"""Share of the covariance between tasks that is replaced by a multiple of the identity matrix. Without it, tasks that
were not trained could only differ from the known ones as these differ from each other."""

NUM_DIRECTIONS = 128
"""Default maximum number of directions in which densities are compared."""


class TaskDensities(nn.Module):
    """Normal densities of the frozen features of each task's texts, and of those of any task.

    The mean m_t of a task is a draw from N(c, B), and the features of its texts are draws from N(m_t, W). In the basis
    that makes W the identity and B diagonal, with the entries b, a task of which n texts with the mean y are known has

        s_t(x) = log N(x; n b / (n b + 1) y, 1 + b / (n b + 1)) - log N(x; 0, 1 + b)

    which is the log-likelihood ratio of "x is a text of task t" and "x is a text of a task that is not known". Only the
    directions with the largest b are kept. A task is added by its mean and its number of texts alone.

    Source: Ioffe, "Probabilistic Linear Discriminant Analysis" (ECCV 2006). It is not a part of the method of Zhao et
    al., who route by prototypes.

    Attributes:
        center: Mean c of the means of the trained tasks [n d].
        directions: Basis of the directions with the largest ratio of covariances [n d, r].
        between: Variances b between tasks in these directions [r].
        means: Means y of the tasks in these directions, relative to the center [T, r].
        counts: Number of texts of each task from which its mean was computed [T]; zeros before `fit`.
    """

    center: Tensor
    directions: Tensor
    between: Tensor
    means: Tensor
    counts: Tensor

    def __init__(self, num_tasks: int, num_features: int, num_directions: int = NUM_DIRECTIONS) -> None:
        """Make densities that are not fitted yet.

        Args:
            num_tasks: Number T of tasks.
            num_features: Size of the features of a text.
            num_directions: Maximum number r of directions. Default: 128.
        """
        super().__init__()
        kept = min(num_directions, num_features)
        self.register_buffer("center", torch.zeros(num_features))
        self.register_buffer("directions", torch.zeros(num_features, kept))
        self.register_buffer("between", torch.zeros(kept))
        self.register_buffer("means", torch.zeros(num_tasks, kept))
        self.register_buffer("counts", torch.zeros(num_tasks))

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` has been called, or fitted densities have been loaded."""
        return bool(self.counts.any())

    def forward(self, features: Tensor) -> Tensor:
        """Compute the log-likelihood ratios of texts and tasks.

        Args:
            features: Hidden states of B texts, averaged over tokens, of n layers [B, n, d].

        Returns:
            Log-likelihood ratios [B, T] in float32, in nats.
        """
        return self.ratios(self.project(features), self.means, self.counts)

    def project(self, features: Tensor) -> Tensor:
        """Compute the coordinates of texts in the kept directions.

        Args:
            features: Hidden states of B texts, averaged over tokens, of n layers [B, n, d].

        Returns:
            Coordinates [B, r] in float32.
        """
        with torch.autocast(features.device.type, enabled=False):
            return (_standardized(features) - self.center) @ self.directions

    def ratios(self, points: Tensor, means: Tensor, counts: Tensor) -> Tensor:
        """Compute the log-likelihood ratios of texts and tasks from their coordinates.

        Args:
            points: Coordinates of B texts [B, r].
            means: Means of the coordinates of known texts of each task [T, r].
            counts: Numbers of these texts [T].

        Returns:
            Log-likelihood ratios [B, T].
        """
        precise, variance = self._posterior(means, counts)
        # The squared distances are multiplied out, because their terms [B, T, r] would need much memory.
        distance = points.square() @ (1 / variance).T - 2 * points @ precise.T
        distance = distance + (precise.square() * variance).sum(dim=1)
        background = (points.square() / (1 + self.between) + torch.log1p(self.between)).sum(dim=1)
        return 0.5 * (background[:, None] - distance - variance.log().sum(dim=1))

    def keys(self, means: Tensor, counts: Tensor) -> Tensor:
        """Compute what `to_keys` needs of each task, so that it takes one matrix product only.

        Args:
            means: Means of the coordinates of known texts of each task [T, r].
            counts: Numbers of these texts [T].

        Returns:
            Keys [T, r + 1].
        """
        precise, variance = self._posterior(means, counts)
        constant = -0.5 * ((precise.square() * variance).sum(dim=1) + variance.log().sum(dim=1))
        return torch.cat([precise, constant[:, None]], dim=1)

    def to_keys(self, points: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function that computes the result of `ratios` for some texts, up to rounding, from keys of tasks.

        Args:
            points: Coordinates of B texts [B, r].

        Returns:
            Function of the result of `keys` for tasks [T, r + 1], and of the numbers of texts [T] of these tasks, of
            which few should differ. It returns log-likelihood ratios [B, T] on the device of the coordinates.
        """
        between, extended = self.between.to(points), F.pad(points, (0, 1), value=1.0)
        background = (points.square() / (1 + between) + torch.log1p(between)).sum(dim=1)

        def ratios(keys: Tensor, counts: Tensor) -> Tensor:
            distinct, which = torch.unique(counts, return_inverse=True)
            variance = 1 + between / (distinct[:, None] * between + 1)
            of_counts = 0.5 * (background[:, None] - points.square() @ (1 / variance).T)
            found: Tensor = extended @ keys.T + of_counts[:, which]
            return found

        return ratios

    def _posterior(self, means: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean / variance [T, r] and variance [T, r] of the texts of each task, given its known texts."""
        known = counts[:, None] * self.between
        variance = 1 + self.between / (known + 1)
        return known / (known + 1) * means / variance, variance

    @torch.no_grad()
    def fit(self, features: Tensor, owners: Tensor, weights: Tensor, counts: Tensor) -> None:
        """Fit the densities to texts of all tasks.

        Args:
            features: Hidden states of N texts, averaged over tokens, of n layers [N, n, d], all of them finite.
            owners: Task of each text [N], where every task has at least one text.
            weights: Weight of each text [N], a positive number.
            counts: Number of independent texts of each task [T], which is smaller if several are forms of one.

        Raises:
            ValueError: If there are fewer than two tasks, or a task has no text.
        """
        sizes = owners.bincount(minlength=len(self.counts))
        if len(sizes) < 2 or not sizes.all():
            raise ValueError(f"expected at least two tasks with texts, found texts by task: {sizes.tolist()}")
        points, weights = _standardized(features).double(), weights.double()[:, None]
        means = _task_means(points, owners, weights[:, 0], len(sizes))
        center = means.mean(dim=0)
        residuals, offsets = points - means[owners], means - center
        within = _shrunk((residuals * weights).T @ residuals / weights.sum(), WITHIN_SHRINKAGE)
        between = _shrunk(offsets.T @ offsets / (len(sizes) - 1), BETWEEN_SHRINKAGE)
        root = torch.linalg.cholesky(within)
        half = torch.linalg.solve_triangular(root, between, upper=False)
        ratio = torch.linalg.solve_triangular(root, half.T, upper=False)
        values, vectors = torch.linalg.eigh((ratio + ratio.T) / 2)
        kept = len(self.between)
        directions = torch.linalg.solve_triangular(root.T, vectors[:, -kept:], upper=True)
        self.center.copy_(center)
        self.directions.copy_(directions)
        self.between.copy_(values[-kept:].clamp(min=0))
        self.means.copy_(offsets @ directions)
        self.counts.copy_(counts)

    def replace(self, means: Tensor, counts: Tensor) -> None:
        """Replace the means and numbers of texts of all tasks, whose number may change.

        Args:
            means: Means of the coordinates of each task's texts [T, r].
            counts: Numbers of these texts [T].
        """
        self.means, self.counts = means.to(self.means), counts.to(self.counts)


def _task_means(points: Tensor, owners: Tensor, weights: Tensor, num_tasks: int) -> Tensor:
    """Compute the weighted means of the texts of each task.

    Args:
        points: Features or coordinates of N texts [N, r].
        owners: Task of each text [N].
        weights: Weight of each text [N].
        num_tasks: Number T of tasks, each of which has a text.

    Returns:
        Means [T, r].
    """
    weights = weights.to(points)
    sums = points.new_zeros(num_tasks, points.shape[1]).index_add_(0, owners, points * weights[:, None])
    return sums / points.new_zeros(num_tasks).index_add_(0, owners, weights)[:, None]


def _standardized(features: Tensor) -> Tensor:
    """Give the states [B, n, d] of each layer mean 0 and variance 1, and concatenate the layers [B, n d]."""
    return F.layer_norm(features.float(), features.shape[-1:]).flatten(1)


def _shrunk(covariance: Tensor, share: float) -> Tensor:
    """Replace a share of a covariance by a multiple of the identity matrix with the same trace, at least 1e-6."""
    level = covariance.diagonal().mean().clamp(min=1e-6)
    return (1 - share) * covariance + share * level * torch.eye(len(covariance)).to(covariance)
