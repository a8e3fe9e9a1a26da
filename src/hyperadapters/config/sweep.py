"""Settings of a sweep, which trains a recipe several times with different settings."""

from __future__ import annotations

import math
from itertools import chain, product
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, Tag, model_validator

from hyperadapters.config.validation import LIST, MAPPING, Int, Number, StrictModel, by_type
from hyperadapters.errors import shown


def _check_scalar(value: object) -> object:
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"expected a number, a text, true, false or null; found {shown(value)}")
    return value


Scalar = Annotated[Any, PlainValidator(_check_scalar)]
Values = Annotated[tuple[Scalar, ...], Field(min_length=1)]
"""Values of one setting, each tried as it is written."""
MAX_TRIALS = 10_000


class Range(StrictModel):
    """Numbers from which a setting is drawn; whole numbers if both bounds are.

    Attributes:
        low: Lower bound.
        high: Upper bound, which may be drawn.
        log: Whether the logarithm of the number is uniformly distributed. Default: False.
    """

    low: Number
    high: Number
    log: bool = False

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"expected low below high, found {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"expected a positive low with log, found {self.low}")
        return self


class SweepConfig(StrictModel):
    """Settings that a sweep tries, each named as on the command line, such as "training.learning_rate".

    A sweep either trains each combination of `cases` and `grid` once, or draws `trials` combinations from `ranges`.

    Attributes:
        cases: Settings that are changed together, such as `[{model.contrast: none}, {model.contrast: instance}]`.
        grid: Values of settings of which every combination is tried, such as `{seed: [0, 1, 2]}`.
        ranges: Range, or list of values, from which each setting is drawn.
        trials: Number of trials. For `ranges`.
        sampler: Sampler of Optuna for `ranges`: "tpe" (default), which learns from earlier trials, or "random".
    """

    cases: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)] = ({},)
    grid: dict[str, Values] = {}
    ranges: dict[
        str,
        Annotated[
            Annotated[Range, Tag(MAPPING)] | Annotated[Values, Tag(LIST)],
            by_type("a range with low and high, or a list of values"),
        ],
    ] = {}
    trials: Int | None = Field(None, ge=1)
    sampler: Literal["tpe", "random"] = "tpe"

    @model_validator(mode="after")
    def _check_one_kind(self) -> Self:
        has_grid = bool(self.grid) or self.cases != ({},)
        if has_grid == bool(self.ranges):
            raise ValueError("expected either ranges, or cases and grid; found " + ("both" if has_grid else "neither"))
        if bool(self.ranges) != (self.trials is not None):
            raise ValueError("trials is the number of draws from ranges: give both or neither of them")
        if self.sampler != "tpe" and not self.ranges:
            raise ValueError("sampler is only for ranges, which are not given; remove it")
        own = [key for key in (*chain(*self.cases), *self.grid, *self.ranges) if key.partition(".")[0] == "sweep"]
        if own:
            raise ValueError(f"'{own[0]}' cannot be tried; remove it, because a trial has no section sweep")
        both = [key for case in self.cases for key in case if key in self.grid]
        if both:
            raise ValueError(f"'{both[0]}' is in cases and in grid; remove one of them")
        if self.num_trials > MAX_TRIALS:
            raise ValueError(f"expected at most {MAX_TRIALS} trials, found {self.num_trials}; try fewer values")
        lists = {**self.grid, **{key: v for key, v in self.ranges.items() if isinstance(v, tuple)}, "cases": self.cases}
        for name, values in lists.items():
            if any(value in values[:place] for place, value in enumerate(values)):
                raise ValueError(f"{name}: expected different values, found one twice in {shown(list(values))}")
        return self

    @property
    def combinations(self) -> list[dict[str, Any]]:
        """The settings of each trial of a grid, in order; those of the last key change first."""
        values = product(*self.grid.values())
        grid = [dict(zip(self.grid, chosen, strict=True)) for chosen in values]
        return [{**case, **chosen} for case in self.cases for chosen in grid]

    @property
    def num_trials(self) -> int:
        """Number of trials."""
        return self.trials or math.prod(map(len, (self.cases, *self.grid.values())))
