"""Runs of Weights & Biases in its offline mode. It has an environment of its own: `make interop-wandb`."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import ROWS, write_recipe, write_rows
from helpers import save_backbone

from hyperadapters import load_recipe, train


def test_trainings_have_runs_of_their_own_and_the_run_of_a_caller_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb has an environment of its own: make interop-wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    write_rows(tmp_path / "data", **ROWS)
    recipe = load_recipe(
        write_recipe(
            tmp_path / "recipe.yaml",
            backbone=str(save_backbone(tmp_path / "backbone")),
            data={"max_length": 16},
            training={"max_steps": 2, "eval_steps": 1, "report_to": ["wandb"]},
            tasks=[{"name": "mood", "source": {"path": "data/{split}.jsonl"}}],
        )
    )

    def runs() -> list[Path]:
        return [*tmp_path.glob("wandb/offline-run-*")]

    for count in (1, 2):
        train(recipe, tmp_path / "out", overwrite=True)
        assert (wandb.run, len(runs())) == (None, count)
    own = wandb.init()
    train(recipe, tmp_path / "out", overwrite=True)
    assert (wandb.run, len(runs())) == (own, 3)
    wandb.finish()
