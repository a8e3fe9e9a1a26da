"""Sweeps: training a recipe with several settings, and keeping the scores of each. Needs Optuna (extra `sweep`)."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache

from hyperadapters._version import __version__
from hyperadapters.config import METRICS_FILE, DataConfig, Recipe, load_recipe
from hyperadapters.config.sweep import Range, SweepConfig
from hyperadapters.errors import HyperAdaptersError, InterruptionError, OutputError, RecipeError
from hyperadapters.inference.batches import best_device
from hyperadapters.inference.predict_files import as_json
from hyperadapters.training.run import is_run, recipe_text, train
from hyperadapters.training.sharding import num_processes
from hyperadapters.training.views import View
from hyperadapters.utils.files import check_folder, locked, making_folder, write_atomically
from hyperadapters.utils.optional import require
from hyperadapters.utils.progress import tolerant

SWEEP_FILE = "sweep.yaml"
STORAGE_FILE = "sweep.db"
RESULTS_FILE = "results.jsonl"
TRIALS_FOLDER = "trials"
"""Names in the folder of a sweep: its recipe, Optuna's storage, a row for each trial, and the runs of the trials."""
CASE = "case"
"""Name of the parameter in Optuna's storage that says which of `cases` a trial has."""
NO_ARM = ("seed", "data.n_train", "data.fraction", "data.k_per_label")
"""Settings that are columns of the rows of their own, and no part of the name of what is compared."""
MAX_SEED = 2**32

logger = logging.getLogger(__name__)


def sweep(
    path: Path,
    output: Path,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    progress: View = "auto",
) -> list[dict[str, Any]]:
    """Train a recipe once for each setting of its section `sweep`, and write a row with the scores of each trial.

    A trial that fails gets a row with its error, and the next one is trained. A trial is stored when it has ended, and
    the settings of the next one only depend on those that are stored, so that a resumed sweep trains the same trials.

    Args:
        path: Recipe with a section `sweep`.
        output: Folder to write to.
        overrides: Settings that replace those of the recipe, as in `load_recipe`. Default: none.
        resume: Whether to continue an interrupted sweep in the folder. Default: False.
        overwrite: Whether to remove an earlier sweep from the folder. Default: False.
        progress: What is shown during the trainings; see `TrainingArguments`. Default: "auto".

    Returns:
        The rows of all trials in order.

    Raises:
        RecipeError: If the recipe has no section `sweep`, or no validation rows, or settings of a trial are invalid.
        OutputError: If the folder contains a sweep and neither `resume` nor `overwrite` is True, or other files.
        InterruptionError: If the process gets SIGINT or SIGTERM. The sweep can be resumed.
        MissingPackageError: If Optuna is not installed.
        HyperAdaptersError: If all trials failed.
    """
    require("optuna")
    recipe = load_recipe(path, tuple(overrides))
    if recipe.sweep is None:
        raise RecipeError(f"{path}: expected a section sweep, with cases and grid or with ranges; found none")
    if num_processes() > 1:
        raise RecipeError("a sweep trains in one process, found several; start it without torchrun and accelerate")
    described = recipe_text(recipe)

    def recipe_of(settings: dict[str, Any]) -> Recipe:
        chosen = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        return load_recipe(path, (*overrides, *chosen)).model_copy(update={"sweep": None})

    for settings in _examples(recipe.sweep):
        recipe_of(settings)
    _check_output(output, described, resume, overwrite)
    with making_folder(output), locked(output, wait=False):
        if overwrite:
            _remove(output)
        write_atomically(output / SWEEP_FILE, described.encode())
        rows = _train_all(recipe.sweep, recipe.seed, recipe_of, output, progress)
    if all("error" in row for row in rows):
        which = "the only trial failed" if len(rows) == 1 else f"all {len(rows)} trials failed, the first one"
        raise HyperAdaptersError(f"{which} with {rows[0]['error']}")
    return rows


def _train_all(
    config: SweepConfig, seed: int, recipe_of: Callable[[dict[str, Any]], Recipe], output: Path, progress: View
) -> list[dict[str, Any]]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{output / STORAGE_FILE}", study_name="sweep", direction="maximize", load_if_exists=True
    )
    distributions = _distributions(config)
    _write_rows(study, output)
    for number in range(len(study.trials), config.num_trials):
        parameters, settings = _chosen(study, config, distributions, seed)
        logger.info(f"trial {number} (the last is {config.num_trials - 1}): {_described(settings)}")
        if progress == "json":
            _write_event({"event": "trial", "trial": number, "settings": settings})
        folder = output / TRIALS_FOLDER / f"{number:04d}"
        scores = _trained(partial(recipe_of, settings), settings, folder, progress)
        if "error" in scores:
            logger.warning(f"trial {number} failed with {scores['error']}")
        state = optuna.trial.TrialState.FAIL if "error" in scores else optuna.trial.TrialState.COMPLETE
        trial = optuna.trial.create_trial(
            state=state,
            value=scores.get("validation"),
            params=parameters,
            distributions=distributions,
            user_attrs={"row": {"trial": number, "settings": settings, **scores}},
        )
        study.add_trial(trial)
        _write_rows(study, output)
    return [trial.user_attrs["row"] for trial in study.trials]


