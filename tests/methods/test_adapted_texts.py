"""Heads that read adapted texts: each text of a pair passes through the backbone with adapters as its own sequence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ENCODERS,
    HEAD_TASKS,
    HIDDEN_SIZE,
    PAIR_TASKS,
    SIZES,
    empty_centroids,
    make_plus_model,
    pair_examples,
    save_backbone,
    stirred,
    tiny_backbone,
    tokenizer_of,
)
from safetensors.torch import load_file
from tolerance import rounding
from torch import Tensor

from hyperadapters import HyperAdapterModel, Task
from hyperadapters.backbones.passes import FrozenOutput
from hyperadapters.config import ModelConfig, Recipe, parse
from hyperadapters.data.examples import Example
from hyperadapters.errors import RecipeError, TaskError
from hyperadapters.fewshot.fit import FitExamples
from hyperadapters.inference.predictor import Predictor
from hyperadapters.methods.base import Route
from hyperadapters.training import run as runs
from hyperadapters.training import trainer as trainers
from hyperadapters.training.prefix_cache import FrozenPrefix
from hyperadapters.training.trainer import Trainer

SIZE = 2 * HIDDEN_SIZE + 1
STYLES = ("plain", "bert", "roberta")
TOLERANCE: dict[str, Any] = {"atol": rounding(HIDDEN_SIZE * 8), "rtol": rounding(HIDDEN_SIZE * 8)}
"""The backbone is in float64; pooling, heads and the comparison of texts are in float32, on numbers of about 1."""


def model_of(style: str = "bert", kind: str = "bert", tasks: list[Task] = PAIR_TASKS, **settings: Any) -> Any:
    """A model with large adapters that differ from task to task. Its backbone is in float64."""
    model = make_plus_model(tasks, kind, **{"head_inputs": "adapted_texts", **settings})
    model.tokenizer = tokenizer_of(style)
    return stirred(model).double()


def batch_of(model: HyperAdapterModel, rows: list[Example]) -> dict[str, Tensor]:
    batch = model.collator(rows)
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def inputs_of(model: HyperAdapterModel, *texts: str | tuple[str, str]) -> dict[str, Tensor]:
    return model.collator.inputs([Example(None, *((text,) if isinstance(text, str) else text)) for text in texts])


def read(model: HyperAdapterModel, task_id: int, *texts: str | tuple[str, str]) -> Tensor:
    """What the head of a task reads [B, F]."""
    return model.head_inputs(inputs_of(model, *texts), torch.full((len(texts),), task_id)).detach()


@contextmanager
def counted(model: HyperAdapterModel) -> Iterator[list[tuple[int, int]]]:
    """Collect the shapes of the token ids that enter the embeddings of the backbone."""
    shapes: list[tuple[int, int]] = []

    def count(module: Any, args: Any, options: Any) -> None:
        shapes.append(tuple(options["input_ids"].shape))

    hook = model.backbone.embeddings.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield shapes
    finally:
        hook.remove()


# What heads read


@pytest.mark.parametrize("form", ["bottleneck", "lora"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_single_text_gives_the_direction_of_the_plain_models_pooled_state(kind: str, form: str) -> None:
    form_settings = {"form": form, **({"adapter_dim": 64} if form == "lora" else {})}
    model = model_of(kind=kind, tasks=HEAD_TASKS, **form_settings)
    plain = model_of(kind=kind, tasks=HEAD_TASKS, head_inputs="adapted", **form_settings)
    plain.method.load_state_dict(model.method.state_dict())
    inputs, task_ids = inputs_of(model, "w1 w2 w3", "red", "w4 w5 blue w6 w7"), torch.tensor([2, 0, 2])
    found = model.head_inputs(inputs, task_ids)
    assert found.shape == (3, SIZE)
    expected = F.normalize(plain.head_inputs(inputs, task_ids), dim=1)
    torch.testing.assert_close(found, F.pad(expected, (0, HIDDEN_SIZE + 1)), **TOLERANCE)


@pytest.mark.parametrize("style", STYLES)
def test_a_pair_is_its_texts_encoded_alone_and_compared(style: str) -> None:
    model = model_of(style)
    pairs = [("w1 w2 w3", "red w4"), ("w5", "w6 w7 w8 w9 blue"), ("same w1", "same w1")]
    found = read(model, 0, *pairs)
    u = read(model, 0, *[first for first, _ in pairs])[:, :HIDDEN_SIZE]
    v = read(model, 0, *[second for _, second in pairs])[:, :HIDDEN_SIZE]
    expected = torch.cat([u + v, (u - v).abs(), (u * v).sum(dim=1, keepdim=True)], dim=1)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert float(found[2, HIDDEN_SIZE : 2 * HIDDEN_SIZE].max()) < TOLERANCE["atol"]
    assert (found - read(model, 2, *pairs)).abs().max() > 0.01  # the adapters of another task


@pytest.mark.parametrize("features", ["layer", "backbone"])
def test_the_retriever_reads_the_mean_of_the_texts(features: str) -> None:
    model = model_of(features=features)
    first, second = "w1 w2 w3", "red w4 w5 w6 w7"
    mixed = model.forward_lower_layers(**inputs_of(model, first, (first, second), second)).pooled
    torch.testing.assert_close(mixed[1], (mixed[0] + mixed[2]) / 2, **TOLERANCE)


@pytest.mark.parametrize("style", STYLES)
def test_rows_of_a_mixed_batch_are_the_same_alone(style: str) -> None:
    model, rows = model_of(style), pair_examples(5)
    for route in (None, "nearest", "soft"):
        options: dict[str, Any] = {} if route is None else {"task_ids": None, "route": route}
        together = model(**{**batch_of(model, rows), **options})
        for index, row in enumerate(rows):
            alone = model(**{**batch_of(model, [row]), **options})
            columns = alone.logits.shape[1]
            torch.testing.assert_close(together.logits[index, :columns], alone.logits[0], **TOLERANCE)
            torch.testing.assert_close(together.instances[index], alone.instances[0], **TOLERANCE)
            assert together.task_ids[index] == alone.task_ids[0]


@pytest.mark.parametrize("method", ["hyperformer", "hyperdecoder", "shared_adapter", "task_adapter"])
def test_other_methods_answer_rows_as_they_answer_them_alone(method: str) -> None:
    model, rows = model_of(preset="paper", method=method), pair_examples(4)
    together = model(**batch_of(model, rows)).logits
    for index, row in enumerate(rows):
        alone = model(**batch_of(model, [row])).logits[0]
        torch.testing.assert_close(together[index, : len(alone)], alone, **TOLERANCE)


def test_heads_read_what_head_inputs_returns() -> None:
    model, rows = model_of(), pair_examples(4)
    batch = batch_of(model, rows)
    task_ids = batch.pop("task_ids")
    inputs = model.head_inputs(batch, task_ids)
    logits = model(**batch, task_ids=task_ids).logits
    for index, task_id in enumerate(task_ids.tolist()):
        own = model.heads.head(task_id).logits(inputs[index : index + 1].double(), inputs[:0])[0]
        torch.testing.assert_close(logits[index, : len(own)].double(), own, **TOLERANCE)


def test_given_states_of_lower_layers_change_nothing() -> None:
    model, rows = model_of(), pair_examples(4)
    batch = batch_of(model, rows)
    task_ids = batch.pop("task_ids")
    expected = model(**batch, task_ids=task_ids).logits
    lower_output, frozen_output = model.forward_lower_layers(**batch), model.forward_frozen_layers(**batch)
    assert len(lower_output.pooled) == len(rows) < len(lower_output.hidden)
    for given in ({"lower_output": lower_output}, {"frozen_output": frozen_output}):
        torch.testing.assert_close(model(**batch, task_ids=task_ids, **given).logits, expected, **TOLERANCE)
        again = model.head_inputs(batch, task_ids, **given)
        torch.testing.assert_close(again, model.head_inputs(batch, task_ids), **TOLERANCE)


def test_gradients_reach_all_trained_parts_from_both_texts() -> None:
    model = model_of().train()
    batch = model.collator([Example(0, "w1 w2", "w3 w4", 1), Example(0, "w5", "w6", 0), Example(2, "w5 w6", None, 1)])
    model.training_loss(batch).total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.numel():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


# What it costs


@pytest.mark.parametrize("has_task", [True, False])
def test_a_batch_passes_once_as_its_texts(has_task: bool) -> None:
    model = model_of()
    rows = [Example(0, "w1 w2 w3 w4 w5", "w6"), Example(2, "w7"), Example(0, "w8", "w9 red")]
    batch = batch_of(model, rows)
    if not has_task:
        del batch["task_ids"]
    with counted(model) as shapes:
        model(**batch)
    assert shapes == [(5, 7)]  # five texts, the longest of five tokens between [CLS] and [SEP]


def test_a_batch_of_single_texts_passes_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    monkeypatch.setattr("hyperadapters.backbones.text_features.split_pairs", None)
    monkeypatch.setattr("hyperadapters.core.grouping._gather", None)
    with counted(model) as shapes:
        model(**batch_of(model, [Example(2, "w1 w2"), Example(2, "w3")]))
    assert shapes == [(2, 4)]


def test_the_predictor_puts_texts_of_one_length_together() -> None:
    model = model_of()
    short, long = "w1 w2", "w1 w2 w3 w4 w5 w6"
    rows = [Example(0, short, short), Example(2, long), Example(0, short, short), Example(0, long, short)]
    with counted(model) as shapes:
        list(Predictor(model, batch_size=2)(rows))
    assert shapes == [(4, 4), (3, 8)]


# Training


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """Three epochs on a task of pairs and a task of single texts, with dropout."""
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    tasks = []
    for task_id, (name, fields) in enumerate([("same", ["text", "text_pair"]), ("mood", ["text"])]):
        examples = [row for row in pair_examples(24) if row.task_id == 2 * task_id]
        rows = [{"text": e.text, "text_pair": e.text_pair, "label": "ny"[int(e.target or 0)]} for e in examples]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({field: row[field] for field in (*fields, "label")}) + "\n" for row in rows))
        tasks.append({"name": name, "fields": fields, "labels": ["n", "y"], "source": {"path": str(path)}})
    backbone = save_backbone(tmp_path / "bert", **dropout)
    tokenizer_of("bert").save_pretrained(backbone)
    return {
        "backbone": str(backbone),
        "model": {"preset": "plus", "label_names": False, **SIZES},
        "data": {"max_length": 40},
        "training": {"num_train_epochs": 3, "batch_size": 8, "eval_steps": 1000, "logging_steps": 1},
        "tasks": tasks,
    }


def trained(values: dict[str, Any], output: Path, place: str) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and losses of a run whose heads stay as they were trained."""
    losses: list[float] = []
    original = Trainer.log

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        losses.extend(logs[name] for name in ("loss",) if name in logs)
        original(self, logs, start_time)

    values = {**values, "training": {**values["training"], "prefix_cache": place}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "log", log)
        patch.setattr(trainers, "fit_text_heads", lambda *args: None)
        runs.train(Recipe.model_validate(values), output)
    (weights,) = output.glob("adapters-*.safetensors")
    return load_file(weights), losses


