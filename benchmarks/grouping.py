"""What batches by length cost in quality: the demo's tasks, trained with and without them.

python benchmarks/grouping.py

Writes a row a run to benchmarks/results/grouping.jsonl: mean of the tasks' test scores, routing accuracy, seconds of
training.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from hyperadapters import __version__, load_recipe, train
from hyperadapters.utils.files import write_atomically

HERE = Path(__file__).parent
SEEDS = (0, 1)


def main() -> None:
    rows = []
    for seed in SEEDS:
        for grouped in (True, False):
            recipe = load_recipe(
                HERE.parent / "recipes" / "demo.yaml", [f"seed={seed}", f"data.group_by_length={str(grouped).lower()}"]
            )
            with TemporaryDirectory() as folder:
                metrics = train(recipe, Path(folder) / "run").metrics
            rows.append(
                {
                    "group_by_length": grouped,
                    "seed": seed,
                    "mean": metrics["mean"]["test"],
                    "routing_accuracy": metrics["routing_accuracy"],
                    "seconds": metrics["seconds"],
                    "version": __version__,
                }
            )
            print(rows[-1])
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(HERE / "results" / "grouping.jsonl", text.encode())


if __name__ == "__main__":
    main()
