"""Training on several processes: what one process computes with the same batches, whatever part each of them has."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from helpers import save_backbone
from other_processes import start
from processes_worker import CASES, RESUMED, SAVED_STEP, SAVING, STEPS, cases_of, train_together, trained
from tolerance import rounding

from hyperadapters import load_recipe, train
from hyperadapters.data.sampling import MixedTaskBatchSampler
from hyperadapters.inference.predictor import Predictor
from hyperadapters.model.model import HyperAdapterModel

TEXTS = ["w1 good", "w2 red"]
LOSS_TOLERANCE = rounding(64)
"""Losses are means of up to 64 numbers in float32; everything else is computed in float64."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_compute_what_one_computes(processes: int, tmp_path: Path) -> None:
    trained(RESUMED, 1, tmp_path / "one", **SAVING)
    recipe = write_recipe(tmp_path / "data", shard_backbone=True, batch_size=12)
    folders = tmp_path / "found.pt", tmp_path / "one", tmp_path / "several", recipe, tmp_path / "run"
    port, log = free_port(), tmp_path / "log"
    started = [
        start(train_together, rank, processes, port, *folders, output=f"{log}-{rank}") for rank in range(processes)
    ]
    for rank, process in enumerate(started):
        process.join()
        assert process.exitcode == 0, Path(f"{log}-{rank}").read_text()[-3000:]
    together = torch.load(tmp_path / "found.pt", weights_only=False)
    alone = {case: trained(case, 1, tmp_path / case) for case in cases_of(processes)}
    for case in alone:
        assert_same_training(case, together["found"][case], alone[case])
        first, *others = (state[case] for state in together["states"])
        assert all(torch.equal(value, other[name]) for other in others for name, value in first.items())
    # Processes that divide the weights of layers hold a part of each, and the rest is gathered and freed.
    for case in filter(sharded, alone):
        found, whole = together["found"][case], alone[case]
        assert sum(found["held"]) < 0.6 * sum(whole["held"]), case
        assert found["frees_whole_weights"], case
        assert not whole["frees_whole_weights"], case
    train(load_recipe(recipe), tmp_path / "run-alone")
    assert_same_run(tmp_path / "run", tmp_path / "run-alone")
    # A step that is not finite in one process is skipped in all of them.
    if "skipped-step" in alone:
        skipped = [row.get("skipped_steps", 0) for row in together["found"]["skipped-step"]["log"] if "loss" in row]
        assert skipped == [0] * 4 + [1] * (STEPS - 4)
    # A training is resumed by another number of processes, both ways.
    assert_same_state(RESUMED, together["found"]["resumed"], alone[RESUMED])
    resumed = trained(RESUMED, 1, tmp_path / "resumed", tmp_path / "several" / f"checkpoint-{SAVED_STEP}")
    assert_same_state(RESUMED, resumed, alone[RESUMED])


