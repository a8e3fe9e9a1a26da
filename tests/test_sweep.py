"""Sweeps: every setting is trained once, a killed sweep goes on where it was, and a failed trial does not end it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import ROWS, write_rows
from helpers import save_backbone

from hyperadapters import sweep as sweeps
from hyperadapters.config import METRICS_FILE, RECIPE_FILE, Recipe, parse
from hyperadapters.config.sweep import SweepConfig
from hyperadapters.errors import HyperAdaptersError, InterruptionError, OutputError, RecipeError
from hyperadapters.report.result_rows import read_rows
from hyperadapters.sweep import sweep
from hyperadapters.training.run import train

MODEL = {"preset": "paper", "adapter_dim": 2, "prototype_dim": 4, "hidden_dim": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny backbone and the rows of a task."""
    folder = tmp_path_factory.mktemp("sweep")
    save_backbone(folder / "bert")
    write_rows(folder / "data", **ROWS)
    return folder


def write_recipe(folder: Path, name: str, **settings: Any) -> Path:
    recipe = {
        "backbone": "./bert",
        "model": MODEL,
        "data": {"max_length": 16},
        "training": {"max_steps": 1, "batch_size": 4},
        "tasks": [{"name": "mood", "source": {"path": "data/{split}.jsonl"}}],
        "sweep": settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder / f"{name}.yaml"


def rows_in(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that are trained. Their scores are written without a training, and are high for a rate near 0.01."""
    recipes = []

    def score(recipe: Recipe, output: Path, resume: bool = False, progress: str = "auto") -> None:
        recipes.append(recipe)
        value = 1 / (1 + abs(0.01 - (recipe.training.learning_rate or 1)))
        metrics = {
            "tasks": {"mood": {split: {"accuracy": value} for split in ("validation", "test")}},
            "mean": {"validation": value, "test": value},
            "routing_accuracy": None,
            "trainable_parameters": 1,
            "seconds": 0.0,
        }
        output.mkdir(parents=True)
        (output / METRICS_FILE).write_text(json.dumps(metrics))

    monkeypatch.setattr(sweeps, "train", score)
    monkeypatch.setattr(sweeps, "clear_device_cache", lambda **options: None)  # takes half a second
    return recipes


def test_every_combination_is_trained_and_has_a_row_with_the_scores_of_its_run(folder: Path, tmp_path: Path) -> None:
    path = write_recipe(folder, "grid", cases=[{"model.contrast": "none"}, {}], grid={"seed": [3, 4]})
    with_two = ["sweep.grid={seed: [3]}"]
    rows = sweep(path, tmp_path / "out", with_two)
    assert rows == rows_in(tmp_path / "out")
    assert [row["settings"] for row in rows] == [{"model.contrast": "none", "seed": 3}, {"seed": 3}]
    for number, row in enumerate(rows):
        run = tmp_path / "out" / "trials" / f"{number:04d}"
        metrics = json.loads((run / METRICS_FILE).read_text())
        recipe = yaml.safe_load((run / "resolved_recipe.yaml").read_text())
        assert recipe["seed"] == row["seed"] == 3
        assert recipe["model"].get("contrast") == row["settings"].get("model.contrast")
        assert "sweep" not in recipe
        assert row["scores"] == {"mood": 100 * metrics["tasks"]["mood"]["test"]["accuracy"]}
        assert [row["validation"], row["score"]] == [100 * metrics["mean"][split] for split in ("validation", "test")]
        assert row["trainable_per_task"] == metrics["trainable_parameters"]
    assert [(row["arm"], row["n"]) for row in rows] == [('model.contrast="none"', "all"), ("recipe", "all")]
    reported, failed = read_rows(tmp_path / "out" / "results.jsonl")
    assert ([row.arm for row in reported], failed) == ([row["arm"] for row in rows], 0)
    with pytest.raises(OutputError, match="already contains a sweep; use --overwrite to replace it or --resume"):
        sweep(path, tmp_path / "out", with_two)
    with pytest.raises(OutputError, match=r"started with another recipe, which is in sweep\.yaml"):
        sweep(path, tmp_path / "out", ["sweep.grid={seed: [4]}"], resume=True)


def test_log_rows_and_folders_number_the_trials_alike(
    folder: Path, tmp_path: Path, trained: list[Recipe], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_recipe(folder, "numbered", grid={"seed": [6, 7]})
    with caplog.at_level(logging.INFO, "hyperadapters"):
        rows = sweep(path, tmp_path / "out")
    assert [(row["trial"], row["seed"]) for row in rows] == [(0, 6), (1, 7)]
    assert sorted(path.name for path in (tmp_path / "out" / "trials").iterdir()) == ["0000", "0001"]
    assert caplog.messages == ["trial 0 (the last is 1): seed=6", "trial 1 (the last is 1): seed=7"]


def test_killed_sweep_trains_what_is_missing(
    folder: Path, tmp_path: Path, trained: list[Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(folder, "killed", grid={"training.learning_rate": [0.1, 0.2, 0.3]})
    whole = sweep(path, tmp_path / "whole")
    counted, score = len(trained), sweeps.train

    def killed(recipe: Recipe, output: Path, resume: bool = False, progress: str = "auto") -> None:
        score(recipe, output, resume)
        if recipe.training.learning_rate == 0.2:
            raise KeyboardInterrupt

    monkeypatch.setattr(sweeps, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep(path, tmp_path / "out")
    assert rows_in(tmp_path / "out") == whole[:1]
    monkeypatch.setattr(sweeps, "train", score)
    assert sweep(path, tmp_path / "out", resume=True) == whole
    assert [recipe.training.learning_rate for recipe in trained[counted:]] == [
        0.1,
        0.2,
        0.3,
    ]  # the second run was complete
    assert sweep(path, tmp_path / "out", resume=True) == whole


def test_interrupted_training_of_a_trial_is_continued(
    folder: Path, tmp_path: Path, trained: list[Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(folder, "interrupted", grid={"seed": [5]})
    score, calls = sweeps.train, []

    def interrupted(recipe: Recipe, output: Path, resume: bool = False, progress: str = "auto") -> None:
        calls.append(resume)
        if not resume:
            output.mkdir(parents=True)
            (output / RECIPE_FILE).write_text("")
            raise InterruptionError("SIGTERM")
        (output / RECIPE_FILE).unlink()
        output.rmdir()
        score(recipe, output)

    monkeypatch.setattr(sweeps, "train", interrupted)
    with pytest.raises(InterruptionError):
        sweep(path, tmp_path / "out")
    assert rows_in(tmp_path / "out") == []
    [row] = sweep(path, tmp_path / "out", resume=True)
    assert (row["seed"], calls) == (5, [False, True])


def test_failed_trial_has_its_error_and_does_not_end_the_sweep(
    folder: Path, tmp_path: Path, trained: list[Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(folder, "failing", grid={"training.learning_rate": [0.1, 0.2, 0.3]})
    score = sweeps.train

    def failing(recipe: Recipe, output: Path, resume: bool = False, progress: str = "auto") -> None:
        if recipe.training.learning_rate != 0.2:
            score(recipe, output, resume)
            raise RuntimeError("no memory")
        score(recipe, output, resume)

    monkeypatch.setattr(sweeps, "train", failing)
    rows = sweep(path, tmp_path / "out")
    assert [row.get("error") for row in rows] == ["RuntimeError: no memory", None, "RuntimeError: no memory"]
    assert [path.name for path in (tmp_path / "out" / "trials").iterdir()] == ["0001"]
    reported, failed = read_rows(tmp_path / "out" / "results.jsonl")
    assert ([row.arm for row in reported], failed) == (["training.learning_rate=0.2"], 2)
    with pytest.raises(HyperAdaptersError, match="the only trial failed with RuntimeError: no memory"):
        sweep(path, tmp_path / "all", ["sweep.grid={training.learning_rate: [0.1]}"])
    assert len(rows_in(tmp_path / "all")) == 1


@pytest.mark.parametrize(("sampler", "trials"), [("tpe", 12), ("random", 3)])  # "tpe" learns from the eleventh on
def test_draws_are_the_same_after_a_resumption(
    folder: Path, tmp_path: Path, trained: list[Recipe], monkeypatch: pytest.MonkeyPatch, sampler: str, trials: int
) -> None:
    ranges = {
        "training.learning_rate": {"low": 1e-4, "high": 0.1, "log": True},
        "model.adapter_dim": {"low": 2, "high": 8},
        "model.codes": ["trunk", "orthogonal"],
    }
    path = write_recipe(folder, sampler, ranges=ranges, trials=trials, sampler=sampler)
    whole = sweep(path, tmp_path / "whole")
    score = sweeps.train

    def killed(recipe: Recipe, output: Path, resume: bool = False, progress: str = "auto") -> None:
        if output.name == f"{trials - 1:04d}":
            raise KeyboardInterrupt
        score(recipe, output, resume)

    monkeypatch.setattr(sweeps, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep(path, tmp_path / "out")
    monkeypatch.setattr(sweeps, "train", score)
    assert sweep(path, tmp_path / "out", resume=True) == whole
    drawn = [row["settings"] for row in whole]
    assert len({settings["training.learning_rate"] for settings in drawn}) == trials
    assert all(1e-4 <= settings["training.learning_rate"] <= 0.1 for settings in drawn)
    assert {settings["model.codes"] for settings in drawn} <= {"trunk", "orthogonal"}
    assert {type(settings["model.adapter_dim"]) for settings in drawn} == {int}


def test_invalid_setting_is_refused_before_anything_is_trained(
    folder: Path, tmp_path: Path, trained: list[Recipe]
) -> None:
    path = write_recipe(folder, "wrong", grid={"training.learning_rat": [0.1]})
    with pytest.raises(RecipeError, match="Did you mean 'learning_rate'"):
        sweep(path, tmp_path / "out")
    path = write_recipe(folder, "wrong", ranges={"model.adapter_dims": {"low": 1, "high": 2}}, trials=1)
    with pytest.raises(RecipeError, match="Did you mean 'adapter_dim'"):
        sweep(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert trained == []


def test_recipe_with_a_sweep_is_not_trained_and_one_without_is_not_swept(folder: Path, tmp_path: Path) -> None:
    path = write_recipe(folder, "one", grid={"seed": [1]})
    recipe = sweeps.load_recipe(path)
    with pytest.raises(RecipeError, match="sweep: is for `hyperadapters sweep`"):
        train(recipe, tmp_path / "run")
    with pytest.raises(RecipeError, match="expected a section sweep"):
        sweep(path, tmp_path / "out", ["sweep=null"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "expected either ranges, or cases and grid; found neither"),
        ({"grid": {"seed": [1]}, "ranges": {"seed": [1]}, "trials": 1}, "found both"),
        ({"ranges": {"seed": [1, 2]}}, "trials is the number of draws from ranges"),
        ({"grid": {"seed": [1, 2]}, "trials": 3}, "trials is the number of draws from ranges"),
        ({"grid": {"seed": []}}, r"grid\.seed: expected 1 or more items; found \[\]"),
        ({"grid": {"seed": [1, [2]]}}, r"grid\.seed\.1: expected a number, a text, true, false or null; found \[2\]"),
        ({"grid": {"sweep": [None]}}, "'sweep' cannot be tried; remove it"),
        ({"cases": [{"seed": 1}, {"sweep.grid": None}]}, r"'sweep\.grid' cannot be tried; remove it"),
        (
            {"ranges": {"a": 3}, "trials": 1},
            r"ranges\.a: expected a range with low and high, or a list of values; found 3",
        ),
        ({"grid": {"seed": [1, 1]}}, "seed: expected different values, found one twice"),
        ({"cases": [{"seed": 1}, {"seed": 1}]}, "cases: expected different values, found one twice"),
        ({"grid": {name: list(range(100)) for name in "abc"}}, "expected at most 10000 trials, found 1000000"),
        ({"grid": {"seed": [1]}, "cases": [{"seed": 2}]}, "'seed' is in cases and in grid"),
        ({"grid": {"seed": [1]}, "sampler": "random"}, "sampler is only for ranges"),
        (
            {"ranges": {"a": {"low": 2, "high": 1}}, "trials": 1},
            r": 1 fault\n  ranges\.a: expected low below high, found 2 and 1",
        ),
        ({"ranges": {"a": {"low": 0, "high": 1, "log": True}}, "trials": 1}, "expected a positive low with log"),
    ],
)
def test_invalid_sweep_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(SweepConfig, values)
