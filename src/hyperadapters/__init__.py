"""Prototype-based HyperAdapter: one frozen language model, one small hypernetwork, sixty-four numbers per task.

The public names import PyTorch and transformers when they are first used, so that importing the package is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from hyperadapters._version import __version__

if TYPE_CHECKING:
    from hyperadapters.config import ModelConfig as ModelConfig
    from hyperadapters.config import Recipe as Recipe
    from hyperadapters.config import Task as Task
    from hyperadapters.config import load_recipe as load_recipe
    from hyperadapters.errors import HyperAdaptersError as HyperAdaptersError
    from hyperadapters.inference.predictor import Predictor as Predictor
    from hyperadapters.model.model import HyperAdapterModel as HyperAdapterModel
    from hyperadapters.training.arguments import TrainingArguments as TrainingArguments
    from hyperadapters.training.run import train as train
    from hyperadapters.training.trainer import Trainer as Trainer

_HOME = {
    "HyperAdapterModel": "model.model",
    "HyperAdaptersError": "errors",
    "ModelConfig": "config",
    "Predictor": "inference.predictor",
    "Recipe": "config",
    "Task": "config",
    "Trainer": "training.trainer",
    "TrainingArguments": "training.arguments",
    "load_recipe": "config",
    "train": "training.run",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'hyperadapters' has no attribute '{name}'")
    return getattr(import_module(f"hyperadapters.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