@pytest.mark.parametrize("place", ["memory", "file"])
def test_kept_states_train_to_the_same_weights_bit_for_bit(recipe: dict[str, Any], place: str, tmp_path: Path) -> None:
    expected, expected_losses = trained(recipe, tmp_path / "none", "none")
    found, losses = trained(recipe, tmp_path / place, place)
    assert losses == expected_losses
    assert len(losses) == 18
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_kept_states_give_the_loss_of_a_whole_pass(tmp_path: Path) -> None:
    model, rows = model_of(), pair_examples(6)
    prefix = FrozenPrefix(model, model.collator.lengths(rows), "memory", folder=tmp_path)
    for places in ([0, 1, 2, 3], [3, 0, 5, 4], [5, 6, 7, 8], [0, 3, 6, 9]):
        batch = model.collator([rows[place] for place in places])
        inputs = {name: batch[name] for name in batch if name not in ("labels", "task_ids")}
        frozen: FrozenOutput = prefix(places, inputs)
        direct = model.forward_frozen_layers(**inputs)
        mask = model.sequences(inputs)["attention_mask"][..., None]
        torch.testing.assert_close(frozen.hidden, direct.hidden * mask, **TOLERANCE)
        torch.testing.assert_close(frozen.pooled, direct.pooled, **TOLERANCE)
        found, expected = model(**batch, frozen_output=frozen).loss, model(**batch).loss
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_both_texts_of_a_row_fit_into_its_place(tmp_path: Path) -> None:
    model = model_of()
    rows = [Example(0, "w1 w2 w3", "w4 w5"), Example(2, "w6")]
    prefix = FrozenPrefix(model, model.collator.lengths(rows), "memory", folder=tmp_path)
    tokens = (5 + 4) + (3 + 1)  # of each text with [CLS] and [SEP], and the one that a single text does not use
    assert prefix.num_bytes == 4 * HIDDEN_SIZE * (tokens + 2)
    assert prefix(range(2), model.collator.inputs(rows)).hidden.shape == (3, 5, HIDDEN_SIZE)


