"""The methods that PHA is compared with, and PHA with a part of its contrast: one model class, one way of a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers import (
    ENCODERS,
    HEAD_TASKS,
    SIZES,
    TEXT_TASKS,
    make_batch,
    make_method_model,
    save_backbone,
    select_rows,
    tiny_backbone,
)
from torch import Tensor

from hyperadapters import Trainer, TrainingArguments, methods
from hyperadapters.config import Method, ModelConfig, Recipe, Task, load_recipe, parse
from hyperadapters.core import AdapterWeights, bottleneck, bottleneck_tensors
from hyperadapters.core.grouping import Grouping
from hyperadapters.errors import RecipeError, TaskError
from hyperadapters.inference.predictor import Predictor
from hyperadapters.inference.routing import calibrate
from hyperadapters.methods.base import Assignment, Route
from hyperadapters.methods.learned import LearnedAdapters
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.run import load_run, load_run_tasks, train

METHODS: tuple[Method, ...] = get_args(Method)
OTHERS = METHODS[1:]
KINDS = ("bert", "t5")
D, A, P, H, T = 16, 4, 8, 6, 3
ARCHITECTURES = {"bert": 2, "t5": 3}
PARTS: dict[Method, tuple[str, ...]] = {
    "pha": ("retriever", "prototypes", "hypernetwork"),
    "hyperformer": ("prototypes", "hypernetwork"),
    "hyperdecoder": ("retriever", "hypernetwork"),
    "shared_adapter": ("learned_adapters",),
    "task_adapter": ("learned_adapters",),
}


def _real(logits: Tensor) -> Tensor:
    return logits.masked_fill(torch.isneginf(logits), 0.0)


def both(test: Any) -> Any:
    return pytest.mark.parametrize("kind", KINDS)(pytest.mark.parametrize("method", METHODS)(test))


@both
def test_a_mixed_batch_gives_each_row_what_it_gets_alone(kind: str, method: str) -> None:
    model, batch = make_method_model(kind, method).double(), make_batch(kind, rows=8)
    mixed = model(**batch)
    assert mixed.loss.isfinite()
    for row in range(8):
        single = model(**select_rows(batch, [row]))
        size = single.logits.shape[-1]
        torch.testing.assert_close(mixed.logits[row : row + 1, ..., :size], single.logits, atol=1e-5, rtol=1e-5)


@both
def test_backward_reaches_all_parts_of_the_method_and_nothing_else(kind: str, method: Method) -> None:
    model = make_method_model(kind, method).train()
    model.training_loss(make_batch(kind)).total.backward()
    expected = {*(f"method.{part}" for part in PARTS[method]), "heads" if kind == "bert" else "shared_adapters"}
    assert {_part(name) for name, value in model.named_parameters() if value.requires_grad} == expected
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (_part(name) in expected), name
        if parameter.grad is not None and "wide" not in name:
            assert parameter.grad.abs().sum() > 0, name


def _part(name: str) -> str:
    """The part of a model that a parameter belongs to, by its name."""
    return ".".join(name.split(".")[: 2 if name.startswith("method.") else 1])


def _count(kind: str, method: Method) -> int:
    """Trainable parameters as docs/methods.md has them, without heads and the encoder's shared adapters."""
    sites, adapter = ARCHITECTURES[kind], 2 * D * A + A + D
    parts = {
        "retriever": D * H + H + H * P + P,
        "prototypes": T * P,
        "hypernetwork": sites * P + (2 * P * H + H) + (H * P + P) + 2 * P + (P + 1) * adapter,
        "learned_adapters": sites * adapter * (T if method == "task_adapter" else 1),
    }
    return sum(parts[part] for part in PARTS[method])


@both
def test_the_number_of_trainable_parameters_is_the_documented_one(kind: str, method: Method) -> None:
    model = make_method_model(kind, method)
    others = [model.shared_adapters] if model.heads is None else [model.shared_adapters, model.heads]
    rest = sum(parameter.numel() for module in others for parameter in module.parameters())
    assert model.num_trainable_parameters() - rest == _count(kind, method)


@both
def test_a_checkpoint_gives_the_same_model_again(kind: str, method: str, tmp_path: Path) -> None:
    model, batch = make_method_model(kind, method), make_batch(kind)
    model.save_pretrained(tmp_path)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, tiny_backbone(kind))
    assert loaded.adapter_config == model.adapter_config
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_checkpoint_from_before_there_were_methods_is_of_pha() -> None:
    before = {"adapter_dim": 4, "contrastive_weight": 0.1}
    assert (ModelConfig(**before).method, ModelConfig(**before).contrast) == ("pha", "both")  # type: ignore[arg-type]


