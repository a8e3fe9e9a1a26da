"""The recipes of the paper's experiments: each is valid with every setting of its sweep, and the one of GLUE trains."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from helpers import VOCABULARY, tiny_backbone, tiny_tokenizer
from hub_repositories import write_repository

from hyperadapters.config import load_recipe
from hyperadapters.training.run import train

PAPER = Path(__file__).parents[2] / "recipes" / "paper"


@pytest.mark.parametrize("path", sorted(PAPER.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_is_valid_with_all_settings_of_its_sweep(path: Path) -> None:
    recipe = load_recipe(path)
    assert len(recipe.tasks) == 8
    assert (recipe.sweep is not None) == (path.stem in ("low-data", "ablations"))
    for settings in recipe.sweep.combinations if recipe.sweep else ():
        changed = load_recipe(path, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
        assert changed.model_copy(update={"sweep": None}) != recipe.model_copy(update={"sweep": None}) or (
            settings == {"model.contrast": "both", "seed": 0}
        )


def test_paper_has_recipes() -> None:
    assert {path.stem for path in PAPER.iterdir()} == {"glue", "super-glue", "low-data", "transfer", "ablations"}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_recipe_of_glue_trains_on_data_with_the_columns_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_repository(tmp_path, "nyu-mll/glue", 12, train_rows=1010)  # of which large tasks hold out 1,000
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    words = [*VOCABULARY, "0", "1", "2", *(f"{number / 5:.1f}" for number in range(26))]
    tiny_backbone("t5", vocab_size=len(words)).save_pretrained(tmp_path / "t5")
    tiny_tokenizer(words).save_pretrained(tmp_path / "t5")
    steps = {"max_steps": 2, "batch_size": 4, "eval_steps": 2, "warmup_steps": 0}
    changes = [f"backbone={tmp_path / 't5'}", "data.n_train=8", "data.n_validation=4", "data.max_target_length=3"]
    recipe = load_recipe(PAPER / "glue.yaml", [*changes, *(f"training.{key}={value}" for key, value in steps.items())])
    run = train(recipe, tmp_path / "run")
    sizes = {data.task.name: {split: len(rows) for split, rows in data.splits.items()} for data in run.tasks}
    assert sizes["qnli"] == {"train": 8, "test": 12, "validation": 4}
    assert sizes["rte"] == {"train": 8, "validation": 4, "test": 6}
    assert run.metrics["tasks"].keys() == {task.name for task in recipe.tasks}
    again = load_recipe(tmp_path / "run" / "resolved_recipe.yaml")
    assert [entry.task for entry in again.tasks] == [entry.task for entry in recipe.tasks]
    assert [entry.source.held_out for entry in again.tasks] == [entry.source.held_out for entry in recipe.tasks]
