"""The commands calibrate and predict --max-error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Cli, assert_refused, save_run, write_lines

from hyperadapters import HyperAdapterModel, Task

TASKS = [Task.classification("mood", ["no", "yes"]), Task.classification("colour", ["blue", "red"])]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("calibrate"), TASKS)


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    for path in saved.iterdir():
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "run"


def rows_of(task: str, labels: tuple[str, str] | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"task": task, "text": f"w{i} w{3 * i % 17} {task}"} for i in range(40)]
    if labels is None:
        return rows
    return [{**row, "label": labels[i % 2]} for i, row in enumerate(rows)]


def test_calibrate_changes_thresholds_temperatures_and_bounds_of_the_run(cli: Cli, run: Path, tmp_path: Path) -> None:
    before = HyperAdapterModel.from_pretrained(run)
    rows = [*rows_of("mood", ("no", "yes")), *rows_of("colour", None)]
    result = cli("calibrate", run, "--inputs", write_lines(tmp_path / "rows.jsonl", rows))
    assert result.code == 0, result.err
    assert "declined at most" in result.out
    assert "of the rows are declined" in result.out
    after = HyperAdapterModel.from_pretrained(run)
    assert not torch.equal(after.pha.thresholds, before.pha.thresholds)
    assert after.heads.temperature[0] != 1
    assert after.heads.temperature[1] == 1  # its rows have no labels
    assert float(after.heads.error_bounds[0, 1].min()) < 1
    assert torch.equal(after.heads.weight, before.heads.weight)


def test_foreign_inputs_and_one_task_for_all_rows(cli: Cli, run: Path, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", [{"text": row["text"]} for row in rows_of("mood", None)])
    foreign = write_lines(tmp_path / "foreign.jsonl", [{"text": f"zebra w{i}"} for i in range(20)])
    options = ("--task", "mood", "--foreign", foreign, "--false-accept-rate", 0.1)
    result = cli("calibrate", run, "--inputs", rows, *options)
    assert result.code == 0, result.err
    assert "of the foreign inputs are accepted" in result.out


def test_max_error_leaves_out_answers(cli: Cli, run: Path, tmp_path: Path) -> None:
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "w1 w2", "task": "mood"}])
    results = [cli("predict", run, "--input", texts, *more) for more in ((), ("--max-error", 0.2))]
    answered = [json.loads(result.out) for result in results]
    note = "note: --max-error leaves out all answers of mood"
    assert [note in result.err for result in results] == [False, True]
    assert [row["task"] for row in answered] == ["mood", "mood"]
    assert answered[0]["answer"] in ("no", "yes")
    assert answered[1]["answer"] is None
    assert answered[1]["probabilities"] == answered[0]["probabilities"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a"}], (), "expected a task in the column 'task'"),
        ([{"text": "a", "task": "size"}], (), "Unknown task 'size'"),
        ([{"text": "a", "task": "mood", "label": "maybe"}], (), "unknown label 'maybe'"),
        ([{"text": "a", "task": "mood"}], ("--false-decline-rate", 2), "expected a number in [0, 1)"),
        ([{"text": "a", "task": "mood"}], ("--false-accept-rate", 0.1), "expected both or neither"),
        ([], (), "expected at least one row"),
    ],
)
def test_what_cannot_be_calibrated_leaves_the_run_as_it_is(
    cli: Cli, run: Path, tmp_path: Path, rows: list[dict[str, Any]], options: tuple[Any, ...], message: str
) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert_refused(cli("calibrate", run, "--inputs", write_lines(tmp_path / "rows.jsonl", rows), *options), message)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
