"""How well each method does with few training rows: suites of tasks, one frozen MiniLM, equal budgets.

    python benchmarks/sample_efficiency.py --suite all --arms probe lora_task pha --sizes 32 100 --seeds 0 1 2

Appends one JSON object a cell (suite, arm, size, seed) to benchmarks/results/sample_efficiency.jsonl; cells already
there are skipped, and those that failed are tried again. The learning rate of an arm is the best of five on the
validation rows with seed 0 (the trials are kept in learning_rates.jsonl beside it), or with --no-search its first one;
only rows of one kind are compared. Needs peft besides the library, and setfit for the arm of that name.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from efficiency.arms import ARMS
from efficiency.data import MAX_LENGTHS, SUITES, load, load_for_development, read_size
from efficiency.experiment import Setting
from efficiency.runner import Runner
from efficiency.training_loop import BUDGETS

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sample_efficiency.jsonl"
TRIALS = "learning_rates.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--suite", choices=SUITES, default="main")
    parser.add_argument("--arms", nargs="+", required=True, choices=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--sizes", nargs="+", type=read_size, default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--first-layer", type=int, choices=(0, 3), default=3, help="layers that stay as they are; 0: a control"
    )
    parser.add_argument("--no-search", action="store_true", help="take the first learning rate of each arm")
    parser.add_argument("--again", action="store_true", help="run cells that are done again; their last rows count")
    parser.add_argument(
        "--development",
        action="store_true",
        help="score validation rows that nothing else uses, not the test rows; needs an --output of its own",
    )
    parser.add_argument(
        "--steps", type=int, help="steps of twelve tasks, to see that an arm runs; needs an --output of its own"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA GPU here; use --device cpu")
    elsewhere = [arm for arm in arguments.arms if not ARMS[arm].in_layers]
    if arguments.first_layer == 0 and elsewhere:
        parser.error(f"--first-layer does not concern the arm(s) {', '.join(elsewhere)}; leave them out")
    if (arguments.development or arguments.steps) and arguments.output == RESULTS:
        parser.error("rows made with --development or --steps are no results; choose another --output")
    setting = Setting(
        arguments.data,
        arguments.suite,
        device=arguments.device,
        first_layer=arguments.first_layer,
        budgets={n: replace(budget, steps=arguments.steps or budget.steps) for n, budget in BUDGETS.items()},
        max_length=MAX_LENGTHS[arguments.suite],
        load=load_for_development if arguments.development else load,
    )
    runner = Runner(
        setting,
        arguments.output,
        arguments.output.with_name(TRIALS),
        lambda line: print(line, flush=True),
        searches=not arguments.no_search,
        again=arguments.again,
    )
    runner.run(arguments.arms, arguments.sizes, arguments.seeds)


if __name__ == "__main__":
    main()
