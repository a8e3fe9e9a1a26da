"""The Markdown tables of repeated inputs, from the report of benchmarks/leakage.py."""

from __future__ import annotations

from typing import Any

from tables import markdown

from efficiency.document_tables import NOTHING

Report = dict[str, dict[str, Any]]
"""What is counted, by suite."""


def tables(report: Report) -> dict[str, str]:
    """Both tables by the name of their marker."""
    if not report:
        return {"leakage": NOTHING, "leakage-texts": NOTHING}
    return {"leakage": suites_table(report), "leakage-texts": texts_table(report)}


def suites_table(report: Report) -> str:
    """Rows of each suite, and how many of them are repeated where they should not be."""
    body = []
    for suite, found in report.items():
        tasks, tested = found["tasks"], found["tested"]
        rows = [sum(task["rows"][split] for task in tasks) for split in ("train", "validation", "test")]
        repeated = sum(sum(task["repeated"].values()) for task in tasks)
        shared = sum(sum(task["shared"].values()) for task in tasks)
        across = [sum(pair[kind] for pair in tested if pair["train"] != pair["test"]) for kind in ("inputs", "texts")]
        trained = sum(pair["inputs"] for pair in found["trained"])
        numbers = (len(tasks), *rows, repeated, shared, *across, trained)
        body.append([suite, *(f"{number:,}" for number in numbers)])
    header = ["suite", "tasks", "training rows", "validation rows", "test rows", "repeated in a split"]
    header += ["in two splits of a task", "test rows in another task's training rows", "with a text there"]
    return markdown([*header, "training inputs of two tasks"], body)


def texts_table(report: Report) -> str:
    """Test rows that have a text in common with training rows, by the task that is tested and the one trained on."""
    shared: dict[str, list[str]] = {}
    for pair in report["all"]["tested"]:
        entry = f"{pair['train']} {pair['texts']:,}" + (f" ({pair['inputs']:,} whole)" if pair["inputs"] else "")
        shared.setdefault(f"{pair['test']} ({pair['rows']:,})", []).append(entry)
    return markdown(
        ["task (test rows)", "test rows with a text among the training rows of"],
        [[test, ", ".join(entries)] for test, entries in shared.items()],
    )
