"""Errors caused by input from outside, such as a recipe, a data file, a checkpoint or an argument.

Each message says what was expected, what was found and what to do. The command line exits with the code of the error,
which is 2 for a wrong call or wrong input. Any other exception is a failure of the program, with exit code 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_SHOWN = 1000
"""Number of characters of a value from outside that an error message shows."""
MAX_COMPARED = 1000
"""Length up to which unknown names are compared with known ones."""


class HyperAdaptersError(Exception):
    """Base class of all errors that this library raises deliberately."""

    exit_code = 2


class RecipeError(HyperAdaptersError):
    """A recipe or a model configuration is invalid."""


class DataError(HyperAdaptersError):
    """A data file, one of its rows, or an argument that holds data is invalid."""


class TaskError(HyperAdaptersError):
    """The definition of a task is invalid, or a task is unknown or does not support what is asked of it."""


class BackboneError(HyperAdaptersError):
    """A backbone cannot be loaded, or adapters cannot be inserted into it."""


class CheckpointError(HyperAdaptersError):
    """A checkpoint is missing, is damaged, has an unknown format, or belongs to another backbone."""


class ConflictError(CheckpointError):
    """A checkpoint was changed meanwhile, so that writing it would discard the other change."""


class OutputError(HyperAdaptersError):
    """A result cannot be written to the given path."""


class ExportError(HyperAdaptersError):
    """The format of an export cannot represent the model."""


class ServingError(HyperAdaptersError):
    """The settings of the server are invalid."""


class ClusterError(HyperAdaptersError):
    """Ray cannot be started, or has fewer processors than are asked for."""


class NotFiniteError(HyperAdaptersError):
    """A loss, a gradient or a prediction is not a finite number."""


class InterruptionError(HyperAdaptersError):
    """A training was ended by a signal and can be resumed. The exit code is 128 plus the number of the signal."""


class OutOfMemoryError(HyperAdaptersError):
    """A batch needs more memory than the device has."""

    exit_code = 1


class MissingPackageError(HyperAdaptersError):
    """An optional package is required but not installed."""

    exit_code = 1


def check_int(name: str, value: object, least: int, error: type[HyperAdaptersError] = DataError) -> None:
    """Check that an argument is an integer and not too small.

    Args:
        name: Name of the argument, for the message.
        value: Value of the argument.
        least: Smallest valid value.
        error: Class of the error to raise. Default: `DataError`.

    Raises:
        error: If the value is not an integer or is less than `least`.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < least:
        raise error(f"{name}: expected an integer of {least} or more, found {shown(value)}")


def check_seed(value: object) -> None:
    """Check that an argument is an integer that PyTorch, NumPy and scikit-learn accept as a seed.

    Args:
        value: Value of the argument.

    Raises:
        DataError: If the value is not an integer from 0 to 2 ** 32 - 1.
    """
    check_int("seed", value, 0)
    if int(value) >= 2**32:  # type: ignore[call-overload]
        raise DataError(f"seed: expected an integer below 2 ** 32, found {shown(value)}")


def shown(value: object) -> str:
    """Return a value from outside as it is shown in an error message, where a long one is shortened.

    Args:
        value: Value of any type, also one whose representation Python refuses to compute.
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer with too many digits, or collections that are nested too deeply
        return f"a value of type {type(value).__name__} that is too large to show"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the known name closest to a name, or `""` if none is close.

    Args:
        name: Unknown name.
        known: Known names.
    """
    # The comparison takes quadratic time, and nobody misspells a name of thousands of characters.
    names = [text for item in known if len(text := str(item)) <= MAX_COMPARED]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6) if len(str(name)) <= MAX_COMPARED else []
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Return the error message for an unknown name, with the closest known name and all known names.

    Args:
        what: What the name denotes, such as "task".
        name: Unknown name.
        known: Known names.
    """
    names = sorted(str(item) for item in known)
    listed = ", ".join(names) if names else "none"
    return f"Unknown {what} '{name}'.{did_you_mean(name, names)} Known: {listed}."
