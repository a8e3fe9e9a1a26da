"""The report on a file of result rows, as the benchmark of sample efficiency writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from hyperadapters.checkpoints.details_file import Count, Number
from hyperadapters.config import parse
from hyperadapters.errors import DataError
from hyperadapters.report.charts import Categories, Chart, Line, Lines, Matrix, Report, Section, Table
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


def read_rows(path: Path) -> tuple[list[ResultRow], int]:
    """Read a file of result rows.

    Args:
        path: JSON-lines file.

    Returns:
        Its rows, at least one, and the number of trials of a sweep that failed.

    Raises:
        DataError: If the file cannot be read, has no rows, or a row has another form.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    rows, failed = [], 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                values = parse_json(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: expected a JSON object: {error}") from error
            if isinstance(values, dict) and "error" in values:
                failed += 1
                continue
            where = f"{path}, line {number}: expected a result row, as `hyperadapters sweep` writes it"
            rows.append(parse(ResultRow, values, DataError, where))
    if not rows:
        raise DataError(f"{path}: expected result rows, found none")
    return rows, failed


def rows_report(path: Path, rows: Sequence[ResultRow], failed: int) -> Report:
    """Return the report on result rows, with a section for each suite.

    Args:
        path: File of the rows.
        rows: The rows.
        failed: Number of trials of a sweep that failed.
    """
    suites = tuple(dict.fromkeys(row.suite for row in rows))
    facts = {
        "rows": str(len(rows)),
        "arms": str(len({row.arm for row in rows})),
        "seeds": str(len({row.seed for row in rows})),
    }
    if failed:
        facts["failed trials"] = str(failed)
    sections = tuple(
        Section(f"Suite {suite}", tuple(_content(str(number), [row for row in rows if row.suite == suite])))
        for number, suite in enumerate(suites, start=1)
    )
    return Report(f"Report on {path.name}", facts, sections)


def _content(end: str, rows: Sequence[ResultRow]) -> list[Chart | Table]:
    sizes = sorted({row.n for row in rows}, key=lambda n: (isinstance(n, str), n if isinstance(n, int) else 0, str(n)))
    arms = tuple(dict.fromkeys(row.arm for row in rows))
    content: list[Chart | Table] = []
    for place, n in enumerate(sizes, start=1):
        content += _of_size(f"{end}-{place}", n, [row for row in rows if row.n == n])
    if found := _by_parameters(arms, rows):
        caption = "Mean score of each arm against trained parameters per task, a line over the sizes n."
        title, x_axis = "Score against parameters", "trained parameters per task"
        content.append(Lines(f"parameters-{end}", title, caption, found, x_axis, "mean score", log_x=True))
    seconds = {f"n = {n}": tuple(_mean_seconds(rows, arm, n) for arm in arms) for n in sizes}
    if any(value is not None for values in seconds.values() for value in values):
        caption = "Mean duration of a training."
        content.append(Categories(f"time-{end}", "Time", caption, arms, seconds, "seconds"))
    return content


def _mean_seconds(rows: Sequence[ResultRow], arm: str, n: int | str) -> float | None:
    found = [row.seconds for row in rows if row.arm == arm and row.n == n and row.seconds is not None]
    return mean(found) if found else None


def _of_size(end: str, n: int | str, rows: Sequence[ResultRow]) -> tuple[Chart, Table, Chart]:
    """Return the scores of rows with the same n, with the best arm first. Means over different n are not comparable."""
    of_arms = {arm: [row for row in rows if row.arm == arm] for arm in {row.arm for row in rows}}
    means = {arm: mean(row.score for row in of_arm) for arm, of_arm in of_arms.items()}
    arms = tuple(sorted(means, key=lambda arm: (-means[arm], arm)))
    deviations = {arm: stdev(row.score for row in of_arms[arm]) if len(of_arms[arm]) > 1 else None for arm in arms}
    seeds = {arm: {row.seed for row in of_arms[arm]} for arm in arms}
    tasks = {arm: {name for row in of_arms[arm] for name in row.scores} for arm in arms}
    caption = (
        f"Mean score over the tasks of each arm with n = {n} training rows of each task, over seeds. Error bars are "
        "standard deviations over seeds."
    )
    if len(set(map(frozenset, seeds.values()))) > 1 or len(set(map(frozenset, tasks.values()))) > 1:
        caption += " Not all arms have the same seeds and tasks, and means over different ones are not comparable."
    chart = Categories(
        f"scores-{end}",
        f"Scores, n = {n}",
        caption,
        arms,
        {"mean score": tuple(means[arm] for arm in arms)},
        "mean score",
        errors={"mean score": tuple(deviations[arm] for arm in arms)},
    )
    table = Table(
        f"Scores, n = {n}",
        ("arm", "mean score", "standard deviation", "seeds", "tasks"),
        tuple(
            (arm, _rounded(means[arm]), _rounded(deviations[arm]), str(len(seeds[arm])), str(len(tasks[arm])))
            for arm in arms
        ),
    )
    return chart, table, _tasks(end, n, {arm: of_arms[arm] for arm in arms})


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _tasks(end: str, n: int | str, of_arms: dict[str, list[ResultRow]]) -> Matrix:
    """Return the scores of each task. Colours compare arms only, because the metrics of tasks have different scales."""
    names = tuple(dict.fromkeys(name for rows in of_arms.values() for row in rows for name in row.scores))
    scores: list[list[float | None]] = []
    for rows in of_arms.values():
        known = [[row.scores[name] for row in rows if name in row.scores] for name in names]
        scores.append([mean(values) if values else None for values in known])
    best = [max(value for value in column if value is not None) for column in zip(*scores, strict=True)]
    differences = [
        tuple(None if value is None else value - top for value, top in zip(row, best, strict=True)) for row in scores
    ]
    lowest = min((value for row in differences for value in row if value is not None), default=0.0)
    return Matrix(
        f"tasks-{end}",
        f"Scores by task, n = {n}",
        "Mean score over seeds of each arm on each task. The colours show the difference to the best arm of the task.",
        tuple(of_arms),
        names,
        tuple(differences),
        tuple(tuple("" if value is None else f"{value:.1f}" for value in row) for row in scores),
        (lowest or -1.0, 0.0),
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
