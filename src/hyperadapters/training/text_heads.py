"""Fitting of heads that read features of the texts, the last step of training (`head_inputs` other than "adapted").

Heads that read adapted texts (`head_inputs` "adapted_texts") are trained together with the adapters. Afterwards, they
are replaced by regularised regressions on the adapted features of all training rows, where tasks with the same labels
learn from each other (see `heads.trained_heads.fit_related_heads`). A head that is trained by gradient descent on few
rows fits them exactly; the regression generalises better. The outputs of the adapters of each task are multiplied by
the one of `ADAPTER_FACTORS` with which its validation rows are predicted best (see `choose_heads`); a task that is
predicted better without adapters loses them.

The other heads also read frozen text features (`head_inputs` "text_features" or "pair_features"). While the adapters
are trained, these heads read the adapted hidden states only. Afterwards, a regularised regression is fitted for each
task to the frozen features of its training rows (see `heads.trained_heads.fit_feature_head`). The logits of the task
are then a weighted sum of the logits of the regression and of the trained head. Their weights, called shares, are
chosen on the validation rows: with few rows the regression is usually better, and with many rows the adapted hidden
states improve on it. The sum is stored as one linear head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadapters.backbones.passes import evaluating
from hyperadapters.config import DataConfig, Task
from hyperadapters.data.examples import Example, by_task, label_examples
from hyperadapters.data.loading import subset
from hyperadapters.data.memory import read_train_and_eval_data
from hyperadapters.data.stored_rows import joined
from hyperadapters.errors import TaskError, check_int
from hyperadapters.heads.regression import (
    TEMPERATURES,
    LabelCost,
    Products,
    TaskRows,
    head_losses,
    label_cost,
    label_tensor,
    minimize,
    pair_scales,
)
from hyperadapters.heads.task_heads import Head, TaskHeads, scaled_features
from hyperadapters.heads.trained_heads import fit_feature_head, fit_related_heads, related_tasks
from hyperadapters.inference.batches import batches_by_length, device_of, to_device
from hyperadapters.inference.finite import check_answers
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.calibration import calibrate_heads

PRIOR = (1.0, 0.0)
"""Shares of the regression and of the trained head towards which the fitted shares are regularised. A head that was
trained on few rows is overconfident, so its prior share is zero."""
PRIOR_STRENGTH = 4.0
"""Strength of that regularisation: half of it times the squared distance from the prior is the penalty, in nats."""
HEAD_ROWS = 200_000
"""Number of training rows, and of validation rows, of all tasks whose features are computed; of a task with more than
its share there are at least two rows of each label. All features are in memory at the same time, and more rows hardly
change a linear model."""
ADAPTER_FACTORS = (1.0, 0.5, 0.0)
"""Candidates for the factor of the outputs of a task's adapters, where heads read adapted texts. The features of few
rows are overfitted by the adapters that were trained on them, and those of adapters between the trained ones and none
at all are often better than both (Wortsman et al., CVPR 2022). Of several equally good ones the first is chosen."""
SHARES_UNCHECKED = (1.0, 0.5)
"""Shares of the regression and of the trained head for a task without validation rows."""


@dataclass(frozen=True)
class HeadRows:
    """Rows to fit heads to.

    Attributes:
        examples: N examples with task ids and targets.
        features: Features of the rows [N, F]: the adapted ones of `HyperAdapterModel.head_inputs` if the heads read
            adapted texts, otherwise the frozen ones of `HyperAdapterModel.head_features`.
        logits: Logits of each row from the trained model, of shape [C] or longer if other tasks have more labels.
            They are empty for rows that only the regressions are fitted to.
    """

    examples: Sequence[Example]
    features: Tensor
    logits: Sequence[Tensor] = ()

    def by_task(self, num_tasks: int) -> list[HeadRows]:
        """Group the rows by task.

        Args:
            num_tasks: Number of tasks of the model.

        Returns:
            The rows of each task, in the order of the task ids.
        """
        rows_of: list[list[int]] = [[] for _ in range(num_tasks)]
        for row, example in enumerate(self.examples):
            assert example.task_id is not None
            rows_of[example.task_id].append(row)
        return [self._subset(rows) for rows in rows_of]

    def _subset(self, rows: Sequence[int]) -> HeadRows:
        logits = [self.logits[row] for row in rows] if self.logits else ()
        return HeadRows([self.examples[row] for row in rows], self.features[list(rows)], logits)

    @property
    def targets(self) -> list[Any]:
        """Target of each row, of length N."""
        return [example.target for example in self.examples]

    def inputs(self, hidden_size: int) -> Tensor:
        """Stack the features of the rows, scaled as wide heads read them.

        Args:
            hidden_size: Hidden size d of the backbone.

        Returns:
            Features of shape [N, F] in float32.
        """
        return scaled_features(self.features, hidden_size)


def fit_text_heads(
    model: HyperAdapterModel, train: Sequence[Example], validation: Sequence[Example], batch_size: int = 64
) -> None:
    """Fit the heads of a trained model to the features of the texts.

    Args:
        model: Trained model with `head_inputs` other than "adapted". Its heads are replaced.
        train: Training examples of all tasks, with task ids and targets.
        validation: Validation examples, with task ids and targets. A task without any gets `SHARES_UNCHECKED`, or keeps
            its adapters as they are if the heads read adapted texts; see `choose_heads`.
        batch_size: Number of examples in a forward pass.

    Raises:
        DataError: If a label of a task has no training example.
        NotFiniteError: If the features of an example are not finite.
        ValueError: If the heads of the model read frozen features and have been fitted already, so that the logits of
            the trained heads can no longer be separated from those of the regressions.
    """
    assert model.heads is not None
    rows, validation = regression_examples(model, train), _at_most(HEAD_ROWS, validation, model.tasks)
    if model.adapter_config.separates_texts:
        _set_adapted_heads(model, rows, validation, batch_size)
        return
    check_not_fitted(model.heads)
    checked = _head_rows(model, validation, batch_size, with_logits=True)
    set_text_heads(model, _head_rows(model, rows, batch_size, with_logits=False), checked)


def fit_heads(
    model: HyperAdapterModel,
    train_data: Mapping[str, Any],
    eval_data: Mapping[str, Any] | None = None,
    batch_size: int = 64,
) -> None:
    """Fit the heads of a trained model to the features of texts in memory, and calibrate them on the validation data.

    Args:
        model: Trained model. Its heads are replaced.
        train_data: Training data of all tasks, in any form that `Trainer` accepts.
        eval_data: Validation data of some or all tasks, in the same forms. A task without any gets `SHARES_UNCHECKED`,
            or keeps its adapters as they are if the heads read adapted texts; see `choose_heads`.
        batch_size: Number of rows in a forward pass. Default: 64.

    Raises:
        DataError: If a row is invalid or a label of a task has no training row. The message names the task and the row.
        TaskError: If the heads of the model do not read features of the texts, or a task is unknown.
        NotFiniteError: If the features of a row are not finite.
        ValueError: If the heads of the model read frozen features and have been fitted already.
    """
    check_int("batch_size", batch_size, 1)
    if model.heads is None or model.adapter_config.head_inputs == "adapted":
        raise TaskError(
            "expected a model whose heads read features of the texts, as with the preset 'plus'; all parameters of "
            "this model are trained together with the adapters, so no heads need to be fitted"
        )
    train, validation = read_train_and_eval_data(model.tasks, train_data, eval_data)
    model.task_table.reset_calibration()
    fit_text_heads(model, train, validation, batch_size)
    calibrate_heads(model, validation, batch_size)


def check_not_fitted(heads: TaskHeads) -> None:
    """Check that the heads of a model have not been fitted to frozen features yet.

    Args:
        heads: Heads of the model.

    Raises:
        ValueError: If they have been fitted.
    """
    if heads.reads_features:
        raise ValueError(
            "expected heads that have been trained on the adapted hidden states only; these heads have been fitted to "
            "text features already and cannot be fitted again: train a new model"
        )


def regression_examples(model: HyperAdapterModel, train: Sequence[Example]) -> list[Example]:
    """List the examples that the regressions are fitted to.

    Args:
        model: Model whose `label_names` setting says whether the names of labels are examples, too.
        train: Training examples of all tasks.

    Returns:
        The training examples, of which up to `HEAD_ROWS` are taken, followed by one example for the name of each label
        if the setting is True.
    """
    rows = _at_most(HEAD_ROWS, train, model.tasks)
    return [*rows, *label_examples(model.tasks)] if model.adapter_config.label_names else list(rows)


def _at_most(count: int, examples: Sequence[Example], tasks: Sequence[Task]) -> Sequence[Example]:
    """Return a number of examples; only tasks with many examples lose some of them, at random and of each label."""
    if len(examples) <= count:
        return examples
    rows_of = by_task(examples, len(tasks))
    remaining, limit = count, 0
    for number, size in enumerate(sorted(map(len, rows_of))):
        limit = remaining // (len(rows_of) - number)
        if size > limit:
            break
        remaining -= size
    settings = DataConfig(n_train=max(1, limit))
    return joined(subset(rows, task, settings, seed=0) for task, rows in zip(tasks, rows_of, strict=True))


@torch.no_grad()
def _adapted_rows(model: HyperAdapterModel, examples: Sequence[Example], batch_size: int) -> HeadRows:
    """Compute the adapted features of examples, each with the adapters of its task."""
    features = torch.empty(0)
    with model.lock, evaluating(model):
        for rows in batches_by_length(examples, batch_size, separates_texts=True):
            inputs = to_device(model.collator.inputs([examples[row] for row in rows]), device_of(model))
            found = model.head_inputs(
                inputs, torch.tensor([examples[row].task_id for row in rows], device=model.device)
            )
            numbers, what = [row + 1 for row in rows], "the output of the adapted backbone"
            check_answers(model, found.isfinite().all(dim=1), [examples[row] for row in rows], numbers, what)
            features = _with_rows(features, found, rows, len(examples))
    return HeadRows(examples, features)


def _with_rows(features: Tensor, found: Tensor, rows: Sequence[int], count: int) -> Tensor:
    """Set some rows of features [N, F] on the CPU, which are made with the first of them."""
    if not len(features):
        features = torch.empty(count, found.shape[1], dtype=found.dtype)
    features[list(rows)] = found.cpu()
    return features


@torch.no_grad()
def _set_adapted_heads(
    model: HyperAdapterModel, train: Sequence[Example], validation: Sequence[Example], batch_size: int
) -> None:
    """Fit heads to adapted features, and choose the factor of the outputs of each task's adapters."""
    candidates = []
    if validation and model.method.can_change_tasks:
        scales = model.pha.adapter_scales
        trained = scales.clone()
        try:
            for factor in ADAPTER_FACTORS:
                scales.copy_(factor * trained)
                candidates.append(_fitted_heads(model, train, validation, batch_size, frozen=factor == 0))
        finally:
            scales.copy_(trained)
        chosen = choose_heads(model.tasks, candidates)
        scales.mul_(scales.new_tensor([ADAPTER_FACTORS[index] for index in chosen]))
    else:
        candidates.append(_fitted_heads(model, train, validation, batch_size))
        chosen = [0] * len(model.tasks)
    heads = [candidates[index].heads[task_id] for task_id, index in enumerate(chosen)]
    model.task_table.set_heads([head.rounded() for head in heads])


