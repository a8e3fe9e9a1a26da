"""Compares the memory that `hyperadapters plan` plans with the peak of real trainings.

    python benchmarks/plan_check.py [--only NAME ...] [--output PATH]
    python benchmarks/plan_check.py --table    # only fills the table of docs/scaling.md from the rows

Each training is the command `hyperadapters train` in a process of its own, with one thread, and takes a few steps. Its
peak is the resident memory of the process (`VmHWM`, or `ru_maxrss`), or what PyTorch has allocated on a CUDA device if
there is one. The allocator of glibc keeps freed memory in pieces that larger tensors do not fit into, so that the
resident memory depends on the order of the batches. The trainings are therefore measured with `MALLOC_MMAP_THRESHOLD_`
set, so that tensors are given back to the system when they are freed (`peak`), and some of them also without it
(`peak_default`).

MiniLM is trained on the tasks of the demo or on long texts; the other backbones have random weights and few, wide
layers, so that weights and activations matter beside the libraries. The rows of a name are replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tables import MISSING, markdown, read

for variable, value in (("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("OMP_NUM_THREADS", "1")):
    os.environ.setdefault(variable, value)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "plan.jsonl"
DOCUMENT = ROOT / "docs" / "scaling.md"
MARKED = re.compile(r"(<!-- table: plan -->\n).*?(<!-- end -->)", re.DOTALL)
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school")
STEPS = 3
"""There are as many training rows as these steps see, so that the states of all of them are kept."""


class Case(NamedTuple):
    """A training.

    Attributes:
        backbone: Name of MiniLM, or a key of `SIZES`.
        words: Words of each text; 0 for the tasks of the demo.
        settings: Settings of the recipe by their paths.
        by_default: Whether the peak is also measured with the default settings of the allocator.
    """

    backbone: str
    words: int
    settings: Mapping[str, Any]
    by_default: bool = False


SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-tiny": (
        "BertModel",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
    ),
    "bert-wide": (
        "BertModel",
        {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "t5-wide": (
        "T5ForConditionalGeneration",
        {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 3, "num_heads": 12, "decoder_start_token_id": 0},
    ),
    "llama-wide": (
        "LlamaForCausalLM",
        {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "intermediate_size": 2816},
    ),
}
"""Classes and sizes of the backbones with random weights."""

BATCH, LENGTH, CACHE = "training.batch_size", "data.max_length", "training.prefix_cache"
CHECKPOINTING = "training.gradient_checkpointing"
CASES: dict[str, Case] = {
    "libraries": Case("bert-tiny", 4, {BATCH: 4}, by_default=True),
    "MiniLM, 96 rows": Case(MINILM, 150, {BATCH: 96, LENGTH: 128}),
    "BERT, 32 rows": Case("bert-wide", 150, {BATCH: 32, LENGTH: 128}),
    "T5, 24 rows": Case("t5-wide", 150, {BATCH: 24, LENGTH: 128}),
    "Llama, 16 rows": Case("llama-wide", 150, {BATCH: 16, LENGTH: 128}),
    "demo, 48 rows": Case(MINILM, 0, {BATCH: 48, LENGTH: 96}, by_default=True),
    "MiniLM, 96 rows, checkpointing": Case(MINILM, 150, {BATCH: 96, LENGTH: 128, CHECKPOINTING: True}),
    "MiniLM, 96 rows, no states kept": Case(MINILM, 150, {BATCH: 96, LENGTH: 128, CACHE: "none"}),
    "MiniLM, 32 rows": Case(MINILM, 150, {BATCH: 32, LENGTH: 128}),
    "MiniLM, 16 long rows": Case(MINILM, 300, {BATCH: 16, LENGTH: 256}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only fill the table of docs/scaling.md")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        train_and_print_peak(*arguments.child)
        return
    for name in [] if arguments.table else arguments.only:
        row = measured(name, CASES[name])
        sizes = ", ".join(f"{key} {megabytes(row[key])} MiB" for key in ("planned", "peak", "peak_default"))
        print(f"{name}: {sizes}, ratios {row['ratio']}, {row['ratio_default']}", flush=True)
        write_row(arguments.output, row)
    if arguments.output == RESULTS:
        DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8"), read(RESULTS)), encoding="utf-8")


def measured(name: str, case: Case) -> dict[str, Any]:
    """Plan and train a case, and return its row."""
    from hyperadapters.config import load_recipe
    from hyperadapters.training.plan import plan_memory

    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe(Path(folder), case)
        plan = plan_memory(load_recipe(recipe))
        peak = peak_of_training(recipe, GIVES_BACK)
        peak_default = peak_of_training(recipe, {}) if case.by_default else None
    return {
        "name": name,
        "planned": plan.total,
        "peak": peak,
        "peak_default": peak_default,
        "ratio": round(plan.total / peak, 3),
        "ratio_default": None if peak_default is None else round(plan.total / peak_default, 3),
        **asdict(plan),
        "settings": dict(case.settings),
        "machine": machine(),
        "threads": 1,
        **{package: version(package) for package in ("torch", "transformers", "hyperadapters")},
    }


def peak_of_training(recipe: Path, allocator: Mapping[str, str]) -> int:
    """Train in a process of its own, with settings of the allocator, and return the peak of its memory.

    Raises:
        RuntimeError: the training failed.
    """
    with tempfile.TemporaryDirectory() as run:
        words = [sys.executable, __file__, "--child", str(recipe), f"{run}/run"]
        environment = {**os.environ, **allocator, "PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


def train_and_print_peak(recipe: str, folder: str) -> None:
    """Call the command, and print the peak of this process."""
    from hyperadapters.cli import main as command_line

    sys.argv = ["hyperadapters", "train", recipe, "--output", folder]
    try:
        command_line()
    except SystemExit as ended:
        if ended.code:
            raise
    print(peak_bytes())


def peak_bytes() -> int:
    """Peak of the memory on a CUDA device, or else of the resident memory of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.is_file() else None
    if found:  # ru_maxrss of a process is at least that of the process which started it
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_recipe(folder: Path, case: Case) -> Path:
    """Write the recipe of a case, with its rows and its backbone."""
    values: dict[str, Any] = {"backbone": case.backbone, "training": {"max_steps": STEPS, "eval_steps": STEPS}}
    rows = STEPS * case.settings[BATCH]
    if case.words:
        generates = case.backbone.startswith(("t5", "llama"))
        values["tasks"] = [write_task(folder, name, case.words, rows // 2, generates) for name in ("first", "second")]
    else:
        values["extends"] = str(ROOT / "recipes" / "demo.yaml")
        values["data"] = {"n_train": rows // 6, "n_validation": 16}
    if case.backbone in SIZES:
        values["backbone"] = str(folder / "backbone")
        write_backbone(case.backbone, folder / "backbone")
    for path, value in case.settings.items():
        section, _, key = path.partition(".")
        values.setdefault(section, {})[key] = value
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    return recipe


def write_task(folder: Path, name: str, words: int, train_rows: int, generates: bool) -> dict[str, Any]:
    """Write the rows of a task of two labels, whose texts have a number of words."""
    for split, count in (("train", train_rows), ("validation", 8), ("test", 8)):
        rows = [
            {
                "text": " ".join(WORDS[(row + 5 * place * (row + 1)) % len(WORDS)] for place in range(words)),
                "label": WORDS[row % 2],
            }
            for row in range(count)
        ]
        (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": name, "source": {"path": str(folder / f"{name}-{{split}}.jsonl")}}
    return {**task, "template": "{text}"} if generates else task


def write_backbone(name: str, folder: Path) -> None:
    """Write a backbone with random weights, and a tokenizer of a few words."""
    import transformers
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    class_name, sizes = SIZES[name]
    model_class = getattr(transformers, class_name)
    ids = {"vocab_size": 2000, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    model_class(model_class.config_class(**ids, **sizes)).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    if class_name.endswith("CausalLM"):
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def machine() -> str:
    """Name of the processor and of the system."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {platform.system()}"


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Put a row into a file of JSON-lines, in the place of that of the same name and device."""
    rows = {(found["name"], found["device"]): found for found in [*read(path), row]}
    path.write_text("".join(json.dumps(found) + "\n" for found in rows.values()))


def filled(text: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a document with the table of the rows between its markers."""
    return MARKED.sub(lambda place: f"{place[1]}\n{plan_table(rows)}\n\n{place[2]}", text)


def plan_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table of planned and measured memory."""
    body = [
        [
            row["name"],
            f"{row['rows']} x {row['tokens']}",
            *(f"{megabytes(row['parts'][part])}" for part in ("backbone", "activations for the backward pass")),
            megabytes(row["planned"]),
            megabytes(row["peak"]),
            ratio(row["ratio"]),
            megabytes(row["peak_default"]),
            ratio(row["ratio_default"]),
        ]
        for row in rows
    ]
    header = ["training", "largest batch", "backbone", "activations", "planned", "peak", "ratio", "glibc", "ratio"]
    return markdown(header, body)


def megabytes(num_bytes: int | None) -> str:
    return MISSING if num_bytes is None else f"{num_bytes / 2**20:.0f}"


def ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
