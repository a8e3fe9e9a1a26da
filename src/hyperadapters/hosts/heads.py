"""Task heads for encoder backbones: from pooled hidden states to labels or numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperadapters.config import Task
from hyperadapters.core import Reduction


class TaskHeads(nn.Module):
    """One linear head a task.

    A regression head predicts the target in units of the training targets' standard deviation from their mean
    (`set_target_scale`), so that tasks with large numbers do not drown the others.
    """

    target_mean: Tensor
    target_std: Tensor

    def __init__(self, width: int, tasks: Sequence[Task]) -> None:
        """Args: width: d of the pooled hidden states; tasks: in the order of their ids."""
        super().__init__()
        self.sizes = tuple(len(task.labels) or 1 for task in tasks)
        self.is_regression = tuple(task.kind == "regression" for task in tasks)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in self.sizes)
        self.register_buffer("target_mean", torch.zeros(len(tasks)))
        self.register_buffer("target_std", torch.ones(len(tasks)))
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]

    def set_target_scale(self, task_id: int, targets: Sequence[float]) -> None:
        """Remember mean and standard deviation of a regression task's training targets."""
        values = torch.tensor(targets, dtype=torch.float64)
        std = values.std(correction=0)
        self.target_mean[task_id] = values.mean()
        self.target_std[task_id] = std if std > 0 else 1.0

    def forward(self, pooled: Tensor, task_ids: Tensor) -> Tensor:
        """Logits of each row under its own task.

        Args:
            pooled: [B, d] in float32.
            task_ids: [B].

        Returns:
            [B, C] with C the largest head in the model: the task's logits (a regression's one value, in the units of
            its targets), then minus infinity.
        """
        logits = pooled.new_full((len(pooled), max(self.sizes)), -torch.inf)
        for task_id in task_ids.unique().tolist():
            rows = (task_ids == task_id).nonzero()[:, 0]
            head = self.heads[task_id]
            values = head(pooled[rows].to(head.weight.dtype)).to(logits.dtype)
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