def _fitted_heads(
    model: HyperAdapterModel,
    train: Sequence[Example],
    validation: Sequence[Example],
    batch_size: int,
    frozen: bool = False,
) -> FittedHeads:
    """Fit heads to the features of the model as it is, with the present factors of its adapters."""
    computed = _adapted_rows(model, train, batch_size), _adapted_rows(model, validation, batch_size)
    return FittedHeads.fit(model.tasks, *computed, frozen)


@dataclass(frozen=True)
class FittedHeads:
    """Heads that were fitted to training rows, and how well they predict validation rows.

    Attributes:
        heads: Heads of the T tasks.
        losses: Losses [K, N] of the N validation rows of each task, for each of the K `TEMPERATURES`.
    """

    heads: list[Head]
    losses: list[Tensor]

    @classmethod
    def fit(cls, tasks: Sequence[Task], train: HeadRows, validation: HeadRows, frozen: bool = False) -> FittedHeads:
        """Fit heads, where related tasks learn from each other (see `heads.trained_heads.fit_related_heads`).

        Args:
            tasks: Tasks of the model.
            train: Rows to fit the heads to.
            validation: Rows to compute the losses of; there may be none.
            frozen: Whether the features are those of the frozen backbone. Default: False.

        Returns:
            The heads and their losses.

        Raises:
            DataError: If a label of a task has no row.
        """
        heads = fit_related_heads(task_rows(tasks, train), frozen)
        return cls(heads, _losses_by_task(tasks, heads, validation))


