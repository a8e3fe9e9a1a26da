"""Real texts: passes of the model beside those of the bare backbone, the predictor beside sentence-transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from efficiency.data import MAX_LENGTHS, Suite, entries_of
from torch import Tensor

from hyperadapters import HyperAdapterModel, Predictor
from hyperadapters.backbones.loading import locate
from hyperadapters.backbones.passes import backbone_inputs
from hyperadapters.config import DataConfig, Lengths
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.data.loading import load_tasks
from hyperadapters.inference.batches import batches_by_length, to_device
from hyperadapters.inference.cache import AdapterCache
from speed_parts.models import CACHE_BYTES, MINILM, Setting, make_backbone, make_model_of
from speed_parts.result_rows import Row, ratio
from speed_parts.serving import in_loop, route_in_turn
from speed_parts.timing import interleaved

ROWS = 16
"""Training rows of a task. Only its test rows are measured; by these the routing is calibrated."""
BATCHES = 8
Batch = dict[str, Tensor]


def passes(setting: Setting) -> Iterator[Row]:
    """Throughput of forward passes with told tasks, relative to those of the bare backbone over the same texts.

    The batches are those of the predictor. A text of a pair passes through the bare backbone in the same way as through
    the model: as a sequence of its own, if the preset has it so. In the row "joint" it reads each pair as one sequence.
    """
    if not _has_data(setting, "forward_texts_vs_bare and forward_pairs_vs_bare"):
        return
    bare = make_backbone(setting.encoder, setting.device, setting.dtype)
    kinds: dict[str, Suite] = {"texts": "fdu", "pairs": "main"}
    for kind, suite in kinds.items():
        data = _tasks(setting, suite, are_pairs=kind == "pairs")
        model = _model(setting, data, suite)
        examples = _in_turn(data)[: min(BATCHES * setting.rows, setting.texts)]
        told = list(_batches(model, examples, setting.rows))
        cache = AdapterCache(model, CACHE_BYTES)
        rows = [{name: values for name, values in batch.items() if name != "task_ids"} for batch in told]
        functions: dict[str, Callable[[], Any]] = {
            "ours": partial(in_loop, model, cache, told),
            "bare": partial(_run_bare, bare, [model.sequences(batch) for batch in rows]),
        }
        if kind == "pairs" and model.adapter_config.separates_texts:
            functions["joint"] = partial(_run_bare, bare, rows)
        times = interleaved(functions, setting.repeats, setting.device)
        shape = {"backbone": setting.encoder, "bottleneck": setting.adapter_dim, "tasks": len(data)}
        shape |= {"rows": setting.rows, "tokens": [batch["input_ids"].shape[1] for batch in told]}
        name = f"forward_{kind}_vs_bare"
        yield ratio(setting, name, times["ours"], times["bare"], "bare backbone, the same sequences", **shape)
        if "joint" in times:
            other = "bare backbone, each pair as one sequence"
            yield ratio(setting, f"{name}_joint", times["ours"], times["joint"], other, **shape)


def predictor(setting: Setting) -> Iterator[Row]:
    """Throughput of the predictor, from texts to answers, relative to `encode` of sentence-transformers.

    Both read the same texts in batches of the same number of rows, cut at the same number of tokens.
    """
    name = "predictor_vs_sentence_transformers"
    if not _has_data(setting, name):
        return
    from sentence_transformers import SentenceTransformer  # not at the top: it is slow to import

    data = _tasks(setting, "fdu")
    model = _model(setting, data, "fdu")
    encoder = SentenceTransformer(locate(MINILM), device=setting.device)
    encoder.max_seq_length = model.lengths.input
    route_in_turn(model, [example.text for example in _in_turn(data, "train")])
    answer = Predictor(model, batch_size=setting.rows)
    examples = _in_turn(data)[: setting.texts]
    texts = [example.text for example in examples]
    options = {"batch_size": setting.rows, "normalize_embeddings": True, "show_progress_bar": False}
    functions: dict[str, Callable[[], Any]] = {
        "told": lambda: list(answer(examples)),
        "routed": lambda: list(answer(texts)),
        "encode": lambda: encoder.encode(texts, **options),
    }
    times = interleaved(functions, max(setting.repeats // 2, 2), setting.device, warmup=1)
    shape = {"backbone": setting.encoder, "bottleneck": setting.adapter_dim, "texts": len(texts), "tasks": len(data)}
    shape |= {"rows": setting.rows, "max_length": model.lengths.input}
    for kind in ("told", "routed"):
        yield ratio(setting, f"{name}_{kind}", times[kind], times["encode"], "sentence-transformers' encode", **shape)


def _has_data(setting: Setting, figures: str) -> bool:
    found = setting.data.is_dir()
    if not found:
        print(f"{figures}: not measured, because there is no folder {setting.data}", file=sys.stderr)
    return found


def _tasks(setting: Setting, suite: Suite, are_pairs: bool = False) -> list[TaskData]:
    entries = [entry for entry in entries_of(setting.data, suite) if len(entry.fields) == 1 + are_pairs]
    return load_tasks(entries, DataConfig(n_train=ROWS, n_validation=ROWS), seed=0)


def _model(setting: Setting, data: Sequence[TaskData], suite: Suite) -> HyperAdapterModel:
    lengths = Lengths(input=MAX_LENGTHS[suite])
    return make_model_of(setting, setting.encoder, [found.task for found in data], lengths)


def _in_turn(data: Sequence[TaskData], split: Any = "test") -> list[Example]:
    """The rows of a split, those of different tasks in turn, as many of each task."""
    return list(chain.from_iterable(zip(*(found.splits[split] for found in data), strict=False)))


def _batches(model: HyperAdapterModel, examples: Sequence[Example], rows: int) -> Iterator[Batch]:
    separates_texts, limit = model.adapter_config.separates_texts, model.lengths.input
    for part in batches_by_length(examples, rows, separates_texts, limit):
        batch = model.collator([replace(examples[row], target=None) for row in part])
        yield to_device(batch, model.device)


def _run_bare(bare: Any, batches: Sequence[Batch]) -> None:
    with torch.inference_mode():
        for batch in batches:
            bare(**backbone_inputs(batch))
