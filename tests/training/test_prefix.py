"""Frozen layers run once for each row, and training and evaluation go on as if they ran every time."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import save_backbone, tiny_backbone, tiny_tokenizer
from safetensors.torch import load_file
from torch import nn

from hyperadapters import HyperAdapterModel, Task
from hyperadapters.config import ModelConfig, Recipe
from hyperadapters.data.examples import Example
from hyperadapters.errors import BackboneError, DataError, OutputError, RecipeError
from hyperadapters.inference.predictor import Predictor
from hyperadapters.training import run as runs
from hyperadapters.training.evaluation import evaluate
from hyperadapters.training.prefix_cache import GIB, FrozenPrefix
from hyperadapters.training.trainer import Trainer

WORDS = [f"w{index}" for index in range(40)]


def _rows(task: int, count: int) -> list[dict[str, str]]:
    """Texts of one to forty words: some fill their place to the last token."""
    generator = torch.Generator().manual_seed(task)
    rows = []
    for index in range(count):
        length = int(torch.randint(1, 41, (1,), generator=generator))
        words = [WORDS[int(i)] for i in torch.randint(0, 40, (length,), generator=generator)]
        rows.append({"text": " ".join([("good", "bad")[index % 2], *words]), "label": ("good", "bad")[index % 2]})
    return rows


@pytest.fixture(params=["bert", pytest.param("roberta", marks=pytest.mark.slow), "t5-half", "t5-whole"])
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """A recipe of three epochs with dropout everywhere it may be."""
    kind = request.param.partition("-")[0]
    dropout = (
        {"dropout_rate": 0.1} if kind == "t5" else {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    )
    frozen = {"t5-half": {"frozen_encoder_layers": 1}, "t5-whole": {"frozen_encoder_layers": 2}}
    tasks = []
    for task, count in enumerate((30, 13)):
        path = tmp_path / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in _rows(task, count)))
        tasks.append({"name": f"t{task}", "labels": ["good", "bad"], "source": {"path": str(path)}})
    return {
        "backbone": str(save_backbone(tmp_path / "backbone", kind, **dropout)),
        "model": {"adapter_dim": 4, "prototype_dim": 8, "hidden_dim": 8, **frozen.get(request.param, {})},
        "data": {"max_length": 40, "max_target_length": 4},
        "training": {"num_train_epochs": 3, "batch_size": 8, "eval_steps": 1000, "logging_steps": 1},
        "tasks": tasks,
    }


def _train(values: dict[str, Any], output: Path, **training: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    values = {**values, "training": {**values["training"], **training}}
    losses: list[float] = []
    original = Trainer.log

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            losses.append(logs["loss"])
        original(self, logs, start_time)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "log", log)
        runs.train(Recipe.model_validate(values), output)
    (weights,) = output.glob("adapters-*.safetensors")
    return load_file(weights), losses


@pytest.mark.parametrize("place", ["memory", "file"])
def test_kept_states_train_to_the_same_weights_bit_for_bit(recipe: dict[str, Any], place: str, tmp_path: Path) -> None:
    expected, expected_losses = _train(recipe, tmp_path / "none", prefix_cache="none")
    found, losses = _train(recipe, tmp_path / place, prefix_cache=place)
    assert losses == expected_losses
    assert len(losses) == 18
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert [path.suffix for path in sorted((tmp_path / place).iterdir())] == [
        *(".md", ".safetensors", ".json", ".json", ".json", ".yaml")
    ]


def test_frozen_layers_run_once_for_each_row(recipe: dict[str, Any], tmp_path: Path) -> None:
    counted = []
    compute = FrozenPrefix._compute

    def count(self: FrozenPrefix, inputs: Any) -> Any:
        counted.append(len(inputs["input_ids"]))
        return compute(self, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenPrefix, "_compute", count)
        _train(recipe, tmp_path / "memory", prefix_cache="memory")
    assert sum(counted) == 43
    assert len(counted) == 6


def test_states_in_float16_train_to_nearly_the_same_losses(recipe: dict[str, Any], tmp_path: Path) -> None:
    _, expected = _train(recipe, tmp_path / "float32")
    _, losses = _train(recipe, tmp_path / "float16", prefix_cache_dtype="float16")
    assert losses != expected
    assert losses == pytest.approx(expected, rel=2e-3)


def _prefix(folder: Path, lengths: list[int], **options: Any) -> FrozenPrefix:
    tasks = [Task(name="t", kind="classification", labels=("a", "b"))]
    model = HyperAdapterModel(tiny_backbone("bert"), tasks, ModelConfig(preset="paper"))
    return FrozenPrefix(model, lengths, folder=folder, **options)


@pytest.mark.parametrize(
    ("limit", "free", "place"), [(1.0, 0, "memory"), (1e-9, 10**9, "file"), (1e-9, 10**4, "none"), (0.0, 0, "none")]
)
def test_the_place_goes_by_what_there_is_room_for(
    limit: float, free: int, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    assert _prefix(tmp_path, [100, 28], memory_gb=limit).place == place


def test_the_size_is_stated_before_anything_is_computed(tmp_path: Path) -> None:
    prefix = _prefix(tmp_path, [100_000, 31_072])
    assert prefix.num_bytes == 131_072 * 16 * 4 + 2 * 16 * 4
    assert prefix.describe() == (
        "Frozen layers: the states of 2 rows, 131,072 tokens, are kept in memory (8.0 MiB when full)."
    )


def test_a_disk_without_room_is_reported_with_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(OutputError, match=r"not enough space in .* for 0\.06 GiB of states .*No space left"):
        _prefix(tmp_path, [1_000_000], place="file")
    assert list(tmp_path.iterdir()) == []


def test_more_memory_than_there_is_is_reported(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"not enough space in memory for .* GiB of states"):
        _prefix(tmp_path, [10**15], place="memory")


def test_activations_that_float16_cannot_hold_are_reported(tmp_path: Path) -> None:
    prefix = _prefix(tmp_path, [3], dtype="float16")
    inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        prefix._model.get_parameter("backbone.embeddings.LayerNorm.weight").fill_(1e6)
        prefix._model.get_parameter("backbone.encoder.layer.1.output.LayerNorm.weight").fill_(1e6)
    with pytest.raises(RecipeError, match="exceed the range of float16; use float32"):
        prefix([0], inputs)


KINDS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"features": "backbone"},
    "t5-half": {"frozen_encoder_layers": 1},
    "t5-whole": {"frozen_encoder_layers": 2},
}


def _model(backbone: nn.Module, **settings: Any) -> HyperAdapterModel:
    tasks = [Task.classification("t0", ["good", "bad"]), Task.regression("t1")]
    model = HyperAdapterModel(backbone, tasks, ModelConfig(preset="paper", adapter_dim=4, prototype_dim=8, **settings))
    model.tokenizer = tiny_tokenizer()
    return model.eval()


def _examples(count: int = 10) -> list[Example]:
    rows = [Example(task, row["text"], None, 0) for task in (0, 1) for row in _rows(task, count // 2)]
    return [Example(row.task_id, row.text, None, index % 2) for index, row in enumerate(rows)]


def _states(model: HyperAdapterModel, examples: list[Example], folder: Path, place: Any = "memory") -> FrozenPrefix:
    lengths = model.collator.lengths(examples)
    return FrozenPrefix(model, lengths, place, folder=folder)


def _count_rows(backbone: nn.Module) -> list[int]:
    """Rows that the lowest layer computes from now on, a number a call; one that hands on its input computes none."""
    encoder: Any = backbone.get_submodule("encoder")
    layer = (encoder.block if hasattr(encoder, "block") else encoder.layer)[0]
    counted: list[int] = []
    query = next(module for module in layer.modules() if isinstance(module, nn.Linear))
    query.register_forward_pre_hook(lambda _, args: counted.append(len(args[0])))
    return counted


@pytest.mark.parametrize("name", KINDS)
def test_evaluation_with_kept_states_gives_what_it_gives_without(name: str, tmp_path: Path) -> None:
    backbone, examples = tiny_backbone(name.partition("-")[0]), _examples()
    model = _model(backbone, **KINDS[name])
    prefix = _states(model, examples, tmp_path)
    expected = evaluate(model, examples, batch_size=4)
    counted = _count_rows(backbone)
    found = [evaluate(model, examples, 4, prefix) for _ in range(3)]
    assert sum(counted) == len(examples)
    assert found[1] == found[0]
    assert found[2] == found[0]
    assert evaluate(model, examples, 4, _states(model, examples, tmp_path, "none")) == found[0]
    assert found[0].tasks["t0"] == expected.tasks["t0"]
    for one, other in zip(found[0].predictions, expected.predictions, strict=True):
        assert (one.task, one.text) == (other.task, other.text)
        assert one.instance == pytest.approx(other.instance, abs=1e-5)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
        if one.text is None:
            assert one.target == pytest.approx(other.target, abs=1e-5)


def test_models_of_one_backbone_share_states_one_after_the_other(tmp_path: Path) -> None:
    backbone, examples = tiny_backbone("bert"), _examples()
    first = _model(backbone)
    prefix = _states(first, examples, tmp_path)
    prefix([0, 1], first.collator.inputs(examples[:2]))
    first.detach()
    for method in ("hyperdecoder", "task_adapter"):
        model = _model(backbone, method=method)
        expected = evaluate(model, examples, batch_size=4)
        counted = _count_rows(backbone)
        found = evaluate(model, examples, 4, prefix)
        assert sum(counted) == (8 if method == "hyperdecoder" else 0)
        for one, other in zip(found.predictions, expected.predictions, strict=True):
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
        model.detach()


@pytest.mark.parametrize("change", ["weights", "feature_layer", "features"])
def test_states_of_other_frozen_layers_are_refused(change: str, tmp_path: Path) -> None:
    examples = _examples()
    prefix = _states(_model(tiny_backbone("bert")), examples, tmp_path)
    settings: dict[str, Any] = {
        "weights": {},
        "feature_layer": {"feature_layer": 3},
        "features": {"features": "backbone"},
    }
    other = _model(tiny_backbone("bert", seed=int(change == "weights")), **settings[change])
    with pytest.raises(BackboneError, match="cached states are of another backbone or of other frozen layers"):
        evaluate(other, examples, prefix=prefix)


def test_a_prefix_of_other_examples_is_refused(tmp_path: Path) -> None:
    examples = _examples()
    model = _model(tiny_backbone("bert"))
    with pytest.raises(DataError, match="expected a prefix of 8 examples, found one of 10"):
        evaluate(model, examples[:8], prefix=_states(model, examples, tmp_path))


def test_inputs_that_are_to_be_routed_do_not_ask_for_states(tmp_path: Path) -> None:
    examples = _examples()
    model = _model(tiny_backbone("bert"))
    asked: list[int] = []

    def states(rows: Any, inputs: Any) -> Any:
        asked.extend(rows)
        return model.forward_frozen_layers(**inputs)

    untold = [Example(None, example.text) if index % 2 else example for index, example in enumerate(examples)]
    found = list(Predictor(model, batch_size=2, decline=False)(untold, frozen=states))
    assert sorted(asked) == [0, 2, 4, 6, 8]
    assert len(found) == 10


def _with_validation(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    for task in (0, 1):
        (tmp_path / f"{task}-validation.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in _rows(task + 5, 6))
        )
        path = {"train": str(tmp_path / f"{task}.jsonl"), "validation": str(tmp_path / f"{task}-validation.jsonl")}
        recipe["tasks"][task]["source"] = {"path": path}
    recipe["training"]["eval_steps"] = 3
    return recipe


def test_frozen_layers_run_once_for_each_validation_row(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = _with_validation(recipe, tmp_path)
    computed: list[int] = []
    compute = FrozenPrefix._compute

    def count(self: FrozenPrefix, inputs: Any) -> Any:
        computed.append(len(inputs["input_ids"]))
        return compute(self, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenPrefix, "_compute", count)
        _train(recipe, tmp_path / "memory", prefix_cache="memory")
    assert sum(computed) == 43 + 12
    expected, _ = _train(recipe, tmp_path / "none", prefix_cache="none")
    found = load_file(next((tmp_path / "memory").glob("adapters-*.safetensors")))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    kept, anew = (json.loads((tmp_path / place / "metrics.json").read_text()) for place in ("memory", "none"))
    assert {**kept, "seconds": 0} == {**anew, "seconds": 0}


def test_training_and_validation_rows_share_the_limit(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[FrozenPrefix] = []
    describe = FrozenPrefix.describe
    monkeypatch.setattr(FrozenPrefix, "describe", lambda self: made.append(self) or describe(self))
    recipe = _with_validation(recipe, tmp_path)
    _train(recipe, tmp_path / "all")
    training, validation = made
    limit = (training.num_bytes + 0.5 * validation.num_bytes) / GIB
    _train(recipe, tmp_path / "half", prefix_cache_gb=limit)
    assert [prefix.place for prefix in made] == ["memory", "memory", "memory", "file"]
