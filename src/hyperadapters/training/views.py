"""What a training shows while it runs: a live table in a terminal, lines elsewhere, or JSON objects."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import IO, Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerState

from hyperadapters.config import Task
from hyperadapters.inference.predict_files import as_json
from hyperadapters.utils.progress import tolerant
from hyperadapters.utils.texts import printable

View = Literal["auto", "lines", "json", "none"]
"""Names of the views. "auto" is a live table in a terminal, and "lines" elsewhere."""

TASK_LOSS = "task_loss_"
"""Beginning of the name of a task's training loss in the log; the name of the task follows."""

REFRESHES_PER_SECOND = 2
MAX_ROWS = 20
"""Number of tasks in the live table. In a low terminal there are fewer."""
OTHER_LINES = 10
"""Lines of a terminal that are not for tasks: the progress, the frame, the other rows of the table and the cursor."""
NARROW = 60
"""Width of a terminal below which the table has no columns for losses and metrics."""
SCORE_COLUMNS = 22
"""Width of the two columns of scores in a narrow terminal, with the frame."""
TASKS_IN_LINE = 8
"""Number of tasks whose scores are in the line of an evaluation."""


class TrainingView(TrainerCallback):
    """Keeps the last values of the log, and shows nothing.

    Attributes:
        tasks: Tasks of the model.
        state: State of the training.
        losses: Last entry of the log with losses.
        scores: Last evaluation.
        best: Evaluation of the best state so far.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        """Begin without losses and scores.

        Args:
            tasks: Tasks of the model.
        """
        self.tasks = tasks
        self.state = TrainerState()
        self.losses: Mapping[str, Any] = {}
        self.scores: Mapping[str, Any] = {}
        self.best: Mapping[str, Any] = {}

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show the training while the context is active.

        Yields:
            None.
        """
        yield

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **options: Any) -> None:
        """Read what a training that is resumed has logged before. The arguments are those of `TrainerCallback`."""
        self.state, self.losses, self.scores, self.best = state, {}, {}, {}
        for entry in state.log_history:
            if "loss" in entry:
                self.losses = entry
            elif "eval_mean" in entry:
                self.scores = entry
                if entry["step"] == state.best_global_step:
                    self.best = entry

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **options: Any) -> None:
        """Keep the losses. The arguments are those of `TrainerCallback`."""
        if "loss" in logs:
            self.losses = {**logs, "step": state.global_step}
            self.show_losses()

    def evaluated(self, scores: Mapping[str, float], is_best: bool) -> None:
        """Keep the scores of an evaluation.

        Args:
            scores: Values by their names in the log.
            is_best: Whether the state is the best one so far.
        """
        self.scores = {**scores, "step": self.state.global_step}
        if is_best:
            self.best = self.scores
        self.show_scores()

    def show_losses(self) -> None:
        """Show the losses, which have changed."""

    def show_scores(self) -> None:
        """Show the scores, which have changed."""


