"""The plan of a training's memory: its parts are those of the real model, and scale as they should."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_batch, make_model, save_backbone, tiny_backbone
from torch import Tensor, nn

from hyperadapters.backbones.loading import load_backbone
from hyperadapters.config import Recipe, parse
from hyperadapters.data.loading import load_tasks
from hyperadapters.errors import RecipeError
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.memory_trace import MemoryTrace
from hyperadapters.training.plan import (
    ACTIVATIONS,
    ADVICE,
    BACKBONE,
    GRADIENTS,
    OPTIMIZER,
    STATES,
    TRAINED,
    MemoryPlan,
    plan_memory,
)
from hyperadapters.training.prefix_cache import FrozenPrefix
from hyperadapters.training.run import examples_of

ROWS = 16
SIZES = {"adapter_dim": 4, "prototype_dim": 8, "hidden_dim": 6}


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A recipe of one task on BERT, whose texts all have the same length."""
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
    for split, count in (("train", ROWS), ("validation", 4)):
        rows = [{"text": "good w1 w2", "label": ("no", "yes")[row % 2]} for row in range(count)]
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "backbone": str(save_backbone(tmp_path / "backbone", num_hidden_layers=2)),
        "model": {"preset": "paper", **SIZES},
        "data": {"max_length": 32},
        "training": {"max_steps": 4, "batch_size": 4},
        "tasks": [{"name": "mood", "source": {"path": files}}],
    }


def planned(
    values: dict[str, Any], processes: int = 1, model: dict[str, Any] | None = None, **training: Any
) -> MemoryPlan:
    changed = {"model": {**values["model"], **(model or {})}, "training": {**values["training"], **training}}
    return plan_memory(parse(Recipe, {**values, **changed}, RecipeError), processes)


def real_model(values: dict[str, Any]) -> HyperAdapterModel:
    recipe = parse(Recipe, values, RecipeError)
    tasks = [data.task for data in load_tasks(recipe.tasks, recipe.data, recipe.seed)]
    backbone = load_backbone(recipe.backbone)
    return HyperAdapterModel(backbone, tasks, recipe.model, recipe.backbone, recipe.data.lengths)


def num_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


# Parts


@pytest.mark.parametrize("kind", ["bert", "t5", "llama"])
def test_parameters_are_those_of_the_real_model(kind: str, values: dict[str, Any], tmp_path: Path) -> None:
    values["backbone"] = str(save_backbone(tmp_path / kind, kind))
    plan, model = planned(values), real_model(values)
    trained = model.num_trainable_parameters()
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert plan.trained_parameters == trained
    assert plan.backbone_parameters == sum(parameter.numel() for parameter in frozen)
    assert plan.parts[BACKBONE] == num_bytes([*frozen, *model.buffers()])
    assert plan.parts[TRAINED] == plan.parts[GRADIENTS] == 4 * trained
    assert plan.parts[OPTIMIZER] == 8 * trained


def test_a_process_holds_its_part_of_divided_layers_and_one_whole_layer(values: dict[str, Any]) -> None:
    values["training"] |= {"batch_size": 8, "shard_backbone": True}
    alone, of_four = (planned(values, processes=processes) for processes in (1, 4))
    layers = [num_bytes(layer.parameters()) for layer in real_model(values).passes.layers]
    assert alone.parts[BACKBONE] - of_four.parts[BACKBONE] == sum(layers) * 3 // 4 - max(layers) > 0
    assert alone.parts[STATES] > of_four.parts[STATES] == of_four.file_bytes == 0


def test_states_are_as_large_as_those_of_the_training(values: dict[str, Any]) -> None:
    plan, model = planned(values), real_model(values)
    recipe = parse(Recipe, values, RecipeError)
    tasks = load_tasks(recipe.tasks, recipe.data, recipe.seed)
    kept = [FrozenPrefix(model, model.collator.lengths(examples_of(tasks, split))) for split in ("train", "validation")]
    assert plan.parts[STATES] == sum(prefix.num_bytes for prefix in kept) > 0


def test_activations_grow_with_the_rows_of_a_batch(values: dict[str, Any]) -> None:
    """What is kept for each row is the same; the adapter of the single task is kept once."""
    found = [planned(values, model={"method": "hyperformer"}, batch_size=rows) for rows in (4, 8, 16)]
    assert [plan.rows for plan in found] == [4, 8, 16]
    of_4, of_8, of_16 = (plan.parts[ACTIVATIONS] for plan in found)
    assert of_16 - of_8 == 2 * (of_8 - of_4) > 0
    assert len({plan.parts[OPTIMIZER] for plan in found}) == 1


def test_gradient_checkpointing_keeps_fewer_activations(values: dict[str, Any]) -> None:
    checkpointed, kept = planned(values, gradient_checkpointing=True), planned(values)
    assert checkpointed.parts[ACTIVATIONS] < kept.parts[ACTIVATIONS]


def test_bfloat16_weights_take_half(values: dict[str, Any]) -> None:
    full, half = planned(values), planned({**values, "backbone_dtype": "bfloat16"})
    integers = num_bytes(buffer for buffer in real_model(values).buffers() if not buffer.is_floating_point())
    of_method = num_bytes(real_model(values).method.buffers())
    assert full.parts[BACKBONE] - half.parts[BACKBONE] == 2 * full.backbone_parameters
    assert integers + of_method < half.parts[BACKBONE]
    assert half.parts[TRAINED] == full.parts[TRAINED]


