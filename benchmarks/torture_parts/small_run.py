"""A small training run on a BERT of random weights, and commands on it in processes of their own."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(200)]
LABELS = ("no", "yes")
TASKS = ("mood", "colour", "size")


def write_backbone(folder: Path) -> None:
    """Write a BERT of random weights with a tokenizer of whole words."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *LABELS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    ).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes), add_pooling_layer=False).save_pretrained(folder)


def rows(count: int, seed: int) -> Iterable[str]:
    """Return lines of JSON, whose label is one of their words."""
    generator = random.Random(seed)
    for _ in range(count):
        label = generator.choice(LABELS)
        yield json.dumps({"text": " ".join([*generator.sample(WORDS, 8), label]), "label": label}) + "\n"


def write_recipe(folder: Path, num_rows: int = 64, **training: Any) -> Path:
    """Write a backbone, data and a recipe, and return the path of the recipe."""
    write_backbone(folder / "backbone")
    for number, task in enumerate(TASKS):
        for split, count in (("train", num_rows), ("validation", 16), ("test", 16)):
            (folder / f"{task}-{split}.jsonl").write_text("".join(rows(count, number)))
    recipe = {
        "backbone": "./backbone",
        "model": {"adapter_dim": 8, "feature_layer": 1},
        "data": {"max_length": 32},
        "training": {"batch_size": 16, "learning_rate": 1e-3, **training},
        "tasks": [{"name": task, "labels": [*LABELS], "source": {"path": f"{task}-{{split}}.jsonl"}} for task in TASKS],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def command(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start a command of hyperadapters in another process with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "hyperadapters", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def finished(*arguments: object) -> tuple[int, str]:
    """Run a command to its end, and return its status and the last line of its errors."""
    process = command(*arguments)
    _, errors = process.communicate()
    return process.returncode, (errors.strip().splitlines() or [""])[-1]


def weights(run: Path) -> str:
    """Return the digest of the trained weights of a run; that of their file also depends on the number of changes."""
    (file,) = run.glob("adapters-*.safetensors")
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        found.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
