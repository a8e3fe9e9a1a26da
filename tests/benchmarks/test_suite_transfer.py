"""Transfer inside a suite, on a tiny backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from efficiency import arms
from efficiency.experiment import Cell, Setting, Trained
from efficiency.suite_transfer import TransferRunner, held_out, sources
from efficiency.training_loop import Budget
from helpers import save_backbone

from hyperadapters import Task
from hyperadapters.data.examples import Example, TaskData

LABELS = ("bad", "good")


def _tasks() -> tuple[TaskData, ...]:
    found = []
    for task_id in range(6):
        splits: Any = {
            split: [
                Example(task_id, f"w{task_id} w{row % 7} w{len(split)} {LABELS[row % 2]}", None, row % 2)
                for row in range(20)
            ]
            for split in ("train", "validation", "test")
        }
        found.append(TaskData(Task.classification(f"task{task_id}", LABELS, metrics=["macro_f1"]), splits))
    return tuple(found)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(
        data=tmp_path,
        suite="fdu",
        backbone_name=str(save_backbone(tmp_path / "bert")),
        first_layer=2,
        budgets={16: Budget(steps=4, batch_size=8, task_batch_size=4, evaluations=2, patience=2)},
        max_length=32,
        load=lambda folder, suite, n, seed: _tasks(),
    )


def _runner(setting: Setting, folder: Path, **options: Any) -> TransferRunner:
    return TransferRunner(setting, folder / "rows.jsonl", n=16, seed=3, report=lambda line: None, **options)


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_every_fourth_task_is_held_out_and_the_others_are_trained_on() -> None:
    assert [data.task.name for data in held_out(_tasks())] == ["task0", "task4"]
    others = sources(_tasks())
    assert [data.task.name for data in others] == ["task1", "task2", "task3", "task5"]
    assert [data.splits["test"][0].task_id for data in others] == [0, 1, 2, 3]


def test_cells_are_scored_and_not_run_twice(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="peft is in the extra 'bench' only")
    cells: list[Cell] = []
    train = arms.ARMS["pha"].train

    def recorded(setting: Setting, cell: Cell, rate: Any) -> Trained:
        cells.append(cell)
        return train(setting, cell, rate)

    monkeypatch.setitem(arms.ARMS, "pha", arms.Arm(recorded, 1e-3))
    methods = ["probe_texts", "probe_names", "lora_texts", "adapter_shared_texts", "pha"]
    _runner(setting, tmp_path, test_rows=10).run(methods, shots=[2], draws=[3])
    rows = _rows(tmp_path)
    assert [(row["method"], row["task"]) for row in rows] == [
        (method, task) for method in methods for task in ("task0", "task4")
    ]
    # The word that tells the label is in each of the texts.
    assert all(row["score"] == 1.0 for row in rows if row["method"].startswith("probe"))
    assert {
        (row["suite"], row["k"], row["seed"], row["metric"], row["examples"], row["test_rows"]) for row in rows
    } == {("fdu", 2, 3, "macro_f1", 4, 10)}
    assert (rows[-1]["n"], rows[-1]["training_seed"], rows[-1]["fit"]) == (16, 3, "adapter")
    assert [[data.task.name for data in cell.tasks] for cell in cells] == [["task1", "task2", "task3", "task5"]]
    _runner(setting, tmp_path, test_rows=10).run(methods, shots=[2], draws=[3])
    assert _rows(tmp_path) == rows
    _runner(setting, tmp_path, test_rows=10, fit="none").run(["pha"], shots=[2], draws=[3])
    assert [row["fit"] for row in _rows(tmp_path)[len(rows) :]] == ["none", "none"]


def test_an_arm_without_a_model_of_the_library_is_refused(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="arm 'probe': expected one with a model to which tasks can be added"):
        _runner(setting, tmp_path).run(["probe"], shots=[2], draws=[3])
