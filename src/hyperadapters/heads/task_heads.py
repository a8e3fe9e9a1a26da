"""Task heads for encoder backbones: from pooled hidden states to labels or numbers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperadapters.config import Task
from hyperadapters.core import Reduction

ERROR_LEVELS = 8
"""Number of confidences for which the error of a task is bounded; see `heads.calibration.error_bounds`."""
DEFAULT_THRESHOLD = 0.5
"""Probability above which a label of a multi-label task is an answer if nothing else is known."""


class Head(NamedTuple):
    """The head of one task.

    Attributes:
        weight: Weight of shape [C, d], or [C, F + d] for a wide head (see `TaskHeads`).
        bias: Bias of shape [C].
        target_mean: Mean of a regression task's training targets, in their units; 0 for other tasks.
        target_std: Standard deviation of a regression task's training targets, in their units; 1 for other tasks.
        temperature: Divisor of the logits of a classification or multi-label task, which makes its probabilities
            calibrated (see `heads.calibration`); 1 for a regression task.
        error_bounds: Confidences and the upper limits of the error of answers that exceed them, of shape [2, J]; see
            `heads.calibration.error_bounds`. None (default) if nothing is known.
        thresholds: Probability above which each label of a multi-label task is an answer, of shape [C]; see
            `heads.thresholds`. None (default) stands for `DEFAULT_THRESHOLD`.
    """

    weight: Tensor
    bias: Tensor
    target_mean: float = 0.0
    target_std: float = 1.0
    temperature: float = 1.0
    error_bounds: Tensor | None = None
    thresholds: Tensor | None = None

    @property
    def label_thresholds(self) -> list[float]:
        """Probability above which each label of a multi-label task is an answer, of length C."""
        return [DEFAULT_THRESHOLD] * len(self.bias) if self.thresholds is None else self.thresholds.tolist()

    def logits(self, pooled: Tensor, features: Tensor) -> Tensor:
        """Compute the logits of rows that all belong to the task of this head.

        Args:
            pooled: Pooled last hidden states of shape [B, d], in float32.
            features: Features of the rows that do not depend on adapters, of shape [B, F], in float32. They are only
                used by a wide head.

        Returns:
            Logits of shape [B, C], or predicted targets of shape [B, 1] in their units.
        """
        inputs = pooled if self.weight.shape[1] == pooled.shape[1] else wide_inputs(pooled, features)
        return F.linear(inputs, self.weight, self.bias) * (self.target_std / self.temperature) + self.target_mean

    def folded(self) -> Head:
        """Divide the weight and the bias by the temperature.

        Returns:
            A head with the same logits and a temperature of 1.
        """
        return self._replace(weight=self.weight / self.temperature, bias=self.bias / self.temperature, temperature=1.0)

    def rounded(self) -> Head:
        """Round the weight to float16, in which a checkpoint can then store it without loss.

        Returns:
            This head with the rounded weight in its former dtype, or this head if a weight exceeds the range of
            float16.
        """
        weight = self.weight.half().to(self.weight)
        return self._replace(weight=weight) if weight.isfinite().all() else self


class TaskHeads(nn.Module):
    """One linear head per task, with the parameters of all heads in three tensors.

    There are two kinds of heads. The input of a plain head is the pooled last hidden state, of shape [B, d]. The input
    of a wide head has shape [B, F + d]: features of the row that do not depend on adapters, followed by the normalised
    pooled last hidden state (see `wide_inputs`). The features retain what an adapter that was trained on few examples
    has lost or not learned yet.

    A regression head predicts standardised targets, so that the losses of tasks with large targets do not dominate
    (see `set_target_scale`).

    The heads have N outputs in all. Those of plain heads come first, then those of wide heads, each in the order of the
    task ids. The head of a task that has no row in a batch receives zero gradients rather than none, so that an
    optimizer with momentum still updates it.

    Attributes:
        weight: Weights of the plain heads, of shape [N_plain, d].
        wide_weight: Weights of the wide heads, of shape [N_wide, F + d].
        bias: Biases of all heads, of shape [N].
        starts: Index of the first output of each task, of shape [T].
        target_mean: Mean of the training targets of each task, of shape [T]; 0 unless it is a regression task.
        target_std: Standard deviation of the training targets of each task, of shape [T]; 1 unless it is a regression
            task.
        temperature: Divisor of the logits of each task, of shape [T]; 1 for a regression task.
        error_bounds: Confidences and upper limits of the error of each task, of shape [T, 2, `ERROR_LEVELS`]. Limits of
            tasks of which nothing is known are 1.
        thresholds: Probability above which each label of a multi-label task is an answer, of shape [N];
            `DEFAULT_THRESHOLD` for the outputs of other tasks.
    """

    starts: Tensor
    target_mean: Tensor
    target_std: Tensor
    temperature: Tensor
    error_bounds: Tensor
    thresholds: Tensor
    _sizes: Tensor
    _is_regression: Tensor
    _is_multi_label: Tensor

    def __init__(
        self,
        hidden_size: int,
        tasks: Sequence[Task],
        is_wide: Sequence[bool] | None = None,
        features_size: int | None = None,
    ) -> None:
        """Initialise the weights at random and the biases to zero.

        Args:
            hidden_size: Size d of the pooled hidden states.
            tasks: The T tasks, in the order of their ids.
            is_wide: Whether the head of each task is wide, of length T. By default, all heads are plain.
            features_size: Size F of the features that wide heads read. Default: `hidden_size`.
        """
        super().__init__()
        self.hidden_size, self.features_size = hidden_size, hidden_size if features_size is None else features_size
        self.warns_if_unfitted = True  # see `heads.unfitted`
        self.sizes = tuple(head_size(task) for task in tasks)
        self.is_regression = tuple(task.kind == "regression" for task in tasks)
        starts, num_plain = _first_outputs(self.sizes, is_wide or [False] * len(tasks))
        self.weight = nn.Parameter(torch.empty(num_plain, hidden_size).normal_(std=0.02))
        adapted = torch.empty(sum(self.sizes) - num_plain, hidden_size).normal_(std=0.02)
        self.wide_weight = nn.Parameter(F.pad(adapted, (self.features_size, 0)))
        self.bias = nn.Parameter(torch.zeros(sum(self.sizes)))
        self.register_buffer("starts", torch.tensor(starts, dtype=torch.long))
        # Tasks with labels keep 0 and 1, with which the logits are not changed.
        self.register_buffer("target_mean", torch.zeros(len(tasks)))
        self.register_buffer("target_std", torch.ones(len(tasks)))
        self.register_buffer("temperature", torch.ones(len(tasks)))
        self.register_buffer("error_bounds", torch.ones(len(tasks), 2, ERROR_LEVELS))
        self.register_buffer("thresholds", torch.full((sum(self.sizes),), DEFAULT_THRESHOLD))
        self.register_buffer("_sizes", torch.tensor(self.sizes, dtype=torch.long), persistent=False)
        self.register_buffer("_is_regression", torch.tensor(self.is_regression, dtype=torch.bool), persistent=False)
        is_multi_label = torch.tensor([task.is_multi_label for task in tasks], dtype=torch.bool)
        self.register_buffer("_is_multi_label", is_multi_label, persistent=False)

    def head(self, task_id: int) -> Head:
        """Get the head of a task.

        Args:
            task_id: Id of the task.

        Returns:
            The head, whose tensors share memory with the parameters and are detached from the autograd graph.
        """
        start, size = int(self.starts[task_id]), self.sizes[task_id]
        is_wide = start >= len(self.weight)
        weight, row = (self.wide_weight, start - len(self.weight)) if is_wide else (self.weight, start)
        return Head(
            weight.detach()[row : row + size],
            self.bias.detach()[start : start + size],
            float(self.target_mean[task_id]),
            float(self.target_std[task_id]),
            float(self.temperature[task_id]),
            self.error_bounds[task_id],
            self.thresholds[self.outputs_of(task_id)],
        )

    def outputs_of(self, task_id: int) -> slice:
        """Return the places of the outputs of a task among all N outputs.

        Args:
            task_id: Id of the task.
        """
        start = int(self.starts[task_id])
        return slice(start, start + self.sizes[task_id])

    def unpack(self) -> list[Head]:
        """Get the heads of all tasks.

        Returns:
            The heads in the order of the task ids, as returned by `head`.
        """
        numbers = (self.starts, self.target_mean, self.target_std, self.temperature)
        # One copy from the device instead of one a task.
        starts, means, stds, temperatures = (tensor.tolist() for tensor in numbers)
        order = sorted(range(len(starts)), key=starts.__getitem__)
        sizes = [self.sizes[task_id] for task_id in order]
        num_plain = bisect_left([starts[task_id] for task_id in order], len(self.weight))
        plain, wide = self.weight.detach().split(sizes[:num_plain]), self.wide_weight.detach().split(sizes[num_plain:])
        parts = zip(order, plain + wide, self.bias.detach().split(sizes), self.thresholds.split(sizes), strict=True)
        bounds, heads = self.error_bounds.unbind(), {}
        for task_id, weight, bias, limits in parts:
            numbers_of_task = means[task_id], stds[task_id], temperatures[task_id]
            heads[task_id] = Head(weight, bias, *numbers_of_task, bounds[task_id], limits)
        return [heads[task_id] for task_id in range(len(order))]

    @property
    def reads_features(self) -> bool:
        """Whether any wide head has a non-zero weight for the features."""
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
        """Create the heads of several tasks from copies of single heads.

        Args:
            tasks: The T tasks, in the order of their ids.
            heads: The head of each task, of length T.
            hidden_size: Size d of the pooled hidden states. Default: the smallest input size of the heads.
            features_size: Size F of the features that wide heads read. Default: `hidden_size`.

        Returns:
            The heads, on the device of the first one.

        Raises:
            ValueError: If the shape of a head does not match its task or the sizes.
        """
        hidden_size = min(head.weight.shape[1] for head in heads) if hidden_size is None else hidden_size
        is_wide = [head.weight.shape[1] > hidden_size for head in heads]
        features_size = hidden_size if features_size is None else features_size
        wide_size = features_size + hidden_size
        made = cls(0, tasks, is_wide).to(heads[0].weight.device)
        for task_id, (head, size) in enumerate(zip(heads, made.sizes, strict=True)):
            if head.weight.shape not in ((size, hidden_size), (size, wide_size)) or head.bias.shape != (size,):
                raise ValueError(
                    f"the head of task {task_id}: expected a weight of shape {(size, hidden_size)} or "
                    f"{(size, wide_size)} and a bias of shape {(size,)}, found {tuple(head.weight.shape)} and "
                    f"{tuple(head.bias.shape)}; make a head with one output for each label of the task"
                )
        made.hidden_size, made.features_size = hidden_size, features_size
        plain = [head for head, wide in zip(heads, is_wide, strict=True) if not wide]
        wide = [head for head, wide in zip(heads, is_wide, strict=True) if wide]
        made.weight = _concatenated([head.weight for head in plain], made.weight.new_empty(0, hidden_size))
        made.wide_weight = _concatenated([head.weight for head in wide], made.weight.new_empty(0, wide_size))
        made.bias = _concatenated([head.bias for head in (*plain, *wide)], made.bias)
        limits = [
            torch.full_like(head.bias, DEFAULT_THRESHOLD) if head.thresholds is None else head.thresholds
            for head in (*plain, *wide)
        ]
        made.thresholds.copy_(torch.cat(limits))
        made.target_mean.copy_(torch.tensor([head.target_mean for head in heads]))
        made.target_std.copy_(torch.tensor([head.target_std for head in heads]))
        made.temperature.copy_(torch.tensor([head.temperature for head in heads]))
        for task_id, head in enumerate(heads):
            if head.error_bounds is not None:
                made.error_bounds[task_id] = head.error_bounds
        return made

    def replace(self, tasks: Sequence[Task], heads: Sequence[Head]) -> None:
        """Replace all tasks and their heads by copies of given ones.

        The parameters are replaced by new ones, which an existing optimizer does not know.

        Args:
            tasks: The T tasks, in the order of their ids.
            heads: The head of each task, of length T.

        Raises:
            ValueError: If the shape of a head does not match its task or the sizes of these heads. Nothing has changed
                then.
        """
        made = TaskHeads.of(tasks, heads, self.hidden_size, self.features_size).to(self.weight.device)
        for name, tensor in (*made.named_parameters(), *made.named_buffers()):
            setattr(self, name, tensor)
        self.sizes, self.is_regression = made.sizes, made.is_regression

    def set_target_scale(self, task_id: int, targets: Sequence[float]) -> None:
        """Store the mean and the standard deviation of a regression task's training targets.

        Args:
            task_id: Id of the task.
            targets: Training targets in their units; see `target_scale` for constant ones.
        """
        self.target_mean[task_id], self.target_std[task_id] = target_scale(targets)

    def forward(self, pooled: Tensor, features: Tensor, task_ids: Tensor) -> Tensor:
        """Compute the logits of each row with the head of its task.

        Args:
            pooled: Pooled last hidden states of shape [B, d], in float32.
            features: Features of the rows that do not depend on adapters, of shape [B, F], in float32.
            task_ids: Task id of each row, of shape [B].

        Returns:
            Logits of shape [B, C], with C the number of outputs of the largest head among the tasks of the batch. A
            regression task has one logit, the predicted target in its units. The columns that the task of a row does
            not have contain minus infinity.
        """
        sizes = self._sizes[task_ids, None]
        columns = torch.arange(int(sizes.max()), device=sizes.device)
        is_own = columns < sizes
        # [B, C] indices into the N outputs. Columns that the task does not have repeat its first output.
        outputs = self.starts[task_ids, None] + columns * is_own
        distinct, columns_of_outputs = outputs.unique(return_inverse=True)
        values = self._values(pooled, features, distinct).gather(1, columns_of_outputs)
        scale = self.target_std[task_ids, None] / self.temperature[task_ids, None]
        values = values * scale + self.target_mean[task_ids, None]
        return values.to(pooled.dtype).masked_fill(~is_own, -torch.inf)

    def _values(self, pooled: Tensor, features: Tensor, outputs: Tensor) -> Tensor:
        """Compute some outputs for every row, before the target scale is applied.

        Args:
            pooled: Pooled last hidden states of shape [B, d].
            features: Features of shape [B, F]; they are not used if there are no wide heads.
            outputs: Indices of the outputs, distinct and in ascending order, of shape [L].

        Returns:
            Values of shape [B, L].
        """
        has_wide, wide_size = self.wide_weight.shape
        num_plain = int((outputs < len(self.weight)).sum()) if has_wide else len(outputs)
        plain, wide = outputs[:num_plain], outputs[num_plain:] - len(self.weight)
        # Without wide heads, their empty weight still gets a gradient, as all parameters of heads do.
        inputs = wide_inputs(pooled, features) if has_wide else pooled.new_zeros(len(pooled), wide_size)
        values = torch.cat([_linear(pooled, self.weight, plain), _linear(inputs, self.wide_weight, wide)], dim=1)
        return values + self.bias.index_select(0, outputs)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        task_ids: Tensor,
        label_smoothing: float = 0.0,
        reduction: Reduction | Literal["none"] = "mean",
    ) -> Tensor:
        """Compute the loss of a batch.

        The loss of a row is the cross-entropy for a classification task, and the squared error of the standardised
        target for a regression task. For a multi-label task it is the mean of the binary cross-entropies of its labels,
        rather than their sum, so that a task does not weigh more in the shared parameters the more labels it has.

        Args:
            logits: Result of `forward`, of shape [B, C].
            labels: Label index or target of each row, of shape [B], in float32; or of shape [B, C'] if there are rows
                of multi-label tasks, as `data.collate.EncoderCollator` makes them.
            task_ids: Task id of each row, of shape [B].
            label_smoothing: Label smoothing of the cross-entropies, in [0, 1].
            reduction: Whether to return the "mean" or the "sum" of the losses of the rows, or all of them ("none").

        Returns:
            The loss, a scalar, or the losses of the rows [B].

        Raises:
            RuntimeError: If a label index is not one of its task's.
        """
        is_regression, sizes = self._is_regression[task_ids], self._sizes[task_ids]
        is_own = torch.arange(logits.shape[1], device=logits.device) < sizes[:, None]
        sets = labels if labels.ndim == 2 else None
        if sets is not None:
            labels = sets[:, 0].masked_fill(self._is_multi_label[task_ids], 0)
        # `gather` would accept an index that only a larger task of the batch has, but it raises an error for -1.
        targets = labels.masked_fill(is_regression, 0).long()
        targets = targets.masked_fill(targets >= sizes, -1)
        log_probabilities = logits.log_softmax(dim=1)
        of_target = log_probabilities.gather(1, targets[:, None])[:, 0]
        mean_of_labels = log_probabilities.masked_fill(~is_own, 0).sum(dim=1) / sizes
        cross_entropy = (label_smoothing - 1) * of_target - label_smoothing * mean_of_labels
        errors = ((logits[:, 0] - labels) / self.target_std[task_ids]).square()
        losses = torch.where(is_regression, errors, cross_entropy)
        if sets is not None:
            losses = torch.where(
                self._is_multi_label[task_ids], _set_losses(logits, sets, sizes, label_smoothing), losses
            )
        if reduction == "none":
            return losses
        return losses.mean() if reduction == "mean" else losses.sum()


def target_losses(
    logits: Tensor, labels: Tensor, label_weights: Tensor | None = None, reduction: Literal["none", "sum"] = "none"
) -> Tensor:
    """Compute the negative log-likelihood of the labels of each row of one task.

    Args:
        logits: Logits of shape [N, C].
        labels: Label indices of shape [N], or for a multi-label task rows of zeros and ones [N, C] in float32.
        label_weights: Factors of the loss for each label [C], only with label indices. Default: all are 1.
        reduction: Whether to return the losses of the rows, "none" (default), or their "sum".

    Returns:
        The cross-entropy, or for a multi-label task the sum of the binary cross-entropies of its labels, in nats, of
        shape [N] or a scalar.
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, label_weights, reduction=reduction)
    losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").sum(dim=1)
    return losses.sum() if reduction == "sum" else losses


