"""Transfer inside a suite: every fourth task is new to a model of the others, and learned from a few examples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from efficiency.arms import ARMS
from efficiency.code_digest import code_digest
from efficiency.data import Size, numbered
from efficiency.experiment import Cell, Setting
from efficiency.few_shot import BASELINES, SHARED, probe_shared
from efficiency.result_rows import append, device_name, read_rows
from hyperadapters import HyperAdapterModel, Task, __version__
from hyperadapters.config import DataConfig
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.data.loading import subset
from hyperadapters.fewshot.fit import Fit
from hyperadapters.inference.predictor import Predictor
from hyperadapters.training.metrics import score

SHOTS = (4, 16, 32)
DRAWS = (3, 4, 5, 6, 7)
"""Seeds of the examples."""
EVERY = 4

Answers = tuple[list[Any], dict[str, Any]]
"""Answers to inputs, and what else their row says."""
Answer = Callable[[Task, list[Example], list[Example], int], Answers]
"""Answers for a task, from a few examples, to inputs, with a seed."""


def held_out(tasks: Sequence[TaskData]) -> list[TaskData]:
    """The first of every four tasks."""
    return list(tasks[::EVERY])


def sources(tasks: Sequence[TaskData]) -> tuple[TaskData, ...]:
    """The others, as the tasks of one model."""
    others = [data for place, data in enumerate(tasks) if place % EVERY]
    return tuple(numbered(data, task_id) for task_id, data in enumerate(others))


class TransferRunner:
    """Runs the cells (method, task, k, draw) that a file of results lacks."""

    def __init__(
        self,
        setting: Setting,
        output: Path,
        n: Size,
        seed: int,
        fit: Fit = "adapter",
        test_rows: int = 500,
        report: Callable[[str], None] = print,
    ) -> None:
        """Read what was done before.

        Args:
            setting: suite, backbone, device.
            output: the results; rows are added.
            n: training rows of each task that a model learns first.
            seed: of this training.
            fit: of `add_task`.
            test_rows: at most, the first of each test file.
            report: told of each cell.
        """
        self.setting, self.output, self.report = setting, output, report
        self.n, self.seed, self.fit, self.test_rows = n, seed, fit, test_rows
        self.digest = code_digest()
        self._done = set(map(_key, read_rows(output)))

    def run(self, methods: Sequence[str], shots: Sequence[int] = SHOTS, draws: Sequence[int] = DRAWS) -> None:
        """Run cells; those that are done are passed over, and a model is trained only where any is missing."""
        tasks = held_out(self.setting.load(self.setting.data, self.setting.suite, "all", 0))
        for method in methods:
            cells = product(tasks, shots, draws)
            missing = [cell for cell in cells if _key(self._fields(method, *cell)) not in self._done]
            if missing:
                self._run_method(method, missing)

    def _run_method(self, method: str, cells: Sequence[tuple[TaskData, int, int]]) -> None:
        answer = self._answer(method)
        for data, k, draw in cells:
            few = subset(data.splits["train"], data.task, DataConfig(k_per_label=k), draw)
            test = data.splits["test"][: self.test_rows]
            inputs = [Example(None, example.text, example.text_pair) for example in test]
            started = time.monotonic()
            answers, facts = answer(data.task, few, inputs, draw)
            row = {
                **self._fields(method, data, k, draw),
                "metric": data.task.main_metric,
                "score": score(data.task, [example.target for example in test], answers)[data.task.main_metric],
                "examples": len(few),
                "test_rows": len(test),
                "seconds": time.monotonic() - started,
                **facts,
                "device": device_name(self.setting.device),
                "threads": torch.get_num_threads(),
                "version": __version__,
                "digest": self.digest,
            }
            append(self.output, row)
            self.report(f"{row['suite']} {row['task']} k={k} draw {draw} {method}: {100 * row['score']:.1f}")

    def _fields(self, method: str, data: TaskData, k: int, draw: int) -> dict[str, Any]:
        """The fields of a row that tell its cell from others."""
        of_model = {} if method in BASELINES else {"n": self.n, "training_seed": self.seed}
        of_fit = {} if method in (*BASELINES, *SHARED) else {"fit": self.fit}
        return {
            "suite": self.setting.suite,
            "task": data.task.name,
            "k": k,
            "seed": draw,
            "method": method,
            **of_model,
            **of_fit,
        }

    def _answer(self, method: str) -> Answer:
        if method in BASELINES:
            return self._baseline(method)
        return (self._probing if method in SHARED else self._adding)(self._trained(method))

    def _baseline(self, method: str) -> Answer:
        def answer(task: Task, few: list[Example], inputs: list[Example], draw: int) -> Answers:
            return list(BASELINES[method](self.setting, task, few, inputs, draw)), {}

        return answer

    def _trained(self, arm: str) -> HyperAdapterModel:
        """A model of the other tasks, with the arm's first learning rate."""
        tasks = sources(self.setting.load(self.setting.data, self.setting.suite, self.n, self.seed))
        trained = ARMS[arm].train(self.setting, Cell(self.n, self.seed, tasks), ARMS[arm].rate)
        if trained.model is None:
            raise ValueError(f"arm '{arm}': expected one with a model to which tasks can be added; choose another")
        return trained.model.eval()

    def _probing(self, model: HyperAdapterModel) -> Answer:
        def answer(task: Task, few: list[Example], inputs: list[Example], draw: int) -> Answers:
            return list(probe_shared(model, few, inputs)), {}

        return answer

    def _adding(self, model: HyperAdapterModel) -> Answer:
        def answer(task: Task, few: list[Example], inputs: list[Example], draw: int) -> Answers:
            fitted = model.add_task(task, few, fit=self.fit, seed=draw)
            answers = [prediction.target for prediction in Predictor(model)(inputs, task=task.name)]
            model.remove_task(task.name)
            nearest = fitted.neighbours[0]
            facts = {"seconds_to_add": fitted.seconds, "steps": fitted.steps, "nearest": nearest.task}
            return answers, {**facts, "similarity": nearest.similarity}

        return answer


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("suite", "task", "k", "seed", "method", "n", "training_seed", "fit"))