class LiveView(TrainingView):
    """Shows a line of progress and a table of the tasks, which change while the model is trained."""

    def __init__(self, tasks: Sequence[Task], console: Console) -> None:
        """Make the table without showing it.

        Args:
            tasks: Tasks of the model.
            console: Console of a terminal.
        """
        super().__init__(tasks)
        self._ordered = tasks
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[loss]}"),
            console=console,
            expand=True,
        )
        self._bar = self._progress.add_task("Training", total=None, loss="")

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show the table while the context is active. Its last state stays in the terminal.

        Yields:
            None.
        """
        stream = sys.stderr
        live = Live(console=self._console, get_renderable=self._render, refresh_per_second=REFRESHES_PER_SECOND)
        with live, _logging_above(stream):
            yield

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **options: Any) -> None:
        """Start the bar. The arguments are those of `TrainerCallback`."""
        super().on_train_begin(args, state, control)
        self._order_tasks()
        self._progress.reset(
            self._bar, total=state.max_steps, completed=state.global_step, description="Training", loss=""
        )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **options: Any) -> None:
        """Advance the bar. The arguments are those of `TrainerCallback`."""
        phase = "Evaluating" if control.should_evaluate else "Training"
        self._progress.update(self._bar, completed=state.global_step, description=phase)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **options: Any) -> None:
        """Say that the trained model is being completed. The arguments are those of `TrainerCallback`."""
        self._progress.update(self._bar, description="Finishing")

    def show_losses(self) -> None:
        """Show the loss in the line of progress."""
        self._progress.update(self._bar, loss=f"loss {self.losses['loss']:.4f}")

    def show_scores(self) -> None:
        """Show the tasks with the lowest scores, if not all of them have room."""
        self._order_tasks()
        self._progress.update(self._bar, description="Training")

    def _order_tasks(self) -> None:
        if len(self.tasks) > self._num_rows():
            self._ordered = sorted(self.tasks, key=lambda task: _for_sorting(_main_score(task, self.scores)))

    def _num_rows(self) -> int:
        return min(MAX_ROWS, max(1, self._console.height - OTHER_LINES))

    def _task_width(self) -> int | None:
        return max(1, self._console.width - SCORE_COLUMNS) if self._console.width < NARROW else None

    def _render(self) -> Group:
        return Group(self._progress, self._table())

    def _table(self) -> Table:
        losses, scores, best = self.losses, self.scores, self.best
        is_wide = self._console.width >= NARROW
        table = Table()
        table.add_column("task", no_wrap=True, overflow="ellipsis", max_width=self._task_width())
        if is_wide:
            table.add_column("loss", justify="right", no_wrap=True)
            table.add_column("metric", no_wrap=True)
        titles = ["now", "best"]
        if is_wide:
            titles = [f"step {scores['step']}" if scores else "score", f"best: step {best['step']}" if best else "best"]
        for title in titles:
            table.add_column(title, justify="right", no_wrap=True)
        shown = self._ordered[: self._num_rows()]
        for task in shown:
            cells = [printable(task.name)]
            cells += [_cell(losses.get(TASK_LOSS + task.name)), task.main_metric] if is_wide else []
            cells += [_cell(_main_score(task, values)) for values in (scores, best)]
            table.add_row(*map(Text, cells))
        if hidden := len(self.tasks) - len(shown):
            table.add_row(f"and {hidden} more")
        table.add_section()
        for title, name in (("mean", "eval_mean"), ("routing", "eval_routing_accuracy")):
            if name in scores:
                blank = ["", ""] if is_wide else []
                table.add_row(title, *blank, _cell(scores[name]), _cell(best.get(name)), style="bold")
        return table


class _StreamView(TrainingView):
    """Writes lines to a stream, each as soon as it is complete."""

    def __init__(self, tasks: Sequence[Task], stream: IO[str]) -> None:
        """Store the stream.

        Args:
            tasks: Tasks of the model.
            stream: Stream to write to.
        """
        super().__init__(tasks)
        self._stream = stream

    def _write_line(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class LineView(_StreamView):
    """Writes one line for each evaluation, or for each entry of the log where there are no evaluations."""

    _has_evaluations = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **options: Any) -> None:
        """Find out whether there are evaluations. The arguments are those of `TrainerCallback`."""
        super().on_train_begin(args, state, control)
        self._has_evaluations = args.eval_strategy != "no"

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **options: Any) -> None:
        """Keep the losses, or that of a whole training that ends before its first entry of the log.

        The arguments are those of `TrainerCallback`.
        """
        if "train_loss" in logs and not self.losses:
            logs = {"loss": logs["train_loss"]}
        super().on_log(args, state, control, logs)

    def show_losses(self) -> None:
        """Write a line, if there are no evaluations."""
        if not self._has_evaluations:
            self._write([])

    def show_scores(self) -> None:
        """Write a line."""
        scores = self.scores
        parts = [f"mean {_cell(scores['eval_mean'])}" + (" (best)" if self.best is scores else "")]
        if "eval_routing_accuracy" in scores:
            parts.append(f"routing {_cell(scores['eval_routing_accuracy'])}")
        scored = [task for task in self.tasks if _main_score(task, scores) is not None]
        parts += [f"{printable(task.name)} {_cell(_main_score(task, scores))}" for task in scored[:TASKS_IN_LINE]]
        if hidden := len(scored[TASKS_IN_LINE:]):
            parts.append(f"and {hidden} more tasks")
        self._write(parts)

    def _write(self, parts: Sequence[str]) -> None:
        parts = [f"loss {_cell(self.losses.get('loss'))}", *parts] if self.losses else parts
        self._write_line(f"step {self.state.global_step}/{self.state.max_steps}: {', '.join(parts)}")


class JsonView(_StreamView):
    """Writes JSON objects, one in each line, with the names of the log."""

    _started = 0.0

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Let everything else that is written to standard output, such as messages of loggers, go to standard error.

        Yields:
            None.
        """
        with redirect_stdout(sys.stderr):
            yield

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **options: Any) -> None:
        """Write the length of the training. The arguments are those of `TrainerCallback`."""
        super().on_train_begin(args, state, control)
        self._started = time.monotonic()
        self._write("begin", {"max_steps": state.max_steps})

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **options: Any) -> None:
        """Write which state was kept. The arguments are those of `TrainerCallback`."""
        seconds = round(time.monotonic() - self._started, 1)
        self._write("end", {"best_step": self.best.get("step"), "seconds": seconds})

    def show_losses(self) -> None:
        """Write the losses, those of tasks by their names."""
        of_tasks = {TASK_LOSS + task.name: task for task in self.tasks}
        tasks = {of_tasks[name].name: {"loss": value} for name, value in self.losses.items() if name in of_tasks}
        others = {name: value for name, value in self.losses.items() if name not in of_tasks}
        self._write("losses", {**others, "tasks": tasks})

    def show_scores(self) -> None:
        """Write all scores, those of tasks by their names."""
        tasks: dict[str, dict[str, float]] = {}
        for task in self.tasks:
            names = {metric: f"eval_{task.name}_{metric}" for metric in task.metrics}
            if found := {metric: self.scores[name] for metric, name in names.items() if name in self.scores}:
                tasks[task.name] = found
        of_all = ("mean", "routing_accuracy")
        others = {name: self.scores[f"eval_{name}"] for name in of_all if f"eval_{name}" in self.scores}
        self._write("evaluation", {**others, "is_best": self.best is self.scores, "tasks": tasks})

    def _write(self, event: str, values: Mapping[str, Any]) -> None:
        self._write_line(as_json({"event": event, "step": self.state.global_step, **values}, ensure_ascii=True))


