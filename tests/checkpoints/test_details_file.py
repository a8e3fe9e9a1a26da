"""The details of a run, which forget a task when it is removed. Promise 10."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import lived_in
from written_runs import run_values, write_values

from hyperadapters.checkpoints.details_file import DETAILS_FILE, forget_tasks, read_details
from hyperadapters.report.run_report import run_report
from hyperadapters.report.runs import read_run


def test_what_is_kept_of_a_task_is_removed_with_it_and_the_rest_stays(tmp_path: Path) -> None:
    values = run_values()
    run = write_values(tmp_path, values)
    before = read_details(run)
    forget_tasks(run, ["intent", "size", "another"])
    after = read_details(run)
    assert [task.name for task in after.tasks] == ["intent", "size"]
    assert after.tasks == (before.tasks[0], before.tasks[2])
    assert after.prototypes == (before.prototypes[0], before.prototypes[2])
    assert after.confusion == ((0, 0, 10), (1, 1, 11))
    assert [point.text for point in after.points] == [point.text for point in before.points if point.task != 1]
    assert {point.task for point in after.points} == {0, 1}
    assert list(after.validation) == ["intent", "size"]
    assert "mood" not in (run / DETAILS_FILE).read_text()
    charts = {chart.name: chart for chart in run_report(read_run(run)).charts}
    # The scores are those of the training, which had three tasks.
    assert len(charts["scores"].categories) == 4  # type: ignore[union-attr]
    assert charts["routing-confusion"].rows == ("intent", "size")  # type: ignore[union-attr]


def test_details_stay_as_they_are_while_no_task_is_removed_and_broken_ones_go(tmp_path: Path) -> None:
    path = write_values(tmp_path, run_values()) / DETAILS_FILE
    content = path.read_bytes()
    forget_tasks(tmp_path, ["size", "mood", "intent"])
    assert path.read_bytes() == content
    path.write_bytes(content[:-1])
    forget_tasks(tmp_path, ["size", "mood", "intent"])
    assert not path.exists()
    forget_tasks(tmp_path, [])


def test_saving_a_model_without_a_task_removes_it_from_the_details_and_renaming_does_not(tmp_path: Path) -> None:
    model = lived_in("bert")
    names = tuple(task.name for task in model.tasks[:3])
    path = write_values(tmp_path, run_values(names)) / DETAILS_FILE
    model.rename_task(names[0], "renamed")
    model.save_pretrained(tmp_path)
    assert [task["name"] for task in json.loads(path.read_bytes())["tasks"]] == list(names)
    model.remove_task("renamed")
    model.save_pretrained(tmp_path)
    assert [task["name"] for task in json.loads(path.read_bytes())["tasks"]] == list(names[1:])
    assert f"of {names[0]}" not in path.read_text()
