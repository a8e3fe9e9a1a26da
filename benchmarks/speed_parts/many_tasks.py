"""Many tasks: size, memory and time to load of a run with ten thousand of them, and a task that is used anew."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hyperadapters import HyperAdapterModel
from hyperadapters.inference.cache import AdapterCache
from speed_parts.fresh_process import ROWS, TASKS, TOKENS, in_fresh_process
from speed_parts.models import (
    CACHE_BYTES,
    Setting,
    make_batch,
    make_model,
    make_peft,
    make_task_ids,
    save_lora,
    serving,
)
from speed_parts.result_rows import Row, ratio, rounded, row, timing
from speed_parts.timing import Timing, interleaved, timed

FEW = 10
FRESH_PROCESSES = 2
LOADED = (1, 30, 100)  # PEFT's model always has one


def many_tasks(setting: Setting) -> Iterator[Row]:
    """What a run with ten thousand tasks takes beyond one with ten, in two cases.

    One has heads, whose bytes are taken off, and the same labels for all tasks.
    The other has no heads, and labels of its own for each task.

    The larger of two differences counts, that of the files and that of the resident memory after loading.
    """
    for backbone, end in ((setting.encoder, ""), ("t5-tiny", "_own_labels")):
        tasks = (FEW, setting.max_tasks)
        with TemporaryDirectory() as folder:
            heads = [save_run(setting, backbone, number, Path(folder) / str(number)) for number in tasks]
            disk = [folder_mb(Path(folder) / str(number)) for number in tasks]
            found: dict[int, list[dict[str, float]]] = {number: [] for number in tasks}
            for _ in range(FRESH_PROCESSES):
                for number in tasks:
                    found[number].append(in_fresh_process("load", backbone, Path(folder) / str(number), 0))
        memory = [min(point["memory_mb"] for point in found[number]) for number in tasks]
        seconds = [median(point["load_s"] for point in found[number]) for number in tasks]
        heads_mb = heads[1] - heads[0]
        disk_mb, memory_mb = disk[1] - disk[0] - heads_mb, memory[1] - memory[0] - heads_mb
        shape = {"backbone": backbone, "tasks": setting.max_tasks, "compared_with_tasks": FEW}
        sizes = {"disk_mb": rounded(disk_mb), "memory_mb": rounded(memory_mb), "heads_mb_taken_off": rounded(heads_mb)}
        yield row(setting, f"ten_thousand_tasks_mb{end}", max(disk_mb, memory_mb), "lower", **sizes, **shape)
        load = {"load_s": [rounded(value) for value in seconds], "processes": FRESH_PROCESSES}
        yield row(setting, f"ten_thousand_tasks_load_s{end}", seconds[1] - seconds[0], "lower", **load, **shape)
        each = 1e6 * disk_mb / (tasks[1] - tasks[0])
        heads_each = {"head_bytes": rounded(1e6 * heads_mb / (tasks[1] - tasks[0]))}
        yield row(setting, f"disk_bytes_per_task{end}", each, "lower", **heads_each, **shape)


def routing_among_many(setting: Setting) -> Iterator[Row]:
    """The nearest of ten thousand tasks of each row, beside the matrix product that it cannot do without."""
    model = make_model(setting, "bert-tiny", setting.max_tasks)
    with torch.inference_mode():
        features = model.density_features(make_batch(setting, setting.rows, setting.tokens[0]))
        instances = model.method.instance_vectors(features[:, -1])
    densities = model.method.densities
    points = instances if densities is None else densities.project(features)
    means = (model.method.prototypes.weight if densities is None else densities.means).detach().T.contiguous()
    functions = {
        "similarity": lambda: model.method.similarity(instances, features).argmax(dim=1),
        "product": lambda: points @ means,
    }
    with torch.inference_mode():
        times = interleaved(functions, 10 * setting.repeats, setting.device)
    shape = {"rows": setting.rows, "tasks": setting.max_tasks}
    product = {"other": "one matrix product", **timing("other", times["product"])}
    ours = timing("ours", times["similarity"])
    yield row(setting, "ten_thousand_tasks_routing_ms", times["similarity"].ms, "lower", **ours, **product, **shape)


def cold_task(setting: Setting) -> Iterator[Row]:
    """Time until the adapters of a task are there that was not used before, beside PEFT's `load_adapter` of a folder.

    As many tasks are in use already: in the cache on our side, loaded on PEFT's.
    """
    repeats = max(setting.repeats // 2, 2)
    model = make_model(setting, setting.encoder, max(LOADED) + repeats + 1)
    peft = make_peft(setting, setting.encoder, 1)
    shape = {"backbone": setting.encoder, "bottleneck": setting.adapter_dim}
    with TemporaryDirectory() as folder:
        saved = save_lora(peft, folder)
        yield row(setting, "peft_disk_bytes_per_task", 1e6 * folder_mb(saved), "lower", **shape)
        for loaded in LOADED:
            cache = AdapterCache(model, CACHE_BYTES)
            for task_id in range(loaded):
                use_task(model, cache, task_id)
            for index in range(len(peft.peft_config), loaded):
                peft.load_adapter(saved, f"task_{index}")
            ours, other = [], []
            for task_id in range(loaded, loaded + repeats + 1):
                ours.append(timed(partial(use_task, model, cache, task_id), setting.device)[0])
                other.append(timed(partial(peft.load_adapter, saved, "further"), setting.device)[0])
                peft.delete_adapter("further")
            ours_time, other_time = Timing(tuple(ours[1:])), Timing(tuple(other[1:]))  # the first of each warms up
            end, details = "" if loaded == max(LOADED) else f"_{loaded}_loaded", {**shape, "loaded": loaded}
            name = "PEFT's load_adapter"
            yield ratio(setting, f"cold_task_vs_peft{end}", ours_time, other_time, name, **details)
    del peft
    ours_time = _cold_between_batches(setting, model)
    yield row(setting, "cold_task_ms", ours_time.ms, "lower", **timing("ours", ours_time), **shape)


def _cold_between_batches(setting: Setting, model: HyperAdapterModel) -> Timing:
    """Times of tasks that are used for the first time, each after a batch of others, as when serving."""
    cache, seconds = AdapterCache(model, CACHE_BYTES), []
    batch = make_batch(setting, setting.rows, setting.tokens[0])
    with serving(model, cache):
        for task_id in range(1, 2 * setting.repeats):
            model(**batch, task_ids=make_task_ids(setting, setting.rows, 1))
            seconds.append(timed(partial(use_task, model, cache, task_id), setting.device)[0])
    return Timing(tuple(seconds[1:]))


def use_task(model: HyperAdapterModel, cache: AdapterCache, task_id: int) -> None:
    """Ask a cache for the adapters of one task."""
    with torch.inference_mode():
        cache(torch.tensor([task_id], device=model.method.thresholds.device))


def curves(setting: Setting) -> Iterator[Row]:
    """Memory, time to load and latency of a batch of 8 tasks, against the number of tasks, for us and for PEFT.

    PEFT is measured as far as it loads within the limit of time. Value of the rows: the largest number of tasks.
    """
    points: list[dict[str, Any]] = []
    repeats = max(setting.repeats // 3, 2)
    for number in setting.scale_tasks:
        with TemporaryDirectory() as folder:
            heads_mb = save_run(setting, setting.encoder, number, Path(folder))
            found = in_fresh_process("load", setting.encoder, folder, repeats)
        points.append({"tasks": number, **_rounded(found), "heads_mb": rounded(heads_mb)})
    shape = {"backbone": setting.encoder, "rows": ROWS, "tokens": TOKENS, "tasks_of_batch": TASKS}
    yield row(setting, "scale_curve", points[-1]["tasks"], "higher", points=points, **shape)
    with TemporaryDirectory() as folder:
        saved = save_lora(make_peft(setting, setting.encoder, 1), folder)
        numbers = ",".join(map(str, setting.scale_tasks))
        found = in_fresh_process("peft", setting.encoder, saved, numbers, setting.scale_limit_s, repeats)
    points = [_rounded(point) for point in found["points"]]
    stopped = {"loaded": found["loaded"], "load_s": rounded(found["load_s"]), "limit_s": setting.scale_limit_s}
    largest = points[-1]["tasks"] if points else 0
    yield row(setting, "scale_curve_peft", largest, "higher", points=points, stopped_at=stopped, **shape)


def save_run(setting: Setting, backbone: str, tasks: int, folder: Path) -> float:
    """Write a run with so many tasks; returns the megabytes of its heads."""
    model = make_model(setting, backbone, tasks)
    model.save_pretrained(folder)
    heads = {} if model.heads is None else model.heads.state_dict()
    return sum(tensor.nbytes for tensor in heads.values()) / 1e6


def folder_mb(folder: Path) -> float:
    """Size of the files of a folder, in millions of bytes."""
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def _rounded(point: dict[str, Any]) -> dict[str, Any]:
    return {name: rounded(value) if isinstance(value, float) else value for name, value in point.items()}