def choose_heads(tasks: Sequence[Task], candidates: Sequence[FittedHeads]) -> list[int]:
    """Choose for each task the heads that predict its validation rows best.

    Adapters that were trained together help related tasks and may harm others. The heads are chosen by the likelihood
    of the validation rows, together for all tasks that learn from each other (see `heads.trained_heads.related_tasks`).
    Heads of adapted features are too confident, because the adapters have seen the labels of the training rows. The
    likelihood is therefore that of the best temperature. A few dozen rows say little, so the gain of a candidate over
    the one that is best in the mean of all groups of tasks is estimated by empirical Bayes: it is shrunk towards its
    mean over all groups, the more the less certain it is and the less the groups differ.

    Args:
        tasks: Tasks of the model.
        candidates: Heads of all tasks that read different features, such as those of adapters and of the frozen
            backbone. Of several equally good ones the first is chosen.

    Returns:
        Index of the chosen candidate for each task. It is 0 for a task without validation rows, unless a task that it
        learns from has some.
    """
    chosen = [0] * len(tasks)
    has_rows = [of_task.numel() > 0 for of_task in candidates[0].losses]
    groups = [group for group in related_tasks(tasks) if any(has_rows[task_id] for task_id in group)]
    if not groups:
        return chosen
    losses = [_losses_of_group(tasks, candidates, group) for group in groups]
    best = int(torch.stack([of_group.mean(dim=1) for of_group in losses]).mean(dim=0).argmin())
    gains = [
        _shrunken_means([of_group[best] - of_group[index] for of_group in losses]) for index in range(len(candidates))
    ]
    for group, index in zip(groups, torch.tensor(gains).argmax(dim=0).tolist(), strict=True):
        for task_id in group:
            chosen[task_id] = index
    return chosen