def _set_losses(logits: Tensor, sets: Tensor, sizes: Tensor, label_smoothing: float) -> Tensor:
    """Mean of the binary cross-entropies of the first `sizes` [B] labels of each row [B], also of other tasks."""
    size = min(logits.shape[1], sets.shape[1])
    is_own = torch.arange(size, device=logits.device) < sizes[:, None]
    targets = sets[:, :size] * (1 - label_smoothing) + label_smoothing / 2
    values = logits[:, :size].float().masked_fill(~is_own, 0)
    losses = F.binary_cross_entropy_with_logits(values, targets, reduction="none")
    return losses.masked_fill(~is_own, 0).sum(dim=1) / sizes


def target_scale(targets: Sequence[float]) -> tuple[float, float]:
    """Compute the mean and the standard deviation of the targets of a regression task.

    Args:
        targets: Targets in their units; at least one.

    Returns:
        The mean and the population standard deviation. The latter is 1 if all targets are equal in float32.
    """
    values = torch.tensor(targets, dtype=torch.float64)
    # The computed standard deviation of equal numbers need not be exactly zero, and labels are stored in float32.
    is_constant = len(values.float().unique()) == 1
    return float(values.mean()), 1.0 if is_constant else float(values.std(correction=0))


def head_size(task: Task) -> int:
    """Get the number of outputs of a task's head.

    Args:
        task: A classification or regression task.

    Returns:
        The number of labels, or 1 for a regression task.
    """
    return len(task.labels) or 1


