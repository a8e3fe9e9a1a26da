"""Fit of one task to a few examples without a gradient step: only its head is fitted, by a convex optimizer.

The features of the examples are computed with the adapter of a similar task and with the frozen backbone. Left-out
examples decide between the full effect of the adapter, half of it, and none. A few examples say little, so the decision
is regularised: the adapter of a task with the same labels has its full effect unless the left-out examples are
predicted worse with it by more than `MARGIN`, and at least half of it unless they are predicted clearly worse. Another
adapter has its full effect only if they are predicted clearly better, and half of it if they are predicted better.

The names or descriptions of labels are rows of their own. Left-out examples choose their weight on the frozen features
(`heads.name_weights`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadapters.config import Task
from hyperadapters.fewshot.fit import DAMPING, FitExamples, Fitted, Start, initial_adapter
from hyperadapters.heads.calibration import LabelledLogits, fit_temperature, no_rows
from hyperadapters.heads.name_weights import choose_name_weight
from hyperadapters.heads.new_heads import MIN_VARIANCE, fit_new_head, left_out_fits, left_out_losses
from hyperadapters.heads.regression import TaskRows, pair_scales
from hyperadapters.heads.task_heads import Head, target_scale
from hyperadapters.heads.thresholds import fit_thresholds
from hyperadapters.model.model import HyperAdapterModel

MARGIN = 2.0
"""Gain in the log-likelihood of the left-out examples, in nats, up to which one choice is not clearly better than the
other, and loss up to which the adapter of a related task keeps its full effect."""
STANDARD_ERRORS = 2.0
"""Number of standard errors of that gain up to which one choice is not clearly better than the other."""


@torch.no_grad()
def fit_head(
    model: HyperAdapterModel,
    data: FitExamples,
    start: Start,
    num_examples: int,
    related: Head | None = None,
    is_own: bool = False,
    seed: int = 0,
) -> Fitted:
    """Fit the head of a task, and choose the effect of the initial adapter, without changing the model.

    Args:
        model: Model in evaluation mode, with `head_inputs` "adapted_texts".
        data: Rows of the task: examples, followed by rows that are never left out, such as the names of labels.
        start: Prototype and adapter to start from.
        num_examples: Number of examples.
        related: Mean head of known tasks with the same labels, in the order of this task. Default: there are none.
        is_own: If True, the initial adapter is that of the task itself. It keeps its effect unless the frozen features
            are clearly better. Default: False.
        seed: Seed of the choice of left-out examples.

    Returns:
        The head, the prototype, and the scale of the adapter; or the scaled adapter, if the initial one is not that of
        the prototype.

    Raises:
        NotFiniteError: If the input of the head is not finite for an example.
    """
    adapter = initial_adapter(model, start)
    inputs = data.all_head_inputs(adapter.scaled(0.0))
    frozen, name_weight, of_frozen = choose_name_weight(
        TaskRows(data.task, inputs, data.targets, scales=pair_scales(data.task, inputs)), num_examples, seed
    )

    def with_effect(scale: float) -> tuple[TaskRows, LeftOutFits]:
        rows = frozen._replace(inputs=data.all_head_inputs(adapter.scaled(scale)))
        return rows, left_out_fits(rows, num_examples, related, seed)

    adapted, left_out = with_effect(1.0)
    scale = _choose_effect(_gains(of_frozen, left_out), start.is_related, is_own)
    if scale == DAMPING:
        adapted, left_out = with_effect(DAMPING)
    head = fit_new_head(adapted, related) if scale else fit_new_head(frozen)
    head = _calibrated(model, data.task, head, left_out if scale else of_frozen)
    own = start.adapter.scaled(scale).detach() if start.adapter is not None and scale else None
    has_names = num_examples < len(data)
    return Fitted(start.prototype.detach(), own, head, None, 0, "none", scale, name_weight if has_names else None)


LeftOutFits = Sequence[tuple[Head, TaskRows]]
"""Heads, each with the examples that were left out of its fit."""


def _choose_effect(gains: Tensor, is_related: bool, is_own: bool) -> float:
    """Choose the effect of an adapter by the gains [N] in the log-likelihood of left-out examples.

    Args:
        gains: Result of `_gains`.
        is_related: Whether the adapter is that of a known task with the same labels.
        is_own: Whether the adapter is that of the task itself.

    Returns:
        1, `DAMPING` or 0.
    """
    if is_own:
        return 0.0 if _is_clear(-gains) else 1.0
    gain = float(gains.sum())
    if is_related:
        return 1.0 if gain >= -MARGIN else 0.0 if _is_clear(-gains) else DAMPING
    return 1.0 if _is_clear(gains) else DAMPING if gain > 0 else 0.0


def _gains(frozen: LeftOutFits, adapted: LeftOutFits) -> Tensor:
    """Compute by how much the adapted features raise the log-likelihood of each left-out example, in nats.

    The likelihood is that of the best temperature for either kind of features; see `left_out_losses`.

    The numbers of a regression task are assumed to be normally distributed around the predictions, with the same
    variance for both kinds of features.
    """
    if not frozen:
        return torch.zeros(1)
    of_frozen, of_adapted = map(left_out_losses, (frozen, adapted))
    gains = of_frozen - of_adapted
    if frozen[0][1].task.labels:
        return gains
    variance = target_scale([target for _, rows in frozen for target in rows.targets])[1] ** 2
    return gains / (of_frozen + of_adapted).mean().clamp(min=MIN_VARIANCE * variance)


def _calibrated(model: HyperAdapterModel, task: Task, head: Head, left_out: LeftOutFits) -> Head:
    """Fit the temperature of a head, and the thresholds of a multi-label task, to left-out examples.

    See `heads.calibration.fit_temperature` and `heads.thresholds.fit_thresholds`.
    """
    assert model.heads is not None
    if not task.labels:
        return head
    parts = [LabelledLogits(F.linear(rows.inputs, fit.weight, fit.bias), rows.labels) for fit, rows in left_out]
    rows = LabelledLogits(*map(torch.cat, zip(*parts, strict=True))) if parts else no_rows(task)
    known = zip(model.tasks, model.heads.temperature.tolist(), strict=True)
    others = [value for other, value in known if other.kind == task.kind and other.name != task.name]
    temperature = fit_temperature(rows, others)
    limits = fit_thresholds(task, (rows.logits / temperature).sigmoid(), rows.labels) if task.is_multi_label else None
    return head._replace(temperature=temperature, thresholds=limits)


def _is_clear(gains: Tensor) -> bool:
    """Return whether the sum of the gains [N] of left-out examples is clearly positive."""
    standard_error = float(gains.std(correction=0)) * len(gains) ** 0.5
    return float(gains.sum()) > max(MARGIN, STANDARD_ERRORS * standard_error)
