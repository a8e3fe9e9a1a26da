"""The check of the quality of data: reads the tasks of a recipe or of data files, and runs all checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hyperadapters.backbones.loading import is_encoder, load_tokenizer
from hyperadapters.config import DEFAULT_BACKBONE, DataConfig, Kind, Recipe, TaskEntry, load_recipe
from hyperadapters.data.task_files import check_different_names, find_tasks, infer_schemas, make_entry
from hyperadapters.errors import DataError, RecipeError, check_int
from hyperadapters.quality.features import TextEncoder
from hyperadapters.quality.findings import SEVERITIES, Finding, QualityReport, TaskSummary
from hyperadapters.quality.label_errors import check_label_errors, sample_sizes
from hyperadapters.quality.languages import LanguageIdentifier, check_languages
from hyperadapters.quality.leakage import check_duplicates
from hyperadapters.quality.lengths import check_lengths
from hyperadapters.quality.rows import CheckedTask, read_tasks
from hyperadapters.quality.rows_and_labels import check_labels, check_rows, label_counts
from hyperadapters.utils.optional import require

MAX_LABEL_ROWS = 20_000
"""Number of rows of all tasks together that are searched for label errors."""


@dataclass(frozen=True)
class CheckSettings:
    """How data are checked.

    Attributes:
        backbone: Backbone of the training, whose tokenizer counts the tokens. If it is an encoder, its features predict
            the labels in the search for label errors, otherwise those of the default backbone.
        max_length: Maximum number of tokens of an input in training.
        on_bad_row: What the training does with rows that cannot be read.
        seed: Seed of held-out splits and samples.
        max_label_rows: Maximum number of rows of all tasks together that are searched for label errors.
    """

    backbone: str = DEFAULT_BACKBONE
    max_length: int = DataConfig().max_length
    on_bad_row: Literal["error", "skip"] = "error"
    seed: int = 0
    max_label_rows: int = MAX_LABEL_ROWS

    @classmethod
    def of(cls, recipe: Recipe, max_label_rows: int = MAX_LABEL_ROWS) -> CheckSettings:
        """Return the settings for the data of a recipe.

        Args:
            recipe: The recipe.
            max_label_rows: Maximum number of rows that are searched for label errors.
        """
        data = recipe.data
        return cls(recipe.backbone, data.max_length, data.on_bad_row, recipe.seed, max_label_rows)


def read_input(
    path: Path,
    overrides: Sequence[str] = (),
    texts: Sequence[str] = (),
    label: str | None = None,
    kind: Kind | None = None,
    max_label_rows: int = MAX_LABEL_ROWS,
    delimiter: str | None = None,
) -> tuple[list[TaskEntry], CheckSettings]:
    """Read what is to be checked: a recipe, a data file, or a folder of data files.

    Args:
        path: Recipe with the ending .yaml or .yml, data file or folder.
        overrides: Settings that replace those of a recipe. Default: none.
        texts: Columns of the texts of data files. Default: they are guessed.
        label: Column of the label of data files. Default: it is guessed.
        kind: Kind of the tasks of data files. Default: it is guessed.
        max_label_rows: Maximum number of rows that are searched for label errors.
        delimiter: Delimiter of CSV and TSV files. Default: a comma and a tab.

    Returns:
        The tasks with their sources, and the settings of the check.

    Raises:
        RecipeError: If the recipe is invalid, or settings are given for data without a recipe.
        DataError: If a file cannot be read, a column cannot be guessed, or columns are given for a recipe.
        TaskError: If the kind is unknown.
    """
    if path.suffix.lower() in (".yaml", ".yml"):
        if texts or any(option is not None for option in (label, kind, delimiter)):
            raise DataError("--text, --label, --kind and --delimiter are for data files; set them in the recipe")
        recipe = load_recipe(path, tuple(overrides))
        return list(recipe.tasks), CheckSettings.of(recipe, max_label_rows)
    if overrides:
        raise RecipeError(f"--set changes settings of a recipe, and {path} is none; remove it, or check a recipe")
    found = find_tasks(path)
    schemas = infer_schemas(found, texts, label, kind, "skip", delimiter)
    source = {} if delimiter is None else {"delimiter": delimiter}
    entries = [make_entry(name, files, schemas[name], **source) for name, files in found.items()]
    return entries, CheckSettings(max_label_rows=max_label_rows)


def check_tasks(entries: Sequence[TaskEntry], settings: CheckSettings | None = None) -> QualityReport:
    """Check the data of tasks. All rows are read, also those that are not in a subset for training.

    Args:
        entries: Tasks with their sources.
        settings: How they are checked. Default: as data without a recipe.

    Returns:
        The report.

    Raises:
        DataError: If a file is missing or cannot be read at all, a task has no training rows, or two tasks have the
            same name.
        BackboneError: If the tokenizer or the encoder cannot be loaded.
        MissingPackageError: If a package of the extra `check` is not installed.
    """
    settings = settings or CheckSettings()
    check_different_names(entry.name for entry in entries)
    check_int("max_label_rows", settings.max_label_rows, 0)
    require("datasketch")
    identify = LanguageIdentifier()
    tasks = read_tasks(entries, settings.seed)
    tokenizer = load_tokenizer(settings.backbone)
    findings, summaries = [], []
    for data in tasks:
        lengths, truncated = check_lengths(data, tokenizer, settings.max_length)
        labels = label_counts(data) if data.task.is_labelled else {}
        rows = {split: len(found) for split, found in data.splits.items()}
        summaries.append(TaskSummary(data.task.name, data.task.kind, rows, labels, lengths))
        findings += [*check_rows(data, settings.on_bad_row), *check_labels(data), *truncated]
        findings += check_languages(data, identify)
    duplicates, notes = check_duplicates(tasks)
    suspected, more_notes = _label_errors(tasks, settings)
    findings += [*duplicates, *suspected]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return QualityReport(summaries, findings, [*notes, *more_notes])


def _label_errors(tasks: Sequence[CheckedTask], settings: CheckSettings) -> tuple[list[Finding], list[str]]:
    chosen = [data for data in tasks if data.task.kind == "classification"]
    notes = [
        f"{data.task.name}: label errors are only searched in classification tasks."
        for data in tasks
        if data.task.kind != "classification"
    ]
    if not chosen or not settings.max_label_rows:
        return [], notes
    name = settings.backbone if is_encoder(settings.backbone) else DEFAULT_BACKBONE
    encoder = TextEncoder(name, settings.max_length)
    findings = []
    sizes = sample_sizes([len(data.rows) for data in chosen], settings.max_label_rows)
    for data, size in zip(chosen, sizes, strict=True):
        found, more = check_label_errors(data, encoder, size, settings.seed)
        findings += found
        notes += more
    searched = [f"Label errors are searched with the features of the frozen encoder {name}."]
    return findings, notes if len(notes) == len(chosen) else [*notes, *searched]