def wide_inputs(pooled: Tensor, features: Tensor) -> Tensor:
    """Compute the input of a wide head.

    Args:
        pooled: Pooled last hidden states of shape [B, d].
        features: Features of shape [B, F], with F at least d.

    Returns:
        The features as returned by `scaled_features`, followed by the pooled last hidden states normalised to unit
        length, of shape [B, F + d], in float32.
    """
    return torch.cat([scaled_features(features, pooled.shape[-1]), F.normalize(pooled.float(), dim=-1)], dim=-1)


def scaled_features(features: Tensor, hidden_size: int) -> Tensor:
    """Normalise the first d features of each row to unit length.

    Args:
        features: Features of shape [B, F], with F at least d.
        hidden_size: Size d of the hidden states.

    Returns:
        Features of shape [B, F], in float32. Those after the first d are not changed.
    """
    features = features.float()
    return torch.cat([F.normalize(features[:, :hidden_size], dim=-1), features[:, hidden_size:]], dim=-1)


def _first_outputs(sizes: Sequence[int], is_wide: Sequence[bool]) -> tuple[list[int], int]:
    """Compute the index of the first output of each task (see `TaskHeads`), and the number of plain heads' outputs."""
    num_plain = sum(size for size, wide in zip(sizes, is_wide, strict=True) if not wide)
    following, starts = [0, num_plain], []
    for size, wide in zip(sizes, is_wide, strict=True):
        starts.append(following[wide])
        following[wide] += size
    return starts, num_plain


def _concatenated(tensors: Sequence[Tensor], default: Tensor) -> nn.Parameter:
    """Concatenate tensors along their first dimension, or return the default if there are none."""
    return nn.Parameter(torch.cat(list(tensors)) if tensors else default)


def _linear(inputs: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Multiply inputs [B, i] by distinct rows [L] of a weight [N, i]; the result [B, L] has the dtype of the inputs."""
    # The backward pass of weight[rows] would accumulate gradients in an order that differs from run to run.
    return F.linear(inputs.to(weight.dtype), weight.index_select(0, rows)).to(inputs.dtype)