def assert_same_training(case: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses, norms of gradients, weights, scores and answers."""
    assert len(found["log"]) == len(expected["log"]) > STEPS
    for row, other in zip(found["log"], expected["log"], strict=True):
        assert row.keys() == other.keys()
        for name in other:
            assert row[name] == pytest.approx(other[name], rel=LOSS_TOLERANCE, abs=1e-6), (case, name)
    assert_same_state(case, found, expected)
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=LOSS_TOLERANCE), case
    tolerance = 1e-3 if has_rounded_heads(case) else 1e-4
    for answer, other in zip(found["answers"], expected["answers"], strict=True):
        assert answer == (pytest.approx(other, abs=tolerance) if isinstance(other, dict | float) else other), case


def assert_same_state(case: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected["state"].items():
        if value.numel():
            largest = max(1.0, float(value.abs().max()))
            difference = (found["state"][name].double() - value.double()).abs().max().item()
            is_rounded = has_rounded_heads(case) and name.startswith("heads.")
            tolerance = torch.finfo(torch.float16).eps if is_rounded else 1e-4
            assert difference <= tolerance * largest, (case, name)


def sharded(case: str) -> bool:
    return bool(CASES[case].get("arguments", {}).get("shard_backbone"))


def assert_same_run(folder: Path, alone: Path) -> None:
    """The number of files, scores and answers of two runs."""
    assert len([*folder.iterdir()]) == len([*alone.iterdir()])
    scores = [json.loads((path / "metrics.json").read_text())["mean"] for path in (folder, alone)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    models = [HyperAdapterModel.from_pretrained(path) for path in (folder, alone)]
    first, second = ([row.probabilities for row in Predictor(model)(TEXTS, task="mood")] for model in models)
    assert [pytest.approx(row, abs=1e-3) for row in first] == second


def has_rounded_heads(case: str) -> bool:
    """Whether the weights of heads are rounded to float16, where two that nearly agree may become neighbours."""
    return bool(CASES[case]["model"]["preset"] == "plus")


@pytest.mark.parametrize(("rows", "batch_size", "replicas"), [(37, 12, 3), (5, 4, 4), (24, 8, 2), (3, 8, 5)])
def test_the_parts_of_a_batch_are_the_batch_without_loss_or_repetition(
    rows: int, batch_size: int, replicas: int
) -> None:
    task_ids = [row % 3 for row in range(rows)]
    whole = MixedTaskBatchSampler(task_ids, batch_size, seed=3)
    parts = [
        MixedTaskBatchSampler(task_ids, batch_size, seed=3, num_replicas=replicas, rank=r) for r in range(replicas)
    ]
    for epoch in range(2):
        for sampler in (whole, *parts):
            sampler.set_epoch(epoch)
        assert {len(sampler) for sampler in (whole, *parts)} == {len(whole)}
        for batch, *own in zip(whole, *parts, strict=True):
            counted = [row for part in own for row in part if row >= 0]
            assert counted == batch
            assert all(part for part in own)  # a process without rows takes part with one that is not counted
            assert {-1 - row for part in own for row in part if row < 0} <= {*batch}


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes" / "accelerate").glob("*.yaml")))
def test_the_files_for_accelerate_are_valid_and_divide_the_data_only(path: Path) -> None:
    config = load_config_from_file(str(path)).to_dict()
    assert config["distributed_type"] == "MULTI_GPU"  # with MULTI_CPU, accelerate starts a single process without MPI
    assert not config.get("fsdp_config")
    assert not config.get("deepspeed_config")


def write_recipe(folder: Path, **training: object) -> Path:
    folder.mkdir(exist_ok=True)
    backbone = save_backbone(folder / "backbone")
    tasks = []
    for name, labels in (("mood", ["bad", "good"]), ("colour", ["blue", "red"])):
        for split, count in (("train", 13), ("validation", 5), ("test", 7)):
            rows = [{"text": f"w{row} {labels[row % 2]}", "label": labels[row % 2]} for row in range(count)]
            (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks.append({"name": name, "labels": labels, "source": {"path": f"{name}-{{split}}.jsonl"}})
    recipe = {
        "backbone": str(backbone),
        "model": {"preset": "plus", "adapter_dim": 4, "prototype_dim": 8, "hidden_dim": 8, "feature_layer": 1},
        "data": {"max_length": 16},
        "training": {"max_steps": 8, "eval_steps": 4, "batch_size": 4, "learning_rate": 1e-3, **training},
        "tasks": tasks,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


@pytest.mark.slow
def test_the_command_trains_on_several_processes(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "data")
    command = ["-m", "hyperadapters", "train", str(recipe), "--output"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, *command, str(tmp_path / "two")], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("Checkpoint and metrics.json are in") == 1
    for line in ("Frozen layers: the states of 26 rows", "step 4/8: mean 0.", "step 8/8: mean 0."):
        assert result.stderr.count(line) == 1
    train(load_recipe(recipe), tmp_path / "one")
    assert_same_run(tmp_path / "two", tmp_path / "one")
