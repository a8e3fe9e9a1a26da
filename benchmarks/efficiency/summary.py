"""What the result rows say: cells of one device, and differences with bootstrap intervals."""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import numpy as np
from tables import Scores

Row = dict[str, Any]
Size = int | str
"""Training rows a task: a number, or "all"."""

Column = dict[str, list[Row]]
"""The rows of one size, by arm."""

NAMES = {
    "probe": "linear probe",
    "full": "full fine-tuning",
    "setfit": "SetFit",
    "lora_task": "LoRA, per task",
    "lora_shared": "LoRA, shared",
    "adapter_task": "adapter, per task",
    "adapter_shared": "adapter, shared",
    "ia3_task": "IA3, per task",
    "ln_task": "LayerNorm, per task",
    "prompt_task": "prompt, per task",
    "mpt": "multi-task prompt",
    "hyperformer": "HyperFormer++ style",
    "hyperdecoder": "Hyperdecoder style",
    "pha": "PHA",
    "plus": "PHA+",
}
"""The main arms in the order of the tables, with their names. Their ablations are called `ARM_no_SOMETHING`."""

WITHOUT_PROTOTYPES = ("plus_no_adapters", "plus_no_hypernetwork")
"""Ablations that stand among the main arms: what the heads of PHA+ read is worth without its prototypes."""

CONTROL = "_all_layers"
"""The end of the names of arms that change all layers, not only the upper ones."""

DRAWS = 10_000


class Difference(NamedTuple):
    """A mean difference with its 95 % interval, and the number of (task, seed) pairs that it is from."""

    mean: float
    low: float
    high: float
    pairs: int


def label(arm: str) -> str:
    """The name of an arm in tables and figures."""
    stem = arm.removesuffix(CONTROL)
    base, without, left_out = stem.partition("_no_")
    name = NAMES.get(base, base)
    if without:
        name += f" without {left_out.replace('_', ' ')}"
    return name if stem == arm else f"{name} (all layers)"


def is_main(arm: str) -> bool:
    """Whether an arm stands among the main ones: no ablation but `WITHOUT_PROTOTYPES`, and no control."""
    return ("_no_" not in arm or arm in WITHOUT_PROTOTYPES) and not arm.endswith(CONTROL)


def arm_order(arm: str) -> tuple[int, str]:
    """Sorts arms as in `NAMES`, each followed by its control and ablations; those not named there come last."""
    base = arm.removesuffix(CONTROL).partition("_no_")[0]
    return list(NAMES).index(base) if base in NAMES else len(NAMES), arm


def size_order(n: Size) -> float:
    return math.inf if n == "all" else float(n)


def columns(rows: list[Row]) -> dict[Size, Column]:
    """Rows by size and arm, in order, by seed within; without failed cells, and of one device for each size."""
    by_size: dict[Size, list[Row]] = defaultdict(list)
    for row in rows:
        if "error" not in row:
            by_size[row["n"]].append(row)
    found = {}
    for n in sorted(by_size, key=size_order):
        device = one_device(n, by_size[n])
        kept = sorted((row for row in by_size[n] if row["device"] == device), key=lambda row: row["seed"])
        arms = sorted({row["arm"] for row in kept}, key=arm_order)
        found[n] = {arm: [row for row in kept if row["arm"] == arm] for arm in arms}
    return found


def one_device(n: Size, rows: list[Row]) -> str:
    """The device of most rows, of the first of them in a tie; says so where there are others."""
    (device, most), *others = Counter(row["device"] for row in rows).most_common()
    if others:
        left_out = ", ".join(f"{count} of {other}" for other, count in others)
        print(f"n = {n}: {most} rows of {device} are used, and left out are {left_out}", file=sys.stderr)
    return str(device)


def pairs(rows: list[Row]) -> Scores:
    """The scores of an arm by (task, seed)."""
    return {(task, row["seed"]): score for row in rows for task, score in row["scores"].items()}


def difference(ours: Scores, theirs: Scores) -> Difference | None:
    """Mean of ours minus theirs, with the paired bootstrap's interval: resamples the pairs that both have.

    None where they have none in common.
    """
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return None
    gains = np.array([ours[pair] - theirs[pair] for pair in common])
    drawn = np.random.default_rng(0).integers(len(gains), size=(DRAWS, len(gains)))
    low, high = np.percentile(gains[drawn].mean(1), [2.5, 97.5])
    return Difference(float(gains.mean()), float(low), float(high), len(gains))
