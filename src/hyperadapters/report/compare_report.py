"""The report that compares several finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, product
from statistics import mean
from typing import Any

from hyperadapters.checkpoints.details_file import Curve
from hyperadapters.config import Split
from hyperadapters.errors import DataError
from hyperadapters.report.charts import Categories, Chart, Line, Lines, Report, Section, Table, decimals
from hyperadapters.report.run_report import MEAN, lines_of, notes, with_mean
from hyperadapters.report.runs import FinishedRun

Runs = Mapping[str, FinishedRun]


def compare_report(runs: Sequence[FinishedRun]) -> Report:
    """Return the report that compares runs.

    Args:
        runs: At least two runs.

    Returns:
        The report.

    Raises:
        DataError: If there are fewer than two runs, a run is given twice, or the runs have no score in common.
    """
    if len(runs) < 2:
        raise DataError(f"--compare: expected two or more runs, found {len(runs)}; give their folders")
    named = _named(runs)
    split, metrics = shared_scores(runs)
    sections = (
        Section("Scores", (scores(named, split, metrics), _score_table(named, split, metrics))),
        Section("Learning curves", tuple(_curves(named, metrics))),
        Section("Certainty", tuple(_calibration(named, split, tuple(metrics)))),
        Section("Parameters and time", tuple(_sizes(named))),
        Section("Settings that differ", (_settings(named),)),
    )
    facts = {"runs": str(len(runs)), "tasks in common": str(len(metrics)), "split": split}
    said = tuple(f"{name}: {note}" for name, run in named.items() for note in notes(run))
    return Report("Comparison of runs", facts, tuple(section for section in sections if section.content), said)


def shared_scores(runs: Sequence[FinishedRun]) -> tuple[Split, dict[str, str]]:
    """Return what can be compared: the split on which runs have most tasks in common, and a metric of each of them.

    Args:
        runs: At least one run.

    Returns:
        The split, test rather than validation, and the first main metric of the runs that all of them have by task.

    Raises:
        DataError: If there is no score that all runs have.
    """
    splits: tuple[Split, ...] = ("test", "validation")
    found: dict[Split, dict[str, str]] = {split: {} for split in splits}
    for split, task in product(splits, runs[0].metrics.tasks):
        of_runs = [run.metrics.tasks.get(task, {}).get(split, {}) for run in runs]
        candidates = [*(run.main_metrics.get(task, "") for run in runs), *of_runs[0]]
        shared = [metric for metric in candidates if all(metric in of_run for of_run in of_runs)]
        if shared:
            found[split][task] = shared[0]
    split = max(splits, key=lambda split: len(found[split]))
    if not found[split]:
        raise DataError(
            "--compare: expected runs that have the same metric of a common task on the same split, found none; give "
            "other runs"
        )
    return split, found[split]


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


def scores(runs: Runs, split: Split, metrics: Mapping[str, str]) -> Categories:
    """Return the scores that all runs have, and their means.

    Args:
        runs: Runs by name.
        split: The split.
        metrics: Metric of each task.
    """
    return Categories(
        "scores",
        f"Scores on {split} rows",
        "Scores of each task that all runs have. Each run is evaluated on its own rows, which are the same if the "
        "recipes have the same data and seed.",
        (*(f"{task} ({metric})" for task, metric in metrics.items()), MEAN),
        {
            name: with_mean([run.metrics.tasks[task][split][metric] for task, metric in metrics.items()])
            for name, run in runs.items()
        },
        "score",
    )


def _score_table(runs: Runs, split: Split, metrics: Mapping[str, str]) -> Table:
    columns = scores(runs, split, metrics).series.values()
    rows = ((*row, *shown) for row, *shown in zip((*metrics.items(), (MEAN, "")), *map(decimals, columns), strict=True))
    return Table(f"Scores on {split} rows", ("task", "metric", *runs), tuple(rows))


def _curves(runs: Runs, metrics: Mapping[str, str]) -> list[Chart]:
    charts: list[Chart] = []
    for term in ("task", "instance", "prototype"):
        curves = {name: run.details.losses[term] for name, run in runs.items() if term in run.details.losses}
        if curves:
            caption = f"The {term} loss by step, a mean since the previous entry of the log."
            charts.append(_lines(runs, f"loss-{term}", f"Loss: {term}", caption, lines_of(curves), "loss"))
    same = [task for task in metrics if len({run.main_metrics.get(task) for run in runs.values()}) == 1]
    means = {name: found for name, run in runs.items() if (found := _mean_curve(run, same))}
    if means:
        caption = (
            f"Mean score on validation rows of the {len(same)} tasks in common with the same main metric in all runs."
        )
        charts.append(_lines(runs, "validation", "Validation scores", caption, means, "score"))
    return charts


def _lines(runs: Runs, name: str, title: str, caption: str, lines: dict[str, Line], axis: str) -> Lines:
    return Lines(name, title, caption, lines, "step", axis, order=tuple(runs))


def _mean_curve(run: FinishedRun, tasks: Sequence[str]) -> Line | None:
    """Return the mean over tasks at the steps at which all of them have a score; None if there are none."""
    curves = [run.details.validation.get(task, Curve()) for task in tasks]
    scores_of = [dict(zip(curve.x, curve.y, strict=True)) for curve in curves]
    steps = tuple(sorted(set.intersection(*map(set, scores_of)))) if scores_of else ()
    return (steps, tuple(mean(of_task[step] for of_task in scores_of) for step in steps)) if steps else None


def _calibration(runs: Runs, split: Split, tasks: Sequence[str]) -> list[Chart | Table]:
    found = {name: run.calibration_errors(split) for name, run in runs.items()}
    shown = tuple(name for name in tasks if any(name in of_run for of_run in found.values()))
    if not shown:
        return []
    series = {name: tuple(of_run.get(task) for task in shown) for name, of_run in found.items()}
    caption = f"Expected calibration error of the classification tasks on {split} rows, with the fitted temperatures."
    rows = tuple(zip(shown, *map(decimals, series.values()), strict=True))
    title = "Calibration errors"
    chart = Categories("calibration", title, caption, shown, series, "calibration error")
    return [chart, Table(title, ("task", *runs), rows)]


def _sizes(runs: Runs) -> list[Chart]:
    names = tuple(runs)
    trained = tuple(float(run.metrics.trainable_parameters) for run in runs.values())
    parts = dict.fromkeys(part for run in runs.values() for part in run.details.seconds)
    seconds = {part: tuple(run.details.seconds.get(part) for run in runs.values()) for part in parts}
    charts: list[Chart] = [
        Categories(
            "parameters",
            "Trained parameters",
            "Number of parameters that are trained.",
            names,
            {"trained parameters": trained},
            "parameters",
            "bars",
        )
    ]
    if seconds:
        charts.append(
            Categories("time", "Time", "Duration of each part of the runs.", names, seconds, "seconds", "bars")
        )
    return charts


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
