"""How fast it is on a CUDA GPU in bfloat16, at the sizes of BERT-base and T5-base with random weights.

    python benchmarks/gpu.py [--only FIGURE ...] [--output PATH]
    python benchmarks/gpu.py --device cpu --small    # shows that it runs, where there is no GPU

The figures are those of benchmarks/speed.py that do not depend on the processor alone, written to the same file;
training is on random token ids.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rich.console import Console
from speed_parts import growth, many_tasks, serving, synthetic_training, training
from speed_parts.models import Setting
from speed_parts.runner import Part, run, select

RESULTS = Path(__file__).parent / "results" / "speed.jsonl"
PARTS = (
    Part(("train_",), synthetic_training.steps),
    Part(("epoch_bucketed_vs_shuffled",), synthetic_training.epochs),
    Part(("per_row_memory_saved",), synthetic_training.memory),
    Part(("exponent_train_",), training.growth),
    Part(("mixed_batch_", "vs_peft_", "peft_1_", "peft_8_", "peft_32_", "loop_"), serving.mixed_batches),
    Part(("generate_",), serving.generation),
    Part(("routing_vs_told",), serving.routing),
    Part(("cold_task_", "peft_disk_bytes_per_task"), many_tasks.cold_task),
    Part(("ten_thousand_tasks_routing_ms",), many_tasks.routing_among_many),
    Part(("exponent_tasks", "exponent_batch", "exponent_length"), growth.batches),
)
AIMS = {
    "train_prefix_cache_vs_peft": 0.45,
    "epoch_bucketed_vs_shuffled": 0.6,
    "per_row_memory_saved": 1.0,
    "mixed_batch_32_tasks": 0.85,
    "routing_vs_told": 1.05,
}
SETTING = Setting(
    encoder="bert-base",
    text_to_text="t5-base",
    device="cuda",
    dtype=torch.bfloat16,
    tokens=(18, 64, 128),
    new_tokens=32,
    repeats=31,
    aims=AIMS,
)
SMALL = {
    "encoder": "bert-tiny",
    "text_to_text": "t5-tiny",
    "tokens": (18, 64),
    "new_tokens": 4,
    "repeats": 3,
    "max_tasks": 100,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", nargs="+", default=[], metavar="FIGURE", help="names of figures, or their beginnings")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models: shows that it runs, not how fast it is")
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS.name} in results/; with --small: none")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            f"torch {torch.__version__} finds no CUDA GPU here. Install a build of torch with CUDA on a machine that "
            "has one; or try the code without one: --device cpu --small"
        )
    try:
        parts = select(PARTS, arguments.only)
    except ValueError as error:
        parser.error(str(error))
    setting = replace(SETTING, device=arguments.device)
    output = arguments.output
    if arguments.small:
        setting = replace(setting, **SMALL)
    elif output is None:
        output = RESULTS
    run(parts, setting, output, Console())


if __name__ == "__main__":
    main()
