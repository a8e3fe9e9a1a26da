"""The weight of the names or descriptions of labels beside the examples of a new task."""

from __future__ import annotations

from typing import NamedTuple

from hyperadapters.heads.new_heads import FEW_SHOT_MANY_LOGITS, left_out_fits, left_out_losses
from hyperadapters.heads.regression import TEMPERATURES, TaskRows
from hyperadapters.heads.task_heads import Head

NAME_WEIGHTS = (10.0, 3.0, 1.0, 0.0)
"""Candidates for the weight of a name, where an example has the weight 1. The first is taken if there is no choice."""

NAME_TEMPERATURES = tuple(temperature for temperature in TEMPERATURES if temperature <= 1)
"""Temperatures at which the weights are compared. Heads of few examples are not confident enough, and heavy names make
them more confident, whether or not they help. Higher temperatures would forgive names that mislead: at the highest, all
weights are about equal."""


class WeightedRows(NamedTuple):
    """Rows of a task with a weight of the names of its labels.

    Attributes:
        rows: Rows with weights: 1 for examples, and `name_weight` for names.
        name_weight: Weight of the names.
        left_out: Heads that were fitted without some of the examples, each with these examples.
    """

    rows: TaskRows
    name_weight: float
    left_out: list[tuple[Head, TaskRows]]

    @property
    def loss(self) -> float:
        """Sum of the losses of the left-out examples, at the best of `NAME_TEMPERATURES`."""
        return float(left_out_losses(self.left_out, NAME_TEMPERATURES).sum()) if self.left_out else 0.0


def choose_name_weight(rows: TaskRows, num_examples: int, seed: int = 0) -> WeightedRows:
    """Choose the weight of the names of labels with the highest likelihood of left-out examples.

    The likelihood is that of the best of `NAME_TEMPERATURES`.

    There is no choice without examples, if a label has no example, or with more than `FEW_SHOT_MANY_LOGITS` rows times
    labels.

    Args:
        rows: Rows of the task, of which the first are examples, and the others names or descriptions of labels.
        num_examples: Number of examples.
        seed: Seed of the choice of left-out examples.

    Returns:
        The rows with their weights, and the fits without left-out examples.
    """
    size, num_labels = len(rows.targets), len(rows.task.labels)
    is_complete = rows.task.kind != "classification" or len(set(rows.targets[:num_examples])) == num_labels
    has_choice = 0 < num_examples < size and is_complete and size * num_labels <= FEW_SHOT_MANY_LOGITS
    candidates = []
    for weight in NAME_WEIGHTS if has_choice else NAME_WEIGHTS[:1]:
        weights = rows.inputs.new_full((size,), weight)
        weights[:num_examples] = 1
        weighted = rows._replace(weights=weights)
        candidates.append(WeightedRows(weighted, weight, left_out_fits(weighted, num_examples, seed=seed)))
    return min(candidates, key=lambda found: found.loss)