def _write_event(event: dict[str, Any]) -> None:
    print(as_json(event, ensure_ascii=True), file=tolerant(sys.stdout), flush=True)


def _trained(
    make_recipe: Callable[[], Recipe], settings: dict[str, Any], folder: Path, progress: View
) -> dict[str, Any]:
    """Train a trial, or continue its training, and return its scores in per cent, or its error."""
    try:
        recipe = make_recipe()
        if not (folder / METRICS_FILE).is_file():
            train(recipe, folder, resume=is_run(folder), progress=progress)
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    except InterruptionError:
        raise
    except Exception as error:  # whatever it is, the other trials may be trained
        shutil.rmtree(folder, ignore_errors=True)
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        clear_device_cache(garbage_collection=True)
    if "validation" not in metrics["mean"]:
        raise RecipeError("a sweep compares trials by their validation rows, and the recipe has none; hold some out")
    split = "test" if "test" in metrics["mean"] else "validation"
    return {
        "arm": _described({key: value for key, value in settings.items() if key not in NO_ARM}) or "recipe",
        "n": _size(recipe.data),
        "seed": recipe.seed,
        "validation": 100 * metrics["mean"]["validation"],
        "score": 100 * metrics["mean"][split],
        "scores": {name: 100 * next(iter(found[split].values())) for name, found in metrics["tasks"].items()},
        "routing_accuracy": metrics["routing_accuracy"],
        "trainable_per_task": metrics["trainable_parameters"] / len(recipe.tasks),
        "seconds": metrics["seconds"],
        "device": best_device().type,
        "version": __version__,
    }


def _size(data: DataConfig) -> int | str:
    """Return the number of training rows of each task, or the setting that it depends on."""
    if data.fraction is not None:
        return f"{100 * data.fraction:g} %"
    return data.n_train or ("all" if data.k_per_label is None else f"{data.k_per_label} of each label")


def _chosen(
    study: Any, config: SweepConfig, distributions: dict[str, Any], seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters of the next trial for Optuna, and its settings.

    Draws only depend on the stored trials: they are made in a copy of the study, with a seed of their own.
    """
    import optuna

    number = len(study.trials)
    if not config.ranges:
        settings = config.combinations[number]
        case = config.cases[number * len(config.cases) // len(config.combinations)]
        return {name: _described(case) if name == CASE else settings[name] for name in distributions}, settings
    sampler = optuna.samplers.TPESampler if config.sampler == "tpe" else optuna.samplers.RandomSampler
    copy = optuna.create_study(direction="maximize", sampler=sampler(seed=(seed + number) % MAX_SEED))
    copy.add_trials(study.trials)
    parameters = copy.ask(distributions).params
    return parameters, parameters


def _distributions(config: SweepConfig) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {name: CategoricalDistribution(values) for name, values in config.grid.items()}
    if len(config.cases) > 1:
        found[CASE] = CategoricalDistribution([_described(case) for case in config.cases])
    for name, values in config.ranges.items():
        if isinstance(values, Range):
            is_whole = isinstance(values.low, int) and isinstance(values.high, int)
            make = IntDistribution if is_whole else FloatDistribution
            found[name] = make(values.low, values.high, log=values.log)  # type: ignore[arg-type]
        else:
            found[name] = CategoricalDistribution(values)
    return found


def _examples(config: SweepConfig) -> list[dict[str, Any]]:
    """Return the settings of a grid, or one draw from ranges, with which the recipe is checked before training."""
    first = {name: values.low if isinstance(values, Range) else values[0] for name, values in config.ranges.items()}
    return [first] if first else config.combinations


def _described(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())


def _write_rows(study: Any, output: Path) -> None:
    lines = [json.dumps(trial.user_attrs["row"], allow_nan=False) + "\n" for trial in study.trials]
    write_atomically(output / RESULTS_FILE, "".join(lines).encode())


def _check_output(output: Path, described: str, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise OutputError("--resume and --overwrite exclude each other: one continues a sweep, the other removes it")
    check_folder(output)
    path = output / SWEEP_FILE
    if not path.is_file():
        if resume:
            raise OutputError(f"{output}: nothing to resume: there is no sweep in it")
        if output.is_dir() and any(output.iterdir()):
            raise OutputError(f"{output}: expected an empty or new folder, or the folder of a sweep; found other files")
    elif not (resume or overwrite):
        raise OutputError(
            f"{output}: already contains a sweep; use --overwrite to replace it or --resume to continue it"
        )
    elif resume and path.read_text(encoding="utf-8") != described:
        raise OutputError(
            f"{output}: the sweep was started with another recipe, which is in {SWEEP_FILE}; resume it with the same "
            "recipe, or use --overwrite"
        )


def _remove(output: Path) -> None:
    shutil.rmtree(output / TRIALS_FOLDER, ignore_errors=True)
    for name in (STORAGE_FILE, f"{STORAGE_FILE}-journal", RESULTS_FILE):
        (output / name).unlink(missing_ok=True)
