"""The file `details.json` of a run, which `hyperadapters report` reads. This module needs no PyTorch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AllowInfNan, Field, Strict, model_validator

from hyperadapters.config import Int, Split, StrictModel, parse
from hyperadapters.errors import DataError
from hyperadapters.utils.files import write_atomically
from hyperadapters.utils.reading import parse_json

DETAILS_FILE = "details.json"
FORMAT = 1
BACKBONE = "backbone"
"""Name of the frozen part of a model among its parameters."""

Number = Annotated[float, Strict(), AllowInfNan(False), Field(ge=-1e100, le=1e100)]
"""A number whose square is finite, far above those of float32, in which models compute."""
Share = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[Int, Field(ge=0, le=2**53)]
"""A count that a float represents exactly, as figures need it."""


class Curve(StrictModel):
    """Values at given places of the horizontal axis.

    Attributes:
        x: Places.
        y: Values at the places, as many.
    """

    x: tuple[Number, ...] = ()
    y: tuple[Number, ...] = ()

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.x) != len(self.y):
            raise ValueError(f"expected as many values as places, found {len(self.y)} and {len(self.x)}")
        return self


class Bin(StrictModel):
    """Rows whose most probable labels have similar probabilities.

    Attributes:
        rows: Number of rows.
        confidence: Mean probability of the most probable label.
        accuracy: Share of rows for which this label is right.
    """

    rows: Count
    confidence: Share
    accuracy: Share


class ErrorLimit(StrictModel):
    """What is answered with a `max_error`.

    Attributes:
        max_error: Maximum share of wrong answers.
        answered: Share of rows that are answered.
        wrong: Share of wrong answers among them; None without any.
    """

    max_error: Share
    answered: Share
    wrong: Share | None


class DeclineRate(StrictModel):
    """What is declined by the conformal threshold of a rate.

    Attributes:
        rate: Maximum share of declined inputs that was asked for.
        bound: Share that the threshold guarantees, from the validation rows that are most similar to the task.
        declined: Share of those rows of the evaluated split that are most similar to the task and declined.
        rows: Number of these rows.
    """

    rate: Share
    bound: Share
    declined: Share
    rows: Count


class TaskDetails(StrictModel):
    """What is kept of one task.

    Attributes:
        name: Name of the task.
        metric: Main metric.
        rows: Number of rows of each split.
        majority: Main metric on the test rows if the most frequent label, or the mean number, is predicted for each of
            them; None without test rows.
        declined: Share of the task's rows of the evaluated split that are declined if their task is not given; None if
            the method cannot route.
        reliability: Bins of a classification task with the temperature; empty for other tasks.
        reliability_before: The same with a temperature of 1.
        risk: Share of wrong answers (y) among the most confident share of rows (x) of a classification task.
        error_limits: Answers with several limits of errors.
        decline_rates: Declined rows at several rates.
    """

    name: str
    metric: str
    rows: dict[Split, Count]
    majority: Number | None = None
    declined: Share | None = None
    reliability: tuple[Bin, ...] = ()
    reliability_before: tuple[Bin, ...] = ()
    risk: Curve = Curve()
    error_limits: tuple[ErrorLimit, ...] = ()
    decline_rates: tuple[DeclineRate, ...] = ()


class Point(StrictModel):
    """A row of the evaluated split on the map.

    Attributes:
        task: Index of its task.
        nearest: Index of the most similar task; None if the method cannot route, or this task was removed.
        vector: Instance vector of unit length, rounded.
        text: The text, or both texts of a pair, shortened.
        target: The label, number or text that is right, shortened.
        answer: The answer in the same form; None without an answer.
    """

    task: Count
    nearest: Count | None
    vector: tuple[Number, ...]
    text: str
    target: str
    answer: str | None


class RunDetails(StrictModel):
    """What a training run keeps for its report, besides the recipe and `metrics.json`.

    Attributes:
        format: Version of the format.
        versions: Versions of packages.
        device: Device of the training.
        split: Split that is evaluated: test, or validation if there are no test rows; None without either.
        seconds: Duration of each part of the run.
        parameters: Number of parameters of each part of the model.
        losses: Mean of each term of the objective since the previous entry, by step.
        validation_mean: Mean of the main metrics on the validation rows, by step.
        validation: Main metric of each task on its validation rows, by step.
        best_step: Step of the state that is kept; None if it is the last one.
        tasks: What is kept of each task, in the order of the model.
        prototypes: Prototypes of the first tasks, of unit length and rounded; empty for a method without prototypes.
        confusion: Index of a task, index of the most similar task, and number of rows of the evaluated split.
        points: Rows of the evaluated split on the map.
    """

    format: Literal[1]
    versions: dict[str, str]
    device: str
    split: Split | None
    seconds: dict[str, Annotated[Number, Field(ge=0)]]
    parameters: dict[str, Count]
    losses: dict[str, Curve]
    validation_mean: Curve
    validation: dict[str, Curve]
    best_step: Count | None
    tasks: tuple[TaskDetails, ...]
    prototypes: tuple[tuple[Number, ...], ...]
    confusion: tuple[tuple[Count, Count, Count], ...]
    points: tuple[Point, ...]

    @model_validator(mode="after")
    def _check_indices(self) -> Self:
        size = len(self.tasks)
        used = [index for own, nearest, _ in self.confusion for index in (own, nearest)]
        used += [index for point in self.points for index in (point.task, point.nearest) if index is not None]
        if len(self.prototypes) > size or any(index >= size for index in used):
            raise ValueError(f"expected indices of {size} tasks, found others")
        if len({task.name for task in self.tasks}) < size:
            raise ValueError("expected tasks of different names, found a name twice")
        if len({len(vector) for vector in (*self.prototypes, *(point.vector for point in self.points))}) > 1:
            raise ValueError("expected prototypes and instance vectors of the same size, found several sizes")
        return self


def read_details(folder: Path) -> RunDetails:
    """Read the details of a finished run.

    Args:
        folder: Folder of the run.

    Returns:
        The details.

    Raises:
        DataError: If the file is missing or has other contents.
    """
    path = folder / DETAILS_FILE
    try:
        values = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file, as in an unfinished run or one of an earlier version; train the recipe again"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected JSON, which cannot be read: {error}; train the recipe again") from error
    if isinstance(values, dict) and values.get("format", FORMAT) != FORMAT:
        raise DataError(
            f"{path}: expected format {FORMAT}, found {values['format']!r:.100}; use the version that wrote it"
        )
    return parse(RunDetails, values, DataError, str(path))


def forget_tasks(folder: Path, kept: Collection[str]) -> None:
    """Remove everything about other tasks from the details of a run, and the whole file if it cannot be read.

    Args:
        folder: Folder that may contain such a file.
        kept: Names of the tasks that are kept, under which they were trained.

    Raises:
        OutputError: If the file cannot be written.
    """
    path = folder / DETAILS_FILE
    if not path.exists():
        return
    try:
        details = read_details(folder)
    except DataError:
        path.unlink()
        return
    if not all(task.name in kept for task in details.tasks):
        write_atomically(path, _only(details, kept).model_dump_json().encode())


def _only(details: RunDetails, kept: Collection[str]) -> RunDetails:
    old = [index for index, task in enumerate(details.tasks) if task.name in kept]
    new = {index: place for place, index in enumerate(old)}
    points = []
    for point in details.points:
        if point.task in new:
            nearest = None if point.nearest is None else new.get(point.nearest)
            points.append(point.model_copy(update={"task": new[point.task], "nearest": nearest}))
    return details.model_copy(
        update={
            "validation": {name: curve for name, curve in details.validation.items() if name in kept},
            "tasks": tuple(details.tasks[index] for index in old),
            "prototypes": tuple(details.prototypes[index] for index in old if index < len(details.prototypes)),
            "confusion": tuple(
                (new[own], new[near], count) for own, near, count in details.confusion if {own, near} <= new.keys()
            ),
            "points": tuple(points),
        }
    )
