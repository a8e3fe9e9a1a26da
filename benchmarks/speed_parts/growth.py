"""How time grows with the tasks, rows and tokens of a batch, and with the rows of a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hyperadapters import HyperAdapterModel
from hyperadapters.backbones.loading import load_tokenizer
from hyperadapters.inference.cache import AdapterCache
from speed_parts.fresh_process import in_fresh_process
from speed_parts.models import (
    CACHE_BYTES,
    MINILM,
    Setting,
    invent_densities,
    make_backbone,
    make_batch,
    make_model,
    make_task_ids,
    make_tasks,
)
from speed_parts.result_rows import Row, rounded, row
from speed_parts.serving import answer, demo_texts, without_gradients
from speed_parts.timing import exponent, interleaved

SIZES = {
    "tasks": [(64, 18, tasks) for tasks in (1, 2, 4, 8, 16, 32, 64)],
    "batch": [(rows, 18, 8) for rows in (8, 16, 32, 64, 128)],
    "length": [(16, tokens, 8) for tokens in (16, 32, 64, 128, 256)],
}
"""Rows, tokens and tasks of the batches along which one of the three grows."""


def batches(setting: Setting) -> Iterator[Row]:
    """Exponents of the time of a batch, and those of the bare backbone beside them."""
    bare = make_backbone(setting.encoder, setting.device, setting.dtype)
    model = make_model(setting, setting.encoder, 64)
    cache = AdapterCache(model, CACHE_BYTES)
    for place, (name, sizes) in zip((2, 0, 1), SIZES.items(), strict=True):
        functions: dict[str, Callable[[], Any]] = {}
        for size in sizes:
            rows, tokens, tasks = size
            batch = make_batch(setting, rows, tokens)
            task_ids = make_task_ids(setting, rows, tasks)
            functions[f"ours_{size[place]}"] = partial(answer, model, cache, model, **batch, task_ids=task_ids)
            functions[f"bare_{size[place]}"] = partial(without_gradients, bare, **batch)
        times = interleaved(functions, max(setting.repeats // 3, 2), setting.device, warmup=1)
        grown = [size[place] for size in sizes]
        ours = [times[f"ours_{size}"].ms for size in grown]
        others = [times[f"bare_{size}"].ms for size in grown]
        details = {
            "points": [[size, rounded(time)] for size, time in zip(grown, ours, strict=True)],
            "bare_points": [[size, rounded(time)] for size, time in zip(grown, others, strict=True)],
            "bare_exponent": rounded(exponent(grown, others)),
            "rows_tokens_tasks": [list(size) for size in sizes],
            "backbone": setting.encoder,
            "bottleneck": setting.adapter_dim,
        }
        yield row(setting, f"exponent_{name}", exponent(grown, ours), "lower", **details)


def predict_files(setting: Setting) -> Iterator[Row]:
    """Exponent of the time, and growth of the memory, of answering files of more and more rows; on a tiny backbone."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_backbone("bert-tiny").save_pretrained(folder / "backbone")
        load_tokenizer(MINILM).save_pretrained(folder / "backbone")
        tasks = make_tasks(8)
        model = HyperAdapterModel.from_backbone(
            str(folder / "backbone"), tasks, setting.preset, adapter_dim=setting.adapter_dim
        )
        invent_densities(model)
        model.save_pretrained(folder / "run")
        points = []
        for rows in setting.predict_rows:
            write_inputs(folder / "in.jsonl", rows, [task.name for task in tasks])
            found = in_fresh_process("predict", folder / "run", folder / "in.jsonl", folder / "out.jsonl")
            points.append((rows, found["seconds"], found["peak_mb"]))
    details = {"points": [[rounded(value) for value in point] for point in points], "backbone": "bert-tiny"}
    sizes, seconds, peaks = (list(values) for values in zip(*points, strict=True))
    yield row(setting, "exponent_predict_rows", exponent(sizes, seconds), "lower", **details)
    largest = f"{sizes[-1] // 1000}k_vs_{sizes[0] // 1000}k" if sizes[0] >= 1000 else f"{sizes[-1]}_vs_{sizes[0]}"
    yield row(setting, f"predict_peak_mb_{largest}", peaks[-1] - peaks[0], "lower", **details)


def write_inputs(path: Path, rows: int, tasks: list[str]) -> None:
    """Write rows of texts, of the tasks in turn."""
    pairs = islice(zip(cycle(demo_texts()), cycle(tasks), strict=False), rows)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text, "task": task}) + "\n" for text, task in pairs)
