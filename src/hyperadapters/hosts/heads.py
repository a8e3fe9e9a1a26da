"""Task heads for encoder backbones: from pooled hidden states to labels or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperadapters.config import Task
from hyperadapters.core import Reduction


class Head(NamedTuple):
    """A head's weight [C, d], or [C, 2 d] of a wide one, its bias [C], and the scale of a regression's targets."""

    weight: Tensor
    bias: Tensor
    target_mean: float = 0.0
    target_std: float = 1.0


class TaskHeads(nn.Module):
    """One linear head a task.

    A head reads the pooled last hidden states [B, d]. A wide head reads two vectors of length 1 in a row [B, 2 d]: the
    direction of the pooled features that the retriever reads, which no adapter has changed, and that of the pooled
    last hidden states. With few examples the first keep what the adapter of another task has lost.

    A regression head predicts the target in units of the training targets' standard deviation from their mean
    (`set_target_scale`), so that tasks with large numbers do not drown the others.
    """

    target_mean: Tensor
    target_std: Tensor

    def __init__(self, width: int, tasks: Sequence[Task]) -> None:
        """Args: width: d of the pooled hidden states; tasks: in the order of their ids."""
        super().__init__()
        self._describe(tasks)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in self.sizes)
        self.register_buffer("target_mean", torch.zeros(len(tasks)))
        self.register_buffer("target_std", torch.ones(len(tasks)))
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]

    def head(self, task_id: int) -> Head:
        """The head of a task; the tensors are the model's, not copies."""
        linear = self.heads[task_id]
        scale = float(self.target_mean[task_id]), float(self.target_std[task_id])
        return Head(linear.weight.detach(), linear.bias.detach(), *scale)  # type: ignore[operator]

    @classmethod
    def of(cls, tasks: Sequence[Task], heads: Sequence[Head]) -> TaskHeads:
        """Heads of tasks with given weights, copied."""
        made = cls(0, ())
        made._describe(tasks)
        made.heads = nn.ModuleList(_linear(head) for head in heads)
        device = heads[0].weight.device
        made.target_mean = torch.tensor([head.target_mean for head in heads], device=device)
        made.target_std = torch.tensor([head.target_std for head in heads], device=device)
        return made

    def _describe(self, tasks: Sequence[Task]) -> None:
        self.sizes = tuple(head_size(task) for task in tasks)
        self.is_regression = tuple(task.kind == "regression" for task in tasks)

    def set_target_scale(self, task_id: int, targets: Sequence[float]) -> None:
        """Remember mean and standard deviation of a regression task's training targets."""
        values = torch.tensor(targets, dtype=torch.float64)
        std = values.std(correction=0)
        self.target_mean[task_id] = values.mean()
        self.target_std[task_id] = std if std > 0 else 1.0

    def forward(self, pooled: Tensor, features: Tensor, task_ids: Tensor) -> Tensor:
        """Logits of each row under its own task.

        Args:
            pooled: last hidden states [B, d] in float32.
            features: what the retriever reads [B, d] in float32.
            task_ids: [B].

        Returns:
            [B, C] with C the largest head among the batch's tasks: the task's logits (a regression's one value, in the
            units of its targets), then minus infinity.
        """
        present = task_ids.unique().tolist()
        logits = pooled.new_full((len(pooled), max(self.sizes[task_id] for task_id in present)), -torch.inf)
        for task_id in present:
            rows = (task_ids == task_id).nonzero()[:, 0]
            head = self.heads[task_id]
            is_wide = head.weight.shape[1] > pooled.shape[1]
            inputs = wide_inputs(pooled[rows], features[rows]) if is_wide else pooled[rows]
            values = head(inputs.to(head.weight.dtype)).to(logits.dtype)
            if self.is_regression[task_id]:
                values = values * self.target_std[task_id] + self.target_mean[task_id]
            logits[rows[:, None], torch.arange(self.sizes[task_id], device=rows.device)] = values
        return logits

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        task_ids: Tensor,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Cross-entropy for classification, squared error in standard deviations for regression, over rows.

        Args:
            logits: result of `forward`, [B, C].
            labels: index of the label or number [B], float32.
            task_ids: [B].
            label_smoothing: of classification.
            reduction: "mean" or "sum" over the rows of the batch.
        """
        total = logits.new_zeros(())
        for task_id in task_ids.unique().tolist():
            rows = (task_ids == task_id).nonzero()[:, 0]
            values, targets = logits[rows, : self.sizes[task_id]], labels[rows]
            if self.is_regression[task_id]:
                total = total + ((values[:, 0] - targets) / self.target_std[task_id]).square().sum()
            else:
                total = total + F.cross_entropy(
                    values, targets.long(), reduction="sum", label_smoothing=label_smoothing
                )
        return total / len(labels) if reduction == "mean" else total


def head_size(task: Task) -> int:
    """Number of outputs of a task's head: one for each label, or one for a number."""
    return len(task.labels) or 1


def wide_inputs(pooled: Tensor, features: Tensor) -> Tensor:
    """What a wide head reads [B, 2 d]: see `TaskHeads`."""
    return torch.cat([F.normalize(features.float(), dim=-1), F.normalize(pooled.float(), dim=-1)], dim=-1)


@torch.no_grad()
def _linear(head: Head) -> nn.Linear:
    linear = nn.utils.skip_init(nn.Linear, head.weight.shape[1], head.weight.shape[0], device=head.weight.device)
    linear.to(head.weight.dtype)
    linear.weight.copy_(head.weight)
    linear.bias.copy_(head.bias)
    return linear
