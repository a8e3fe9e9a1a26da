"""Definitions of multi-label tasks."""

from __future__ import annotations

import pytest

from hyperadapters.config import Task
from hyperadapters.errors import TaskError


def test_a_multi_label_task_has_any_number_of_labels_and_metrics_of_its_own() -> None:
    task = Task.multi_label("topics", ["sport", "politics"])
    assert (task.kind, task.labels, task.metrics) == ("multi-label", ("sport", "politics"), ("micro_f1",))
    assert task.is_multi_label
    assert Task.multi_label("spam", ["spam"]).labels == ("spam",)
    metrics = ("subset_accuracy", "macro_f1")
    assert Task.multi_label("topics", ["a"], metrics=metrics).metrics == metrics


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metrics": ["accuracy"]}, "unknown metric of a multi-label task 'accuracy'.*subset_accuracy"),
        ({"labels": ["a;b"]}, "must not contain ';', which separates labels in cells; found 'a;b'"),
        ({"verbalizer": {"a": "b"}}, "a verbalizer is only for classification tasks, found kind 'multi-label'"),
        ({"step": 1.0}, "a step is only for regression tasks, found kind 'multi-label'"),
        ({"labels": ["a", "a "]}, "labels must be different from each other"),
    ],
)
def test_what_such_a_task_cannot_have_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(TaskError, match=f"(?i){message}"):
        Task.multi_label("topics", **{"labels": ["a"], **values})  # type: ignore[arg-type]


def test_a_classification_task_with_one_label_is_pointed_to_this_kind() -> None:
    with pytest.raises(TaskError, match="choose the kind multi-label"):
        Task.classification("spam", ["spam"])
