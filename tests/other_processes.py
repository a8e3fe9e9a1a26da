"""Other processes, which are copies of the process of the tests where that is safe, because imports take seconds."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from hyperadapters.cli import main


def start(function: Callable[..., Any], *arguments: Any, output: object = None) -> BaseProcess:
    """Call a function in another process, which is no copy on other systems or where an accelerator may be in use.

    Both of its output streams are written to the file `output`, if there is one.
    """
    method = "fork" if sys.platform == "linux" and not torch.accelerator.is_available() else "spawn"
    context = multiprocessing.get_context(method)
    process = context.Process(target=_call, args=(function, arguments, output and str(output)), daemon=True)
    with warnings.catch_warnings():
        # Later versions of Python warn of other threads, but those of pytest-xdist only wait.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    return process


def start_command(*arguments: object, output: object = os.devnull) -> BaseProcess:
    """Start a command of hyperadapters."""
    return start(_run_command, [str(argument) for argument in arguments], output=output)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], output: str | None) -> None:
    if output:
        sys.stdout = sys.stderr = open(output, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
        for descriptor in (1, 2):
            os.dup2(sys.stdout.fileno(), descriptor)
    function(*arguments)


def _run_command(arguments: list[str]) -> None:
    sys.argv = ["hyperadapters", *arguments]
    main()
