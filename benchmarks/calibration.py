"""Whether probabilities are calibrated, and whether promises about declined inputs and wrong answers are kept.

    python benchmarks/calibration.py [--suites main fdu] [--seeds 0 1]

For each suite and seed, a model of the preset "plus" is trained on 100 rows of each task, with at most 100 validation
rows. Half of the test rows (at most 1,000 of each task in main, 400 elsewhere) is scored. The other half serves
`model.calibrate` as fresh rows. Foreign inputs are those of the other suites. Appends one JSON object for each suite
and seed to benchmarks/results/calibration.jsonl; --tables prints the tables of docs/calibration.md from this file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from efficiency.code_digest import code_digest
from efficiency.data import MAX_LENGTHS, PARTS, Suite, load

from hyperadapters import HyperAdapterModel, Predictor, Trainer, TrainingArguments, __version__
from hyperadapters.config import DEFAULT_BACKBONE
from hyperadapters.data.examples import Example
from hyperadapters.heads.calibration import confidence_for
from hyperadapters.inference.predictor import Prediction
from hyperadapters.training.evaluation import evaluate

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "calibration.jsonl"
ROWS, STEPS = 100, 250
SCORED_ROWS = {"main": 500, "fdu": 200, "hwu64": 200, "tweeteval": 200}
"""Maximum number of scored rows of a task, and of fresh rows."""
FOREIGN_ROWS = 500
FEWEST_ROWS = 200
"""Number of scored rows that a task needs for its calibration error to say something."""
MAX_ERRORS = (0.05, 0.1, 0.2)
FALSE_DECLINE_RATE, FALSE_ACCEPT_RATE = 0.05, 0.1


def halves(rows: list[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Two random halves of at most `count` rows each."""
    rows = random.Random(seed).sample(rows, min(len(rows), 2 * count))
    return rows[::2], rows[1::2]


def promise(kept: int, count: int, bound: float) -> dict[str, float]:
    """How often something happened that was to happen at most with the given share.

    The excess is in standard errors of the share. Where the bound is that of as many other rows, whose draw counts as
    well, the standard error of the difference is larger by a factor of 1.4 (see `tables`).
    """
    share, error = kept / max(1, count), (bound * (1 - bound) / max(1, count)) ** 0.5
    return {"share": share, "rows": count, "bound": bound, "excess": (share - bound) / error}


def declined(predictions: list[Prediction], bounds: dict[str, float]) -> dict[str, dict[str, float]]:
    """Of the rows routed to each task, the share that is declined, beside its bound."""
    by_task: dict[str, list[bool]] = {}
    for prediction in predictions:
        assert prediction.routing is not None
        by_task.setdefault(prediction.routing.candidates[0].task, []).append(not prediction.routing.accepted)
    return {name: promise(sum(own), len(own), bounds[name]) for name, own in by_task.items() if name in bounds}


def share_declined(predictions: list[Prediction]) -> float:
    """Share of the rows that routing declines."""
    return float(np.mean([not prediction.routing.accepted for prediction in predictions if prediction.routing]))


def answered(model: HyperAdapterModel, rows: list[Example], predictions: list[Prediction]) -> dict[str, Any]:
    """For each maximum error: the share of rows that are answered, of wrong answers, and of tasks that exceed it."""
    assert model.heads is not None
    found = {}
    for max_error in MAX_ERRORS:
        right: dict[str, list[bool]] = {}
        count = 0
        for row, prediction in zip(rows, predictions, strict=True):
            if prediction.probabilities is not None:
                count += 1
                confidence = confidence_for(model.heads.error_bounds[int(row.task_id or 0)], max_error)
                if max(prediction.probabilities.values()) > confidence:
                    right.setdefault(str(prediction.task), []).append(prediction.target == row.target)
        every = [value for own in right.values() for value in own]
        excesses = [promise(len(own) - sum(own), len(own), max_error)["excess"] for own in right.values()]
        found[str(max_error)] = {
            "answered": len(every) / count,
            "wrong": 1 - float(np.mean(every)) if every else 0.0,
            "tasks": len(right),
            "tasks_two_errors_above": sum(excess > 2 for excess in excesses),
        }
    return found


