"""The command line as a module: `python -m hyperadapters`, which torchrun and accelerate start."""

from hyperadapters.cli import main

if __name__ == "__main__":
    main()