# Use


def test_a_loaded_model_answers_the_same(tmp_path: Path) -> None:
    model, rows = model_of().float(), pair_examples(4)
    model.save_pretrained(tmp_path)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, tiny_backbone("bert"))
    assert loaded.adapter_config.head_inputs == "adapted_texts"
    assert loaded.heads is not None
    assert loaded.heads.weight.shape == (5, SIZE)
    with torch.no_grad():
        assert torch.equal(loaded(**batch_of(model, rows)).logits, model(**batch_of(model, rows)).logits)


@pytest.mark.parametrize("route", ["nearest", "soft"])
def test_the_predictor_answers_given_and_routed_rows_as_the_model_does(route: Route) -> None:
    model, rows = model_of(), pair_examples(6)
    model.method.thresholds.fill_(-torch.inf)
    predictor = Predictor(model, batch_size=4, route=route)
    for given in (True, False):
        asked = [row if given else Example(None, row.text, row.text_pair) for row in rows]
        for row, found in zip(asked, predictor(asked), strict=True):
            options = {} if given else {"route": route}
            output = model(**batch_of(model, [row]), **options)
            task = model.tasks[int(output.task_ids)]
            assert found.task == task.name
            (routing,) = model.route([(row.text, row.text_pair) if row.text_pair else row.text])
            assert found.routing is not None
            assert found.routing.candidates[0].task == routing.candidates[0].task
            if found.probabilities is None:
                assert found.answer == pytest.approx(output.logits[0, 0].item(), abs=TOLERANCE["atol"])
            else:
                expected = output.logits[0, : len(task.labels)].softmax(dim=0).tolist()
                assert list(found.probabilities.values()) == pytest.approx(expected, abs=TOLERANCE["atol"])


