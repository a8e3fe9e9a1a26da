"""Markdown tables of the result files, for the documents.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

RESULTS = Path(__file__).parent / "results"
MISSING = "\N{EN DASH}"
METHODS = {
    "probe": "logistic regression",
    "probe_texts": "the same on text features",
    "lora": "LoRA",
    "none": "retrieval only",
    "head": "`head`",
    "prototype": "`prototype`",
    "adapter": "`adapter`",
}


def rows(name: str) -> list[dict[str, Any]]:
    return read(RESULTS / f"{name}.jsonl")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; of a single value itself, and of none a dash."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else MISSING
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


def markdown(header: list[str], body: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *body)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)


def table(header: list[str], body: list[list[str]]) -> None:
    print(markdown(header, body) + "\n")


Scores = dict[tuple[str, int], float]
"""Scores by (task, seed), in per cent."""


def transfer_scores(found: list[dict[str, Any]]) -> dict[tuple[int, str], Scores]:
    """The scores of each (k, method)."""
    scores: dict[tuple[int, str], Scores] = defaultdict(dict)
    for row in found:
        scores[row["k"], row["method"]][row["task"], row["seed"]] = 100 * row["score"]
    return scores


def transfer_table(found: list[dict[str, Any]]) -> str:
    """Accuracy by k, task and method: mean and standard deviation over draws, and those of the mean over tasks.

    The mean of a method is over the draws for which it has a score of every task.
    """
    scores = transfer_scores(found)
    seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in found:
        seconds[row["k"], row["method"]].append(row["seconds"])
    tasks = list(dict.fromkeys(row["task"] for row in found))
    present = {row["method"] for row in found}
    methods = [method for method in METHODS if method in present] + sorted(present - set(METHODS))
    body = []
    for k in sorted({k for k, _ in scores}):
        columns = [scores.get((k, method), {}) for method in methods]
        for task in tasks:
            draws = [[score for (name, _), score in column.items() if name == task] for column in columns]
            body.append([str(k), task, *map(spread, draws)])
        means = [draw_means(column, tasks) for column in columns]
        body.append([str(k), "**mean**", *(f"**{spread(x)}**" for x in means)])
        times = [seconds.get((k, method), []) for method in methods]
        body.append([str(k), "longest, s", *(f"{max(x):.1f}" if x else MISSING for x in times)])
    return markdown(["k", "task", *(METHODS.get(method, f"`{method}`") for method in methods)], body)


def draw_means(scores: Scores, tasks: list[str]) -> list[float]:
    """Means over tasks, of the draws that have them all."""
    seeds = dict.fromkeys(seed for _, seed in scores)
    complete = [seed for seed in seeds if all((task, seed) in scores for task in tasks)]
    return [mean(scores[task, seed] for task in tasks) for seed in complete]


def routing() -> None:
    """Routing of known tasks and declining of unknown ones, by what tasks are recognised by."""
    body = []
    for row in rows("routing"):
        aurocs = [f"{found['similarity']:.3f}" for found in row["auroc"].values()]
        shares = [row[f"accuracy{end}"] for end in ("", "_but_nli", "_but_nli_and_shared_sources")]
        counts = [str(row["nli_confusions"]), f"{100 * row['declined_known']:.1f}"]
        body.append([row["recognised_by"], *(f"{100 * x:.1f}" for x in shares), *counts, *aurocs])
    if body:
        held_out = list(rows("routing")[0]["auroc"])
        header = [
            "recognised by",
            "routing accuracy, %",
            "but for NLI",
            "and shared sources",
            "NLI confusions",
            "declined, %",
        ]
        table([*header, *(f"AUROC {name}" for name in held_out)], body)
    for row in rows("routing"):
        if row["recognised_by"] == "prototype":
            print(f"256 inputs: {row['told_ms']:.0f} ms with their tasks told, {row['routed_ms']:.0f} ms routed.\n")
            declined = ", ".join(f"{name} {100 * share:.0f} %" for name, share in row["declined"].items())
            print(f"Declined: {declined}\n")
            names = row["tasks"]
            confusion = zip(names, row["confusion"], strict=True)
            table(["own task", *names], [[name, *map(str, counts)] for name, counts in confusion])


def features() -> None:
    """Which layer to route by."""
    layers = defaultdict(list)
    for row in rows("features"):
        layers[row["layer"]].append(row)
    body = []
    for layer, found in layers.items():
        shares = [[100 * row[f"accuracy{end}"] for row in found] for end in ("", "_but_nli_and_shared_sources")]
        aurocs = [mean(row["auroc"][name] for row in found) for name in found[0]["auroc"]]
        spread = [f"{mean(x):.1f} ± {stdev(x):.1f}" for x in shares]
        body.append([str(layer), str(found[0]["passes"]), *spread, *(f"{x:.3f}" for x in aurocs)])
    if body:
        first = next(iter(layers.values()))[0]
        print(f"A routed batch: {first['one_pass_ms']:.1f} ms in one pass, {first['two_pass_ms']:.1f} ms in two.\n")
        names = list(first["auroc"])
        header = ["layer", "passes", "routing accuracy, %", "but for NLI and shared sources"]
        table([*header, *(f"AUROC {name}" for name in names)], body)


SPEED_TABLES = {
    "Training": ("train_", "epoch_", "per_row_"),
    "Options of training": ("option_", "compile_"),
    "Mixed batches": ("mixed_batch_", "peft_1_", "peft_8_", "peft_32_", "vs_peft_", "loop_"),
    "Passes and answers of real texts": ("forward_", "predictor_vs_"),
    "Several tasks of one text": ("several_tasks_",),
    "Generation and routing": ("generate_", "routing_", "predictor_texts_"),
    "Many tasks": ("ten_thousand_", "cold_", "disk_", "peft_disk_", "predict_peak_"),
}
"""The tables of docs/performance.md, and the beginnings of the names of their figures."""


def speed() -> None:
    """The figures of benchmarks/speed.py and benchmarks/gpu.py, by device."""
    by_device: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows("speed"):
        by_device[row["device"]].append(row)
    for device, found in by_device.items():
        print(f"### {device}, {found[0]['threads']} threads\n")
        print(speed_tables(found))


SPEED_COLUMNS = ["figure", "default preset (quartiles)", "`paper`", "aim", "ours, ms", "other, ms", "the other"]


def speed_tables(found: Sequence[dict[str, Any]]) -> str:
    """The tables of the figures of one device.

    The aim and the times of a line are those of the default preset, or of `paper` where that alone was measured.
    """
    figures: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in found:
        figures[row["figure"]][row["preset"]] = row
    texts = []
    for title, beginnings in SPEED_TABLES.items():
        body = [speed_cells(presets) for figure, presets in figures.items() if figure.startswith(beginnings)]
        if body:
            texts.append(f"{title}:\n\n{markdown(SPEED_COLUMNS, body)}\n")
    grown = [row for figure, presets in figures.items() if figure.startswith("exponent_") for row in presets.values()]
    if grown:
        texts.append(markdown(["figure", "preset", "exponent", "points"], [growth_cells(row) for row in grown]) + "\n")
    return "\n".join(texts)


def speed_cells(presets: dict[str, dict[str, Any]]) -> list[str]:
    """A line of a figure, of which there is a row for each preset that was measured."""
    row = presets.get("plus", presets.get("paper"))
    assert row is not None
    relation = "≥" if row["better"] == "higher" else "≤"
    aim = "" if row["aim"] is None else f"{relation} {row['aim']:g}"
    times = [f"{row[name]:.4g}" if name in row else "" for name in ("ours_ms", "other_ms")]
    is_default = row["preset"] == "plus" or str(row.get("backbone")).startswith("t5")
    default, paper = speed_value(row if is_default else None), speed_value(presets.get("paper"))
    return [f"`{row['figure']}`", default, paper, aim, *times, row.get("other", "")]


def speed_value(row: dict[str, Any] | None) -> str:
    if row is None:
        return MISSING
    value = f"{row['value']:.3g}"
    return value + " ({:.3g} to {:.3g})".format(*row["quartiles"]) if "quartiles" in row else value


def growth_cells(row: dict[str, Any]) -> list[str]:
    unit = "s" if row["figure"] == "exponent_predict_rows" else "ms"
    points = ", ".join(f"{int(point[0]):,}: {point[1]:.3g} {unit}" for point in row["points"])
    return [f"`{row['figure']}`", row["preset"], f"{row['value']:.2f}", points]


def grouping() -> None:
    """Quality with and without batches by length, over seeds."""
    body = []
    for grouped in (True, False):
        found = [row for row in rows("grouping") if row["group_by_length"] == grouped]
        if found:
            shares = [[100 * row[name] for row in found] for name in ("mean", "routing_accuracy")]
            seconds = [row["seconds"] for row in found]
            cells = [f"{mean(x):.1f} ± {stdev(x):.1f}" for x in (*shares, seconds)]
            body.append(["by length" if grouped else "shuffled", str(len(found)), *cells])
    if body:
        table(["batches", "seeds", "mean score, %", "routing accuracy, %", "training, s"], body)


if __name__ == "__main__":
    print(transfer_table(rows("transfer_paper")) + "\n")
    routing()
    features()
    speed()
    grouping()