def measure(folder: Path, suite: Suite, seed: int) -> dict[str, Any]:
    """All figures of one suite and seed."""
    data = load(folder, suite, ROWS, seed)
    model = HyperAdapterModel.from_backbone(
        DEFAULT_BACKBONE, [found.task for found in data], max_length=MAX_LENGTHS[suite]
    )
    train, validation = ({found.task.name: found.splits[split] for found in data} for split in ("train", "validation"))
    Trainer(model, train, validation, TrainingArguments(max_steps=STEPS, seed=seed, report_to="none")).train()
    scored: list[Example] = []
    fresh: dict[str, list[Example]] = {}
    for found in data:
        fresh[found.task.name], own = halves(found.splits["test"], SCORED_ROWS[suite], seed)
        scored += own
    others = [data for part in PARTS if part != suite for data in load(folder, part, ROWS, seed)]
    inputs = [Example(None, row.text, row.text_pair) for found in others for row in found.splits["test"][:100]]
    outside, foreign = halves(inputs, FOREIGN_ROWS, seed)
    predictor = Predictor(model)

    result = evaluate(model, scored)
    calibration = {
        name: vars(found)
        for name, found in result.calibration.items()
        if sum(row.task_id == model.task_id(name) for row in scored) >= FEWEST_ROWS
    }
    after_training = {
        "declined": share_declined(result.predictions),
        "answered": answered(model, scored, result.predictions),
    }
    report = model.calibrate(fresh, false_decline_rate=FALSE_DECLINE_RATE)
    bounds = {name: found.decline_bound for name, found in report.tasks.items() if found.decline_bound is not None}
    predictions = list(predictor(scored))
    recalibrated = {"declined": declined(predictions, bounds), "answered": answered(model, scored, predictions)}
    model.calibrate(fresh, outside, FALSE_DECLINE_RATE, FALSE_ACCEPT_RATE)
    accepted = sum(found.accepted for found in model.route(foreign))
    return {
        "suite": suite,
        "seed": seed,
        "score": result.mean,
        "calibration": calibration,
        "after_training": after_training,
        "recalibrated": recalibrated,
        "with_foreign": {
            "accepted": promise(accepted, len(foreign), FALSE_ACCEPT_RATE),
            "known_declined": share_declined(list(predictor(scored))),
        },
        "version": __version__,
        "digest": code_digest(),
    }


def tables(rows: list[dict[str, Any]]) -> str:
    """The tables of the documentation in Markdown."""
    lines = [
        "| suite | tasks | calibration error before | after | largest after | tasks at most 0.05 | Brier score before "
        "| after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for suite in dict.fromkeys(row["suite"] for row in rows):
        found = [task for row in rows if row["suite"] == suite for task in row["calibration"].values()]
        if not found:  # no task of the suite has enough rows
            continue
        before, after, brier, brier_after = (
            [task[name] for task in found]
            for name in ("calibration_error_before", "calibration_error", "brier_score_before", "brier_score")
        )
        lines.append(
            f"| {suite} | {len(found)} | {np.mean(before):.3f} | {np.mean(after):.3f} | {max(after):.3f} | "
            f"{sum(value <= 0.05 for value in after)} | {np.mean(brier):.3f} | {np.mean(brier_after):.3f} |"
        )
    lines += [
        "",
        "| suite | declined after training, % | declined with fresh rows, % | tasks above the bound by two standard "
        "errors | foreign accepted, % | known declined then, % |",
        "|---|---|---|---|---|---|",
    ]
    for suite in dict.fromkeys(row["suite"] for row in rows):
        own = [row for row in rows if row["suite"] == suite]
        by_task = [task for row in own for task in row["recalibrated"]["declined"].values()]
        share = sum(task["share"] * task["rows"] for task in by_task) / sum(task["rows"] for task in by_task)
        lines.append(
            f"| {suite} | {100 * np.mean([row['after_training']['declined'] for row in own]):.1f} | "
            f"{100 * share:.1f} | {sum(task['excess'] > 2 * 2**0.5 for task in by_task)} of {len(by_task)} | "
            f"{100 * np.mean([row['with_foreign']['accepted']['share'] for row in own]):.1f} | "
            f"{100 * np.mean([row['with_foreign']['known_declined'] for row in own]):.1f} |"
        )
    lines += ["", "| suite | rows | " + " | ".join(f"answered at {e}, % | wrong, %" for e in MAX_ERRORS) + " |"]
    lines.append("|---|---|" + "---|" * (2 * len(MAX_ERRORS)))
    for suite in dict.fromkeys(row["suite"] for row in rows):
        for name, title in (("after_training", "validation"), ("recalibrated", "fresh")):
            found = [row[name]["answered"] for row in rows if row["suite"] == suite]
            cells = [
                f"{100 * np.mean([one[str(e)]['answered'] for one in found]):.1f} | "
                f"{100 * np.mean([one[str(e)]['wrong'] for one in found]):.1f}"
                for e in MAX_ERRORS
            ]
            lines.append(f"| {suite} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--suites", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--tables", action="store_true", help="print the tables of the results, measure nothing")
    arguments = parser.parse_args()
    if arguments.tables:
        print(tables([json.loads(line) for line in arguments.output.read_text().splitlines()]))
        return
    for seed in arguments.seeds:
        for suite in arguments.suites:
            with arguments.output.open("a") as file:
                file.write(json.dumps(measure(arguments.data, suite, seed)) + "\n")
            print(f"{suite}, seed {seed}: done", flush=True)


if __name__ == "__main__":
    main()
