"""The command line. PyTorch is imported only inside the commands, so that the help appears quickly."""

# The groups of the help have the order of these imports.
# isort: off
from hyperadapters.cli import training, reports, prediction, tasks, data

# isort: on
from hyperadapters.cli.app import app
from hyperadapters.cli.entry import main

__all__ = ["app", "data", "main", "prediction", "reports", "tasks", "training"]