def make_view(name: View, tasks: Sequence[Task], has_bars: bool = True) -> TrainingView:
    """Make a view of a training.

    Args:
        name: Name of the view.
        tasks: Tasks of the model.
        has_bars: Whether "auto" may be a live table. Default: True.

    Returns:
        The view. "json" writes to standard output, and the others to standard error. An output that fails does not
        end the training.
    """
    if name == "none":
        return TrainingView(tasks)
    if name == "json":
        return JsonView(tasks, tolerant(sys.stdout))
    stream = tolerant(sys.stderr)
    console = Console(file=stream)
    if name == "auto" and has_bars and console.is_terminal and not console.is_dumb_terminal:
        return LiveView(tasks, console)
    return LineView(tasks, stream)


def _main_score(task: Task, scores: Mapping[str, Any]) -> float | None:
    return scores.get(f"eval_{task.name}_{task.main_metric}")


def _for_sorting(score: float | None) -> float:
    """Return a number that puts scores that are not numbers first, and tasks without a score last."""
    return math.inf if score is None else -math.inf if math.isnan(score) else score


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


@contextmanager
def _logging_above(stream: IO[str]) -> Iterator[None]:
    """Let the logs that go to a stream go to the present standard error, which writes above a live table."""
    loggers = [logging.getLogger(name) for name in (None, "hyperadapters", "transformers")]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    changed = [
        handler for handler in handlers if isinstance(handler, logging.StreamHandler) and handler.stream is stream
    ]
    for handler in changed:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in changed:
            handler.setStream(stream)
