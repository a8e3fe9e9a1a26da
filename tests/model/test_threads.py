"""One model asked by several threads, in several processes, and as a copy."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_backbone
from torch import Tensor, nn

from hyperadapters import HyperAdapterModel, Predictor, Task
from hyperadapters.errors import TaskError

KINDS = ["bert", "t5", "bart", "gpt2"]
TEXTS = ["w1", "w2 w3", "good w4 w5 w6", "bad", "w7 w8 w9"]
NUM_TASKS = 3


def make_model(tmp_path: Path, kind: str, **settings: Any) -> HyperAdapterModel:
    """A model in float64 whose tasks answer differently."""
    labels = ["yes", "no", "red", "blue"]
    tasks = [
        Task.classification(f"task{index}", labels) if kind == "bert" else Task.text_to_text(f"task{index}")
        for index in range(NUM_TASKS)
    ]
    folder = save_backbone(tmp_path / kind, kind)
    settings |= {"preset": "paper", "max_length": 32, "max_target_length": 6}
    model = HyperAdapterModel.from_backbone(str(folder), tasks, **settings)
    for parameter in model.method.hypernetwork.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def answers(predictor: Predictor, task: str | None) -> list[Any]:
    return [
        (found.task, found.answer, found.probabilities, found.text, found.instance) for found in predictor(TEXTS, task)
    ]


def same(found: list[Any], expected: list[Any]) -> bool:
    """Whether answers are equal, numbers up to 1e-9; those of two tasks differ by more than a thousand times that.

    A thread may get other kernels than the main one, and a model with another number of tasks has products of other
    shapes; in float64 both change the last digits only.
    """
    return all(
        one[:2] == other[:2]
        and one[2] == (other[2] and pytest.approx(other[2], abs=1e-9))
        and one[3] == other[3]
        and one[4] == pytest.approx(other[4], abs=1e-9)
        for one, other in zip(found, expected, strict=True)
    )


def modes_and_state(model: HyperAdapterModel) -> tuple[Any, ...]:
    return [module.training for module in model.modules()], model.passes._active._state, model.method._adapter_source


@pytest.mark.parametrize("one_predictor", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_that_share_a_model_get_the_answers_of_their_tasks(
    tmp_path: Path, kind: str, one_predictor: bool
) -> None:
    model = make_model(tmp_path, kind)
    shared = Predictor(model, batch_size=2)
    tasks = [None, *(task.name for task in model.tasks)]
    expected = {task: answers(shared, task) for task in tasks}
    assert len({str(answer) for answer in expected.values()}) > NUM_TASKS - 1
    before = modes_and_state(model)

    def ask(number: int) -> bool:
        task = tasks[number % len(tasks)]
        predictor = shared if one_predictor else Predictor(model, batch_size=2)
        return same(answers(predictor, task), expected[task])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(32)))
    assert modes_and_state(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_threads_that_share_a_model_in_training_mode_leave_it_as_it_was(tmp_path: Path, kind: str) -> None:
    model = make_model(tmp_path, kind).train()
    expected, before = answers(Predictor(model), "task1"), modes_and_state(model)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: answers(Predictor(model), "task1"), range(24)))
    assert all(same(one, expected) for one in found)
    assert modes_and_state(model) == before


def test_forwards_and_gradients_of_threads_are_their_own(tmp_path: Path) -> None:
    model = make_model(tmp_path, "bert")
    ids = torch.randint(3, 40, (4, 6))

    def gradient(task_id: int) -> Tensor:
        weight = model.method.prototypes.weight
        loss = model(ids, task_ids=torch.full((4,), task_id)).logits.square().sum()
        return torch.autograd.grad(loss, weight)[0]

    expected = [gradient(task_id) for task_id in range(NUM_TASKS)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: gradient(number % NUM_TASKS), range(60)))
    for number, gradient_of_task in enumerate(found):
        torch.testing.assert_close(gradient_of_task, expected[number % NUM_TASKS])


def test_recomputation_in_one_thread_does_not_meet_the_forward_of_another(tmp_path: Path) -> None:
    model = make_model(tmp_path, "bert").train()
    model.activation_checkpointing_enable()
    ids = torch.randint(3, 40, (4, 6))

    def gradient(task_id: int) -> Tensor:
        loss = model(ids, task_ids=torch.full((4,), task_id)).logits.square().sum()
        return torch.autograd.grad(loss, model.method.prototypes.weight)[0]

    expected = [gradient(task_id) for task_id in range(NUM_TASKS)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: gradient(number % NUM_TASKS), range(60)))
    for number, gradient_of_task in enumerate(found):
        torch.testing.assert_close(gradient_of_task, expected[number % NUM_TASKS])


def test_tasks_come_and_go_while_threads_ask(tmp_path: Path) -> None:
    model = make_model(tmp_path, "bert")
    expected = answers(Predictor(model), "task0")
    rows = [{"text": "good w1", "label": "yes"}, {"text": "bad w2", "label": "no"}]

    def ask(_: int) -> bool:
        try:
            return same(answers(Predictor(model), "task0"), expected)
        except TaskError as error:  # between the look at the tasks and the turn of the batch
            return "removed or renamed" in str(error)

    with ThreadPoolExecutor(4) as pool:
        asked = pool.map(ask, range(60))
        for number in range(3):
            model.add_task(Task.classification(f"new{number}", ["yes", "no"]), rows, max_steps=1)
            model.remove_task(f"new{number}")
        assert all(asked)
    assert [task.name for task in model.tasks] == ["task0", "task1", "task2"]


def _answers_of_pickled(pickled: bytes) -> list[Any]:
    return answers(Predictor(pickle.loads(pickled)), "task1")


@pytest.mark.parametrize("settings", [{}, {"form": "lora"}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_model_answers_the_same_and_can_be_detached(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    model = make_model(tmp_path, kind, **settings)
    copied = pickle.loads(pickle.dumps(model))
    assert same(answers(Predictor(copied), "task1"), answers(Predictor(model), "task1"))
    assert copied.lock is not model.lock
    backbone, original = copied.detach(), model.detach()
    assert type(backbone) is type(original)
    assert [type(module) for module in backbone.modules()] == [type(module) for module in original.modules()]


@pytest.mark.slow
def test_a_model_reaches_another_process(tmp_path: Path) -> None:
    model = make_model(tmp_path, "bert")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(_answers_of_pickled, pickle.dumps(model)).result()
    assert [answer[:2] for answer in found] == [answer[:2] for answer in answers(Predictor(model), "task1")]


def test_a_pickled_predictor_answers_the_same(tmp_path: Path) -> None:
    predictor = Predictor(make_model(tmp_path, "gpt2"))
    assert same(answers(pickle.loads(pickle.dumps(predictor)), "task2"), answers(predictor, "task2"))