def test_a_new_task_reads_adapted_texts_and_changes_no_other() -> None:
    model, rows = make_plus_model(), pair_examples(8)  # its adapters change nothing yet, so texts remain apart
    before = [prediction.probabilities for prediction in Predictor(model)(rows)]
    new = Task.classification("near", ["no", "yes"], fields=("text", "text_pair"))
    examples = [
        {"text": e.text, "text_pair": e.text_pair, "label": ("no", "yes")[int(e.target or 0)]} for e in rows[::3]
    ]
    for fit in ("none", "adapter"):
        model.add_task(new, examples, fit=fit, max_steps=2)
        head = model.heads.head(3)
        assert head.weight.shape == (2, SIZE)
        assert [prediction.probabilities for prediction in Predictor(model)(rows)] == before
        found = model.predict([(e.text, e.text_pair) for e in rows[::3]], task="near")
        assert [prediction.target for prediction in found] == [example.target for example in rows[::3]]
        model.remove_task("near")


def test_a_new_task_is_fitted_with_the_states_that_its_answers_are_made_of() -> None:
    model = model_of()
    empty_centroids(model)
    texts = [("w1 w2", "w3"), ("red w4 w5", "w6 w7 w8"), ("w9", "")]
    data = FitExamples(model, PAIR_TASKS[0], [Example(0, *pair, 1) for pair in texts])
    weights = model.method.adapters(torch.tensor([2]))
    found = data.head_inputs(data.outputs([2, 0, 1], weights)[0], [2, 0, 1])
    torch.testing.assert_close(found, read(model, 2, texts[2], texts[0], texts[1]), **TOLERANCE)


