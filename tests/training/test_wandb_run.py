"""Runs of Weights & Biases, which is not a dependency, in its offline mode."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyperadapters.training.wandb_run import own_wandb_run


def test_trainings_have_runs_of_their_own_and_the_run_of_a_caller_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    seen = []
    for _ in range(2):
        with own_wandb_run(["wandb"]):
            assert wandb.run is None
            seen.append(wandb.init().id)
    assert wandb.run is None
    assert len(set(seen)) == 2
    own = wandb.init()
    with own_wandb_run(["wandb"]):
        pass
    with own_wandb_run([]):
        pass
    assert wandb.run is own
    wandb.finish()
