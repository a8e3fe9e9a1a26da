"""The report that compares several finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from hyperadapters.errors import DataError
from hyperadapters.report.charts import Categories, Chart, Lines, Report, Section, Table
from hyperadapters.report.run_report import MEAN, lines_of, with_mean
from hyperadapters.report.runs import FinishedRun

Runs = Mapping[str, FinishedRun]


def compare_report(runs: Sequence[FinishedRun]) -> Report:
    """Return the report that compares runs.

    Args:
        runs: At least two runs.

    Returns:
        The report.

    Raises:
        DataError: If there are fewer than two runs, a run is given twice, or the runs have no task in common.
    """
    if len(runs) < 2:
        raise DataError(f"--compare: expected two or more runs, found {len(runs)}; give their folders")
    named = _named(runs)
    common = [name for name in runs[0].main_scores if all(name in run.main_scores for run in runs)]
    if not common:
        raise DataError("--compare: expected runs with scores of a common task, found none; give other runs")
    sections = (
        Section("Scores", (scores(named, common),)),
        Section("Learning curves", tuple(_curves(named))),
        Section("Certainty", tuple(_calibration(named, common))),
        Section("Parameters and time", tuple(_sizes(named))),
        Section("Settings that differ", (_settings(named),)),
    )
    facts = {"runs": str(len(runs)), "tasks in common": str(len(common))}
    return Report("Comparison of runs", facts, tuple(section for section in sections if section.content))


def _named(runs: Sequence[FinishedRun]) -> dict[str, FinishedRun]:
    """Return the runs by the ends of their paths, as short as they differ."""
    folders = [run.folder.resolve() for run in runs]
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise DataError(f"--compare: {twice} is given twice; give different runs")
    for depth in count(1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, runs, strict=True))


def scores(runs: Runs, tasks: Sequence[str]) -> Categories:
    """Return the main metrics of the tasks that all runs have, and their means.

    Args:
        runs: Runs by name.
        tasks: Names of the tasks.
    """
    splits = sorted({str(run.details.split) for run in runs.values()})
    return Categories(
        "scores",
        f"Scores on {' or '.join(splits)} rows",
        "Main metric of each task that all runs have. Each run is evaluated on its own rows, which are the same if the "
        "recipes have the same data and seed.",
        (*tasks, MEAN),
        {name: with_mean([run.main_scores[task] for task in tasks]) for name, run in runs.items()},
        "score",
    )


def _curves(runs: Runs) -> list[Chart]:
    charts: list[Chart] = []
    for term in ("task", "instance", "prototype"):
        curves = {name: run.details.losses[term] for name, run in runs.items() if term in run.details.losses}
        if curves:
            caption = f"The {term} loss by step, a mean since the previous entry of the log."
            charts.append(Lines(f"loss-{term}", f"Loss: {term}", caption, lines_of(curves), "step", "loss"))
    curves = {name: run.details.validation_mean for name, run in runs.items() if run.details.validation_mean.x}
    if curves:
        caption = "Mean of the main metrics on the validation rows of each run."
        charts.append(Lines("validation", "Validation scores", caption, lines_of(curves), "step", "score"))
    return charts


def _calibration(runs: Runs, tasks: Sequence[str]) -> list[Chart]:
    found = {name: run.calibration_errors for name, run in runs.items()}
    shown = tuple(name for name in tasks if any(name in of_run for of_run in found.values()))
    if not shown:
        return []
    series = {name: tuple(of_run.get(task) for task in shown) for name, of_run in found.items()}
    caption = "Expected calibration error of the classification tasks, with the fitted temperatures."
    return [Categories("calibration", "Calibration errors", caption, shown, series, "calibration error")]


def _sizes(runs: Runs) -> list[Chart]:
    names = tuple(runs)
    trained = tuple(float(run.metrics.trainable_parameters) for run in runs.values())
    parts = dict.fromkeys(part for run in runs.values() for part in run.details.seconds)
    seconds = {part: tuple(run.details.seconds.get(part) for run in runs.values()) for part in parts}
    return [
        Categories(
            "parameters",
            "Trained parameters",
            "Number of parameters that are trained.",
            names,
            {"trained parameters": trained},
            "parameters",
            "bars",
        ),
        Categories("time", "Time", "Duration of each part of the runs.", names, seconds, "seconds", "bars"),
    ]


def _settings(runs: Runs) -> Table:
    flat = {name: dict(_flat(run.settings)) for name, run in runs.items()}
    keys = dict.fromkeys(key for settings in flat.values() for key in settings)
    rows = tuple(
        (key, *values) for key in keys if len(set(values := [settings.get(key, "") for settings in flat.values()])) > 1
    )
    versions = dict.fromkeys(name for run in runs.values() for name in run.details.versions)
    for name in versions:
        found = [run.details.versions.get(name, "") for run in runs.values()]
        if len(set(found)) > 1:
            rows = (*rows, (f"version of {name}", *found))
    return Table("Settings and versions", ("setting", *runs), rows)


def _flat(values: Any, path: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Return the values of nested settings by their dotted paths, with tasks by their names."""
    if isinstance(values, dict):
        return [item for key, inner in values.items() for item in _flat(inner, (*path, key))]
    if isinstance(values, list) and path == ("tasks",):
        return [item for task in values for item in _flat(task, ("tasks", task["name"]))]
    return [(".".join(path), str(values))]
