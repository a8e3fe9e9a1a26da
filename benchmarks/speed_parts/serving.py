"""Batches of mixed tasks against the bare backbone, PEFT's LoRA and a loop over tasks; routing; generation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from hyperadapters import HyperAdapterModel, Predictor
from hyperadapters.data.examples import Example
from hyperadapters.inference.cache import AdapterCache
from hyperadapters.inference.routing import calibrate, instance_vectors
from speed_parts.models import (
    CACHE_BYTES,
    Setting,
    adapter_names,
    make_backbone,
    make_batch,
    make_model,
    make_peft,
    make_task_ids,
    make_uneven_task_ids,
    serving,
)
from speed_parts.result_rows import Row, ratio, row, timing
from speed_parts.timing import interleaved

Call = Callable[..., Any]
TASKS = (1, 8, 32)
PEFT = "PEFT LoRA"


def answer(model: HyperAdapterModel, cache: AdapterCache | None, call: Call, **inputs: Any) -> None:
    """Run a batch through a model as it is served."""
    with serving(model, cache):
        call(**inputs)


def without_gradients(call: Call, **inputs: Any) -> None:
    """Run a batch through something else."""
    with torch.inference_mode():
        call(**inputs)


def in_loop(model: HyperAdapterModel, cache: AdapterCache, batches: list[dict[str, Tensor]]) -> None:
    """Run one batch after the other."""
    with serving(model, cache):
        for batch in batches:
            model(**batch)


def single_task_batches(batch: dict[str, Tensor], task_ids: Tensor) -> list[dict[str, Tensor]]:
    """The rows of a batch, cut into one batch a task."""
    return [
        {name: values[task_ids == task] for name, values in (*batch.items(), ("task_ids", task_ids))}
        for task in task_ids.unique()
    ]


def mixed_batches(setting: Setting) -> Iterator[Row]:
    """Throughput of batches with told tasks, relative to the bare backbone, to PEFT and to a loop over tasks.

    All adapters are in the cache, but for the rows "uncached", where the hypernetwork writes them for each batch. Each
    task has as many rows as another, but for the row "uneven".
    """
    bare = make_backbone(setting.encoder, setting.device, setting.dtype)
    model = make_model(setting, setting.encoder, max(TASKS))
    cache = AdapterCache(model, CACHE_BYTES)
    peft = make_peft(setting, setting.encoder, max(TASKS))
    for tokens in setting.tokens:
        is_first = tokens == setting.tokens[0]
        batch = make_batch(setting, setting.rows, tokens)
        functions: dict[str, Callable[[], Any]] = {"bare": partial(without_gradients, bare, **batch)}
        for tasks in TASKS:
            told = {**batch, "task_ids": make_task_ids(setting, setting.rows, tasks)}
            names = adapter_names(setting.rows, tasks)
            functions[f"ours_{tasks}"] = partial(answer, model, cache, model, **told)
            functions[f"peft_{tasks}"] = partial(without_gradients, peft, **batch, adapter_names=names)
            if is_first:
                functions[f"uncached_{tasks}"] = partial(answer, model, None, model, **told)
                if tasks > 1:
                    parts = single_task_batches(batch, told["task_ids"])
                    functions[f"loop_{tasks}"] = partial(in_loop, model, cache, parts)
        if is_first:
            uneven = make_uneven_task_ids(setting, setting.rows, 8)
            functions["uneven"] = partial(answer, model, cache, model, **batch, task_ids=uneven)
        times = interleaved(functions, setting.repeats if is_first else max(setting.repeats // 2, 2), setting.device)
        end, bare_name = "" if is_first else f"_{tokens}_tokens", "bare backbone"
        for tasks in TASKS:
            ours = times[f"ours_{tasks}"]
            shape = _shape(setting, setting.encoder, tokens, tasks)
            name = f"mixed_batch_{tasks}_{'task' if tasks == 1 else 'tasks'}{end}"
            yield ratio(setting, name, ours, times["bare"], bare_name, **shape)
            tasks_name = name.removeprefix("mixed_batch_")
            yield ratio(setting, f"vs_peft_{tasks_name}", ours, times[f"peft_{tasks}"], PEFT, **shape)
            yield ratio(setting, f"peft_{tasks_name}", times[f"peft_{tasks}"], times["bare"], bare_name, **shape)
            if is_first:
                yield ratio(setting, f"{name}_uncached", times[f"uncached_{tasks}"], times["bare"], bare_name, **shape)
            if f"loop_{tasks}" in times:
                loop_name = "loop over batches of one task"
                yield ratio(setting, f"loop_{tasks_name}", ours, times[f"loop_{tasks}"], loop_name, **shape)
        if is_first:
            shape = {**_shape(setting, setting.encoder, tokens, 8), "rows_of_tasks": uneven.bincount().tolist()}
            yield ratio(setting, "mixed_batch_8_tasks_uneven", times["uneven"], times["bare"], bare_name, **shape)


def generation(setting: Setting) -> Iterator[Row]:
    """Throughput of greedy generation in batches of mixed tasks, relative to the bare backbone and to PEFT."""
    bare = make_backbone(setting.text_to_text, setting.device, setting.dtype)
    model = make_model(setting, setting.text_to_text, max(TASKS))
    cache = AdapterCache(model, CACHE_BYTES)
    peft = make_peft(setting, setting.text_to_text, 8)
    tokens = setting.tokens[0]
    # Always so many tokens: with random weights the end would come at random.
    options = {"max_new_tokens": setting.new_tokens, "min_new_tokens": setting.new_tokens, "do_sample": False}
    inputs: dict[str, Any] = {**make_batch(setting, setting.rows, tokens), **options}
    told = {tasks: {**inputs, "task_ids": make_task_ids(setting, setting.rows, tasks)} for tasks in (8, 32)}
    names = adapter_names(setting.rows, 8)
    functions: dict[str, Callable[[], Any]] = {
        "bare": partial(without_gradients, bare.generate, **inputs),  # type: ignore[arg-type]
        "ours_8": partial(answer, model, cache, model.generate, **told[8]),
        "ours_32": partial(answer, model, cache, model.generate, **told[32]),
        "uncached": partial(answer, model, None, model.generate, **told[8]),
        "peft": partial(without_gradients, peft.generate, **inputs, adapter_names=names),
    }
    times = interleaved(functions, max(setting.repeats // 3, 2), setting.device, warmup=1)
    shape = {**_shape(setting, setting.text_to_text, tokens, 8), "new_tokens": setting.new_tokens}
    bare_name = "generate of the bare backbone"
    yield ratio(setting, "generate_vs_bare", times["ours_8"], times["bare"], bare_name, **shape)
    yield ratio(setting, "generate_vs_bare_uncached", times["uncached"], times["bare"], bare_name, **shape)
    yield ratio(setting, "generate_vs_peft", times["ours_8"], times["peft"], PEFT, **shape)
    shape["tasks"] = 32
    yield ratio(setting, "generate_vs_bare_32_tasks", times["ours_32"], times["bare"], bare_name, **shape)


def routing(setting: Setting) -> Iterator[Row]:
    """Time of a batch whose tasks are found in the same pass, relative to one whose tasks are told."""
    model = make_model(setting, setting.encoder, max(TASKS))
    tokens = setting.tokens[0]
    batch = make_batch(setting, setting.rows, tokens)
    for tasks in (8, 32):
        route_to_first(model, batch, tasks)
        cache = AdapterCache(model, CACHE_BYTES)
        with serving(model, cache):
            task_ids = model(**batch).task_ids
        found = len(task_ids.unique())
        functions = {
            "routed": partial(answer, model, cache, model, **batch),
            "told": partial(answer, model, cache, model, **batch, task_ids=task_ids),
        }
        times = interleaved(functions, setting.repeats, setting.device)
        name = "routing_vs_told" if tasks == 8 else f"routing_vs_told_{tasks}_tasks"
        shape = _shape(setting, setting.encoder, tokens, found)
        yield ratio(setting, name, times["routed"], times["told"], "the batch, tasks told", "lower", **shape)


def routing_of_texts(setting: Setting) -> Iterator[Row]:
    """The same through the predictor, from texts to answers; for a backbone with a tokenizer."""
    tasks = 8
    model = make_model(setting, setting.encoder, tasks)
    texts = demo_texts()[: 8 * setting.rows]
    route_in_turn(model, texts)
    predictor = Predictor(model, batch_size=setting.rows)
    tasks_found = [found.routing.candidates[0].task for found in predictor(texts)]  # of declined texts as well
    told = [{"text": text, "task": task} for text, task in zip(texts, tasks_found, strict=True)]
    functions = {"routed": lambda: list(predictor(texts)), "told": lambda: list(predictor(told))}
    times = interleaved(functions, max(setting.repeats // 2, 2), setting.device, warmup=1)
    shape = {"backbone": setting.encoder, "texts": len(texts), "rows": setting.rows, "tasks": len({*tasks_found})}
    name, other = "routing_vs_told_predictor", "the predictor, tasks told"
    yield ratio(setting, name, times["routed"], times["told"], other, "lower", **shape)
    rate = 1000 * len(texts) / times["routed"].ms
    yield row(setting, "predictor_texts_per_second", rate, "higher", **timing("ours", times["routed"]), **shape)


def several_tasks(setting: Setting) -> Iterator[Row]:
    """Time of the predictor for several tasks of one text, relative to a call a task, and to one batch of all tasks."""
    model = make_model(setting, setting.encoder, max(TASKS))
    texts = demo_texts()
    route_in_turn(model, texts[: 8 * max(TASKS)])
    predictor, text = Predictor(model), max(texts[: setting.rows], key=len)
    for count in TASKS[1:]:
        names = [task.name for task in model.tasks[:count]]
        rows = [{"text": text, "task": name} for name in names]
        functions: dict[str, Callable[[], Any]] = {
            "together": partial(_read, predictor.predict_tasks, [text], names),
            "apart": partial(_one_by_one, predictor, text, names),
            "batch": partial(_read, predictor, rows),
        }
        times = interleaved(functions, setting.repeats, setting.device)
        tokens = len(model.tokenizer(text)["input_ids"])
        shape = {"backbone": setting.encoder, "tokens": tokens, "tasks": count, "bottleneck": setting.adapter_dim}
        shape |= {"feature_layer": model.adapter_config.feature_layer}
        figure, others = f"several_tasks_{count}", ("a call of the predictor for each task", "one batch of all tasks")
        yield ratio(setting, f"{figure}_vs_calls", times["together"], times["apart"], others[0], "lower", **shape)
        yield ratio(setting, f"{figure}_vs_batch", times["together"], times["batch"], others[1], "lower", **shape)


def _read(call: Call, *inputs: Any) -> None:
    """Read all predictions."""
    list(call(*inputs))


def _one_by_one(predictor: Predictor, text: str, names: Sequence[str]) -> None:
    for name in names:
        list(predictor([text], task=name))


@torch.no_grad()
def route_to_first(model: HyperAdapterModel, batch: dict[str, Tensor], tasks: int) -> None:
    """Spread the rows of a batch over the first tasks of a model: without training, all would go to one."""
    instances, features = model.instance_vectors(**batch), model.density_features(batch)
    weight = model.method.prototypes.weight
    weight[:] = -instances.mean(dim=0)
    weight[:tasks] = instances[:tasks]
    if model.method.densities is None:
        return
    others = range(tasks, len(model.tasks))
    points = torch.cat([features, -features.mean(dim=0, keepdim=True).expand(len(others), -1, -1)])
    owners = torch.tensor([*(row % tasks for row in range(len(features))), *others], device=points.device)
    counts = owners.bincount(minlength=len(model.tasks)).float()
    model.task_table.fit_densities(points, owners, torch.ones(len(owners), device=points.device), counts)


def route_in_turn(model: HyperAdapterModel, texts: Sequence[str]) -> None:
    """Calibrate the routing of a model as if texts were of its tasks in turn."""
    examples = [Example(index % len(model.tasks), text) for index, text in enumerate(texts)]
    with torch.no_grad():
        model.method.prototypes.weight.copy_(instance_vectors(model, examples[: len(model.tasks)]))
    calibrate(model, examples, [])


def demo_texts() -> list[str]:
    """The texts of the demo's test files, those of different tasks in turn."""
    folder = files("hyperadapters") / "demo_data"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    lines = [(folder / name / "test.jsonl").read_text(encoding="utf-8").splitlines() for name in names]
    return [json.loads(line)["text"] for turn in zip(*lines, strict=False) for line in turn]


def _shape(setting: Setting, backbone: str, tokens: int, tasks: int) -> dict[str, Any]:
    return {
        "backbone": backbone,
        "rows": setting.rows,
        "tokens": tokens,
        "tasks": tasks,
        "bottleneck": setting.adapter_dim,
    }
