"""The queue of questions: batches in order, bounds, deadlines, and an end that answers what was accepted."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from hyperadapters.errors import DataError, HyperAdaptersError, TaskError
from hyperadapters.serving.batching import SWITCH_SECONDS, BatchTimes, DeadlineError, MicroBatcher, RefusedError
from hyperadapters.serving.served_model import Answer, Question

FATAL = (("a", None), ("b", "fatal"), ("c", None))


class Answering:
    """A function that answers questions when it is let go on, and remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.go = threading.Event()
        self.go.set()
        self.times: list[BatchTimes] = []

    def __call__(self, questions: Sequence[Question]) -> list[Answer | HyperAdaptersError]:
        self.batches.append([str(question.inputs[0]) for question in questions])
        self.go.wait(10)
        if any(question.task == "fatal" for question in questions):
            raise ZeroDivisionError
        return [
            TaskError("unknown") if question.task == "unknown" else Answer(list(question.inputs), {}, {})  # type: ignore[arg-type]
            for question in questions
        ]


@asynccontextmanager
async def running(answering: Answering, **settings: Any) -> AsyncIterator[MicroBatcher]:
    options = {"max_rows": 4, "max_tokens": 100, "max_wait": 0.0, "max_queue_rows": 8, **settings}
    batcher = MicroBatcher(answer=answering, observe=answering.times.append, **options)
    batcher.start(asyncio.get_running_loop())
    try:
        yield batcher
    finally:
        answering.go.set()
        await asyncio.to_thread(batcher.stop)


async def until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


async def occupied(batcher: MicroBatcher, answering: Answering, text: str = "0") -> Any:
    """Let the thread begin a batch that it does not end before `answering.go` is set."""
    answering.go.clear()
    before, future = len(answering.batches), batcher.submit(question(text), 10, 1)
    await until(lambda: len(answering.batches) > before)
    return future


def question(*texts: str, task: str | None = None) -> Question:
    return Question(texts, task)


def test_the_switch_interval_is_lower_while_the_thread_runs() -> None:
    before = sys.getswitchinterval()

    async def inside() -> float:
        async with running(Answering()):
            return sys.getswitchinterval()

    assert asyncio.run(inside()) == pytest.approx(min(SWITCH_SECONDS, before))
    assert sys.getswitchinterval() == before


def test_what_waits_is_answered_together_in_order_up_to_the_maximum() -> None:
    async def main() -> None:
        answering = Answering()
        async with running(answering) as batcher:
            first = await occupied(batcher, answering)
            rest = [batcher.submit(question(f"{index}"), 10, 1) for index in range(1, 7)]
            answering.go.set()
            found = await asyncio.gather(first, *rest)
        assert [answer.results[0] for answer in found] == ["0", "1", "2", "3", "4", "5", "6"]
        assert answering.batches == [["0"], ["1", "2", "3", "4"], ["5", "6"]]
        assert [times.rows for times in answering.times] == [1, 4, 2]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("texts", "batches"),
    [
        ([("a", "b", "c", "d", "e")], [["a"]]),  # more than the maximum: a batch of its own
        ([("a", "b", "c"), ("d", "e")], [["a"], ["d"]]),
        ([("x" * 300,), ("y" * 300,)], [["x" * 300], ["y" * 300]]),  # 75 tokens each
        ([("x" * 100,), ("y" * 100,)], [["x" * 100, "y" * 100]]),
    ],
)
def test_a_batch_is_bounded_by_rows_and_tokens(texts: list[tuple[str, ...]], batches: list[list[str]]) -> None:
    async def main() -> None:
        answering = Answering()
        async with running(answering) as batcher:
            first = await occupied(batcher, answering)
            rest = [batcher.submit(question(*row), 10, 1) for row in texts]
            answering.go.set()
            await asyncio.gather(first, *rest)
        assert answering.batches[1:] == batches

    asyncio.run(main())


def test_an_idle_thread_waits_for_further_questions() -> None:
    async def main() -> None:
        answering = Answering()
        async with running(answering, max_wait=0.5) as batcher:
            first = batcher.submit(question("0"), 10, 1)
            await asyncio.sleep(0.02)
            await asyncio.gather(first, *(batcher.submit(question(f"{index}"), 10, 1) for index in range(1, 4)))
        assert answering.batches == [["0", "1", "2", "3"]]

    asyncio.run(main())


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def main() -> None:
        answering = Answering()
        async with running(answering) as batcher:
            await batcher.submit(question("warm"), 10, 1)
            running_one = await occupied(batcher, answering)
            waiting = [batcher.submit(question(f"{index}", f"{index}"), 10, 1) for index in range(4)]
            assert batcher.queued_rows == 8
            with pytest.raises(RefusedError, match="8 inputs wait, and 8 may") as refused:
                batcher.submit(question("late"), 10, 1)
            assert refused.value.retry_after >= 0
            with pytest.raises(RefusedError):
                batcher.submit(question("late"), 10, num_tasks=5)
            answering.go.set()
            await asyncio.gather(running_one, *waiting)
            assert (await batcher.submit(question("now"), 10, 1)).results == ["now"]

    asyncio.run(main())


