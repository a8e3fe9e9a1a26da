"""The one place that imports optional packages and says how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType

from hyperadapters.errors import MissingPackageError

_EXTRA_OF = {"matplotlib": "plot", "onnxscript": "onnx", "peft": "peft"}


def require(module: str) -> ModuleType:
    """Import an optional module.

    Raises:
        MissingPackageError: it is not installed; the message names the extra that brings it.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingPackageError(
            f"This needs the package '{package}', which is not installed. "
            f"Install it with: pip install 'hyperadapters[{_EXTRA_OF[package]}]'"
        ) from error
