"""How fast it is, beside the bare backbone and PEFT's LoRA.

    python benchmarks/speed.py [--only FIGURE ...] [--preset paper] [--quick] [--output PATH]

Things that are compared are timed in turn in the same run, after warming up; a figure is the median of the ratios of
each round. Models have the default preset of their backbone, or the one that is named. Writes a row a figure to
benchmarks/results/speed.jsonl, in the place of rows of the same figure, device and preset. Needs peft, psutil and
sentence-transformers besides the library, and an otherwise idle machine. Figures of the texts of ../shared/data are
left out where there is no such folder.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.console import Console
from speed_parts import growth, many_tasks, real_texts, serving, training
from speed_parts.models import Setting
from speed_parts.runner import Part, run, select

RESULTS = Path(__file__).parent / "results" / "speed.jsonl"
PARTS = (
    Part(("train_",), training.steps),
    Part(("epoch_bucketed_vs_shuffled",), training.epochs),
    Part(("option_", "compile_vs_eager"), training.options),
    Part(("exponent_train_",), training.growth),
    Part(("per_row_memory_saved",), training.memory),
    Part(("mixed_batch_", "vs_peft_", "peft_1_", "peft_8_", "peft_32_", "loop_"), serving.mixed_batches),
    Part(("generate_",), serving.generation),
    Part(("routing_vs_told",), serving.routing),
    Part(("routing_vs_told_predictor", "predictor_texts_per_second"), serving.routing_of_texts),
    Part(("several_tasks_",), serving.several_tasks),
    Part(("forward_texts_vs_bare", "forward_pairs_vs_bare"), real_texts.passes),
    Part(("predictor_vs_sentence_transformers",), real_texts.predictor),
    Part(("cold_task_", "peft_disk_bytes_per_task"), many_tasks.cold_task),
    Part(("ten_thousand_tasks_routing_ms",), many_tasks.routing_among_many),
    Part(("ten_thousand_tasks_mb", "ten_thousand_tasks_load_s", "disk_bytes_per_task"), many_tasks.many_tasks),
    Part(("scale_curve",), many_tasks.curves),
    Part(("exponent_tasks", "exponent_batch", "exponent_length"), growth.batches),
    Part(("exponent_predict_rows", "predict_peak_mb"), growth.predict_files),
)
PRESETS = ("default", "paper")
AIMS = {
    "train_prefix_cache_vs_peft": 0.45,
    "epoch_bucketed_vs_shuffled": 0.6,
    "per_row_memory_saved": 1.0,
    "mixed_batch_1_task": 0.90,
    "mixed_batch_8_tasks": 0.85,
    "mixed_batch_32_tasks": 0.75,
    "vs_peft_8_tasks": 1.1,
    "vs_peft_32_tasks": 1.5,
    "generate_vs_bare": 0.85,
    "routing_vs_told": 1.05,
    "several_tasks_8_vs_calls": 0.6,
    "several_tasks_32_vs_calls": 0.5,
    "forward_texts_vs_bare": 0.87,
    "forward_pairs_vs_bare": 0.87,
    "predictor_vs_sentence_transformers_told": 1.0,
    "predictor_vs_sentence_transformers_routed": 1.0,
    "ten_thousand_tasks_mb": 10.0,
    "ten_thousand_tasks_load_s": 1.0,
    "cold_task_ms": 5.0,
    "cold_task_vs_peft": 20.0,
}
QUICK = {
    "tokens": (18,),
    "texts": 64,
    "new_tokens": 4,
    "repeats": 3,
    "max_tasks": 1000,
    "scale_tasks": (10, 30),
    "scale_limit_s": 10.0,
    "predict_rows": (100, 1000),
    "train_batches": 2,
    "train_repeats": 2,
    "epoch_rows": 8,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", nargs="+", default=[], metavar="FIGURE", help="names of figures, or their beginnings")
    parser.add_argument(
        "--preset", choices=PRESETS, default="default", help="of the models; default: the one of their backbone"
    )
    parser.add_argument("--quick", action="store_true", help="small and few: shows that it runs, not how fast it is")
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS.name} in results/; with --quick: none")
    arguments = parser.parse_args()
    try:
        parts = select(PARTS, arguments.only)
    except ValueError as error:
        parser.error(str(error))
    setting = Setting(aims=AIMS, preset=None if arguments.preset == "default" else arguments.preset)
    output = arguments.output
    if arguments.quick:
        setting = replace(setting, **QUICK)
    elif output is None:
        output = RESULTS
    run(parts, setting, output, Console())


if __name__ == "__main__":
    main()
