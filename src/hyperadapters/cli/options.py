"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a finished run.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe in YAML, see recipes/.")]
ExamplesFile = Annotated[Path, typer.Option(help="JSON-lines, CSV, TSV or Parquet file.")]
Delimiter = Annotated[
    str | None, typer.Option(help="Delimiter of a CSV or TSV file; default: a comma for CSV and a tab for TSV.")
]
PerLabel = Annotated[int | None, typer.Option(min=1, help="Number of examples of each label to use; default: all.")]
FitOption = Annotated[
    str | None,
    typer.Option(
        help="Parameters to train: prototype, adapter, shared or none; or head for a regression without training. "
        "Default: head if the heads of the model read adapted texts, otherwise adapter."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the subset, the held-out examples and the batches.")]
TextColumns = Annotated[
    list[str] | None,
    typer.Option("--text", help="Column of the text; repeat it for the second text of pairs. Default: it is guessed."),
]
InputColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--text", help="Column of the text; repeat it for the second text of pairs. Default: text and text_pair."
    ),
]
NamedLabelColumn = Annotated[str | None, typer.Option("--label-column", help="Column of the label. Default: label.")]
LabelColumn = Annotated[str | None, typer.Option("--label", help="Column of the label. Default: it is guessed.")]
KindOption = Annotated[
    str | None,
    typer.Option(
        "--kind", help="Kind: classification, multi-label, regression or text-to-text. Default: it is guessed."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but warnings and errors.")]
JsonLog = Annotated[
    bool, typer.Option("--json-log", help="Print progress and results as JSON objects, one in each line.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe; can be repeated."),
]
