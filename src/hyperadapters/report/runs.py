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
CHECKPOINT_FILE = "hyperadapter.json"
"""File of the checkpoint with its tasks, which `checkpoints.format` writes; that module needs PyTorch."""
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


class CheckpointTask(BaseModel):
    """A task in `hyperadapter.json`, without what reports do not show.

    Attributes:
        name: Name of the task.
    """

    model_config = ConfigDict(frozen=True)

    name: str


class Checkpoint(BaseModel):
    """Contents of `hyperadapter.json`, without what reports do not show.

    Attributes:
        tasks: Present tasks of the model.
        renamed: Name under which a task was trained by its present name, for those that were renamed.
    """

    model_config = ConfigDict(frozen=True)

    tasks: tuple[CheckpointTask, ...]
    renamed: dict[str, str] = {}


@dataclass(frozen=True)
class Changes:
    """How the tasks of a checkpoint differ from those that were trained.

    Attributes:
        removed: Names of removed tasks.
        renamed: Present name of each renamed task by the name under which it was trained.
        added: Names of added tasks.
    """

    removed: tuple[str, ...]
    renamed: dict[str, str]
    added: tuple[str, ...]


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
        checkpoint: Contents of `hyperadapter.json`; None without that file.
    """

    folder: Path
    metrics: Metrics
    details: RunDetails
    recipe: str | None
    settings: dict[str, Any]
    missing: tuple[str, ...]
    baselines: dict[str, dict[str, float]]
    checkpoint: Checkpoint | None

    @property
    def main_metrics(self) -> dict[str, str]:
        """Name of the main metric of each trained task. Details forget removed tasks, whose first metric it is."""
        return _first_metrics(self.metrics) | {task.name: task.metric for task in self.details.tasks}

    @property
    def main_scores(self) -> dict[str, float]:
        """Main metric of each trained task that has rows in the evaluated split."""
        split = self.details.split
        return {
            task: of_splits[split][metric]
            for task, metric in self.main_metrics.items()
            if split is not None and metric in (of_splits := self.metrics.tasks.get(task, {})).get(split, {})
        }

    @property
    def changes(self) -> Changes:
        """What has changed since the training. Without details, tasks that were added are not known."""
        kept = {task.name for task in self.details.tasks}
        present = {name: name for name in kept}
        if self.checkpoint is not None:
            present = {task.name: self.checkpoint.renamed.get(task.name, task.name) for task in self.checkpoint.tasks}
        trained = tuple(self.main_metrics)
        return Changes(
            removed=tuple(name for name in trained if name not in kept or name not in present.values()),
            renamed={old: new for new, old in present.items() if old != new and old in kept},
            added=tuple(new for new, old in present.items() if old not in kept and DETAILS_FILE not in self.missing),
        )

    def calibration_errors(self, split: Split) -> dict[str, float]:
        """Return the expected calibration error of each task that has one on a split.

        Args:
            split: The split.
        """
        found = {task: of_splits.get(split, {}) for task, of_splits in self.metrics.calibration.items()}
        name = "calibration_error"
        return {task: scores[name] for task, scores in found.items() if name in scores}


def read_run(folder: Path) -> FinishedRun:
    """Read the files of a finished run, of which only `metrics.json` has to be there.

    Args:
        folder: Folder of the run.

    Returns:
        Their contents.

    Raises:
        DataError: If the folder does not exist, `metrics.json` is missing, or a file has other contents.
        RecipeError: If the recipe of the run is not valid.
    """
    if not is_folder(folder):
        raise DataError(f"{folder}: expected the folder of a finished run or a result file (.jsonl), found neither")
    metrics = parse(Metrics, _json(folder / METRICS_FILE), DataError, str(folder / METRICS_FILE))
    missing = tuple(name for name in (DETAILS_FILE, RECIPE_FILE) if not (folder / name).exists())
    details = _without_details(folder, metrics) if DETAILS_FILE in missing else read_details(folder)
    _check_scores(folder, metrics, details)
    recipe, settings = None, {}
    if RECIPE_FILE not in missing:
        settings = load_recipe(folder / RECIPE_FILE).model_dump(mode="json", by_alias=True)
        recipe = (folder / RECIPE_FILE).read_text(encoding="utf-8")
    return FinishedRun(
        folder, metrics, details, recipe, settings, missing, _baselines(folder, details), _checkpoint(folder)
    )


def _without_details(folder: Path, metrics: Metrics) -> RunDetails:
    """Return details with nothing but the evaluated split, and the tasks with their main metric, which is the first."""
    splits: tuple[Split, ...] = ("test", "validation")
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
        "tasks": [{"name": task, "metric": metric, "rows": {}} for task, metric in _first_metrics(metrics).items()],
        "prototypes": [],
        "confusion": [],
        "points": [],
    }
    return parse(RunDetails, values, DataError, str(folder / METRICS_FILE))


def _first_metrics(metrics: Metrics) -> dict[str, str]:
    found = {
        name: [metric for scores in of_splits.values() for metric in scores]
        for name, of_splits in metrics.tasks.items()
    }
    return {task: names[0] for task, names in found.items() if names}


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


def _checkpoint(folder: Path) -> Checkpoint | None:
    path = folder / CHECKPOINT_FILE
    return parse(Checkpoint, _json(path), DataError, str(path)) if path.exists() else None


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the folder of a finished run, or train the recipe again") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected JSON, which cannot be read: {error}") from error
