"""Markdown tables of the result files, for the documents.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

RESULTS = Path(__file__).parent / "results"
METHODS = {
    "probe": "logistic regression",
    "none": "retrieval only",
    "prototype": "`prototype`",
    "adapter": "`adapter`",
}


def rows(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(header: list[str], body: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for cells in body:
        print("| " + " | ".join(cells) + " |")
    print()


def transfer() -> None:
    """Accuracy by task, k and method: mean and standard deviation over seeds; and the mean over tasks."""
    scores: dict[tuple[int, str, str], list[float]] = defaultdict(list)
    by_seed: dict[tuple[int, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in rows("transfer"):
        scores[row["k"], row["task"], row["method"]].append(100 * row["score"])
        by_seed[row["k"], row["method"]][row["seed"]].append(100 * row["score"])
        seconds[row["k"], row["method"]].append(row["seconds"])
    tasks = list(dict.fromkeys(task for _, task, _ in scores))
    body = []
    for k in sorted({k for k, _, _ in scores}):
        for task in tasks:
            found = [scores[k, task, method] for method in METHODS]
            body.append([str(k), task, *(f"{mean(x):.1f} ± {stdev(x):.1f}" for x in found)])
        means = [[mean(x) for x in by_seed[k, method].values()] for method in METHODS]
        body.append([str(k), "**mean**", *(f"**{mean(x):.1f} ± {stdev(x):.1f}**" for x in means)])
        longest = [max(seconds[k, method]) for method in METHODS]
        body.append([str(k), "longest, s", *(f"{x:.1f}" for x in longest)])
    table(["k", "task", *METHODS.values()], body)


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
            "routed right, %",
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
        header = ["layer", "passes", "routed right, %", "but for NLI and shared sources"]
        table([*header, *(f"AUROC {name}" for name in names)], body)


SPEED_TABLES = {
    "Training": ("train_", "epoch_", "per_row_"),
    "Options of training": ("option_", "compile_"),
    "Mixed batches": ("mixed_batch_", "peft_1_", "peft_8_", "peft_32_", "vs_peft_", "loop_"),
    "Generation and routing": ("generate_", "routing_", "predictor_"),
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
        for title, beginnings in SPEED_TABLES.items():
            body = [speed_cells(row) for row in found if row["figure"].startswith(beginnings)]
            if body:
                print(f"{title}:\n")
                table(["figure", "value (quartiles)", "aim", "ours, ms", "other, ms", "the other"], body)
        growth = [row for row in found if row["figure"].startswith("exponent_")]
        if growth:
            table(["figure", "exponent", "points"], [growth_cells(row) for row in growth])


def speed_cells(row: dict[str, Any]) -> list[str]:
    relation = "≥" if row["better"] == "higher" else "≤"
    aim = "" if row["aim"] is None else f"{relation} {row['aim']:g}"
    times = [f"{row[name]:.4g}" if name in row else "" for name in ("ours_ms", "other_ms")]
    value = f"{row['value']:.3g}"
    if "quartiles" in row:
        value += " ({:.3g} to {:.3g})".format(*row["quartiles"])
    return [f"`{row['figure']}`", value, aim, *times, row.get("other", "")]


def growth_cells(row: dict[str, Any]) -> list[str]:
    unit = "s" if row["figure"] == "exponent_predict_rows" else "ms"
    points = ", ".join(f"{int(point[0]):,}: {point[1]:.3g} {unit}" for point in row["points"])
    return [f"`{row['figure']}`", f"{row['value']:.2f}", points]


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
        table(["batches", "seeds", "mean score, %", "routed right, %", "training, s"], body)


if __name__ == "__main__":
    transfer()
    routing()
    features()
    speed()
    grouping()
