"""The Markdown tables of docs/sample-efficiency.md that are about new tasks from a few examples."""

from __future__ import annotations

from statistics import mean

from tables import METHODS, MISSING, draw_means, markdown, spread, transfer_scores, transfer_table

from efficiency.data import SUITES
from efficiency.document_tables import NOTHING, difference_cell
from efficiency.summary import Row, arm_order, difference, label

COMPARED = ("probe", "probe_texts", "lora")
"""Methods that a new task of a run is compared with."""
SUITE_COMPARED = ("probe_texts", "probe_names", "lora_texts", "adapter_shared_texts", "lora_shared_texts")
"""Methods that the models of a suite are compared with: those that do not call `add_task`."""
SUITE_METHODS = {
    "probe_texts": "logistic regression on text features",
    "probe_names": "the same with the names of labels",
    "lora_texts": "LoRA, text heads",
    "adapter_shared_texts": "logistic regression with the shared adapter of the other tasks",
    "lora_shared_texts": "logistic regression with the shared LoRA of the other tasks",
}


def tables(of_run: list[Row], of_suites: list[Row]) -> dict[str, str]:
    """All tables by the name of their marker."""
    return {
        "transfer": transfer_table(of_run) if of_run else NOTHING,
        "transfer-differences": transfer_differences(of_run) if of_run else NOTHING,
        "suite-transfer": suite_table(of_suites) if of_suites else NOTHING,
        "suite-transfer-differences": suite_differences(of_suites) if of_suites else NOTHING,
    }


def transfer_differences(rows: list[Row]) -> str:
    """The fit `head` minus what it is compared with by k, for each task over draws, and for all over (task, draw)."""
    scores = transfer_scores(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    present = [method for method in COMPARED if any(row["method"] == method for row in rows)]
    body = []
    for k in sorted({k for k, _ in scores}):
        ours = scores.get((k, "head"), {})
        for task in (*tasks, None):
            chosen = {pair: score for pair, score in ours.items() if task in (pair[0], None)}
            cells = [difference_cell(difference(chosen, scores.get((k, method), {}))) for method in present]
            body.append([str(k), task or "**all**", *cells])
    return markdown(["k", "task", *(f"`head` minus {METHODS[method]}" for method in present)], body)


def named(rows: list[Row]) -> list[Row]:
    """The last row of each cell, its method named as in the tables, baselines first."""
    sizes = {row["n"] for row in rows if "n" in row}

    def name(row: Row) -> str:
        found = SUITE_METHODS.get(row["method"]) or label(row["method"])
        found += f", n = {row['n']}" if "n" in row and len(sizes) > 1 else ""
        return f"{found}, fit {row['fit']}" if row.get("fit", "adapter") != "adapter" else found

    def order(row: Row) -> tuple[int, int, str]:
        baselines = list(SUITE_METHODS)
        place = baselines.index(row["method"]) if row["method"] in baselines else len(baselines)
        return place, *arm_order(row["method"])

    last = {(row["suite"], row["task"], row["k"], row["seed"], name(row)): row for row in rows}
    return [{**row, "method": name(row)} for row in sorted(last.values(), key=order)]


def suite_table(rows: list[Row]) -> str:
    """Mean over the new tasks of each suite by k and method, with its deviation over draws."""
    found = named(rows)
    methods = list(dict.fromkeys(row["method"] for row in found))
    body = []
    for suite in (suite for suite in SUITES if any(row["suite"] == suite for row in found)):
        of_suite = [row for row in found if row["suite"] == suite]
        tasks = list(dict.fromkeys(row["task"] for row in of_suite))
        scores = transfer_scores(of_suite)
        for k in sorted({k for k, _ in scores}):
            cells = [spread(draw_means(scores.get((k, method), {}), tasks)) for method in methods]
            body.append([f"{suite} ({len(tasks)} tasks)", str(k), *cells])
    return markdown(["suite", "k", *methods], body)


def suite_differences(rows: list[Row]) -> str:
    """Each model minus each baseline by suite and k, over (task, draw), and the least mean difference of a task."""
    found = named(rows)
    baselines = [SUITE_METHODS[method] for method in SUITE_COMPARED]
    present = [method for method in baselines if any(row["method"] == method for row in found)]
    models = [method for method in dict.fromkeys(row["method"] for row in found) if method not in baselines]
    body = []
    for suite in (*(suite for suite in SUITES if any(row["suite"] == suite for row in found)), None):
        # A task of `all` is also one of its own suite, so that the mean over all suites is without `all`.
        chosen = [row for row in found if row["suite"] == suite or (suite is None and row["suite"] != "all")]
        scores = transfer_scores([{**row, "task": f"{row['suite']}/{row['task']}"} for row in chosen])
        for k in sorted({k for k, _ in scores}):
            for model in models:
                cells = []
                for method in present:
                    ours, theirs = scores.get((k, model), {}), scores.get((k, method), {})
                    gains = {pair: ours[pair] - theirs[pair] for pair in ours.keys() & theirs.keys()}
                    of_tasks = {
                        task: mean(gain for pair, gain in gains.items() if pair[0] == task)
                        for task in sorted({task for task, _ in gains})
                    }
                    least = min(of_tasks, key=of_tasks.__getitem__, default=None)
                    told = MISSING if least is None else f"{least.partition('/')[2]} {of_tasks[least]:+z.1f}"
                    cells += [difference_cell(difference(ours, theirs)), told]
                body.append([suite or "**mean**", str(k), model, *cells])
    headings = (cell for method in present for cell in (f"minus {method}", "least, task"))
    return markdown(["suite", "k", "model", *headings], body)
