"""Task heads for encoder backbones: from pooled hidden states to labels or numbers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperadapters.config import Task
from hyperadapters.core import Reduction


class Head(NamedTuple):
    """A head's weight [C, d], or [C, F + d] of a wide one, its bias [C], and the scale of a regression's targets."""

    weight: Tensor
    bias: Tensor
    target_mean: float = 0.0
    target_std: float = 1.0

    def logits(self, pooled: Tensor, features: Tensor) -> Tensor:
        """Logits [B, C] of rows that are all of this head's task; arguments as of `TaskHeads.forward`."""
        inputs = pooled if self.weight.shape[1] == pooled.shape[1] else wide_inputs(pooled, features)
        return F.linear(inputs, self.weight, self.bias) * self.target_std + self.target_mean


class TaskHeads(nn.Module):
    """One linear head a task, all of them packed into three tensors.

    A head reads the pooled last hidden states [B, d]. A wide head reads [B, F + d]: features of the row that
    no adapter has changed, and the direction of the pooled last hidden states (see `wide_inputs`). With few examples
    the first keep what an adapter has lost or not yet learned.

    A regression head predicts the target in units of the training targets' standard deviation from their mean
    (`set_target_scale`), so that tasks with large numbers do not drown the others.

    The N outputs of all tasks are in the order of the task ids, first those of plain heads, then those of wide ones:
    `weight` [N plain, d], `wide_weight` [N wide, F + d], `bias` [N]; `starts` [T] has the first output of each task. In
    training, the head of a task that is absent from a batch has gradients of zero, not none, so an optimizer's
    momentum moves it on.
    """

    starts: Tensor
    target_mean: Tensor
    target_std: Tensor
    _sizes: Tensor
    _is_regression: Tensor

    def __init__(
        self,
        hidden_size: int,
        tasks: Sequence[Task],
        is_wide: Sequence[bool] | None = None,
        features_size: int | None = None,
    ) -> None:
        """Make fresh heads.

        Args:
            hidden_size: d of the pooled hidden states.
            tasks: in the order of their ids.
            is_wide: of each task; default: none is.
            features_size: F, of the features that wide heads read; default: d.
        """
        super().__init__()
        self.hidden_size, self.features_size = hidden_size, hidden_size if features_size is None else features_size
        self.warns_if_unfitted = True  # see `heads.unfitted`
        self.sizes = tuple(head_size(task) for task in tasks)
        self.is_regression = tuple(task.kind == "regression" for task in tasks)
        starts, num_plain = _places(self.sizes, is_wide or [False] * len(tasks))
        self.weight = nn.Parameter(torch.empty(num_plain, hidden_size).normal_(std=0.02))
        adapted = torch.empty(sum(self.sizes) - num_plain, hidden_size).normal_(std=0.02)
        self.wide_weight = nn.Parameter(F.pad(adapted, (self.features_size, 0)))
        self.bias = nn.Parameter(torch.zeros(sum(self.sizes)))
        self.register_buffer("starts", torch.tensor(starts, dtype=torch.long))
        # A classification keeps 0 and 1, which change nothing.
        self.register_buffer("target_mean", torch.zeros(len(tasks)))
        self.register_buffer("target_std", torch.ones(len(tasks)))
        self.register_buffer("_sizes", torch.tensor(self.sizes, dtype=torch.long), persistent=False)
        self.register_buffer("_is_regression", torch.tensor(self.is_regression, dtype=torch.bool), persistent=False)

    def head(self, task_id: int) -> Head:
        """The head of a task; the tensors are the model's, not copies."""
        start, size = int(self.starts[task_id]), self.sizes[task_id]
        is_wide = start >= len(self.weight)
        weight, row = (self.wide_weight, start - len(self.weight)) if is_wide else (self.weight, start)
        scale = float(self.target_mean[task_id]), float(self.target_std[task_id])
        return Head(weight.detach()[row : row + size], self.bias.detach()[start : start + size], *scale)

    def unpack(self) -> list[Head]:
        """The heads of all tasks, as `head` gives them."""
        numbers = (self.starts, self.target_mean, self.target_std)
        starts, means, stds = (tensor.tolist() for tensor in numbers)  # one copy from the device, not one a task
        order = sorted(range(len(starts)), key=starts.__getitem__)
        sizes = [self.sizes[task_id] for task_id in order]
        num_plain = bisect_left([starts[task_id] for task_id in order], len(self.weight))
        plain, wide = self.weight.detach().split(sizes[:num_plain]), self.wide_weight.detach().split(sizes[num_plain:])
        heads: dict[int, Head] = {}
        for task_id, weight, bias in zip(order, plain + wide, self.bias.detach().split(sizes), strict=True):
            heads[task_id] = Head(weight, bias, means[task_id], stds[task_id])
        return [heads[task_id] for task_id in range(len(order))]

    @property
    def reads_features(self) -> bool:
        """Whether any wide head has weights other than 0 for features."""
        return bool(self.wide_weight[:, : self.features_size].any())

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        tasks: Sequence[Task],
        heads: Sequence[Head],
        hidden_size: int | None = None,
        features_size: int | None = None,
    ) -> TaskHeads:
        """Heads of tasks with given weights, copied.

        Args:
            tasks: in the order of their ids.
            heads: of each task.
            hidden_size: d of the pooled hidden states; default: what the narrowest head reads.
            features_size: F, of the features that wide heads read; default: d.

        Raises:
            ValueError: a head has another shape than its task's.
        """
        hidden_size = min(head.weight.shape[1] for head in heads) if hidden_size is None else hidden_size
        is_wide = [head.weight.shape[1] > hidden_size for head in heads]
        features_size = hidden_size if features_size is None else features_size
        wide_size = features_size + hidden_size
        made = cls(0, tasks, is_wide).to(heads[0].weight.device)
        for task_id, (head, size) in enumerate(zip(heads, made.sizes, strict=True)):
            if head.weight.shape not in ((size, hidden_size), (size, wide_size)) or head.bias.shape != (size,):
                raise ValueError(f"the head of task {task_id} has shape {tuple(head.weight.shape)}, not {size} outputs")
        made.hidden_size, made.features_size = hidden_size, features_size
        plain = [head for head, wide in zip(heads, is_wide, strict=True) if not wide]
        wide = [head for head, wide in zip(heads, is_wide, strict=True) if wide]
        made.weight = _joined([head.weight for head in plain], made.weight.new_empty(0, hidden_size))
        made.wide_weight = _joined([head.weight for head in wide], made.weight.new_empty(0, wide_size))
        made.bias = _joined([head.bias for head in (*plain, *wide)], made.bias)
        made.target_mean.copy_(torch.tensor([head.target_mean for head in heads]))
        made.target_std.copy_(torch.tensor([head.target_std for head in heads]))
        return made

    def replace(self, tasks: Sequence[Task], heads: Sequence[Head]) -> None:
        """Take other tasks and their heads, copied; the parameters are new ones then.

        Args:
            tasks: In the order of their ids.
            heads: Of each task.

        Raises:
            ValueError: A head has another shape than its task's. Nothing has changed then.
        """
        made = TaskHeads.of(tasks, heads, self.hidden_size, self.features_size).to(self.weight.device)
        for name, tensor in (*made.named_parameters(), *made.named_buffers()):
            setattr(self, name, tensor)
        self.sizes, self.is_regression = made.sizes, made.is_regression

    def set_target_scale(self, task_id: int, targets: Sequence[float]) -> None:
        """Remember mean and standard deviation of a regression task's training targets (1 where they are constant)."""
        self.target_mean[task_id], self.target_std[task_id] = target_scale(targets)

    def forward(self, pooled: Tensor, features: Tensor, task_ids: Tensor) -> Tensor:
        """Logits of each row under its own task.

        Args:
            pooled: last hidden states [B, d] in float32.
            features: of the rows, unchanged by adapters [B, F] in float32.
            task_ids: [B].

        Returns:
            [B, C] with C the largest head among the batch's tasks: the task's logits (a regression's one value, in the
            units of its targets), then minus infinity.
        """
        sizes = self._sizes[task_ids, None]
        columns = torch.arange(int(sizes.max()), device=sizes.device)
        is_own = columns < sizes
        # [B, C]: which of the N outputs; where a row's task has no more of them, its first once more.
        outputs = self.starts[task_ids, None] + columns * is_own
        distinct, places = outputs.unique(return_inverse=True)
        values = self._values(pooled, features, distinct).gather(1, places)
        values = values * self.target_std[task_ids, None] + self.target_mean[task_ids, None]
        return values.to(pooled.dtype).masked_fill(~is_own, -torch.inf)

    def _values(self, pooled: Tensor, features: Tensor, outputs: Tensor) -> Tensor:
        """Some of the N outputs [L], distinct and in ascending order, for every row: [B, L]."""
        num_plain = int((outputs < len(self.weight)).sum()) if len(self.wide_weight) else len(outputs)
        plain, wide = outputs[:num_plain], outputs[num_plain:] - len(self.weight)
        inputs = wide_inputs(pooled, features)
        values = torch.cat([_product(pooled, self.weight, plain), _product(inputs, self.wide_weight, wide)], dim=1)
        return values + self.bias.index_select(0, outputs)

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
        is_regression, sizes = self._is_regression[task_ids], self._sizes[task_ids]
        # An index that is none of the row's own labels becomes -1, which `gather` refuses.
        targets = labels.masked_fill(is_regression, 0).long()
        targets = targets.masked_fill(targets >= sizes, -1)
        log_shares = logits.log_softmax(dim=1)
        of_target = log_shares.gather(1, targets[:, None])[:, 0]
        is_own = torch.arange(logits.shape[1], device=logits.device) < sizes[:, None]
        of_own = log_shares.masked_fill(~is_own, 0).sum(dim=1) / sizes
        cross_entropy = (label_smoothing - 1) * of_target - label_smoothing * of_own
        errors = ((logits[:, 0] - labels) / self.target_std[task_ids]).square()
        losses = torch.where(is_regression, errors, cross_entropy)
        return losses.mean() if reduction == "mean" else losses.sum()