def _losses_of_group(tasks: Sequence[Task], candidates: Sequence[FittedHeads], group: Sequence[int]) -> Tensor:
    """Compute the loss [K, N] of each validation row of related tasks with each of K candidates, in nats.

    The heads have the temperature with the smallest loss. The errors of a regression task are assumed to be normally
    distributed with the same variance for all candidates.
    """
    losses = torch.stack([_best(torch.cat([of.losses[task_id] for task_id in group], dim=1)) for of in candidates])
    if tasks[group[0]].kind == "regression":
        return losses / (2 * losses.mean().clamp(min=1e-12))
    return losses


def _best(losses: Tensor) -> Tensor:
    """Return the losses [N] at the temperature with the smallest sum, of losses [K, N]."""
    return losses[int(losses.sum(dim=1).argmin())]


def _shrunken_means(samples: Sequence[Tensor]) -> list[float]:
    """Estimate the means of samples by empirical Bayes, with the variance between samples by the method of moments."""
    means = torch.stack([sample.mean() for sample in samples]) if samples else torch.empty(0)
    if len(samples) < 2:
        return means.tolist()
    errors = torch.stack([sample.var(correction=0) / (len(sample) - 1) for sample in samples])
    errors = errors.where(errors.isfinite(), errors.nan_to_num().max())  # nothing is known of a single row
    between = (means.var() - errors.mean()).clamp(min=0)
    share = (between / (between + errors)).nan_to_num()
    return (share * means + (1 - share) * means.mean()).tolist()


