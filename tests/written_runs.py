"""Folders of finished runs and files of result rows for the tests of reports, written without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

NAMES = ("intent", "mood", "size")
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "<b>bold</b> & $x^2$ {{ 7 * 7 }} %{x}",
    "_under\u2028line\u202e\x07 " + "long " * 400,
)
"""Names that would do harm as HTML, in Plotly, jinja2 or matplotlib."""


def run_values(names: tuple[str, ...] = NAMES, seed: int = 0, rows: int = 12) -> dict[str, Any]:
    """The contents of the files of a run of three tasks, two of them classifications, by the names of the files."""
    draw = np.random.default_rng(seed)

    def share() -> float:
        return float(draw.uniform())

    def vector(task: int) -> list[float]:
        found = np.eye(6)[task] + draw.normal(0, 0.2, 6)
        return np.round(found / np.linalg.norm(found), 4).tolist()

    def bins() -> list[dict[str, Any]]:
        return [{"rows": 4, "confidence": 0.55 + 0.1 * place, "accuracy": share()} for place in range(4)]

    metrics = {name: "pearson" if index == 2 else "accuracy" for index, name in enumerate(names)}
    scores = {name: {split: {metrics[name]: share()} for split in ("validation", "test")} for name in names}
    tasks: list[dict[str, Any]] = []
    for name in names:
        task: dict[str, Any] = {
            "name": name,
            "metric": metrics[name],
            "rows": {"train": 50, "validation": 10, "test": rows},
            "majority": share() / 2,
            "declined": share() / 10,
            "decline_rates": [
                {"rate": rate, "bound": rate / 2, "declined": share() / 5, "rows": rows} for rate in (0.05, 0.1, 0.2)
            ],
        }
        if metrics[name] == "accuracy":
            task |= {
                "reliability": bins(),
                "reliability_before": bins(),
                "risk": {"x": [0.25, 0.5, 1.0], "y": [0.0, 0.125, 0.25 + share() / 8]},
                "error_limits": [
                    {"max_error": 0.05, "answered": 0.0, "wrong": None},
                    {"max_error": 0.2, "answered": share(), "wrong": share() / 4},
                ],
            }
        tasks.append(task)
    steps = [50.0, 100.0, 150.0]
    details: dict[str, Any] = {
        "format": 1,
        "versions": {"hyperadapters": "0.1.0", "torch": "2.13.0"},
        "device": "cpu",
        "split": "test",
        "seconds": {"training steps": 40.5, "final evaluation": 1.25},
        "parameters": {"heads": 2_000, "hypernetwork": 60_000 + seed, "backbone": 22_000_000},
        "losses": {
            term: {"x": steps, "y": draw.uniform(size=3).tolist()}
            for term in ("total", "task", "instance", "prototype")
        },
        "validation_mean": {"x": steps, "y": draw.uniform(size=3).tolist()},
        "validation": {name: {"x": steps, "y": draw.uniform(size=3).tolist()} for name in names},
        "best_step": 100,
        "tasks": tasks,
        "prototypes": [vector(index) for index in range(3)],
        "confusion": [[0, 0, rows - 2], [0, 1, 2], [1, 1, rows], [2, 1, 1], [2, 2, rows - 1]],
        "points": [
            {
                "task": index,
                "nearest": index,
                "vector": vector(index),
                "text": f"text {row} of {name}",
                "target": "yes",
                "answer": "yes" if row else None,
            }
            for index, name in enumerate(names)
            for row in range(rows)
        ],
    }
    return {
        "metrics.json": {
            "tasks": scores,
            "calibration": {
                name: {"test": {"temperature": 1.5, "calibration_error": share() / 10, "calibration_error_before": 0.2}}
                for name in names[:2]
            },
            "mean": {
                split: float(np.mean([one[split][metrics[name]] for name, one in scores.items()]))
                for split in ("validation", "test")
            },
            "routing_accuracy": 0.95,
            "trainable_parameters": 62_000 + seed,
            "seconds": 41.5,
        },
        "details.json": details,
        "comparison.json": {"test": {"majority": {}, "linear_probe": {name: share() for name in names}, "pha": {}}},
        "hyperadapter.json": {"format": "hyperadapters", "tasks": [{"name": name} for name in names]},
        "resolved_recipe.yaml": {
            "backbone": "some/model",
            "seed": seed,
            "training": {"max_steps": 150},
            "tasks": [{"name": f"task {index}", "source": {"path": "/rows.csv"}} for index in range(len(names))],
        },
    }


def write_values(folder: Path, values: dict[str, Any]) -> Path:
    """A folder with these files; one whose value is None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        if value is not None:
            text = yaml.safe_dump(value) if name.endswith(".yaml") else json.dumps(value)
            (folder / name).write_text(text)
    return folder


def result_rows() -> list[dict[str, Any]]:
    """Result rows of two arms with two sizes and two seeds."""
    return [
        {
            "suite": "main",
            "arm": arm,
            "n": n,
            "seed": seed,
            "scores": {"mood": 60.0 + place + seed, "topic": 70.0 + seed},
            "score": 65.0 + place / 2 + seed,
            "trainable_per_task": 1000 * (place + 1),
            "seconds": 3.5 + seed,
            "steps": 10,
        }
        for place, arm in enumerate(("probe", "pha"))
        for n in (16, 100)
        for seed in (0, 1)
    ]
