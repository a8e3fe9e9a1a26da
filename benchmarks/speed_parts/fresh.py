"""What is measured in a process of its own, where nothing else has taken memory: prints one JSON object.

python -m speed_parts.fresh load BACKBONE RUN REPEATS
python -m speed_parts.fresh peft BACKBONE FOLDER COUNT,COUNT,... SECONDS REPEATS
python -m speed_parts.fresh predict RUN INPUT OUTPUT
python -m speed_parts.fresh train BACKBONE TASKS ROWS TOKENS TARGET_TOKENS
"""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from hyperadapters import HyperAdapterModel, Predictor
from hyperadapters.inference.cache import AdapterCache
from hyperadapters.inference.predict_files import predict_file
from speed_parts.models import (
    CACHE_BYTES,
    Setting,
    adapter_names,
    make_backbone,
    make_batch,
    make_model,
    make_task_ids,
    serving,
)
from speed_parts.timing import interleaved, timed

ROWS, TOKENS, TASKS = 32, 18, 8
"""The batch whose latency is measured at each number of tasks."""


def in_fresh_process(command: str, *arguments: object) -> Any:
    """Run a command of this module in a new process, and return what it found."""
    words = [sys.executable, "-m", "speed_parts.fresh", command, *map(str, arguments)]
    folder = Path(__file__).resolve().parents[1]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_load(backbone_name: str, run: str, repeats: str) -> dict[str, float]:
    """Time and memory of loading a run into a backbone that is there; and the latency of a batch, unless 0 times."""
    backbone = _touched(make_backbone(backbone_name))
    before = resident_mb()
    seconds, model = timed(partial(HyperAdapterModel.from_pretrained, run, backbone))
    found = {"load_s": seconds, "memory_mb": resident_mb() - before}
    return {**found, **_latency(model, int(repeats))} if int(repeats) else found


def _latency(model: HyperAdapterModel, repeats: int) -> dict[str, float]:
    setting = Setting()
    batch, cache = make_batch(setting, ROWS, TOKENS), AdapterCache(model, CACHE_BYTES)
    with serving(model, cache):
        told = partial(model, **batch, task_ids=make_task_ids(setting, ROWS, TASKS))
        times = interleaved({"told": told, "routed": partial(model, **batch)}, repeats)
    return {f"{name}_ms": found.ms for name, found in times.items()}


def measure_peft(backbone_name: str, folder: str, counts: str, limit: str, repeats: str) -> dict[str, Any]:
    """The same for PEFT, loading one adapter after the other; stops when loading has taken `limit` seconds."""
    from peft import PeftModel

    backbone = _touched(make_backbone(backbone_name))
    before = resident_mb()
    loading, model = timed(partial(PeftModel.from_pretrained, backbone, folder, adapter_name="task_0"))
    batch, names, points, loaded = make_batch(Setting(), ROWS, TOKENS), adapter_names(ROWS, TASKS), [], 1
    for count in map(int, counts.split(",")):
        while loaded < count and loading < float(limit):
            loading += timed(partial(model.load_adapter, folder, f"task_{loaded}"))[0]
            loaded += 1
        if loaded < count:
            break
        point = {"tasks": count, "load_s": loading, "memory_mb": resident_mb() - before}
        with torch.inference_mode():
            told = interleaved({"told": partial(model, **batch, adapter_names=names)}, int(repeats))["told"]
        points.append({**point, "told_ms": told.ms})
    return {"points": points, "loaded": loaded, "load_s": loading}


def measure_predict(run: str, input_file: str, output: str) -> dict[str, float]:
    """Time of answering a file, loading apart, and the most memory that the process ever held."""
    predictor = Predictor.from_pretrained(run, device="cpu")
    seconds, _ = timed(partial(predict_file, predictor, Path(input_file), None, Path(output)))
    return {"seconds": seconds, "peak_mb": peak_mb()}


def measure_training(backbone_name: str, *sizes: str) -> dict[str, float]:
    """The most memory that the gradients of one batch take, and the size of the adapters generated for it."""
    tasks, rows, tokens, target_tokens = map(int, sizes)
    setting = Setting(adapter_dim=64)
    model = make_model(setting, backbone_name, tasks).train()
    task_ids = make_task_ids(setting, rows, tasks)
    with torch.no_grad():
        weights_mb = sum(tensor.nbytes for tensor in model.method.adapters(task_ids.unique()).values()) / 1e6
    labels = make_batch(setting, rows, target_tokens)["input_ids"]
    model(**make_batch(setting, rows, tokens), task_ids=task_ids, labels=labels).loss.backward()
    return {"peak_mb": peak_mb(), "weights_mb": weights_mb}


def _touched(backbone: nn.Module) -> nn.Module:
    """Read all weights once: a file that is mapped into memory counts from when it is read."""
    for parameter in backbone.parameters():
        parameter.sum()
    return backbone


def resident_mb() -> float:
    """Memory that the process holds now, in millions of bytes."""
    gc.collect()
    return float(psutil.Process().memory_info().rss) / 1e6


def peak_mb() -> float:
    """The most memory that the process has held, in millions of bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # elsewhere too, but on Linux the other number can be that of the process that started this
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


COMMANDS: dict[str, Callable[..., Any]] = {
    "load": measure_load,
    "peft": measure_peft,
    "predict": measure_predict,
    "train": measure_training,
}

if __name__ == "__main__":
    found = COMMANDS[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(found))
