"""Ending a training in order when its process is asked to end, so that it can be resumed from the present step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl

from hyperadapters.errors import InterruptionError
from hyperadapters.training.sharding import num_processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(TrainerCallback):
    """Lets a training save its state and end after the present step if its process gets SIGINT or SIGTERM.

    A second signal has its usual effect. Several processes end after the same step, even if only one gets the signal.

    Attributes:
        signal: The signal, once the training has ended because of it.
    """

    def __init__(self) -> None:
        """Begin without a signal."""
        self.signal: signal.Signals | None = None
        self._received = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Receive signals while the context is active, if this is the main thread, as Python requires.

        Yields:
            None.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def receive(number: int, frame: FrameType | None) -> None:
            self._received = number
            for other, handler in before.items():
                signal.signal(other, handler)

        for number in SIGNALS:
            signal.signal(number, receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **options: Any) -> TrainerControl:
        """Save the state and stop if any process has got a signal.

        Args:
            args: Settings of the training.
            state: State of the training.
            control: Control of the training.
            **options: Unused.

        Returns:
            The control.
        """
        received = torch.tensor(self._received, device=args.device)
        if num_processes() > 1:
            dist.all_reduce(received, dist.ReduceOp.MAX)
        if number := int(received):
            self.signal = signal.Signals(number)
            control.should_save = control.should_training_stop = True
        return control

    def error(self, step: int, folder: object) -> InterruptionError:
        """Return the error with which the training ends.

        Args:
            step: Last step of the training.
            folder: Folder of the run.
        """
        assert self.signal is not None
        message = f"training was ended by {self.signal.name} after step {step}, and its state was saved in {folder}"
        error = InterruptionError(f"{message}; --resume continues it")
        error.exit_code = 128 + self.signal
        return error