def test_a_question_whose_deadline_has_passed_is_not_computed() -> None:
    async def main() -> None:
        answering = Answering()
        async with running(answering) as batcher:
            first = await occupied(batcher, answering)
            late, in_time = batcher.submit(question("late"), 0.01, 1), batcher.submit(question("in time"), 10, 1)
            await asyncio.sleep(0.05)
            answering.go.set()
            await first
            with pytest.raises(DeadlineError, match="before its deadline"):
                await late
            assert (await in_time).results == ["in time"]
        assert answering.batches == [["0"], ["in time"]]

    asyncio.run(main())


def test_an_answer_that_would_be_late_is_refused_at_once() -> None:
    async def main() -> None:
        answering = Answering()
        async with running(answering) as batcher:
            slow = await occupied(batcher, answering, "slow")
            await asyncio.sleep(0.2)
            answering.go.set()
            await slow  # an input takes 0.2 s from now on
            first = await occupied(batcher, answering)
            waiting = batcher.submit(question("1"), 10, 1)
            with pytest.raises(RefusedError, match="the answer would take about"):
                batcher.submit(question("2"), 0.1, 1)
            answering.go.set()
            await asyncio.gather(first, waiting)

    asyncio.run(main())


def test_an_error_concerns_its_question_only() -> None:
    async def main() -> None:
        answering = Answering()
        async with running(answering, max_wait=0.2) as batcher:
            wrong, right = batcher.submit(question("a", task="unknown"), 10, 1), batcher.submit(question("b"), 10, 1)
            with pytest.raises(TaskError):
                await wrong
            assert (await right).results == ["b"]

    asyncio.run(main())


def test_an_unexpected_error_fails_only_the_question_that_causes_it() -> None:
    async def main() -> None:
        answering = Answering()
        async with running(answering, max_wait=0.2) as batcher:
            futures = [batcher.submit(question(text, task=task), 10, 1) for text, task in FATAL]
            found = await asyncio.gather(*futures, return_exceptions=True)
        assert isinstance(found[1], ZeroDivisionError)
        assert [found[0].results, found[2].results] == [["a"], ["c"]]  # type: ignore[union-attr]
        assert answering.batches == [["a", "b", "c"], ["a"], ["b"], ["c"]]

    asyncio.run(main())


def test_the_end_answers_what_was_accepted_and_refuses_the_rest() -> None:
    async def main() -> None:
        answering = Answering()
        async with running(answering) as batcher:
            answering.go.clear()
            accepted = [batcher.submit(question(f"{index}"), 10, 1) for index in range(6)]
            stopping = asyncio.create_task(asyncio.to_thread(batcher.stop))
            await until(lambda: not batcher.is_alive)
            with pytest.raises(RefusedError, match="is being stopped"):
                batcher.submit(question("late"), 10, 1)
            answering.go.set()
            assert [(await future).results for future in accepted] == [[f"{index}"] for index in range(6)]
            await stopping

    asyncio.run(main())


def test_functions_are_called_in_the_thread_between_batches() -> None:
    async def main() -> None:
        answering, called = Answering(), []
        async with running(answering) as batcher:
            await batcher.call(lambda: called.append(threading.current_thread().name))
            await batcher.submit(question("0"), 10, 1)
        assert called == ["inference"]
        with pytest.raises(RefusedError):  # nobody would call it
            batcher.call(lambda: None)

    asyncio.run(main())


def test_an_idle_thread_answers_although_an_earlier_batch_was_slow() -> None:
    async def main() -> None:
        answering = Answering()
        async with running(answering) as batcher:
            slow = await occupied(batcher, answering, "slow")
            await asyncio.sleep(0.3)
            answering.go.set()
            await slow
            assert (await batcher.submit(question("a", "b", "c", "d"), 0.2, 1)).results == ["a", "b", "c", "d"]

    asyncio.run(main())


def test_a_request_for_more_than_may_wait_is_refused() -> None:
    async def main() -> None:
        async with running(Answering()) as batcher:
            with pytest.raises(DataError, match="at most 8 answers"):
                batcher.submit(question("a", "b"), 10, num_tasks=5)

    asyncio.run(main())