def _losses_by_task(tasks: Sequence[Task], heads: Sequence[Head], rows: HeadRows) -> list[Tensor]:
    """Compute the losses [K, N] of the rows of each task, for each of `TEMPERATURES`."""
    found = []
    for task, head, own in zip(tasks, heads, rows.by_task(len(tasks)), strict=True):
        of_task = TaskRows(task, own.features.float(), own.targets)
        losses = [head_losses(head, of_task, one) for one in TEMPERATURES] if own.examples else []
        found.append(torch.stack(losses) if losses else torch.empty(len(TEMPERATURES), 0))
    return found


def task_rows(tasks: Sequence[Task], rows: HeadRows) -> list[TaskRows]:
    """Group rows by task, as `heads.trained_heads.fit_related_heads` reads them.

    Args:
        tasks: Tasks of the model.
        rows: Rows of all tasks, with the features that their heads read.

    Returns:
        The rows of each task, in the order of the tasks.
    """
    return [
        TaskRows(task, own.features.float(), own.targets, scales=pair_scales(task, own.features))
        for task, own in zip(tasks, rows.by_task(len(tasks)), strict=True)
    ]


@torch.no_grad()
def _head_rows(model: HyperAdapterModel, examples: Sequence[Example], batch_size: int, with_logits: bool) -> HeadRows:
    """Compute the frozen features of examples, and the logits of the trained heads if `with_logits` is True."""
    features, logits = torch.empty(0), [torch.empty(0)] * len(examples)
    with model.lock, evaluating(model):
        for rows in batches_by_length(examples, batch_size):
            inputs = to_device(model.collator.inputs([examples[row] for row in rows]), device_of(model))
            is_pair = [examples[row].text_pair is not None for row in rows]
            found = model.head_features(inputs, torch.empty(0), is_pair)
            numbers = [row + 1 for row in rows]
            what = "the output of the frozen backbone"
            check_answers(model, found.isfinite().all(dim=1), [examples[row] for row in rows], numbers, what)
            features = _with_rows(features, found, rows, len(examples))
            if with_logits:
                task_ids = torch.tensor([examples[row].task_id for row in rows], device=found.device)
                output = model(**inputs, task_ids=task_ids)
                for row, of_row in zip(rows, output.logits.cpu(), strict=True):
                    logits[row] = of_row
    return HeadRows(examples, features, logits if with_logits else ())


@torch.no_grad()
def set_text_heads(model: HyperAdapterModel, train: HeadRows, validation: HeadRows) -> None:
    """Fit the heads of a trained model to frozen text features that have been computed already.

    Args:
        model: Trained model with `head_inputs` other than "adapted". Its heads are replaced.
        train: Rows of all tasks to fit the regressions to.
        validation: Rows to choose the shares on, with the logits of heads that do not read the features yet.

    Raises:
        DataError: If a label of a task has no row in `train`.
    """
    assert model.heads is not None
    hidden_size, num_tasks = model.heads.hidden_size, len(model.tasks)
    made = []
    for task, trained, fitted_to, rows in zip(
        model.tasks, model.heads.unpack(), train.by_task(num_tasks), validation.by_task(num_tasks), strict=True
    ):
        inputs = fitted_to.inputs(hidden_size).numpy()
        regression = fit_feature_head(task, inputs, fitted_to.targets, trained.target_mean, trained.target_std)
        if not (trained.weight.isfinite().all() and trained.bias.isfinite().all()):
            shares = PRIOR
        else:
            shares = _shares(task, rows, regression, trained, hidden_size) if rows.targets else SHARES_UNCHECKED
        made.append(_combined(regression, trained, shares))
    model.task_table.set_heads(made)


