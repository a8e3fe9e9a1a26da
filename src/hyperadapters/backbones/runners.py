"""Choice of the runner for a backbone."""

from hyperadapters.backbones.passes import PassRunner as make_runner

__all__ = ["make_runner"]