@both
def test_detaching_gives_the_backbone_back(kind: str, method: str) -> None:
    model, fresh = make_method_model(kind, method), tiny_backbone(kind)
    backbone = model.detach()
    assert [name for name, _ in backbone.named_modules()] == [name for name, _ in fresh.named_modules()]
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("method", ["shared_adapter", "task_adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_learned_adapters_start_at_the_backbone(kind: str, method: Method) -> None:
    batch = make_batch(kind)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    backbone = tiny_backbone(kind).double()
    tasks = HEAD_TASKS if kind in ENCODERS else TEXT_TASKS
    frozen = {} if kind == "bert" else {"frozen_encoder_layers": 2}
    with torch.no_grad():
        expected = backbone(**inputs, **({} if kind == "bert" else {"decoder_input_ids": batch["labels"]}))[0]
        model = HyperAdapterModel(backbone, tasks, ModelConfig(method=method, **frozen)).eval()
        lower_output = model.forward_lower_layers(**inputs)
        weights = model.method.adapters(torch.tensor([2]))
        found = model.forward_with_adapter(inputs, weights, lower_output, None if kind == "bert" else batch["labels"])[
            0
        ]
    if kind == "bert":
        mask = batch["attention_mask"][..., None]
        expected = ((expected * mask).sum(dim=1) / mask.sum(dim=1)).float()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_learned_adapters_are_those_of_their_tasks() -> None:
    """Three tasks in one module equal three adapters: outputs and gradients."""
    torch.manual_seed(0)
    learned = LearnedAdapters(2, 3, bottleneck_tensors(5, 4)).double()
    assert learned.down_weight.abs().max() <= 5**-0.5
    assert not learned.up_weight.any()
    with torch.no_grad():
        learned.up_weight.normal_()
        learned.up_bias.normal_()
    tasks, inputs = torch.tensor([2, 0, 2, 1]), torch.randn(4, 6, 5, dtype=torch.float64)
    distinct, rows = tasks.unique(return_inverse=True)
    grouping = Grouping.of(rows, 3)
    weights = learned(distinct).tasks(grouping.tasks)
    found = bottleneck(inputs, weights.layer(1), grouping)
    found.square().sum().backward()

    expected = torch.zeros_like(found)
    for task in range(3):
        parts = (learned.down_weight, learned.down_bias, learned.up_weight, learned.up_bias)
        down, down_bias, up, up_bias = (part[1, task].detach().clone().requires_grad_() for part in parts)
        output = torch.relu(inputs[tasks == task] @ down + down_bias) @ up + up_bias
        output.square().sum().backward()
        expected[tasks == task] = output
        assert learned.up_weight.grad is not None
        torch.testing.assert_close(learned.up_weight.grad[1, task], up.grad)
    torch.testing.assert_close(found, expected)


def test_the_shared_adapter_is_one_for_all_tasks() -> None:
    model = make_method_model("bert", "shared_adapter")
    weights = model.method.adapters(torch.tensor([0, 2]))
    assert weights["down_weight"].shape == (2, 2, D, A)
    assert all(torch.equal(tensor[:, 0], tensor[:, 1]) for tensor in weights.values())


@pytest.mark.parametrize("kind", KINDS)
def test_task_adapters_of_a_model_equal_models_of_one_task_each(kind: str) -> None:
    together, batch = make_method_model(kind, "task_adapter").double(), make_batch(kind)
    mixed = together(**batch)
    for task_id, task in enumerate(together.tasks):
        alone = HyperAdapterModel(tiny_backbone(kind).double(), [task], together.adapter_config).eval()
        alone.shared_adapters.load_state_dict(together.shared_adapters.state_dict())
        with torch.no_grad():
            for part, value in alone.method.learned_adapters.named_parameters():
                value.copy_(together.method.learned_adapters.get_parameter(part)[:, task_id : task_id + 1])
            if alone.heads is not None and together.heads is not None:
                head = together.heads.unpack()[task_id]
                alone.heads.weight.copy_(head.weight)
                alone.heads.bias.copy_(head.bias)
        rows = (batch["task_ids"] == task_id).nonzero()[:, 0].tolist()
        own = select_rows(batch, rows)
        own["task_ids"] = torch.zeros_like(own["task_ids"])
        found = alone(**own).logits
        torch.testing.assert_close(found, mixed.logits[rows][..., : found.shape[-1]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_hyperdecoders_weights_of_a_row_depend_on_that_row_only(kind: str) -> None:
    model, batch = make_method_model(kind, "hyperdecoder"), make_batch(kind, rows=4)
    pooled = model.forward_lower_layers(batch["input_ids"], batch["attention_mask"]).pooled.detach().requires_grad_()
    instances = model.method.instance_vectors(pooled)
    state = model.method.select(batch["task_ids"], instances)
    assert state.weights is not None
    assert state.weights["up_weight"].shape == (ARCHITECTURES[kind], 4, A, D)
    state.weights["up_weight"][:, 2].sum().backward()
    assert pooled.grad is not None
    assert pooled.grad[2].any()
    assert not pooled.grad[[0, 1, 3]].any()
    others = model.method.select(batch["task_ids"].flip(0), instances).weights
    assert others is not None
    assert all(torch.equal(tensor, others[name]) for name, tensor in state.weights.items())


def test_the_hyperdecoder_trains_its_retriever_by_the_task_loss() -> None:
    model = make_method_model("bert", "hyperdecoder").train()
    losses = model.training_loss(make_batch("bert"))
    assert torch.equal(losses.total, losses.task)
    losses.task.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.method.retriever.parameters())


def test_hyperformer_generates_from_its_task_embeddings() -> None:
    model = make_method_model("bert", "hyperformer")
    expected = model.method.hypernetwork(model.method.prototypes.weight[[2, 0]])
    found = model.method.adapters(torch.tensor([2, 0]))
    assert isinstance(found, AdapterWeights)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", OTHERS)
def test_the_other_methods_have_no_contrastive_losses(kind: str, method: str) -> None:
    losses = make_method_model(kind, method).training_loss(make_batch(kind))
    assert (float(losses.instance), float(losses.prototype)) == (0.0, 0.0)
    assert torch.equal(losses.total, losses.task)


@pytest.mark.parametrize("contrast", ["both", "instance", "prototype", "none"])
def test_either_contrastive_loss_can_be_left_out(contrast: str) -> None:
    model, batch = make_method_model("bert", "pha", contrast=contrast).double().train(), make_batch("bert")
    losses, whole = model.training_loss(batch), make_method_model("bert", "pha").double().train().training_loss(batch)
    has_instance, has_prototype = contrast in ("both", "instance"), contrast in ("both", "prototype")
    assert torch.equal(losses.instance, whole.instance * has_instance)
    assert torch.equal(losses.prototype, whole.prototype * has_prototype)
    assert torch.equal(losses.task, whole.task)
    torch.testing.assert_close(losses.total, losses.task + losses.instance + losses.prototype)
    losses.total.backward()
    assert (model.method.retriever.up.weight.grad is not None) == (contrast != "none")


@pytest.mark.parametrize("method", METHODS)
def test_beams_give_each_row_what_it_gets_alone(method: str) -> None:
    model, batch = (
        make_method_model("t5", method).double(),
        make_batch("t5", rows=5),
    )  # float64: no beam is nearly as likely
    del batch["labels"]
    options: dict[str, Any] = {"num_beams": 3, "do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    together = model.generate(**batch, **options)
    for row in range(5):
        assert torch.equal(model.generate(**select_rows(batch, [row]), **options)[0], together[row])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", OTHERS)
def test_a_row_without_a_task_is_an_error(kind: str, method: str) -> None:
    model, batch = make_method_model(kind, method), make_batch(kind)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    message = f"method '{method}' cannot route: give each input its task"
    with pytest.raises(TaskError, match=message):
        model(**inputs, **({"decoder_input_ids": batch["labels"]} if kind == "t5" else {}))
    with pytest.raises(TaskError, match=message):
        list(Predictor(model)(["w1 w2"]))
    with pytest.raises(TaskError, match=message):
        model.route(["w1 w2"])
    with pytest.raises(TaskError, match=message):
        calibrate(model, [], [])
    if kind == "t5":
        with pytest.raises(TaskError, match=message):
            model.generate(**inputs)


@pytest.mark.parametrize("method", OTHERS)
def test_the_tasks_of_other_methods_stay_as_trained(method: str) -> None:
    model = make_method_model("bert", method)
    message = f"method '{method}' keeps the tasks that it was trained with: only 'pha' can change them"
    with pytest.raises(TaskError, match=message):
        model.add_task(Task.classification("new", ["a", "b"]), [{"text": "w1", "label": "a"}])
    with pytest.raises(TaskError, match=message):
        model.refit_task("colour", [{"text": "w1", "label": "red"}])
    with pytest.raises(TaskError, match=message):
        model.remove_task("colour")
    model.rename_task("colour", "shade")
    assert model.tasks[0].name == "shade"


def test_what_a_method_does_not_have_is_an_error() -> None:
    batch = make_batch("bert")
    with pytest.raises(TaskError, match="method 'task_adapter' has no retriever and therefore no instance vectors"):
        make_method_model("bert", "task_adapter").instance_vectors(batch["input_ids"])
    with pytest.raises(TaskError, match="method 'hyperdecoder' generates adapters for inputs, not for tasks"):
        make_method_model("bert", "hyperdecoder").method.adapters(torch.tensor([0]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "official"}, "preset 'official' is only for method 'pha'; use preset 'paper' with 'hyperformer'"),
        ({"centroids_per_task": 2}, "is for routing, and method 'hyperformer' cannot route; remove it"),
    ],
)
def test_settings_of_pha_alone_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(ModelConfig, {"method": "hyperformer", **settings})


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'hyperformer'"):
        parse(ModelConfig, {"method": "hyperformr"})


def _recipe(folder: Path, kind: str, method: str) -> Recipe:
    tasks = []
    for name, words in (("colour", ("red", "blue")), ("mood", ("good", "bad"))):
        for split, count in (("train", 24), ("validation", 8), ("test", 8)):
            rows = [{"text": f"w{row} {words[row % 2]} w{row + 3}", "label": words[row % 2]} for row in range(count)]
            (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks.append({"name": name, "source": {"path": f"{name}-{{split}}.jsonl"}})
    recipe = {
        "backbone": str(save_backbone(folder / "backbone", kind)),
        "model": {**SIZES, "method": method},
        "data": {"max_length": 16, "max_target_length": 4},
        "training": {"max_steps": 6, "batch_size": 8, "eval_steps": 3},
        "tasks": tasks,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return load_recipe(folder / "recipe.yaml")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", OTHERS)
def test_a_run_of_every_method_trains_is_measured_and_answers(kind: str, method: str, tmp_path: Path) -> None:
    run = train(_recipe(tmp_path, kind, method), tmp_path / "run")
    assert run.metrics["routing_accuracy"] is None
    assert not hasattr(run.model.method, "method.thresholds")
    model, recipe = load_run(tmp_path / "run")
    assert model.adapter_config.method == method
    examples = load_run_tasks(model, recipe)[0].splits["test"]
    predictions = list(Predictor(model)(examples))
    assert [p.answer for p in predictions] == [p.answer for p in run.evaluations["test"].predictions[:8]]
    assert all(prediction.routing is None for prediction in predictions)
    assert all((prediction.instance is None) == (method != "hyperdecoder") for prediction in predictions)


class OneAdapterForEachTask(methods.Method):
    """A method that is not in the library: a learned adapter for the one task."""

    def __init__(self, config: ModelConfig, num_tasks: int, num_layers: int, hidden_size: int, tensors: Any) -> None:
        super().__init__(config)
        self.own = LearnedAdapters(num_layers, num_tasks, tensors)

    def _select(
        self, task_ids: Tensor | None, instances: Tensor | None, route: Route, similarity: Tensor | None
    ) -> Assignment:
        assert task_ids is not None
        return self._of_tasks(task_ids)

    def adapters(self, task_ids: Tensor) -> AdapterWeights:
        weights: AdapterWeights = self.own(task_ids)
        return weights


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_method_is_trained_and_saved_and_answers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(methods.METHODS, "task_adapter", OneAdapterForEachTask)
    folder, tasks = save_backbone(tmp_path / kind, kind), [Task.classification("mood", ["bad", "good"])]
    rows = [{"text": "w1", "label": "bad"}, {"text": "w2", "label": "good"}]
    model = HyperAdapterModel.from_backbone(str(folder), tasks, method="task_adapter", **SIZES)
    assert isinstance(model.method, OneAdapterForEachTask)
    Trainer(model, {"mood": rows}, {"mood": rows}, TrainingArguments(max_steps=2)).train()
    model.save_pretrained(tmp_path / "saved")
    loaded = HyperAdapterModel.from_pretrained(tmp_path / "saved")
    assert loaded.predict(["w1"], task="mood") == model.predict(["w1"], task="mood")