_CostOfShares = Callable[[Tensor], tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]
"""Returns the cost of shares [2], its derivatives [2], and a function that multiplies its second derivatives."""


def _shares(task: Task, rows: HeadRows, regression: Head, trained: Head, hidden_size: int) -> tuple[float, float]:
    """Choose the shares of the regression's and the trained head's logits by regularised maximum likelihood.

    The shares are constrained to be non-negative, and the share of a trained head that diverged is zero. The targets of
    a regression task are assumed to be normally distributed, with the variance of the regression's residuals.

    Args:
        task: Task of the rows.
        rows: N validation rows of the task, with logits.
        regression: Head of the features, with a weight of shape [C, F].
        trained: Head that was trained together with the adapters.
        hidden_size: Hidden size d of the backbone.

    Returns:
        The shares of the regression and of the trained head.
    """
    first = F.linear(rows.inputs(hidden_size), regression.weight, regression.bias)
    second = torch.stack([logits[: len(trained.bias)] for logits in rows.logits])
    if not second.isfinite().all():
        return PRIOR
    first, second = first.double(), second.double()
    if task.kind != "regression":
        labels = label_tensor(task, rows.targets)
    else:
        targets = torch.tensor(rows.targets)
        second = (second - trained.target_mean) / trained.target_std
        targets = (targets - trained.target_mean) / trained.target_std
        variance = float((first[:, 0] - targets).square().mean().clamp(min=1e-6))

    def of_shares(of_logits: Tensor) -> Tensor:
        return torch.stack([(of_logits * first).sum(), (of_logits * second).sum()])

    def cost(shares: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        logits = shares[0] * first + shares[1] * second
        if task.kind == "regression":
            errors = logits - targets[:, None]
            loss, of_logits = errors.square().sum() / (2 * variance), errors / variance
            of_rows = LabelCost(loss, of_logits, lambda change: change / variance)
        else:
            of_rows = label_cost(logits, labels)

        def products(change: Tensor) -> Tensor:
            return of_shares(of_rows.products(change[0] * first + change[1] * second))

        return of_rows.loss, of_shares(of_rows.of_logits), products

    found = _best_shares(cost, torch.ones(2))
    if (found < 0).any():  # The cost is convex: if a share is negative, its best non-negative value is zero.
        found = _best_shares(cost, (found >= 0).float())
    if not found.isfinite().all():
        return PRIOR
    first_share, second_share = found.clamp(min=0).tolist()
    return first_share, second_share


def _best_shares(cost: _CostOfShares, free: Tensor) -> Tensor:
    """Minimise the cost of the shares plus the penalty on their distance from `PRIOR`.

    Args:
        cost: Cost of the shares without the penalty.
        free: 1 for each share that may vary, 0 for one that is fixed at zero, of shape [2].

    Returns:
        The best shares, of shape [2].
    """
    prior = torch.tensor(PRIOR)

    def penalized(shares: Tensor) -> tuple[Tensor, list[Tensor], Products]:
        loss, of_shares, products = cost(free * shares)
        distance = free * (shares - prior)
        loss = loss + PRIOR_STRENGTH / 2 * distance.square().sum()
        return (
            loss,
            [free * of_shares + PRIOR_STRENGTH * distance],
            lambda change: [free * products(free * change) + PRIOR_STRENGTH * free * change],
        )

    return free * minimize(penalized, [prior])[0]


def _combined(regression: Head, trained: Head, shares: tuple[float, float]) -> Head:
    """Make the wide head whose logits are the sum of both heads' logits, each multiplied by its share."""
    features_size = regression.weight.shape[1]
    adapted, bias = trained.weight.cpu()[:, features_size:], trained.bias.cpu()
    if not shares[1]:  # Zero times infinity or nan would be nan.
        adapted, bias = torch.zeros_like(adapted), torch.zeros_like(bias)
    weight = torch.cat([shares[0] * regression.weight, shares[1] * adapted], dim=1)
    bias = shares[0] * regression.bias + shares[1] * bias
    return trained._replace(weight=weight, bias=bias).rounded()
