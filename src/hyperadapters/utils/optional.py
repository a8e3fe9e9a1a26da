"""Import of optional packages, with instructions for their installation."""

from __future__ import annotations

import importlib
from types import ModuleType

from hyperadapters.errors import MissingPackageError

_EXTRA_OF = {
    "datasketch": "check",
    "fastapi": "serve",
    "httpx2": "client",
    "jinja2": "check",
    "matplotlib": "plot",
    "onnxruntime": "runtime",
    "onnxscript": "onnx",
    "optuna": "sweep",
    "peft": "peft",
    "plotly": "report",
    "prometheus_client": "serve",
    "py3langid": "check",
    "ray": "ray",
    "rouge_score": "rouge",
    "tokenizers": "runtime",
    "uvicorn": "serve",
}


def require(module: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: Name of the module, such as "matplotlib.figure".

    Returns:
        The module.

    Raises:
        MissingPackageError: If the package is not installed. The message names the extra that installs it.
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
