"""What the result rows say: cells of one device and kind by suite, and differences with bootstrap intervals."""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tables import Scores

from efficiency.data import PARTS, SUITES
from efficiency.result_rows import cell_key

Row = dict[str, Any]
Size = int | str
"""Training rows a task: a number, or "all"."""

Column = dict[str, list[Row]]
"""The rows of one suite and size, by arm."""

Columns = dict[Size, Column]
"""Those of one suite, by size."""

NAMES = {
    "probe": "linear probe",
    "full": "full fine-tuning",
    "setfit": "SetFit",
    "lora_task": "LoRA, per task",
    "lora_shared": "LoRA, shared",
    "lora32_shared": "LoRA of rank 32, shared",
    "adapter_task": "adapter, per task",
    "adapter_shared": "adapter, shared",
    "adapter_shared_frozen": "adapter, shared, frozen",
    "adapter_shared_then_task": "adapter, shared, then per task",
    "ia3_task": "IA3, per task",
    "ln_task": "LayerNorm, per task",
    "prompt_task": "prompt, per task",
    "mpt": "multi-task prompt",
    "hyperformer": "HyperFormer++ style",
    "hyperdecoder": "Hyperdecoder style",
    "pha": "PHA",
    "former_plus": "former PHA+",
    "plus": "PHA+",
}
"""The main arms in the order of the tables, with their names. Those whose heads also read texts are called `ARM_texts`,
and ablations `ARM_no_SOMETHING`."""

WITHOUT_PROTOTYPES = ("plus_no_adapters", "plus_no_hypernetwork", "plus_no_prototypes")
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


class Parts(NamedTuple):
    """What the name of an arm consists of: the arm that it is a kind of, what is left out of it, and how it differs."""

    base: str
    left_out: str
    reads_texts: bool
    is_control: bool


def parts_of(arm: str) -> Parts:
    """Read the name of an arm."""
    stem = arm.removesuffix(CONTROL)
    base, _, left_out = stem.partition("_no_")
    return Parts(base.removesuffix("_texts"), left_out, base.endswith("_texts"), stem != arm)


def label(arm: str) -> str:
    """The name of an arm in tables and figures."""
    parts = parts_of(arm)
    name = NAMES.get(parts.base, parts.base)
    if parts.reads_texts:
        name += ", text heads"
    if parts.left_out:
        name += f" without {parts.left_out.replace('_', ' ')}"
    return f"{name} (all layers)" if parts.is_control else name


def is_main(arm: str) -> bool:
    """Whether an arm stands among the main ones: no ablation but `WITHOUT_PROTOTYPES`, and no control."""
    parts = parts_of(arm)
    return not parts.is_control and (not parts.left_out or arm in WITHOUT_PROTOTYPES)


def arm_order(arm: str) -> tuple[int, str]:
    """Sorts arms as in `NAMES`, each followed by its kinds and ablations; those not named there come last."""
    base = parts_of(arm).base
    return list(NAMES).index(base) if base in NAMES else len(NAMES), arm


def size_order(n: Size) -> float:
    return math.inf if n == "all" else float(n)


def suites(rows: list[Row]) -> dict[str, Columns]:
    """The columns of each suite that has rows, in the order of the suites."""
    by_suite: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_suite[row["suite"]].append(row)
    found = {suite: columns(by_suite[suite]) for suite in SUITES if suite in by_suite}
    return {suite: of_suite for suite, of_suite in found.items() if of_suite}


def columns(rows: list[Row]) -> Columns:
    """Rows of a suite by size and arm, in order, by seed within.

    Failed cells are left out, of cells that were run again all but the last rows, and for each size the rows of other
    devices than most, and those whose learning rates were chosen in another way than most.
    """
    finished = {cell_key(row): row for row in rows if "error" not in row}
    by_size: dict[Size, list[Row]] = defaultdict(list)
    for row in finished.values():
        by_size[row["n"]].append(row)
    found = {}
    for n in sorted(by_size, key=size_order):
        place = f"{by_size[n][0]['suite']}, n = {n}"
        of_device = most(place, by_size[n], lambda row: row["device"])
        with_rate = [row for row in of_device if row["learning_rate"] is not None]
        comparable = most(place, with_rate, lambda row: "searched rates" if row["trials"] else "first rates")
        without_rate = [row for row in of_device if row["learning_rate"] is None]
        kept = sorted([*without_rate, *comparable], key=lambda row: row["seed"])
        if len(digests := {row["digest"] for row in kept}) > 1:
            print(f"{place}: the rows were made by {len(digests)} versions of the code", file=sys.stderr)
        arms = sorted({row["arm"] for row in kept}, key=arm_order)
        found[n] = {arm: [row for row in kept if row["arm"] == arm] for arm in arms}
    return found


def most(place: str, rows: list[Row], kind: Callable[[Row], str]) -> list[Row]:
    """The rows of the most frequent kind, the first of them in a tie; says so where there are others."""
    if not rows:
        return []
    (first, count), *others = Counter(map(kind, rows)).most_common()
    if others:
        left_out = ", ".join(f"{number} of {other}" for other, number in others)
        print(f"{place}: {count} rows of {first} are used, and left out are {left_out}", file=sys.stderr)
    return [row for row in rows if kind(row) == first]


def pairs(rows: list[Row]) -> Scores:
    """The scores of an arm by (task, seed)."""
    return {(task, row["seed"]): score for row in rows for task, score in row["scores"].items()}


def difference(ours: Scores, theirs: Scores) -> Difference | None:
    """Mean of ours minus theirs, with the paired bootstrap's interval: resamples the pairs that both have.

    None where they have none in common.
    """
    return mean_difference([(ours, theirs)])


def mean_difference(compared: Sequence[tuple[Scores, Scores]]) -> Difference | None:
    """The mean over suites of the mean differences, for which the pairs of each suite are resampled by themselves.

    Args:
        compared: ours and theirs of each suite.

    Returns:
        None where a suite has no pairs in common.
    """
    means, drawn, count = [], [], 0
    generator = np.random.default_rng(0)
    for ours, theirs in compared:
        common = sorted(ours.keys() & theirs.keys())
        if not common:
            return None
        gains = np.array([ours[pair] - theirs[pair] for pair in common])
        rows = generator.integers(len(gains), size=(DRAWS, len(gains)))
        means.append(float(gains.mean()))
        drawn.append(gains[rows].mean(1))
        count += len(gains)
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return Difference(float(np.mean(means)), float(low), float(high), count)


def parts_of_all(scores: dict[str, float]) -> dict[str, float]:
    """The mean of each suite among the scores of a model of all tasks, whose names begin with their family's."""
    by_suite: dict[str, list[float]] = {suite: [] for suite in PARTS}
    for task, score in scores.items():
        family = task.partition("_")[0]
        by_suite[family if family in PARTS else "main"].append(score)
    return {suite: sum(found) / len(found) for suite, found in by_suite.items() if found}
