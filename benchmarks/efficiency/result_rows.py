"""Rows of results, one JSON object a line, and the memory that they tell of."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import torch

from hyperadapters.utils.files import make_folder


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


CellKey = tuple[str, str, int | str, int, str, bool]


def cell_key(row: dict[str, Any]) -> CellKey:
    """What tells cells apart: suite, arm, size, seed, device, and whether the learning rate was searched."""
    return row["suite"], row["arm"], row["n"], row["seed"], row["device"], row["trials"] > 0


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file, and see to it that it is on the disk."""
    make_folder(path.parent)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def device_name(device: str) -> str:
    """What rows call a device: the name of the GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def reset_peak(device: str) -> None:
    """Forget the most memory held so far, where the system can (Linux, CUDA)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    marks = Path("/proc/self/clear_refs")
    if marks.exists():
        marks.write_text("5")


def peak_mb(device: str) -> float:
    """The most memory held since then, cached states included: the GPU's, or the process's, in millions of bytes."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
