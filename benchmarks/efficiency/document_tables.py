"""The Markdown tables of README.md and docs/sample-efficiency.md that are about the result rows, and their places."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import mean
from typing import Any

from tables import MISSING, markdown, spread

from efficiency.data import PARTS, SUITES
from efficiency.summary import (
    Column,
    Columns,
    Difference,
    Row,
    Size,
    arm_order,
    difference,
    label,
    mean_difference,
    pairs,
    parts_of_all,
    size_order,
)
from efficiency.training_loop import BUDGETS

NOTHING = "Not measured yet."
FORMER = "_with_former_heads"
"""End of the names of arms in rows that were made before the heads had their present penalties."""
MARKED = re.compile(
    r"(<!-- (?:table|figure): (\S+) -->\n)((?:(?!<!-- (?:table|figure): ).)*?)(<!-- end -->)", re.DOTALL
)
START = re.compile(r"<!-- (?:table|figure): ")


def replaced(text: str, blocks: dict[str, str]) -> str:
    """The text with each marked place filled by the block of its name; what is around stays.

    Raises:
        ValueError: a marker has no end.
        KeyError: a marker names no block.
    """
    if len(START.findall(text)) != len(MARKED.findall(text)):
        raise ValueError("each `<!-- table: NAME -->` needs its own line and an `<!-- end -->` after it")
    return MARKED.sub(lambda place: f"{place[1]}\n{blocks[place[2]]}\n\n{place[4]}", text)


def tables(found: dict[str, Columns], trials: list[Row]) -> dict[str, str]:
    """All tables by the name of their marker.

    Args:
        found: the columns of each suite.
        trials: of learning rates.
    """
    made = {
        "suites": suites_table(found, sizes_of(found)) if found else NOTHING,
        "suites-32": suites_table(found, [32], FORMER) if 32 in sizes_of(found) else NOTHING,
        "parts": parts_table(found["all"]) if "all" in found else NOTHING,
        "plus-differences": differences_table(found, "plus", minus_base=False) if found else NOTHING,
        "pha-differences": differences_table(found, "pha", minus_base=True) if found else NOTHING,
        "learning-rates": rates_table(trials, found) if trials else NOTHING,
    }
    for suite in SUITES:
        columns = found.get(suite, {})
        made[f"scores-{suite}"] = main_table(columns) if columns else NOTHING
        made[f"costs-{suite}"] = costs_table(columns) if columns else NOTHING
        for n in BUDGETS:
            made[f"tasks-{suite}-{n}"] = tasks_table(columns[n]) if n in columns else NOTHING
    return made


def suites_table(found: dict[str, Columns], sizes: Sequence[Size], without: str | None = None) -> str:
    """Scores by size, arm and suite, and the mean of the four suites of which `all` consists.

    Args:
        found: columns by suite and size.
        sizes: training rows a task.
        without: end of the names of arms that are left out.
    """
    body = []
    for n in sizes:
        of_size = {suite: columns.get(n, {}) for suite, columns in found.items()}
        for arm in arms_of(of_size):
            if without is not None and arm.endswith(without):
                continue
            cells = [score_cell(of_size[suite], arm) if of_size.get(suite) else MISSING for suite in SUITES]
            body.append(
                [size_label(n), label(arm), *cells, mean_cell([of_size.get(suite, {}) for suite in PARTS], arm)]
            )
    return markdown(["rows a task", "arm", *SUITES, f"mean of {len(PARTS)}"], body)


def mean_cell(columns: Sequence[Column], arm: str) -> str:
    """The mean over suites for each seed that the arm has in all of them, where it has all of their tasks."""
    if not all(arm in column and fewer_tasks(column, arm) is None for column in columns):
        return MISSING
    scores = [{row["seed"]: row["score"] for row in column[arm]} for column in columns]
    seeds = [seed for seed in scores[0] if all(seed in of_suite for of_suite in scores)]
    means = [mean(of_suite[seed] for of_suite in scores) for seed in seeds]
    return f"{spread(means)} ({len(means)})" if means else MISSING


def parts_table(columns: Columns) -> str:
    """What the models of all tasks score on the tasks of each suite, and the mean of these means."""
    body = []
    for n, column in columns.items():
        for arm, rows in column.items():
            means = [parts_of_all(row["scores"]) for row in rows]
            cells = [spread([found[suite] for found in means if suite in found]) for suite in PARTS]
            whole = spread([mean(found.values()) for found in means if len(found) == len(PARTS)])
            body.append([size_label(n), label(arm), *cells, whole])
    return markdown(["rows a task", "arm", *PARTS, f"mean of {len(PARTS)}"], body)


def sizes_of(found: dict[str, Columns]) -> list[Size]:
    return sorted(set(chain.from_iterable(found.values())), key=size_order)


def main_table(columns: Columns) -> str:
    """Scores by arm and size; trainable parameters and stored bytes by arm, a range where they depend on the size."""
    body = []
    for arm in arms_of(columns):
        cells = [score_cell(column, arm) for column in columns.values()]
        rows = [row for column in columns.values() for row in column.get(arm, [])]
        sizes = [span(known(rows, name)) for name in ("trainable_per_task", "bytes_per_task")]
        body.append([label(arm), *cells, *sizes])
    return markdown(["arm", *map(size_label, columns), "trainable per task", "bytes per added task"], body)


def arms_of(columns: Mapping[Any, Column]) -> list[str]:
    return sorted(set(chain.from_iterable(columns.values())), key=arm_order)


def size_label(n: Size) -> str:
    return "all rows" if n == "all" else f"n = {n}"


def score_cell(column: Column, arm: str) -> str:
    """Score and number of seeds, and the number of tasks where other arms have more."""
    rows = column.get(arm, [])
    if not rows:
        return MISSING
    tasks = fewer_tasks(column, arm)
    return f"{spread([row['score'] for row in rows])} ({len(rows)}{f'; {tasks} tasks' if tasks else ''})"


def fewer_tasks(column: Column, arm: str) -> int | None:
    """The number of tasks of an arm, None if it has as many as any arm: only then are means to be compared."""
    counts = {name: min(len(row["scores"]) for row in rows) for name, rows in column.items()}
    return counts[arm] if counts[arm] < max(counts.values()) else None


def known(rows: list[Row], name: str) -> list[float]:
    """The values of a field, without those that an arm cannot have (such as the routing of one that cannot route)."""
    return [row[name] for row in rows if row.get(name) is not None]


def span(values: list[float]) -> str:
    ends = [f"{end(values):,.0f}" for end in (min, max)] if values else [MISSING]
    return " to ".join(dict.fromkeys(ends))


def costs_table(columns: Columns) -> str:
    """Seconds of training and routing accuracy, means over seeds, by arm and size."""
    body = []
    for arm in arms_of(columns):
        rows = [column.get(arm, []) for column in columns.values()]
        seconds = [f"{mean(found):,.0f}" if (found := known(cell, "seconds")) else MISSING for cell in rows]
        routed = [spread([100 * share for share in known(cell, "routing_accuracy")]) for cell in rows]
        body.append([label(arm), *seconds, *routed])
    devices = [next(iter(column.values()))[0]["device"] for column in columns.values()]
    headings = [f"s, {size_label(n)}, {device}" for n, device in zip(columns, devices, strict=True)]
    return markdown(["arm", *headings, *(f"routing accuracy, %, {size_label(n)}" for n in columns)], body)


def tasks_table(column: Column) -> str:
    """Scores by arm and task."""
    tasks = list(dict.fromkeys(task for rows in column.values() for row in rows for task in row["scores"]))
    body = []
    for arm, rows in column.items():
        scores = [[row["scores"][task] for row in rows if task in row["scores"]] for task in tasks]
        body.append([label(arm), *map(spread, scores), score_cell(column, arm)])
    return markdown(["arm", *tasks, "mean"], body)


def differences_table(found: dict[str, Columns], base: str, minus_base: bool) -> str:
    """Differences between each arm and one arm in each suite, and in the mean of the four of which `all` consists.

    Args:
        found: the columns of each suite.
        base: the one arm.
        minus_base: whether it is subtracted from the others, or they from it.
    """
    body = []
    for n in sizes_of(found):
        of_size = {suite: columns.get(n, {}) for suite, columns in found.items()}
        for arm in arms_of(of_size):
            if arm == base:
                continue
            first, second = (arm, base) if minus_base else (base, arm)
            compared = {
                suite: (pairs(of_size.get(suite, {}).get(first, [])), pairs(of_size.get(suite, {}).get(second, [])))
                for suite in SUITES
            }
            cells = [difference_cell(difference(*scores)) for scores in compared.values()]
            cells.append(difference_cell(mean_difference([compared[suite] for suite in PARTS])))
            body.append([size_label(n), label(arm), *cells])
    return markdown(["rows a task", "arm", *SUITES, f"mean of {len(PARTS)}"], body)


def difference_cell(found: Difference | None) -> str:
    """Mean with interval, and the number of pairs."""
    if found is None:
        return MISSING
    return f"{found.mean:+z.1f} ({found.low:+z.1f} to {found.high:+z.1f}; {found.pairs})"


def rates_table(trials: list[Row], found: dict[str, Columns]) -> str:
    """Validation scores of the learning rates tried, by suite, size, arm and device, and the one of the results."""
    tried: dict[tuple[str, Size, str, str], dict[float, float]] = defaultdict(dict)
    for trial in trials:
        key = trial["suite"], trial["n"], trial["arm"], trial["device"]
        tried[key][trial["learning_rate"]] = trial["validation"]
    body = []
    order = sorted(tried, key=lambda key: (SUITES.index(key[0]), size_order(key[1]), arm_order(key[2]), key[3]))
    for suite, n, arm, device in order:
        scores = tried[suite, n, arm, device]
        listed = ", ".join(f"{rate:g}: {scores[rate]:.1f}" for rate in sorted(scores))
        rows = [row for row in found.get(suite, {}).get(n, {}).get(arm, []) if row["device"] == device]
        chosen = ", ".join(f"{row['learning_rate']:g}" for row in rows[:1] if row["trials"])
        body.append([suite, size_label(n), label(arm), device, listed, chosen or MISSING])
    return markdown(["suite", "rows a task", "arm", "device", "learning rate: validation score", "chosen"], body)
