"""Strict validation of recipes, tasks and model configurations, which refuses unknown keys and reports all faults."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Any, Self, TypeVar, cast

from pydantic import (
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    ModelWrapValidatorHandler,
    Strict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import InitErrorDetails

from hyperadapters.errors import HyperAdaptersError, RecipeError, did_you_mean, shown
from hyperadapters.utils.texts import counted

Model = TypeVar("Model", bound=BaseModel)
Int = Annotated[int, Strict()]
TEXT, LIST, MAPPING = "(text)", "(list)", "(mapping)"
"""Tags of the types of a union, by which `by_type` chooses."""
WRONG_TYPE = "wrong_type"
"""Type of the fault of a value that has none of the types."""
NO_KEYS = (TEXT, LIST, MAPPING, "[key]")
"""What pydantic has in the location of a fault beside keys and indices."""
MAX_FAULTS = 100
"""Number of faults that an error message describes."""

NUMBER_LIMIT = re.compile(r"Input should be ((greater|less) than|a multiple)")

RENAMED_KEYS = {
    "label_words": "verbalizer",
    "cut": "held_out",
    "prototypes_per_task": "centroids_per_task",
    "width": "hidden_size",
}
"""Keys of earlier versions and their present names."""

RENAMED_VALUES = {"head_inputs": {"text": "text_features", "texts": "pair_features"}}
"""Values of earlier versions and their present names, for each key."""


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, found {value}")
    return value


Float = Annotated[float, AllowInfNan(False), BeforeValidator(_refuse_bool)]
"""A finite number, or a string such as "1e-3", which YAML does not read as a number. Booleans are refused."""


def _keep_int(value: object, as_float: ValidatorFunctionWrapHandler) -> float:
    return value if type(value) is int else cast(float, as_float(value))


Number = Annotated[Float, WrapValidator(_keep_int)]
"""A number as for `Float`, of which whole ones remain integers."""


def by_type(expected: str) -> Discriminator:
    """Return what chooses a tagged type of a union, so that a wrong value has one fault and not one for each type.

    Args:
        expected: What is expected, for the message about a value that has none of the types.
    """

    def tag(value: object) -> str:
        if isinstance(value, (dict, BaseModel)):
            return MAPPING
        return LIST if isinstance(value, (list, tuple)) else TEXT

    return Discriminator(tag, custom_error_type=WRONG_TYPE, custom_error_message=f"expected {expected}")


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (tuple, dict)):
        yield from chain.from_iterable(map(_texts, chain(value, value.values()) if isinstance(value, dict) else value))


def _is_unicode(text: str) -> bool:
    """Return whether a text can be written: YAML and JSON can express unpaired surrogates, which UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class StrictModel(BaseModel):
    """Base class of all configurations: immutable, and unknown keys and texts that are not Unicode are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="wrap")
    @classmethod
    def _explain_renamed(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Name the new key or value in the error for a renamed one."""
        try:
            return handler(values)
        except ValidationError as invalid:
            faults = [_renamed(cls, fault) for fault in invalid.errors(include_url=False)]
            raise ValidationError.from_exception_data(invalid.title, faults) from None

    @model_validator(mode="after")
    def _check_unicode(self) -> Self:
        for name, value in vars(self).items():
            if invalid := next((text for text in _texts(value) if not _is_unicode(text)), None):
                raise ValueError(f"{name}: expected valid Unicode, found {shown(invalid)}; correct the text")
        return self


def _renamed(model: type[BaseModel], fault: Any) -> InitErrorDetails:
    """Return the details of a fault, with the new name in the message if it is a renamed key or value."""
    key, value, message = str(next(iter(fault["loc"]), "")), fault["input"], None
    if fault["type"] == "extra_forbidden" and RENAMED_KEYS.get(key) in model.model_fields:
        message = f"this key was renamed; use '{RENAMED_KEYS[key]}' instead"
    elif fault["type"] == "literal_error" and isinstance(value, str) and value in RENAMED_VALUES.get(key, {}):
        message = f"the value '{value}' was renamed; use '{RENAMED_VALUES[key][value]}' instead"
    elif fault["type"] == WRONG_TYPE:  # pydantic cannot make this fault anew
        message = f"{fault['msg']}; found {shown(value)}"
    details: dict[str, Any] = {name: fault[name] for name in InitErrorDetails.__annotations__ if name in fault}
    if message is not None:
        details |= {"type": "value_error", "ctx": {"error": ValueError(message)}}
    return cast(InitErrorDetails, details)


def parse(model: type[Model], values: object, error: type[HyperAdaptersError] = RecipeError, where: str = "") -> Model:
    """Validate values from outside as a configuration and report all faults together.

    Args:
        model: Class of the configuration.
        values: Mapping of keys to values.
        error: Class of the error to raise.
        where: Name of the origin of the values, such as a file name, for the message. Default: the name of `model`.

    Returns:
        The configuration.

    Raises:
        error: If the values are invalid. The message has one line for each fault, which names its location, what is
            wrong and what was found, and the nearest known key for an unknown one.
    """
    try:
        return model.model_validate(values)
    except ValidationError as invalid:
        faults = [fault for fault in invalid.errors() if not _is_of_items(fault)]
        lines = [_describe(model, fault) for fault in faults[:MAX_FAULTS]]
        if len(faults) > MAX_FAULTS:
            lines.append(f"  and {len(faults) - MAX_FAULTS} more")
        raise error("\n".join([f"{where or model.__name__}: {counted(len(faults), 'fault')}", *lines])) from None


def _is_of_items(fault: Any) -> bool:
    """Return whether a list is too short only because pydantic does not count its invalid items, which are faults."""
    return bool(fault["type"] == "too_short" and fault["ctx"]["actual_length"] != len(fault["input"]))


def _describe(model: type[BaseModel], fault: Any) -> str:
    path = [str(part) for part in fault["loc"] if part not in NO_KEYS]
    place = ".".join(path) or "as a whole"
    if fault["type"] == "extra_forbidden":
        return f"  {place}: unknown key.{did_you_mean(path[-1], _known_keys(model, path[:-1]))}"
    if fault["loc"][-1:] == ("[key]",) and fault["type"] == "literal_error":
        return f"  {place}: unknown key, expected {fault['ctx']['expected']}.{did_you_mean(path[-1], _literals(fault))}"
    if fault["type"] == "missing":
        return f"  {place}: required, not given"
    if fault["type"] == "value_error":
        return f"  {place}: {fault['msg'].removeprefix('Value error, ')}"
    found, nearest = shown(fault["input"]), ""
    message = fault["msg"].replace("valid tuple", "list")
    if fault["type"] == "too_short":
        message = f"expected {fault['ctx']['min_length']} or more items"
    if fault["type"] == "literal_error":
        nearest = did_you_mean(found.strip("'"), _literals(fault))
    message = NUMBER_LIMIT.sub(r"expected a number \1", message).replace("Input should be", "expected")
    return f"  {place}: {message}; found {found}{'.' * bool(nearest)}{nearest}"


def _literals(fault: Any) -> list[str]:
    """Return the values of which a fault of the type `literal_error` expected one."""
    return re.findall(r"'([^']*)'", fault["ctx"]["expected"])


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
