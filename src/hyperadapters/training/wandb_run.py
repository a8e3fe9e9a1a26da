"""A run of Weights & Biases for each training of a recipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout


@contextmanager
def own_wandb_run(loggers: Sequence[str]) -> Iterator[None]:
    """End the run of Weights & Biases that a training begins in this context.

    transformers leaves it active, so that the next training of the process, such as the next trial of a sweep, would
    add its values to it. A run that was active before is left as it is.

    Args:
        loggers: Names of the loggers of the training. Without "wandb" nothing is done.

    Yields:
        None.
    """
    if "wandb" not in loggers:
        yield
        return
    import wandb

    before = wandb.run
    try:
        yield
    finally:
        if wandb.run is not None and wandb.run is not before:
            with redirect_stdout(sys.stderr):  # standard output is for results
                wandb.finish()
