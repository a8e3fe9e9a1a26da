"""The report on a file of result rows, as the benchmark of sample efficiency writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from hyperadapters.checkpoints.details_file import Count, Number
from hyperadapters.config import parse
from hyperadapters.errors import DataError
from hyperadapters.report.charts import Categories, Chart, Line, Lines, Matrix, Report, Section, Values
from hyperadapters.report.maps import labels_of
from hyperadapters.utils.reading import parse_json

Size = Annotated[Number, Field(ge=0)]


class ResultRow(BaseModel):
    """A row: the scores of one arm with one size of the training data and one seed.

    Attributes:
        suite: Name of the tasks together.
        arm: Name of the method with its settings.
        n: Number of training rows of each task, or "all".
        seed: Seed.
        scores: Score of each task.
        score: Mean of the scores.
        trainable_per_task: Number of trained parameters divided by that of the tasks.
        seconds: Duration of the training.
    """

    model_config = ConfigDict(frozen=True)

    suite: str = "main"
    arm: str
    n: Count | str
    seed: Count
    scores: dict[str, Number]
    score: Number
    trainable_per_task: Size | None = None
    seconds: Size | None = None


def read_rows(path: Path) -> list[ResultRow]:
    """Read a file of result rows.

    Args:
        path: JSON-lines file.

    Returns:
        Its rows, at least one.

    Raises:
        DataError: If the file cannot be read, has no rows, or a row has another form.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                values = parse_json(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: expected a JSON object: {error}") from error
            if isinstance(values, dict) and "error" in values:  # a trial of a sweep that failed
                continue
            where = f"{path}, line {number}: expected a result row, as `hyperadapters sweep` writes it"
            rows.append(parse(ResultRow, values, DataError, where))
    if not rows:
        raise DataError(f"{path}: expected result rows, found none")
    return rows


def rows_report(path: Path, rows: Sequence[ResultRow]) -> Report:
    """Return the report on result rows, with a section for each suite.

    Args:
        path: File of the rows.
        rows: The rows.
    """
    suites = tuple(dict.fromkeys(row.suite for row in rows))
    facts = {
        "rows": str(len(rows)),
        "arms": str(len({row.arm for row in rows})),
        "seeds": str(len({row.seed for row in rows})),
    }
    sections = tuple(
        Section(f"Suite {suite}", tuple(_charts(str(number), [row for row in rows if row.suite == suite])))
        for number, suite in enumerate(suites, start=1)
    )
    return Report(f"Report on {path.name}", facts, sections)


def _charts(end: str, rows: Sequence[ResultRow]) -> list[Chart]:
    sizes = sorted({row.n for row in rows}, key=lambda n: (isinstance(n, str), n if isinstance(n, int) else 0, str(n)))
    arms = _ranked(rows)
    charts: list[Chart] = [_scores(end, arms, sizes, rows)]
    charts += [_tasks(f"{end}-{place}", n, arms, rows) for place, n in enumerate(sizes, start=1)]
    if found := _by_parameters(arms, rows):
        caption = "Mean score of each arm against trained parameters per task, a line over the sizes n."
        title, x_axis = "Score against parameters", "trained parameters per task"
        charts.append(Lines(f"parameters-{end}", title, caption, found, x_axis, "mean score", log_x=True))
    seconds = {f"n = {n}": _centres(arms, n, rows, "seconds")[0] for n in sizes}
    if any(value is not None for values in seconds.values() for value in values):
        caption = "Mean duration of a training."
        charts.append(Categories(f"time-{end}", "Time", caption, arms, seconds, "seconds"))
    return charts


def _ranked(rows: Sequence[ResultRow]) -> tuple[str, ...]:
    """Return the arms in descending order of their mean score."""
    means = {arm: mean(row.score for row in rows if row.arm == arm) for arm in {row.arm for row in rows}}
    return tuple(sorted(means, key=lambda arm: (-means[arm], arm)))


def _scores(end: str, arms: tuple[str, ...], sizes: Sequence[int | str], rows: Sequence[ResultRow]) -> Categories:
    found = {f"n = {n}": _centres(arms, n, rows, "score") for n in sizes}
    return Categories(
        f"scores-{end}",
        "Scores",
        "Mean score over the tasks of each arm with n training rows of each task, over seeds. Error bars are standard "
        "deviations over seeds.",
        arms,
        {name: centres for name, (centres, _) in found.items()},
        "mean score",
        errors={name: deviations for name, (_, deviations) in found.items()},
    )


def _centres(arms: Sequence[str], n: int | str, rows: Sequence[ResultRow], attribute: str) -> tuple[Values, Values]:
    """Return the mean of an attribute over the seeds of each arm, and its standard deviation."""
    found = [
        [value for row in rows if row.arm == arm and row.n == n if (value := getattr(row, attribute)) is not None]
        for arm in arms
    ]
    centres = tuple(mean(values) if values else None for values in found)
    return centres, tuple(stdev(values) if len(values) > 1 else None for values in found)


def _tasks(end: str, n: int | str, arms: Sequence[str], rows: Sequence[ResultRow]) -> Matrix:
    of_size = [row for row in rows if row.n == n]
    names = tuple(dict.fromkeys(name for row in of_size for name in row.scores))
    shown = tuple(arm for arm in arms if any(row.arm == arm for row in of_size))
    values: list[list[Any]] = []
    for arm in shown:
        known = [[row.scores[name] for row in of_size if row.arm == arm and name in row.scores] for name in names]
        values.append([mean(scores) if scores else None for scores in known])
    flat = [value for row in values for value in row if value is not None]
    return Matrix(
        f"tasks-{end}",
        f"Scores by task, n = {n}",
        "Mean score over seeds of each arm on each task.",
        shown,
        names,
        tuple(map(tuple, values)),
        labels_of(values, lambda value: "" if value is None else f"{value:.1f}"),
        (min(flat), max(flat)) if flat else (0.0, 1.0),
        "task",
        "arm",
    )


def _by_parameters(arms: Sequence[str], rows: Sequence[ResultRow]) -> dict[str, Line]:
    found = {}
    for arm in arms:
        points = [
            (mean(known), mean(row.score for row in of_arm))
            for n in dict.fromkeys(row.n for row in rows)
            if (of_arm := [row for row in rows if row.arm == arm and row.n == n])
            and (known := [row.trainable_per_task for row in of_arm if row.trainable_per_task])
        ]
        if points:
            found[arm] = (tuple(x for x, _ in points), tuple(y for _, y in points))
    return found
