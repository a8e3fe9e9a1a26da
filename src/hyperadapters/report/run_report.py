"""The report on one finished run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from hyperadapters.checkpoints.details_file import BACKBONE, DETAILS_FILE, Bin, Curve, RunDetails, TaskDetails
from hyperadapters.config import RECIPE_FILE
from hyperadapters.report.charts import (
    Categories,
    Chart,
    Line,
    Lines,
    Matrix,
    Report,
    Section,
    Table,
    Text,
    Values,
    percent,
)
from hyperadapters.report.maps import MAX_MATRIX, maps_of, similarity_of
from hyperadapters.report.runs import Changes, FinishedRun

MEAN = "mean of the tasks"
MAX_PANELS = 30
"""Number of tasks up to which each has its own reliability diagram."""
NEEDED_FOR = {
    DETAILS_FILE: "learning curves, maps of the tasks, routing of each task, diagrams of certainty, parameters and "
    "durations of the parts of the run, and versions",
    RECIPE_FILE: "recipe and no settings",
}
"""What is not shown without a file."""


def run_report(run: FinishedRun) -> Report:
    """Return the report on a run.

    Args:
        run: What the files of the run say.
    """
    details = run.details
    recipe = None if run.recipe is None else Text("Recipe", run.recipe)
    versions = Table("Versions", ("package", "version"), tuple(details.versions.items())) if details.versions else None
    sections = (
        Section("Scores", (scores(run), _score_table(run)) if run.main_scores else ()),
        Section("Learning curves", tuple(learning_curves(details))),
        Section("Map of the tasks", (*maps_of(details), *_present(similarity_of(details)))),
        Section("Routing", _present(confusion(details), _routing_table(details), declined(details))),
        Section("Certainty", (*certainty(details), *_present(_calibration_table(run)))),
        Section("Parameters and time", _present(parameters(details), durations(details))),
        Section("Recipe and versions", _present(recipe, versions)),
    )
    shown = tuple(section for section in sections if section.content)
    return Report(f"Report on {run.folder.resolve().name}", facts(run), shown, notes(run))


def notes(run: FinishedRun) -> tuple[str, ...]:
    """Return what a reader has to know about a whole report on a run.

    Args:
        run: The run.
    """
    missing = (
        f"The folder has no {name}, so the report shows no {NEEDED_FOR[name]}. To get them, train the recipe again."
        for name in run.missing
    )
    changed = _changed(run.changes)
    return (*missing, changed) if changed else tuple(missing)


def _changed(changes: Changes) -> str:
    """Return sentences on the tasks that have changed since the training; an empty text if there are none."""
    found = []
    if changes.removed:
        found.append(
            f"Removed: {_quoted(changes.removed)}. The scores, the calibration, the routing accuracy, the losses, the "
            "parameters, the durations and the recipe are those of the training with them; the other figures and "
            "tables are without their rows, which were deleted together with them."
        )
    if changes.renamed:
        found.append("Renamed: " + ", ".join(f"'{old}' to '{new}'" for old, new in changes.renamed.items()) + ".")
    if changes.added:
        found.append(f"Added, and therefore not evaluated in this run: {_quoted(changes.added)}.")
    return (
        " ".join(("The report shows the tasks as they were trained. They have changed since.", *found)) if found else ""
    )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def facts(run: FinishedRun) -> dict[str, str]:
    """Return the short facts of a run.

    Args:
        run: The run.
    """
    metrics, details = run.metrics, run.details
    found = {f"mean score, {split}": f"{value:.4f}" for split, value in metrics.mean.items()}
    if metrics.routing_accuracy is not None:
        found[f"routing accuracy, {details.split}"] = percent(metrics.routing_accuracy)
    found |= {
        "tasks": str(len(run.main_metrics)),
        "trained parameters": f"{metrics.trainable_parameters:,}",
        "training": f"{metrics.seconds:,.0f} s" + (f" on {details.device}" if details.device else ""),
    }
    return found | ({"backbone": str(run.settings["backbone"])} if run.settings else {})


def scores(run: FinishedRun) -> Categories:
    """Return the main metric of each task with the model and with each baseline, and the means.

    Args:
        run: The run, which has scores.
    """
    split, model = run.details.split, run.main_scores
    series = {"model": model, **(run.baselines if split == "test" else {})}
    return Categories(
        "scores",
        f"Scores on {split} rows",
        "Main metric of each task with the trained model"
        + (", and with baselines that need no training of the model." if len(series) > 1 else "."),
        (*(f"{task} ({run.main_metrics[task]})" for task in model), MEAN),
        {name: with_mean([found.get(task) for task in model]) for name, found in series.items()},
        "score",
    )


def with_mean(values: Sequence[float | None]) -> Values:
    """Return values with their mean at the end, which is None if one of them is missing.

    Args:
        values: Values of categories.
    """
    known = [value for value in values if value is not None]
    return (*values, sum(known) / len(known) if known and len(known) == len(values) else None)


def _score_table(run: FinishedRun) -> Table:
    rows = []
    splits = tuple(run.metrics.mean)
    for task, of_splits in run.metrics.tasks.items():
        for metric in dict.fromkeys(metric for found in of_splits.values() for metric in found):
            values = [of_splits.get(split, {}).get(metric) for split in splits]
            rows.append((task, metric, *("" if value is None else f"{value:.4f}" for value in values)))
    return Table("All metrics", ("task", "metric", *splits), tuple(rows))


def learning_curves(details: RunDetails) -> list[Chart]:
    """Return the losses and the validation scores by step.

    Args:
        details: Details of the run.
    """
    found: list[Chart] = []
    losses = {name: curve for name, curve in details.losses.items() if name != "total"}
    if losses:
        caption = "Mean of each term of the objective since the previous entry of the log, weighted as in their sum."
        found.append(Lines("losses", "Losses", caption, lines_of(losses), "step", "loss", panels=True))
    if details.validation_mean.x:
        kept = "the last one" if details.best_step is None else f"that of step {details.best_step}"
        caption = (
            f"Main metric of each task on its validation rows during the training. The state that was kept is {kept}. "
            "With the preset plus, the scores of the finished model, which are under Scores, may differ, because heads "
            "are fitted again at the end."
        )
        curves = lines_of({MEAN: details.validation_mean, **details.validation})
        found.append(Lines("validation", "Validation scores", caption, curves, "step", "score", order=_names(details)))
    return found


def lines_of(curves: Mapping[str, Curve]) -> dict[str, Line]:
    """Return curves as lines.

    Args:
        curves: Curves by name.
    """
    return {name: (curve.x, curve.y) for name, curve in curves.items()}


def confusion(details: RunDetails) -> Matrix | None:
    """Return the share of each task's rows whose most similar task is each of the tasks.

    Args:
        details: Details of the run.

    Returns:
        The matrix; None if the method cannot route, or there are more than `MAX_MATRIX` tasks.
    """
    size = len(details.tasks)
    if not details.confusion or size > MAX_MATRIX:
        return None
    counts = [[0] * size for _ in range(size)]
    for own, nearest, count in details.confusion:
        counts[own][nearest] += count
    names = _names(details)
    return Matrix(
        "routing-confusion",
        "Routing confusion",
        f"Most similar task of the {details.split} rows of each task. The numbers are rows, the colours their share of "
        "the task.",
        names,
        names,
        tuple(tuple(count / max(1, sum(row)) for count in row) for row in counts),
        tuple(tuple(map(str, row)) for row in counts),
        (0.0, 1.0),
        "most similar task",
        "own task",
    )


def _routing_table(details: RunDetails) -> Table | None:
    counts = [0] * len(details.tasks)
    right = list(counts)
    for own, nearest, count in details.confusion:
        counts[own] += count
        right[own] += count if own == nearest else 0
    rows = tuple(
        (task.name, str(count), percent(found / count), percent(task.declined))
        for task, count, found in zip(details.tasks, counts, right, strict=True)
        if count
    )
    header = ("task", "rows", "accuracy", "declined")
    return Table("Routing of each task", header, rows) if rows else None


def declined(details: RunDetails) -> Lines | None:
    """Return the shares of declined rows against the bounds that conformal thresholds guarantee.

    Args:
        details: Details of the run.

    Returns:
        The figure; None without validation and test rows, or if the method cannot route.
    """
    lines = _of_tasks(
        details,
        lambda task: ([rate.bound for rate in task.decline_rates], [rate.declined for rate in task.decline_rates]),
    )
    if not lines:
        return None
    return Lines(
        "coverage",
        "Declined rows against the bound",
        f"Share of the {details.split} rows most similar to a task that conformal thresholds from its validation rows "
        "decline, against the share that they guarantee on average. A share p of n rows has a standard error of the "
        "square root of p (1 - p) / n.",
        lines,
        "guaranteed bound",
        "declined share",
        diagonal=True,
        order=_names(details),
    )


def certainty(details: RunDetails) -> list[Lines]:
    """Return reliability diagrams, risk-coverage curves, and answers with a limit of errors.

    Args:
        details: Details of the run.

    Returns:
        The figures; none without classification tasks with heads.
    """
    risk = lines_of({task.name: task.risk for task in details.tasks if task.risk.x})
    bins = "Share of right answers against the mean probability of the answer in bins of equal width, with "
    area = ". The area of a point shows the number of rows."

    def reliability(name: str, title: str, what: str, bins_of: Callable[[TaskDetails], tuple[Bin, ...]]) -> Lines:
        found = {task.name: of_task for task in details.tasks if (of_task := bins_of(task))}
        return Lines(
            name,
            title,
            bins + what + area,
            {
                task: (tuple(one.confidence for one in of_task), tuple(one.accuracy for one in of_task))
                for task, of_task in found.items()
            },
            "probability of the answer",
            "share of right answers",
            diagonal=True,
            rows={task: tuple(one.rows for one in of_task) for task, of_task in found.items()},
            order=_names(details),
            panels=len(found) <= MAX_PANELS,
        )

    answered = _of_tasks(details, lambda task: _limits(task, lambda limit: limit.answered))
    wrong = _of_tasks(details, lambda task: _limits(task, lambda limit: limit.wrong))
    found = [
        reliability("reliability", "Reliability", "the fitted temperatures", lambda task: task.reliability),
        reliability(
            "reliability-before",
            "Reliability without temperatures",
            "a temperature of 1",
            lambda task: task.reliability_before,
        ),
        Lines(
            "risk-coverage",
            "Risk and coverage",
            "Share of wrong answers if only the most certain share of rows is answered.",
            risk,
            "answered share of rows",
            "share of wrong answers",
            order=_names(details),
        ),
        Lines(
            "answered",
            "Answers with a limit of errors",
            "Share of rows that are answered with max_error, for which the validation rows have to show that at most "
            "this share of answers is wrong.",
            answered,
            "max_error",
            "answered share of rows",
            order=_names(details),
        ),
        Lines(
            "wrong-answers",
            "Errors with a limit of errors",
            "Share of wrong answers among those given with max_error, which is to stay below the diagonal.",
            wrong,
            "max_error",
            "share of wrong answers",
            diagonal=True,
            order=_names(details),
        ),
    ]
    return [figure for figure in found if figure.lines]  # with few rows, nothing is answered


def _limits(task: TaskDetails, value: Callable[..., float | None]) -> tuple[list[float], list[float]]:
    found = [(limit.max_error, shown) for limit in task.error_limits if (shown := value(limit)) is not None]
    return [x for x, _ in found], [y for _, y in found]


def _of_tasks(
    details: RunDetails, points: Callable[[TaskDetails], tuple[Iterable[float], Iterable[float]]]
) -> dict[str, Line]:
    """Return the lines of those tasks that have points."""
    found = {task.name: points(task) for task in details.tasks}
    return {name: (x, y) for name, (xs, ys) in found.items() if (x := tuple(xs)) and (y := tuple(ys))}


def _calibration_table(run: FinishedRun) -> Table | None:
    rows = tuple(
        (
            task,
            split,
            *(
                f"{found[name]:.4f}" if name in found else ""
                for name in ("temperature", "calibration_error_before", "calibration_error", "brier_score")
            ),
        )
        for task, splits in run.metrics.calibration.items()
        for split, found in splits.items()
    )
    header = ("task", "split", "temperature", "calibration error before", "calibration error", "Brier score")
    return Table("Calibration", header, rows) if rows else None


def parameters(details: RunDetails) -> Categories | None:
    """Return the numbers of parameters of the trained parts of the model.

    Args:
        details: Details of the run.

    Returns:
        The figure; None without such numbers.
    """
    trained = {part: count for part, count in details.parameters.items() if part != BACKBONE}
    frozen = details.parameters.get(BACKBONE, 0)
    caption = f"Parameters of each trained part. The frozen backbone has {frozen:,}."
    return _bars("parameters", "Trained parameters", caption, trained, "parameters")


def durations(details: RunDetails) -> Categories | None:
    """Return the durations of the parts of the run.

    Args:
        details: Details of the run.

    Returns:
        The figure; None without durations.
    """
    caption = f"Duration of each part of the run on {details.device}."
    return _bars("time", "Time", caption, details.seconds, "seconds")


def _names(details: RunDetails) -> tuple[str, ...]:
    return tuple(task.name for task in details.tasks)


def _bars(
    name: str, title: str, caption: str, found: dict[str, float] | dict[str, int], axis: str
) -> Categories | None:
    if not found:
        return None
    return Categories(name, title, caption, tuple(found), {axis: tuple(map(float, found.values()))}, axis, "bars")


def _present(*items: Chart | Table | Text | None) -> tuple[Chart | Table | Text, ...]:
    return tuple(item for item in items if item is not None)
