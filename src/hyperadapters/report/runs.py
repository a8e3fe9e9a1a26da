"""The files of a finished run that a report reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from hyperadapters.checkpoints.details_file import DETAILS_FILE, FORMAT, Count, Number, RunDetails, read_details
from hyperadapters.config import METRICS_FILE, RECIPE_FILE, Split, load_recipe, parse
from hyperadapters.errors import DataError
from hyperadapters.utils.reading import is_folder, parse_json

COMPARISON_FILE = "comparison.json"
"""File of the demo with the scores of its baselines."""
Scores = dict[str, Number]


class Metrics(BaseModel):
    """Contents of `metrics.json`, without what reports do not show.

    Attributes:
        tasks: Scores by task, split and metric.
        calibration: Measures of calibration by task, split and name.
        mean: Mean of the main metrics by split.
        routing_accuracy: Share of rows whose most similar task is their own; None if the method cannot route.
        trainable_parameters: Number of trained parameters.
        seconds: Duration of the training in seconds.
    """

    model_config = ConfigDict(frozen=True)

    tasks: dict[str, dict[Split, Scores]]
    calibration: dict[str, dict[Split, Scores]] = {}
    mean: dict[Split, Number]
    routing_accuracy: Number | None
    trainable_parameters: Count
    seconds: Number


class Comparison(BaseModel):
    """Contents of the demo's `comparison.json`, without what reports do not show.

    Attributes:
        test: Main metric by method and task.
    """

    model_config = ConfigDict(frozen=True)

    test: dict[str, Scores] = {}


@dataclass(frozen=True)
class FinishedRun:
    """What the files of a finished run say.

    Attributes:
        folder: Folder of the run.
        metrics: Contents of `metrics.json`.
        details: Contents of `details.json`; without that file, what `metrics.json` says of the tasks.
        recipe: Text of the recipe; None without its file.
        settings: All settings of the recipe with their defaults, nested as in the file; empty without that file.
        missing: Names of the files that are not in the folder, of `details.json` and the recipe.
        baselines: Main metric by the name of a baseline and the task, on the test rows.
    """

    folder: Path
    metrics: Metrics
    details: RunDetails
    recipe: str | None
    settings: dict[str, Any]
    missing: tuple[str, ...]
    baselines: dict[str, dict[str, float]]

    @property
    def main_scores(self) -> dict[str, float]:
        """Main metric of each task that has rows in the evaluated split."""
        split = self.details.split
        return {
            task.name: of_splits[split][task.metric]
            for task in self.details.tasks
            if split is not None and split in (of_splits := self.metrics.tasks.get(task.name, {}))
        }

    @property
    def calibration_errors(self) -> dict[str, float]:
        """Expected calibration error of each task that has one on the evaluated split."""
        split, name = self.details.split, "calibration_error"
        return {
            task: of_splits[split][name]
            for task, of_splits in self.metrics.calibration.items()
            if split is not None and name in of_splits.get(split, {})
        }


def read_run(folder: Path) -> FinishedRun:
    """Read the files of a finished run, of which only `metrics.json` has to be there.

    Args:
        folder: Folder of the run.

    Returns:
        Their contents.

    Raises:
        DataError: If the folder does not exist `metrics.json` is missing, or a file has other contents.
        RecipeError: If the recipe of the run is not valid.
    """
    if not is_folder(folder):
        raise DataError(f"{folder}: expected the folder of a finished run, found no folder")
    metrics = parse(Metrics, _json(folder / METRICS_FILE), DataError, str(folder / METRICS_FILE))
    missing = tuple(name for name in (DETAILS_FILE, RECIPE_FILE) if not (folder / name).exists())
    details = _without_details(folder, metrics) if DETAILS_FILE in missing else read_details(folder)
    _check_scores(folder, metrics, details)
    recipe, settings = None, {}
    if RECIPE_FILE not in missing:
        settings = load_recipe(folder / RECIPE_FILE).model_dump(mode="json", by_alias=True)
        recipe = (folder / RECIPE_FILE).read_text(encoding="utf-8")
    return FinishedRun(folder, metrics, details, recipe, settings, missing, _baselines(folder, details))


def _without_details(folder: Path, metrics: Metrics) -> RunDetails:
    """Return details with nothing but the evaluated split, and the tasks with their main metric, which is the first."""
    splits: tuple[Split, ...] = ("test", "validation")
    found = {task: next((list(scores) for scores in of_task.values()), []) for task, of_task in metrics.tasks.items()}
    values = {
        "format": FORMAT,
        "versions": {},
        "device": "",
        "split": next((split for split in splits if any(split in task for task in metrics.tasks.values())), None),
        "seconds": {},
        "parameters": {},
        "losses": {},
        "validation_mean": {},
        "validation": {},
        "best_step": None,
        "tasks": [{"name": name, "metric": names[0], "rows": {}} for name, names in found.items() if names],
        "prototypes": [],
        "confusion": [],
        "points": [],
    }
    return parse(RunDetails, values, DataError, str(folder / METRICS_FILE))


def _check_scores(folder: Path, metrics: Metrics, details: RunDetails) -> None:
    """Raise DataError unless the scores of each task contain its main metric. A task without rows has no scores."""
    for task in details.tasks:
        scores = metrics.tasks.get(task.name, {})
        if any(task.metric not in of_split for of_split in scores.values()):
            raise DataError(
                f"{folder}: expected {task.metric}, the main metric of task '{task.name}', for each split in "
                f"{METRICS_FILE}, found none; the files are not of the same run, so train the recipe again"
            )


def _baselines(folder: Path, details: RunDetails) -> dict[str, dict[str, float]]:
    found = {"majority class": {task.name: task.majority for task in details.tasks if task.majority is not None}}
    path = folder / COMPARISON_FILE
    if path.exists():
        scores = parse(Comparison, _json(path), DataError, str(path)).test
        found |= {
            name.replace("_", " "): of_tasks for name, of_tasks in scores.items() if name not in ("majority", "pha")
        }
    return {name: of_tasks for name, of_tasks in found.items() if of_tasks}


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the folder of a finished run, or train the recipe again") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected JSON, which cannot be read: {error}") from error
