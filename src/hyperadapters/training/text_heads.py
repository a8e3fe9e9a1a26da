"""Heads of a trained model that also read the texts as the frozen backbone sees them (`model.head_inputs`).

While the adapters are trained, heads read the adapted hidden states alone. Then, for each task, a regularised
regression is fitted to the frozen features of the training rows, and the validation rows say how much of each goes
into the answer. With few rows the regression carries the task, with many rows the adapters add to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeCV
from torch import Tensor

from hyperadapters.backbones.passes import evaluating
from hyperadapters.config import Task
from hyperadapters.data.examples import Example, label_examples
from hyperadapters.data.memory import read_train_and_eval_data
from hyperadapters.errors import DataError, TaskError, check_int
from hyperadapters.heads.task_heads import Head, TaskHeads, scaled_features
from hyperadapters.inference.batches import batches_by_length, device_of, to_device
from hyperadapters.inference.finite import check_answers
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.probes import logistic_regression

RIDGE_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
PRIOR = (1.0, 0.0)
"""Shares of the regression's logits and of the trained head's, from which the validation rows have to argue away: a
head that was trained on few rows is too sure of itself."""
PRIOR_STRENGTH = 4.0
"""Half of it is what a distance of 1 from the prior costs, in nats."""
SHARES_UNCHECKED = (1.0, 0.5)
"""Shares for a task without validation rows."""


@dataclass(frozen=True)
class HeadRows:
    """Rows to fit heads to.

    Attributes:
        examples: with task and target [N].
        features: of each, result of `HyperAdapterModel.head_features` [F].
        logits: of each, by the trained model, at least as many as its task has; none for rows that only the
            regressions are fitted to.
    """

    examples: Sequence[Example]
    features: Sequence[Tensor]
    logits: Sequence[Tensor] = ()

    def by_task(self, num_tasks: int) -> list[HeadRows]:
        """The rows of each task, by task id."""
        rows_of: list[list[int]] = [[] for _ in range(num_tasks)]
        for row, example in enumerate(self.examples):
            assert example.task_id is not None
            rows_of[example.task_id].append(row)
        return [self._chosen(rows) for rows in rows_of]

    def _chosen(self, rows: Sequence[int]) -> HeadRows:
        logits = [self.logits[row] for row in rows] if self.logits else ()
        return HeadRows([self.examples[row] for row in rows], [self.features[row] for row in rows], logits)

    @property
    def targets(self) -> list[float]:
        """Index of the label or number of each row."""
        return [float(example.target or 0) for example in self.examples]


def fit_text_heads(
    model: HyperAdapterModel, train: Sequence[Example], validation: Sequence[Example], batch_size: int = 64
) -> None:
    """Fit the heads of a trained model to what its frozen backbone makes of the texts.

    Args:
        model: with `head_inputs` other than "adapted"; its heads are replaced.
        train, validation: examples of all its tasks. A task without validation examples gets `SHARES_UNCHECKED`.
        batch_size: of the passes that make the features.

    Raises:
        DataError: a label of a task has no training example.
        NotFiniteError: the features of an example are not finite.
        ValueError: the heads have been fitted already; what they had learned before is no longer apart.
    """
    assert model.heads is not None
    check_not_fitted(model.heads)
    checked = _head_rows(model, validation, batch_size, with_logits=True)
    rows = regression_examples(model, train)
    set_text_heads(model, _head_rows(model, rows, batch_size, with_logits=False), checked)


def fit_heads(
    model: HyperAdapterModel,
    train_data: Mapping[str, Any],
    eval_data: Mapping[str, Any] | None = None,
    batch_size: int = 64,
) -> None:
    """As `fit_text_heads`, with data as a `Trainer` takes them; see `HyperAdapterModel.fit_heads`."""
    check_int("batch_size", batch_size, 1)
    if model.heads is None or model.adapter_config.head_inputs == "adapted":
        raise TaskError(
            "this model has no heads that read frozen features, which those of the preset 'plus' do; what it has is "
            "trained with the adapters, and there is nothing to fit"
        )
    fit_text_heads(model, *read_train_and_eval_data(model.tasks, train_data, eval_data), batch_size)


def check_not_fitted(heads: TaskHeads) -> None:
    """Raise ValueError if the heads of a model have been fitted to frozen features already."""
    if heads.reads_features:
        raise ValueError("heads that read the texts already cannot be fitted again; train a new model")


def regression_examples(model: HyperAdapterModel, train: Sequence[Example]) -> list[Example]:
    """What the regressions are fitted to: training examples, and names of labels if the model takes them for some."""
    return [*train, *label_examples(model.tasks)] if model.adapter_config.label_names else list(train)


@torch.no_grad()
def _head_rows(model: HyperAdapterModel, examples: Sequence[Example], batch_size: int, with_logits: bool) -> HeadRows:
    features = [torch.empty(0)] * len(examples)
    logits = list(features)
    with model.lock, evaluating(model):
        for rows in batches_by_length(examples, batch_size):
            inputs = to_device(model.collator.inputs([examples[row] for row in rows]), device_of(model))
            is_pair = [examples[row].text_pair is not None for row in rows]
            found = model.head_features(inputs, torch.empty(0), is_pair)
            numbers = [row + 1 for row in rows]
            what = "what the frozen backbone computes"
            check_answers(model, found.isfinite().all(dim=1), [examples[row] for row in rows], numbers, what)
            for row, of_row in zip(rows, found.cpu(), strict=True):
                features[row] = of_row
            if with_logits:
                task_ids = torch.tensor([examples[row].task_id for row in rows], device=found.device)
                output = model(**inputs, task_ids=task_ids)
                for row, of_row in zip(rows, output.logits.cpu(), strict=True):
                    logits[row] = of_row
    return HeadRows(examples, features, logits if with_logits else ())


@torch.no_grad()
def set_text_heads(model: HyperAdapterModel, train: HeadRows, validation: HeadRows) -> None:
    """As `fit_text_heads`, for rows whose features are known, and logits of heads that read none of them."""
    assert model.heads is not None
    hidden_size = model.heads.hidden_size
    made = []
    num_tasks = len(model.tasks)
    for task, trained, fitted_to, rows in zip(
        model.tasks, model.heads.unpack(), train.by_task(num_tasks), validation.by_task(num_tasks), strict=True
    ):
        regression = _regression(task, fitted_to, trained, hidden_size)
        if not (trained.weight.isfinite().all() and trained.bias.isfinite().all()):
            shares = PRIOR
        else:
            shares = _shares(task, rows, regression, trained, hidden_size) if rows.targets else SHARES_UNCHECKED
        made.append(_combined(regression, trained, shares))
    model.task_table.set_heads(made)


def _regression(task: Task, rows: HeadRows, trained: Head, hidden_size: int) -> Head:
    """A ridge or logistic regression on features; its strength is chosen on rows that are left out."""
    inputs = scaled_features(torch.stack(list(rows.features)), hidden_size).numpy()
    scale = trained.target_mean, trained.target_std
    if task.kind == "regression":
        if len(rows.targets) < 2:  # one row: its target is all that is known
            return _head(np.zeros((1, inputs.shape[1])), np.zeros(1), *scale)
        ridge = RidgeCV(RIDGE_STRENGTHS).fit(inputs, (np.array(rows.targets) - scale[0]) / scale[1])
        return _head(ridge.coef_[None], np.array([ridge.intercept_]), *scale)
    labels = [int(target) for target in rows.targets]
    if unseen := [label for index, label in enumerate(task.labels) if index not in labels]:
        raise DataError(f"task '{task.name}': no training example of label(s) {', '.join(unseen)}; add one of each")
    found = logistic_regression(inputs, labels)
    weight, bias = found.coef_, found.intercept_
    if len(weight) == 1:  # scikit-learn has one output for two labels
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return _head(weight, bias)


def _head(weight: Any, bias: Any, *scale: float) -> Head:
    return Head(torch.tensor(weight, dtype=torch.float32), torch.tensor(bias, dtype=torch.float32), *scale)


def _shares(task: Task, rows: HeadRows, regression: Head, trained: Head, hidden_size: int) -> tuple[float, float]:
    """How much of the regression's and of the trained logits makes the validation rows most likely, given `PRIOR`.

    Neither is below 0; a trained head that diverged has no share. A regression task's numbers are taken as normally
    distributed, with the spread that the regression leaves.
    """
    inputs = scaled_features(torch.stack(list(rows.features)), hidden_size)
    first = F.linear(inputs, regression.weight, regression.bias)
    second = torch.stack([logits[: len(trained.bias)] for logits in rows.logits]).float()
    targets = torch.tensor(rows.targets)
    if not second.isfinite().all():
        return PRIOR
    if task.kind == "regression":
        second = (second - trained.target_mean) / trained.target_std
        targets = (targets - trained.target_mean) / trained.target_std
        spread = float((first[:, 0] - targets).square().mean().clamp(min=1e-6))

    def cost(shares: Tensor) -> Tensor:
        logits = shares[0] * first + shares[1] * second
        if task.kind == "regression":
            return (logits[:, 0] - targets).square().sum() / (2 * spread)
        return F.cross_entropy(logits, targets.long(), reduction="sum")

    found = _minimum(cost, torch.ones(2))
    if (found < 0).any():  # of a convex cost: where one share is below 0, the best without it is at 0
        found = _minimum(cost, (found >= 0).float())
    if not found.isfinite().all():
        return PRIOR
    first_share, second_share = found.clamp(min=0).tolist()
    return first_share, second_share


def _minimum(cost: Callable[[Tensor], Tensor], free: Tensor) -> Tensor:
    """The shares [2] with the lowest cost, that of their distance from `PRIOR` included; 0 where they are not free."""
    prior = torch.tensor(PRIOR)
    shares = prior.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([shares], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cost(free * shares) + PRIOR_STRENGTH / 2 * (free * (shares - prior)).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return free * shares.detach()


def _combined(regression: Head, trained: Head, shares: tuple[float, float]) -> Head:
    """The wide head whose logits are the sum of both heads', each times its share."""
    features_size = regression.weight.shape[1]
    adapted, bias = trained.weight.cpu()[:, features_size:], trained.bias.cpu()
    if not shares[1]:  # also where it is not finite
        adapted, bias = torch.zeros_like(adapted), torch.zeros_like(bias)
    weight = torch.cat([shares[0] * regression.weight, shares[1] * adapted], dim=1)
    rounded = weight.half().float()  # so that a checkpoint can keep it in half the bytes and lose nothing
    weight = rounded if rounded.isfinite().all() else weight
    bias = shares[0] * regression.bias + shares[1] * bias
    return trained._replace(weight=weight, bias=bias)
