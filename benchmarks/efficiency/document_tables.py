"""The Markdown tables of docs/sample-efficiency.md, and their places in it."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import chain
from statistics import mean

from tables import METHODS, MISSING, markdown, spread, transfer_scores, transfer_table

from efficiency.summary import Column, Difference, Row, Size, arm_order, difference, label, pairs, size_order

NOTHING = "Not measured yet."
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


COMPARED = ("probe", "probe_texts", "lora")
"""Methods that new tasks from a few examples are compared with."""


def tables(columns: dict[Size, Column], trials: list[Row], transfer: list[Row]) -> dict[str, str]:
    """All tables by the name of their marker."""
    return {
        "main": main_table(columns) if columns else NOTHING,
        "costs": costs_table(columns) if columns else NOTHING,
        "differences": differences_table(columns) if columns else NOTHING,
        "tasks-100": tasks_table(columns[100]) if 100 in columns else NOTHING,
        "tasks-32": tasks_table(columns[32]) if 32 in columns else NOTHING,
        "learning-rates": rates_table(trials, columns) if trials else NOTHING,
        "transfer": transfer_table(transfer) if transfer else NOTHING,
        "transfer-differences": transfer_differences(transfer) if transfer else NOTHING,
    }


def main_table(columns: dict[Size, Column]) -> str:
    """Scores by arm and size; trainable parameters and stored bytes by arm, a range where they depend on the size."""
    body = []
    for arm in arms_of(columns):
        cells = [score_cell(column, arm) for column in columns.values()]
        rows = [row for column in columns.values() for row in column.get(arm, [])]
        sizes = [span(known(rows, name)) for name in ("trainable_per_task", "bytes_per_task")]
        body.append([label(arm), *cells, *sizes])
    return markdown(["arm", *map(size_label, columns), "trainable per task", "bytes per added task"], body)


def arms_of(columns: dict[Size, Column]) -> list[str]:
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


def costs_table(columns: dict[Size, Column]) -> str:
    """Seconds of training and share of test rows routed right, means over seeds, by arm and size."""
    body = []
    for arm in arms_of(columns):
        rows = [column.get(arm, []) for column in columns.values()]
        seconds = [f"{mean(found):,.0f}" if (found := known(cell, "seconds")) else MISSING for cell in rows]
        routed = [spread([100 * share for share in known(cell, "routing_accuracy")]) for cell in rows]
        body.append([label(arm), *seconds, *routed])
    devices = [next(iter(column.values()))[0]["device"] for column in columns.values()]
    headings = [f"s, {size_label(n)}, {device}" for n, device in zip(columns, devices, strict=True)]
    return markdown(["arm", *headings, *(f"routed right, %, {size_label(n)}" for n in columns)], body)


def tasks_table(column: Column) -> str:
    """Scores by arm and task."""
    tasks = list(dict.fromkeys(task for rows in column.values() for row in rows for task in row["scores"]))
    body = []
    for arm, rows in column.items():
        scores = [[row["scores"][task] for row in rows if task in row["scores"]] for task in tasks]
        body.append([label(arm), *map(spread, scores), score_cell(column, arm)])
    return markdown(["arm", *tasks, "mean"], body)


def differences_table(columns: dict[Size, Column]) -> str:
    """Each arm minus PHA, and PHA+ minus each other arm."""
    body = []
    for n, column in columns.items():
        scores = {arm: pairs(rows) for arm, rows in column.items()}
        for arm in column:
            to_pha = None if arm == "pha" else difference(scores[arm], scores.get("pha", {}))
            of_plus = None if arm == "plus" else difference(scores.get("plus", {}), scores[arm])
            body.append([size_label(n), label(arm), *difference_cells(to_pha), *difference_cells(of_plus)])
    return markdown(["rows a task", "arm", "arm minus PHA", "pairs", "PHA+ minus arm", "pairs"], body)


def difference_cells(found: Difference | None) -> list[str]:
    """Mean with interval, and the number of pairs."""
    if found is None:
        return [MISSING, MISSING]
    return [f"{found.mean:+z.1f} ({found.low:+z.1f} to {found.high:+z.1f})", str(found.pairs)]


def transfer_differences(rows: list[Row]) -> str:
    """`adapter` minus what it is compared with by k, for each task over draws, and for all over (task, draw)."""
    scores = transfer_scores(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    present = [method for method in COMPARED if any(row["method"] == method for row in rows)]
    body = []
    for k in sorted({k for k, _ in scores}):
        ours = scores.get((k, "adapter"), {})
        for task in (*tasks, None):
            chosen = {pair: score for pair, score in ours.items() if task in (pair[0], None)}
            found = [difference(chosen, scores.get((k, method), {})) for method in present]
            cells = [cell for one in found for cell in difference_cells(one)]
            body.append([str(k), task or "**all**", *cells])
    columns = [cell for method in present for cell in (f"`adapter` minus {METHODS[method]}", "pairs")]
    return markdown(["k", "task", *columns], body)


def rates_table(trials: list[Row], columns: dict[Size, Column]) -> str:
    """Validation scores of the learning rates tried, by size, arm and device, and the one of the results."""
    tried: dict[tuple[Size, str, str], dict[float, float]] = defaultdict(dict)
    for trial in trials:
        tried[trial["n"], trial["arm"], trial["device"]][trial["learning_rate"]] = trial["validation"]
    body = []
    for n, arm, device in sorted(tried, key=lambda key: (size_order(key[0]), arm_order(key[1]), key[2])):
        scores = tried[n, arm, device]
        listed = ", ".join(f"{rate:g}: {scores[rate]:.1f}" for rate in sorted(scores))
        rows = [row for row in columns.get(n, {}).get(arm, []) if row["device"] == device]
        chosen = ", ".join(f"{rate:g}" for rate in dict.fromkeys(row["learning_rate"] for row in rows))
        body.append([size_label(n), label(arm), device, listed, chosen or MISSING])
    return markdown(["rows a task", "arm", "device", "learning rate: validation score", "chosen"], body)
