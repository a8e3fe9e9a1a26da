"""Errors caused by what came from outside: a recipe, a data file, a checkpoint, an argument.

Each message says what was expected, what was found and what to do. The command line ends with the exit code of the
error (2: the call or what it was given is wrong); any other exception is a failure of the program (1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HyperAdaptersError(Exception):
    """Base of all errors this library raises on purpose."""

    exit_code = 2


class RecipeError(HyperAdaptersError):
    """A recipe or a model configuration is wrong."""


class DataError(HyperAdaptersError):
    """A data file or one of its rows is wrong."""


class TaskError(HyperAdaptersError):
    """A task is defined wrongly, unknown, or addressed by a wrong index."""


class BackboneError(HyperAdaptersError):
    """A backbone cannot be loaded or is not one that adapters can be put into."""


class CheckpointError(HyperAdaptersError):
    """A checkpoint is missing, damaged, of another format, or of another backbone."""


class OutputError(HyperAdaptersError):
    """A result cannot be written where it was asked for."""


class ExportError(HyperAdaptersError):
    """A model cannot be expressed in the format it is to be exported to."""


class NotFiniteError(HyperAdaptersError):
    """A loss, a gradient or an answer is not a finite number."""


class MissingPackageError(HyperAdaptersError):
    """An optional package is needed and not installed."""

    exit_code = 1


def check_int(name: str, value: object, least: int, error: type[HyperAdaptersError] = DataError) -> None:
    """Raise `error` unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < least:
        raise error(f"{name}: expected an integer of {least} or more, found {value!r}")


def check_seed(value: object) -> None:
    """Raise DataError unless `value` is an integer that PyTorch, NumPy and scikit-learn take as a seed."""
    check_int("seed", value, 0)
    if int(value) >= 2**32:  # type: ignore[call-overload]
        raise DataError(f"seed: expected an integer below 2 ** 32, found {value!r}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the known name closest to `name`, or `""` if none is close."""
    close = difflib.get_close_matches(str(name), [str(item) for item in known], n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Return the sentence for an unknown name: what it is, the nearest known one, and all known ones."""
    names = sorted(str(item) for item in known)
    listed = ", ".join(names) if names else "none"
    return f"Unknown {what} '{name}'.{did_you_mean(name, names)} Known: {listed}."
