"""Runs parts of the benchmark and writes down what they find."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from speed_parts.models import Setting
from speed_parts.result_rows import Row, print_rows, write_rows


@dataclass(frozen=True)
class Part:
    """Figures that are measured together.

    Attributes:
        figures: the beginnings of their names.
        measure: makes their rows.
    """

    figures: tuple[str, ...]
    measure: Callable[[Setting], Iterable[Row]]


def select(parts: Sequence[Part], wanted: Sequence[str]) -> list[Part]:
    """The parts that make any of the figures; all of them if none is named.

    Raises:
        ValueError: nothing makes one of them.
    """
    if not wanted:
        return list(parts)
    for name in wanted:
        if not any(_makes(part, name) for part in parts):
            known = ", ".join(begin for part in parts for begin in part.figures)
            raise ValueError(f"no figure begins with '{name}'; known: {known}")
    return [part for part in parts if any(_makes(part, name) for name in wanted)]


def _makes(part: Part, name: str) -> bool:
    return any(name.startswith(begin) or begin.startswith(name) for begin in part.figures)


def run(parts: Iterable[Part], setting: Setting, output: Path | None, console: Console) -> None:
    """Measure parts one after the other, write each one's rows when it is done, and print a table of all."""
    disable_progress_bar()
    rows: list[Row] = []
    began = time.perf_counter()
    for part in parts:
        started = time.perf_counter()
        found = list(part.measure(setting))
        if output is not None:
            write_rows(output, found)
        rows += found
        console.print(f"{', '.join(part.figures)}: {time.perf_counter() - started:.0f} s", highlight=False)
        gc.collect()
        if setting.device.startswith("cuda"):
            torch.cuda.empty_cache()
    print_rows(rows, console)
    console.print(f"{time.perf_counter() - began:.0f} s in all" + ("" if output is None else f"; rows are in {output}"))