def target_scale(targets: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a regression's targets; 1 in the place of the latter where they are constant."""
    values = torch.tensor(targets, dtype=torch.float64)
    # Labels are float32, and the mean of equal numbers need not be exactly that number.
    is_constant = len(values.float().unique()) == 1
    return float(values.mean()), 1.0 if is_constant else float(values.std(correction=0))


def head_size(task: Task) -> int:
    """Number of outputs of a task's head: one for each label, or one for a number."""
    return len(task.labels) or 1


def wide_inputs(pooled: Tensor, features: Tensor) -> Tensor:
    """What a wide head reads [B, F + d]: features, and the direction of the pooled last hidden states.

    Args:
        pooled: last hidden states [B, d].
        features: [B, F], F at least d.
    """
    return torch.cat([scaled_features(features, pooled.shape[-1]), F.normalize(pooled.float(), dim=-1)], dim=-1)


def scaled_features(features: Tensor, hidden_size: int) -> Tensor:
    """Features [B, F] as a wide head reads them: the first d in their direction only, the others as they are."""
    features = features.float()
    return torch.cat([F.normalize(features[:, :hidden_size], dim=-1), features[:, hidden_size:]], dim=-1)


def _places(sizes: Sequence[int], is_wide: Sequence[bool]) -> tuple[list[int], int]:
    """The first output of each task, see `TaskHeads`, and the number of outputs of plain heads."""
    num_plain = sum(size for size, wide in zip(sizes, is_wide, strict=True) if not wide)
    following, starts = [0, num_plain], []
    for size, wide in zip(sizes, is_wide, strict=True):
        starts.append(following[wide])
        following[wide] += size
    return starts, num_plain


def _joined(tensors: Sequence[Tensor], default: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat(list(tensors)) if tensors else default)


def _product(inputs: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Inputs [B, i] times some distinct rows [L] of a weight [N, i]: [B, L] in the type of the inputs."""
    # index_select and not weight[rows]: the gradient of the latter adds up in an order that varies from run to run.
    return F.linear(inputs.to(weight.dtype), weight.index_select(0, rows)).to(inputs.dtype)
