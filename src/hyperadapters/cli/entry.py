"""The entry point of the command line."""

from __future__ import annotations

import codecs
import errno
import io
import json
import logging
import os
import sys
from contextlib import suppress

import typer

from hyperadapters.cli.app import app
from hyperadapters.errors import HyperAdaptersError

JSON_ESCAPES = "hyperadapters.json_escapes"
"""Name of the error handler of the output streams."""
UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EFBIG)
"""Errors of an output that cannot be written to any more, which are not failures of the program."""


def main() -> None:
    r"""Run the command line. An error of the user ends the command with a message and exit code 2.

    Characters that an output stream cannot encode are written as in JSON, such as \u00f6. An output that cannot be
    written to any more ends the command with exit code 1, with a message if the disk is full, and without one if the
    reader has closed the pipe.
    """
    _prepare_streams()
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, which logs irrelevant warnings
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, because the interpreter prints a traceback if it fails at exit
    except HyperAdaptersError as error:
        with suppress(OSError):  # the error stream may be closed, and the exit code is sufficient then
            typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discards the rest of the buffer
        if error.errno != errno.EPIPE:
            typer.echo(f"error: the output cannot be written: {error}", err=True)
        sys.exit(1)


def _prepare_streams() -> None:
    """Let the output streams accept every character, and discard the output to a closed stream."""
    codecs.register_error(JSON_ESCAPES, _json_escapes)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the stream was closed before the interpreter started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=JSON_ESCAPES)


def _json_escapes(error: UnicodeError) -> tuple[str, int]:
    """Escape characters that cannot be encoded as JSON does, so that JSON remains valid."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end
