"""Rows of the results: one a figure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from hyperadapters import __version__
from hyperadapters.utils.files import make_folder, write_atomically
from speed_parts.models import Setting, preset_of
from speed_parts.timing import Timing

Row = dict[str, Any]
Better = Literal["higher", "lower"]


def row(setting: Setting, figure: str, value: float, better: Better, **details: Any) -> Row:
    """A row: the figure, what it was measured on, and details such as the shape of the batch.

    The preset is that of models on the `backbone` of the details, by default on the setting's encoder.
    """
    return {
        "figure": figure,
        "preset": preset_of(setting, details.get("backbone", setting.encoder)),
        "value": rounded(value),
        "aim": setting.aims.get(figure),
        "better": better,
        "device": _device_name(setting.device),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "version": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": _peft_version(),
        **details,
    }


def ratio(
    setting: Setting,
    figure: str,
    ours: Timing,
    other: Timing,
    other_name: str,
    better: Better = "higher",
    **details: Any,
) -> Row:
    """The row of a ratio, how many times faster ours is; slower, where lower is better.

    The median of the ratios of each round, so that what slows the machine down for a while counts on both sides.
    """
    times = other.seconds, ours.seconds
    above, below = times if better == "higher" else reversed(times)
    first, value, third = np.quantile(np.divide(above, below), (0.25, 0.5, 0.75)).tolist()
    details = {"quartiles": [rounded(first), rounded(third)], **timing("ours", ours), "other": other_name, **details}
    return row(setting, figure, value, better, **details, **timing("other", other))


def timing(name: str, times: Timing) -> dict[str, Any]:
    """Median, quartiles and number of times, under names that start with `name`."""
    return {
        f"{name}_ms": rounded(times.ms),
        f"{name}_quartiles_ms": [rounded(value) for value in times.quartiles_ms],
        f"{name}_repeats": len(times.seconds),
    }


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def write_rows(path: Path, new: Iterable[Row]) -> None:
    """Put rows into a file of JSON-lines, in the place of those of the same figure, device and preset."""
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    rows = {(found["figure"], found["device"], found["preset"]): found for found in [*old, *new]}
    make_folder(path.parent)
    write_atomically(path, "".join(json.dumps(found) + "\n" for found in rows.values()).encode())


def print_rows(rows: Iterable[Row], console: Console) -> None:
    """Print a table of figures."""
    table = Table("figure", "preset", title="Times are medians in ms; the rows say what the other thing is")
    for name in ("value", "aim", "ours", "other"):
        table.add_column(name, justify="right", no_wrap=True)
    for found in rows:
        relation = "≥" if found["better"] == "higher" else "≤"
        aim = "" if found["aim"] is None else f"{relation} {found['aim']:g}"
        times = (f"{found[name]:g}" if name in found else "" for name in ("ours_ms", "other_ms"))
        table.add_row(found["figure"], found["preset"], f"{found['value']:g}", aim, *times)
    console.print(table)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


@cache
def _peft_version() -> str | None:
    try:
        return version("peft")
    except PackageNotFoundError:
        return None
