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
from efficiency.code_digest import code_digest
from efficiency.data import Size
from efficiency.experiment import Cell, Setting, Trained
from efficiency.learning_rates import TRIALS, Trials, search
from efficiency.result_rows import append, cell_key, device_name, peak_mb, read_rows, reset_peak
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

    def __init__(
        self,
        setting: Setting,
        output: Path,
        trials: Path,
        report: Callable[[str], None] = print,
        searches: bool = True,
        again: bool = False,
    ) -> None:
        """Read what was done before.

        Args:
            setting: data, backbone, device.
            output: the results; rows are added.
            trials: those of the learning rates; rows are added.
            report: told of each cell and trial.
            searches: whether learning rates are searched; otherwise each arm has its first one.
            again: whether cells and trials that are done are run again. The last row of a cell counts.
        """
        self.setting, self.output, self.report, self.searches = setting, output, report, searches
        self.trials = Trials(trials, again)
        self.device, self.digest = device_name(setting.device), code_digest()
        done = [] if again else [row for row in read_rows(output) if "error" not in row]
        self._done = set(map(cell_key, done))
        self._kept: Measured | None = None

    def run(self, arms: Sequence[str], sizes: Sequence[Size], seeds: Sequence[int]) -> None:
        """Run cells; those that are done are passed over, those that failed are tried again."""
        for n in sizes:
            for arm in arms:
                missing = [seed for seed in seeds if cell_key(self._cell_fields(arm, n, seed)) not in self._done]
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
        first = ARMS[arm].rate
        if first is None or not self.searches:
            return first
        return search(first, lambda rate: self._try_rate(arm, n, rate))

    def _try_rate(self, arm: str, n: Size, rate: float) -> float:
        name = self._name(arm)
        known = self.trials.validation(self.setting.suite, name, n, self.device, rate)
        if known is not None:
            return known
        row: dict[str, Any] = {"suite": self.setting.suite, "arm": name, "n": n}
        try:
            measured = self._train(ARMS[arm], self._cell(n, SEED_OF_TRIALS), rate)
        except (RuntimeError, ValueError) as error:  # a rate that is too high for the arm, where a lower one was not
            if self._kept is None:
                raise
            self._tell(row, f"rate {rate:g}: {_failure(error)['error']}")
            return -float("inf")
        trained = measured.trained
        row |= {
            "learning_rate": rate,
            "validation": trained.validation,
            "steps": trained.steps,
            "seconds": trained.seconds,
            "device": self.device,
        }
        self.trials.add({**row, "version": __version__, "digest": self.digest})
        self._tell(row, f"rate {rate:g}: validation {trained.validation:.2f}, {trained.seconds:.0f} s")
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
        return Cell(n, seed, self.setting.load(self.setting.data, self.setting.suite, n, seed))

    def _name(self, arm: str) -> str:
        return arm + (ALL_LAYERS if self.setting.first_layer == 0 else "")

    def _cell_fields(self, arm: str, n: Size, seed: int) -> dict[str, Any]:
        """The fields of a row that tell its cell from others."""
        searched = self.searches and ARMS[arm].rate is not None
        row = {"suite": self.setting.suite, "arm": self._name(arm), "n": n, "seed": seed}
        return {**row, "trials": TRIALS if searched else 0, "device": self.device}

    def _write(self, arm: str, n: Size, seed: int, result: dict[str, Any]) -> None:
        row = {**self._cell_fields(arm, n, seed), **result}
        append(self.output, {**row, "threads": torch.get_num_threads(), "version": __version__, "digest": self.digest})
        told = f"score {row['score']:.2f}, {row['seconds']:.0f} s" if "score" in row else row["error"]
        self._tell(row, f"seed {seed}: {told}")

    def _tell(self, row: dict[str, Any], text: str) -> None:
        self.report(f"{row['suite']} {row['arm']} n={row['n']} {text}")

    def _forget(self) -> None:
        self._kept = None
        gc.collect()
        if self.setting.device.startswith("cuda"):
            torch.cuda.empty_cache()


def _failure(error: Exception) -> dict[str, Any]:
    """What a row says of an error: the last line of its traceback."""
    traceback.print_exception(error)
    return {"error": traceback.format_exception_only(error)[-1].strip()}
