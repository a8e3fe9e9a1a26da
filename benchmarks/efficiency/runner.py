"""Runs cells, size by size, arm by arm and seed by seed, and writes a row for each when it is finished."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from efficiency.arms import ARMS, Arm
from efficiency.data import Size
from efficiency.experiment import Cell, Setting, Trained
from efficiency.learning_rates import Trials, search
from efficiency.result_rows import append, device_name, peak_mb, read_rows, reset_peak
from hyperadapters import __version__

SEED_OF_TRIALS = 0
ALL_LAYERS = "_all_layers"


@dataclass(frozen=True)
class Measured:
    """A trained arm, with its learning rate and the most memory that the training held."""

    trained: Trained
    rate: float | None
    peak_mb: float


class Runner:
    """Runs the cells that a file of results lacks.

    The best of an arm's trials is kept until the next arm's turn, so that its own cell needs no training.
    """

    def __init__(self, setting: Setting, output: Path, trials: Path, report: Callable[[str], None] = print) -> None:
        """Read what was done before.

        Args:
            setting: data, backbone, device.
            output: the results; rows are added.
            trials: those of the learning rates; rows are added.
            report: told of each cell and trial.
        """
        self.setting, self.output, self.report = setting, output, report
        self.trials = Trials(trials)
        self.device = device_name(setting.device)
        self._done = {
            (row["arm"], row["n"], row["seed"], row["device"]) for row in read_rows(output) if "error" not in row
        }
        self._kept: Measured | None = None

    def run(self, arms: Sequence[str], sizes: Sequence[Size], seeds: Sequence[int]) -> None:
        """Run cells; those that are done are passed over, those that failed are tried again."""
        for n in sizes:
            for arm in arms:
                missing = [seed for seed in seeds if (self._name(arm), n, seed, self.device) not in self._done]
                if missing:
                    self._run_column(arm, n, missing)

    def _run_column(self, arm: str, n: Size, seeds: Sequence[int]) -> None:
        """Run an arm at a size; where no learning rate is found, every one of its cells has failed."""
        self._forget()  # an earlier arm's best
        try:
            rate = self._choose_rate(arm, n)
        except Exception as error:
            for seed in seeds:
                self._write(arm, n, seed, _failure(error))
            return
        for seed in seeds:
            try:
                self._write(arm, n, seed, self._run_cell(ARMS[arm], n, seed, rate))
            except Exception as error:
                self._write(arm, n, seed, _failure(error))

    def _choose_rate(self, arm: str, n: Size) -> float | None:
        if not ARMS[arm].grid:
            return None
        return search(ARMS[arm].grid, lambda rate: self._try_rate(arm, n, rate))

    def _try_rate(self, arm: str, n: Size, rate: float) -> float:
        name = self._name(arm)
        known = self.trials.validation(name, n, self.device, rate)
        if known is not None:
            return known
        try:
            measured = self._train(ARMS[arm], self._cell(n, SEED_OF_TRIALS), rate)
        except (RuntimeError, ValueError) as error:  # a rate that is too high for the arm, where a lower one was not
            if self._kept is None:
                raise
            self.report(f"{name} n={n} rate {rate:g}: {_failure(error)['error']}")
            return -float("inf")
        trained = measured.trained
        row = {"arm": name, "n": n, "learning_rate": rate, "validation": trained.validation, "steps": trained.steps}
        self.trials.add({**row, "seconds": trained.seconds, "device": self.device, "version": __version__})
        self.report(f"{name} n={n} rate {rate:g}: validation {trained.validation:.2f}, {trained.seconds:.0f} s")
        if self._kept is None or trained.validation > self._kept.trained.validation:
            self._kept = measured
        return trained.validation

    def _run_cell(self, arm: Arm, n: Size, seed: int, rate: float | None) -> dict[str, Any]:
        cell = self._cell(n, seed)
        # After a resumed search the best of its trials may be an earlier run's: then it is trained once more.
        measured = self._kept if seed == SEED_OF_TRIALS else None
        if measured is None or measured.rate != rate:
            measured = self._train(arm, cell, rate)
        trained = measured.trained
        tested = trained.test()
        return {
            "scores": tested.scores,
            "score": sum(tested.scores.values()) / len(tested.scores),
            "trainable": trained.trainable,
            "trainable_per_task": round(trained.trainable_per_task),
            "bytes_per_task": round(trained.bytes_per_task),
            "seconds": trained.seconds,
            "peak_mb": measured.peak_mb,
            "routing_accuracy": tested.routing_accuracy,
            "learning_rate": rate,
            "steps": trained.steps,
        }

    def _train(self, arm: Arm, cell: Cell, rate: float | None) -> Measured:
        reset_peak(self.setting.device)
        trained = arm.train(self.setting, cell, rate)
        return Measured(trained, rate, peak_mb(self.setting.device))

    def _cell(self, n: Size, seed: int) -> Cell:
        return Cell(n, seed, self.setting.load(self.setting.data, n, seed))

    def _name(self, arm: str) -> str:
        return arm + (ALL_LAYERS if self.setting.first_layer == 0 else "")

    def _write(self, arm: str, n: Size, seed: int, result: dict[str, Any]) -> None:
        name = self._name(arm)
        row = {"arm": name, "n": n, "seed": seed, **result}
        append(
            self.output,
            {**row, "device": self.device, "threads": torch.get_num_threads(), "version": __version__},
        )
        told = f"score {row['score']:.2f}, {row['seconds']:.0f} s" if "score" in row else row["error"]
        self.report(f"{name} n={n} seed {seed}: {told}")

    def _forget(self) -> None:
        self._kept = None
        gc.collect()
        if self.setting.device.startswith("cuda"):
            torch.cuda.empty_cache()


def _failure(error: Exception) -> dict[str, Any]:
    """What a row says of an error: the last line of its traceback."""
    traceback.print_exception(error)
    return {"error": traceback.format_exception_only(error)[-1].strip()}
