"""Task stores from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import Cli, assert_refused
from helpers import empty_centroids

from hyperadapters import HyperAdapterModel, Task
from hyperadapters.checkpoints.task_store import TaskStore

TASKS = [Task.classification("mood", ["no", "yes"]), Task.classification("colour", ["blue", "red"])]


@pytest.fixture
def run(tmp_path: Path, bert_folder: Path) -> Path:
    model = HyperAdapterModel.from_backbone(str(bert_folder), TASKS, adapter_dim=2, prototype_dim=4, hidden_dim=4)
    with torch.no_grad():
        empty_centroids(model).normal_()
        for parameter in model.method.hypernetwork.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rows = [{"text": "good w1", "task": "mood", "n": 1}, {"text": "red w2"}, {"text": "blue w3", "task": "colour"}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "texts.jsonl"


def test_tasks_of_a_run_are_stored_and_answer_like_those_of_the_run(
    cli: Cli, run: Path, texts: Path, tmp_path: Path
) -> None:
    result = cli("store", run, tmp_path / "store", "--task", "mood")
    assert (result.code, result.out) == (0, f"The task store {tmp_path / 'store'} has 1 task\n")
    assert cli("store", run, tmp_path / "store", "--task", "colour").code == 0
    assert [task.name for task in TaskStore.open(tmp_path / "store")] == ["mood", "colour"]

    assert cli("predict", run, "--input", texts, "--output", tmp_path / "of_run.jsonl").code == 0
    assert cli("remove-task", run, "--name", "mood").code == 0
    result = cli("predict", run, "--input", texts, "--store", tmp_path / "store", "--output", tmp_path / "out.jsonl")
    assert result.code == 0
    found, expected = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("out.jsonl", "of_run.jsonl")
    )
    for row, other in zip(found, expected, strict=True):
        for name in ("text", "task", "routed", "answer"):
            assert row[name] == other[name]
        assert row["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    assert found[0]["n"] == 1
    assert "similarity" not in found[0]
    assert found[1]["candidates"] == pytest.approx(expected[1]["candidates"], abs=1e-5)


def test_what_does_not_fit_is_refused_and_nothing_is_written(cli: Cli, run: Path, texts: Path, tmp_path: Path) -> None:
    assert_refused(cli("store", run, tmp_path / "store", "--task", "mod"), "Unknown task 'mod'", "Did you mean 'mood'?")
    assert not (tmp_path / "store").exists()
    assert cli("store", run, tmp_path / "store").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    assert_refused(cli("store", run, tmp_path / "store"), "there is already a task", "--replace")
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before
    assert cli("store", run, tmp_path / "store", "--replace").code == 0
    assert len(TaskStore.open(tmp_path / "store")) == 2
    assert_refused(cli("copy-store", tmp_path / "none", tmp_path / "copy"), "no task store here")
    assert_refused(cli("copy-store", tmp_path / "store", tmp_path / "store"), "already exists")
    result = cli("copy-store", tmp_path / "store", tmp_path / "copy")
    assert result == (0, f"The task store {tmp_path / 'copy'} has 2 tasks\n", "")
    for name, content in before.items():
        assert len((tmp_path / "copy" / name).read_bytes()) == len(content) or name == "task_store.json"
    assert_refused(
        cli("predict", run, "--input", texts, "--store", tmp_path / "store", "--tasks", "mood"),
        "--store: not valid with --tasks, --route or --engine",
    )
    assert_refused(cli("predict", run, "--input", texts, "--store", tmp_path / "none"), "no task store here")
    assert_refused(
        cli("predict", run, "--input", texts, "--store", tmp_path / "store", "--task", "mod"), "Unknown task 'mod'"
    )