def test_a_merged_task_answers_as_before() -> None:
    model, rows = model_of(form="lora", adapter_dim=64), [row for row in pair_examples(4) if row.task_id == 0]
    expected = model(**batch_of(model, rows)).logits
    model.merge("same")
    torch.testing.assert_close(model(**batch_of(model, rows)).logits, expected, **TOLERANCE)
    assert torch.equal(model(**batch_of(model, rows)).instances, model.instance_vectors(**model.collator.inputs(rows)))


# Which rows are pairs


def test_token_types_distinguish_pairs_where_there_are_no_sequence_ids() -> None:
    model = model_of("bert")
    inputs, task_ids = inputs_of(model, ("w1 w2", "w3"), "w4", ("w5", "")), torch.tensor([0, 2, 0])
    expected, instances = model.head_inputs(inputs, task_ids), model.instance_vectors(**inputs)
    del inputs["sequence_ids"]
    torch.testing.assert_close(model.head_inputs(inputs, task_ids), expected, **TOLERANCE)
    torch.testing.assert_close(model(**inputs).instances, instances, **TOLERANCE)


@pytest.mark.parametrize("task_ids", [torch.tensor([0]), None])
def test_pairs_that_nothing_distinguishes_are_refused(task_ids: Tensor | None) -> None:
    model = model_of("roberta")
    inputs = {name: inputs_of(model, ("w1", "w2"))[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(TaskError, match=r"found neither; make the batch with model\.collator, or pass sequence_ids"):
        model(**inputs, task_ids=task_ids)
    if task_ids is not None:
        zeros = torch.zeros_like(inputs["input_ids"])
        with pytest.raises(TaskError, match="found token_type_ids without a 1 in a row"):
            model.head_inputs({**inputs, "token_type_ids": zeros}, task_ids)


def test_single_texts_need_nothing_that_distinguishes_texts() -> None:
    model = model_of("roberta")
    inputs = inputs_of(model, "w1 w2")
    expected = model(**inputs, task_ids=torch.tensor([2])).logits
    del inputs["sequence_ids"]
    torch.testing.assert_close(model(**inputs, task_ids=torch.tensor([2])).logits, expected)


def test_backbones_without_heads_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"head_inputs: 'adapted_texts' .* is for encoders"):
        HyperAdapterModel(
            tiny_backbone("t5"), [Task.text_to_text("a")], parse(ModelConfig, {"head_inputs": "adapted_texts"})
        )
    model = HyperAdapterModel(tiny_backbone("gpt2"), [Task.text_to_text("a")], ModelConfig())
    ids = torch.tensor([[3, 4]])
    with pytest.raises(TaskError, match="head_inputs: expected an encoder with task heads"):
        model.head_inputs({"input_ids": ids}, torch.tensor([0]))
