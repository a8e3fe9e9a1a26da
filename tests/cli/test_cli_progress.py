"""`--quiet` and `--json-log`: what the commands that train print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import ROWS, Cli, assert_refused, write_recipe, write_rows
from helpers import save_backbone

from hyperadapters import quickstart


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_rows(tmp_path / "data", **ROWS)
    return write_recipe(
        tmp_path / "recipe.yaml",
        backbone=str(save_backbone(tmp_path / "backbone")),
        data={"max_length": 16},
        training={"max_steps": 2, "eval_steps": 1, "logging_steps": 1},
        tasks=[{"name": "mood", "source": {"path": "data/{split}.jsonl"}}],
    )


def test_a_quiet_training_prints_nothing(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    assert cli("train", recipe, "--output", tmp_path / "run", "--quiet") == (0, "", "")
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_a_json_log_ends_with_the_metrics(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    code, out, err = cli("train", recipe, "--output", tmp_path / "run", "--json-log")
    assert (code, err) == (0, "")
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events] == ["begin", *["losses", "evaluation"] * 2, "end", "result"]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert events[-1] == {"event": "result", **metrics}


def test_a_quickstart_prints_its_recipe_only_with_other_text(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "MIN_STEPS", 4)
    monkeypatch.setattr(quickstart, "MAX_STEPS", 4)
    rows = [(f"w{row} {('bad', 'good')[row % 2]}", ("no", "yes")[row % 2]) for row in range(30)]
    write_rows(tmp_path, mood=rows)
    backbone = save_backbone(tmp_path / "backbone", "bert", max_position_embeddings=128)
    arguments = ("quickstart", tmp_path / "mood.jsonl", "--backbone", backbone, "--output", tmp_path / "run")
    code, out, err = cli(*arguments, "--json-log")
    assert (code, err) == (0, "")
    assert {json.loads(line)["event"] for line in out.splitlines()} >= {"begin", "evaluation", "end", "result"}
    assert cli(*arguments, "--overwrite", "--quiet") == (0, "", "")


@pytest.mark.parametrize("command", ["train", "quickstart", "demo", "sweep"])
def test_both_options_together_are_refused(command: str, cli: Cli, recipe: Path, tmp_path: Path) -> None:
    arguments = [recipe] if command != "demo" else []
    result = cli(command, *arguments, "--output", tmp_path / "run", "--quiet", "--json-log")
    assert_refused(result, "--quiet and --json-log exclude each other")
    assert not (tmp_path / "run").exists()
