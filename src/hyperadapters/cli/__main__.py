"""Lets ``python -m hyperadapters.cli`` run the command line."""

from hyperadapters.cli import main

main()
