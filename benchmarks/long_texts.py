"""Long texts: truncated at a number of tokens, or cut into chunks whose logits are averaged.

    python benchmarks/long_texts.py --data DATA [--sizes 100 400] [--seeds 0 1 2]

The texts of boolq (a question and a passage) and imdb are encoded by the frozen default backbone, and a logistic
regression reads the mean hidden states, normalised and for boolq compared with those of the question as in
`backbones.text_features`. It is fitted on the first N of the shuffled training rows, with the penalty that
cross-validation chooses, and scored on the test rows. A linear head of the mean of the chunks' features has the mean of
their logits; for `chunk_logits` it was fitted to the first chunks only. Appends a row for each task and way, with the
scores of all seeds and the processor time of encoding, to benchmarks/results/long_texts.jsonl; --tables prints them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegressionCV
from tables import read, spread, table
from torch import Tensor

from hyperadapters import __version__
from hyperadapters.backbones.loading import load_backbone, load_tokenizer
from hyperadapters.config import DEFAULT_BACKBONE
from hyperadapters.core import masked_mean

RESULTS = Path(__file__).parent / "results" / "long_texts.jsonl"
TASKS = {"boolq": "boolq", "imdb": "families/fdu/imdb"}
TRUNCATED, CHUNK, BATCH_TOKENS = (128, 256, 512), 128, 8192
WAYS = (*(f"truncate_{length}" for length in TRUNCATED), "chunks", "chunk_logits")

Array = np.ndarray[Any, Any]


class Encoder:
    """The frozen backbone, its tokenizer, and the processor time in seconds that it took."""

    def __init__(self) -> None:
        self.backbone = load_backbone(DEFAULT_BACKBONE).eval()
        self.tokenizer = load_tokenizer(DEFAULT_BACKBONE)
        self.seconds = 0.0

    def windows(self, text: str, length: int, every: bool) -> list[list[int]]:
        """The token ids of the first window of a text, or of all windows one after another."""
        options = {"truncation": True, "max_length": length, "return_overflowing_tokens": every, "verbose": False}
        found = self.tokenizer(text, **options)["input_ids"]
        return list(found) if every else [found]

    @torch.inference_mode()
    def directions(self, windows: Sequence[list[int]]) -> Tensor:
        """The normalised mean hidden states of each window [W, d]."""
        started = time.process_time()
        order = sorted(range(len(windows)), key=lambda index: len(windows[index]))
        found = torch.empty(len(windows), self.backbone.config.hidden_size)
        while order:
            rows = [order.pop()]
            while order and (len(rows) + 1) * len(windows[rows[0]]) <= BATCH_TOKENS:
                rows.append(order.pop())
            batch = self.tokenizer.pad({"input_ids": [windows[row] for row in rows]}, return_tensors="pt")
            hidden = self.backbone(**batch).last_hidden_state
            found[rows] = F.normalize(masked_mean(hidden, batch["attention_mask"]), dim=1)
        self.seconds += time.process_time() - started
        return found

    def features(self, rows: Sequence[dict[str, str]], length: int, every: bool) -> list[Tensor]:
        """The features of the windows of each row [windows, F], compared with those of the question of a pair."""
        parts = [self.windows(row.get("text_pair", row["text"]), length, every) for row in rows]
        vectors = self.directions([window for windows in parts for window in windows])
        found = list(vectors.split([len(windows) for windows in parts]))
        if "text_pair" not in rows[0]:
            return found
        questions = self.directions([self.windows(row["text"], length, every=False)[0] for row in rows])
        return [
            torch.cat([u + v, (u - v).abs(), (u * v).sum(dim=1, keepdim=True)], dim=1)
            for u, v in zip(questions, found, strict=True)
        ]


def score(train: tuple[Array, Array], test: tuple[list[Tensor], Array], size: int, seed: int) -> float:
    """Accuracy of a logistic regression, whose logits of the windows of a test row are averaged."""
    chosen = np.random.default_rng(seed).permutation(len(train[0]))[:size]
    options = {"l1_ratios": (0,), "scoring": "accuracy", "use_legacy_attributes": False}
    classifier = LogisticRegressionCV(Cs=np.logspace(-2, 3, 6), cv=5, max_iter=2000, **options)
    classifier.fit(train[0][chosen], train[1][chosen])
    logits = np.array([classifier.decision_function(windows.numpy()).mean() for windows in test[0]])
    return 100 * float(((logits > 0) == (test[1] == classifier.classes_[1])).mean())


def measure(encoder: Encoder, folder: Path, task: str, sizes: Sequence[int], seeds: Sequence[int]) -> None:
    rows = {split: read(folder / TASKS[task] / f"{split}.jsonl") for split in ("train", "test")}
    labels = {split: np.array([row["label"] for row in found]) for split, found in rows.items()}
    lengths = [len(encoder.windows(row.get("text_pair", row["text"]), 10**6, False)[0]) for row in rows["test"]]
    for way in WAYS:
        every, length = not way.startswith("truncate"), CHUNK if way[0] == "c" else int(way.split("_")[1])
        encoder.seconds = 0.0
        test = encoder.features(rows["test"], length, every)
        seconds = encoder.seconds
        train = encoder.features(rows["train"], length, every)
        means = torch.stack([windows[0] if way == "chunk_logits" else windows.mean(dim=0) for windows in train])
        for size in sizes:
            found = [score((means.numpy(), labels["train"]), (test, labels["test"]), size, seed) for seed in seeds]
            row = {
                "task": task, "way": way, "n": size, "seeds": list(seeds), "accuracy": [round(one, 2) for one in found],
                "encoding_seconds": round(seconds, 1), "test_rows": len(test),
                "longer_than_chunk": round(float(np.mean([number > CHUNK for number in lengths])), 3),
                "version": __version__,
            }  # fmt: skip
            print(row)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")


def print_tables() -> None:
    found = read(RESULTS)
    for task in TASKS:
        own = [row for row in found if row["task"] == task]
        first = next(row["encoding_seconds"] for row in own if row["way"] == WAYS[0])
        sizes = sorted({row["n"] for row in own})
        body = []
        for way in WAYS:
            cells = {row["n"]: row for row in own if row["way"] == way}
            time_ratio = f"{cells[sizes[0]]['encoding_seconds'] / first:.1f}"
            body.append([f"`{way}`", *(spread(cells[size]["accuracy"]) for size in sizes), time_ratio])
        print(f"{task}: {100 * own[0]['longer_than_chunk']:.0f} % of the texts are longer than {CHUNK} tokens\n")
        table([task, *(f"n = {size}" for size in sizes), "time"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="Folder with the tasks of the comparison.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tables", action="store_true", help="Print the tables of the result file.")
    arguments = parser.parse_args()
    if arguments.tables:
        print_tables()
        return
    encoder = Encoder()
    for task in TASKS:
        measure(encoder, arguments.data, task, arguments.sizes, arguments.seeds)


if __name__ == "__main__":
    main()