def test_processes_divide_the_rows_and_share_a_file(values: dict[str, Any]) -> None:
    together, small = planned(values, processes=2, batch_size=8), planned(values, batch_size=4)
    assert together.rows == small.rows == 4
    assert together.parts[ACTIVATIONS] == small.parts[ACTIVATIONS]
    assert together.parts[GRADIENTS] == 2 * small.parts[GRADIENTS]
    assert together.parts[OPTIMIZER] == small.parts[OPTIMIZER]
    assert (together.parts[STATES], together.file_bytes) == (0, small.parts[STATES])


def test_states_are_where_the_recipe_puts_them(values: dict[str, Any]) -> None:
    kept, in_file, nowhere = (planned(values, prefix_cache=place) for place in ("memory", "file", "none"))
    size = kept.parts[STATES]
    assert [plan.parts[STATES] for plan in (kept, in_file, nowhere)] == [size, 0, 0]
    assert [plan.file_bytes for plan in (kept, in_file, nowhere)] == [0, size, 0]


def test_the_largest_part_is_the_one_that_advice_is_about(values: dict[str, Any]) -> None:
    plan = planned(values, model={"hidden_dim": 4000})
    assert plan.advice.startswith(f"{OPTIMIZER} (")
    assert plan.advice.endswith(ADVICE[OPTIMIZER])


def test_a_backbone_without_weights_is_planned(values: dict[str, Any], tmp_path: Path) -> None:
    """Its 12 billion parameters would take 47 GiB, and there is no file of them."""
    folder = save_backbone(tmp_path / "large")
    (folder / "model.safetensors").unlink()
    sizes = {"hidden_size": 8192, "intermediate_size": 90_000, "num_attention_heads": 64, "num_hidden_layers": 7}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **sizes}))
    plan = planned({**values, "backbone": str(folder)})
    assert plan.backbone_parameters > 12_000_000_000
    assert plan.parts[BACKBONE] > 4 * plan.backbone_parameters


# What a step keeps


def saved_tensors(model: HyperAdapterModel, batch: dict[str, Tensor]) -> tuple[Counter[tuple[Any, ...]], Tensor]:
    """Size, type and shape of each tensor that autograd keeps beside parameters, buffers and inputs; and the loss."""
    known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers(), *batch.values())}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss: Tensor = model(**batch).loss
    return Counter((x.untyped_storage().nbytes(), x.dtype, tuple(x.shape)) for x in saved.values()), loss


def total(tensors: Counter[tuple[Any, ...]]) -> int:
    return sum(found[0] * times for found, times in tensors.items())


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "t5", "llama"])
def test_a_trace_keeps_what_a_real_step_keeps(kind: str) -> None:
    batch = make_batch(kind)
    real, _ = saved_tensors(make_model(kind).train(), batch)
    trace = MemoryTrace()
    with trace:
        model = make_model(kind).train()
        before = trace.live
        kept, loss = saved_tensors(model, batch)
        loss.backward()
    assert kept == real
    assert total(real) <= trace.peak - before
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    assert gradients == 4 * model.num_trainable_parameters()


# The trace itself


def test_trace_counts_tensors_while_they_live() -> None:
    trace = MemoryTrace()
    with trace:
        first = torch.ones(10, 10)
        view = first[2:]
        second = first + 1
        assert (trace.live, trace.peak) == (800, 800)
        del first, second
        assert trace.live == 400  # of the view
        del view
        assert (trace.live, trace.peak) == (0, 800)
        trace.restart()
        assert trace.peak == 0


def test_trace_computes_integers_and_no_floats() -> None:
    with MemoryTrace() as trace:
        ids = torch.arange(4)
        assert ids.cumsum(0).tolist() == [0, 1, 3, 6]
        assert ids[ids > 1].shape == (2,)
        weights = torch.randn(4, 3)
        assert not bool((weights[ids] > 0).any())
        trace.condition = True
        assert bool((weights[ids] > 0).any())
        assert weights.nonzero().shape == (0, 2)


def test_trace_makes_weights_without_memory() -> None:
    with MemoryTrace() as trace:
        layer = nn.Linear(10**6, 10**6, bias=False)
        layer(torch.ones(1, 10**6)).sum().backward()
        assert layer.weight.grad is not None
        assert trace.live == 2 * 4 * 10**12


def test_trace_leaves_models_outside_alone() -> None:
    backbone = tiny_backbone("bert")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with MemoryTrace():
        tiny_backbone("bert")
    assert all(value.equal(before[name]) for name, value in backbone.state_dict().items())


# Refusals


@pytest.mark.parametrize(
    ("processes", "training", "message"),
    [
        (0, {}, "processes: expected an integer of 1 or more, found 0"),
        (3, {}, "training.batch_size: expected a multiple of the number of processes, .* found 4 for 3 processes"),
        (2, {"auto_batch": True}, "training.auto_batch: only for one process"),
        (1, {"attention": "flash_attention_2"}, "training.attention: 'flash_attention_2' cannot be used"),
    ],
)
def test_a_training_that_would_be_refused_is_not_planned(
    processes: int, training: dict[str, Any], message: str, values: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match=message):
        planned(values, processes, **training)
