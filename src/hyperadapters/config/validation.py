"""Validation of whatever comes from outside: unknown keys refused, all faults reported together."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import AllowInfNan, BaseModel, BeforeValidator, ConfigDict, Strict, ValidationError

from hyperadapters.errors import HyperAdaptersError, RecipeError, did_you_mean

Model = TypeVar("Model", bound=BaseModel)
Int = Annotated[int, Strict()]


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, found {value}")
    return value


Float = Annotated[float, AllowInfNan(False), BeforeValidator(_refuse_bool)]
"""A finite number; also a text such as "1e-3", which YAML does not read as a number, but not a truth value."""


class StrictModel(BaseModel):
    """Immutable, refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def parse(model: type[Model], values: object, error: type[HyperAdaptersError] = RecipeError, where: str = "") -> Model:
    """Validate `values` as `model`, reporting all faults together with the nearest known keys.

    Raises:
        error: with one line a fault: where it is, what is wrong, what was found.
    """
    try:
        return model.model_validate(values)
    except ValidationError as invalid:
        faults = [_describe(model, fault) for fault in invalid.errors()]
        raise error("\n".join([f"{where or model.__name__}: {len(faults)} fault(s)", *faults])) from None


def _describe(model: type[BaseModel], fault: Any) -> str:
    path = [str(part) for part in fault["loc"]]
    place = ".".join(path) or "as a whole"
    if fault["type"] == "extra_forbidden":
        return f"  {place}: unknown key.{did_you_mean(path[-1], _known_keys(model, path[:-1]))}"
    if fault["type"] == "missing":
        return f"  {place}: required, not given"
    message = fault["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    if fault["type"] == "literal_error":
        message += "." + did_you_mean(str(fault["input"]), re.findall(r"'([^']*)'", fault["ctx"]["expected"]))
    found = "" if fault["type"] == "value_error" else f"; found {fault['input']!r}"
    return f"  {place}: {message}{found}"


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    current: Any = model
    for part in path:
        if part not in current.model_fields:  # an index of a list, or a key of a mapping
            continue
        annotation = current.model_fields[part].annotation
        nested = [annotation, *getattr(annotation, "__args__", ())]
        current = next((item for item in nested if isinstance(item, type) and issubclass(item, BaseModel)), None)
        if current is None:
            return []
    return [field.alias or name for name, field in current.model_fields.items()]
