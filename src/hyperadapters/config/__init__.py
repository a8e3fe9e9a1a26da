"""Configurations of tasks, models and training runs, which are validated strictly and never execute code.

`Task`, `ModelConfig` and `Lengths` are stored in a checkpoint. `Recipe` describes a training run.
"""

from hyperadapters.config.model import (
    PRESETS,
    BackboneKind,
    Dtype,
    Lengths,
    Method,
    ModelConfig,
    ModuleNames,
    drop_settings_without_effect,
)
from hyperadapters.config.recipe import (
    DEFAULT_BACKBONE,
    METRICS_FILE,
    RECIPE_FILE,
    DataConfig,
    Recipe,
    TrainingConfig,
    load_recipe,
    resolve_paths,
)
from hyperadapters.config.sources import SPLITS, HeldOut, Source, Split, TaskEntry
from hyperadapters.config.tasks import (
    LABEL_SEPARATOR,
    METRICS_OF_KIND,
    Kind,
    Task,
    check_task_names,
    normalize_label,
)
from hyperadapters.config.validation import Int, StrictModel, parse

__all__ = [
    "BackboneKind",
    "DEFAULT_BACKBONE",
    "HeldOut",
    "DataConfig",
    "Dtype",
    "Int",
    "Kind",
    "LABEL_SEPARATOR",
    "Lengths",
    "METRICS_FILE",
    "METRICS_OF_KIND",
    "Method",
    "ModelConfig",
    "ModuleNames",
    "PRESETS",
    "RECIPE_FILE",
    "Recipe",
    "SPLITS",
    "Source",
    "Split",
    "StrictModel",
    "Task",
    "TaskEntry",
    "TrainingConfig",
    "check_task_names",
    "drop_settings_without_effect",
    "load_recipe",
    "normalize_label",
    "parse",
    "resolve_paths",
]
