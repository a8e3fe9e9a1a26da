"""Routing: keys, thresholds and mixtures by hand, on whole models, and in two passes."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import (
    ENCODER_DECODERS,
    ENCODERS,
    HEAD_TASKS,
    TEXT_TASKS,
    empty_centroids,
    make_batch,
    make_model,
    save_backbone,
    tiny_backbone,
    tiny_tokenizer,
)
from torch import Tensor, nn

from hyperadapters.config import ModelConfig, Task, load_recipe
from hyperadapters.core import PrototypeTable, masked_mean
from hyperadapters.data.examples import Example
from hyperadapters.errors import DataError, RecipeError, TaskError
from hyperadapters.inference.predictor import Predictor
from hyperadapters.inference.routing import (
    ROUNDING,
    RoutingResult,
    calibrate,
    centroids,
    conformal_thresholds,
    similarities,
    thresholds,
)
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.run import train

KINDS = ("bert", "t5")
ALL = (*ENCODERS, *ENCODER_DECODERS)


def table(weight: list[list[float]], keys: list[list[list[float]]] | None = None) -> PrototypeTable:
    prototypes = PrototypeTable(len(weight), len(weight[0]))
    with torch.no_grad():
        prototypes.weight.copy_(torch.tensor(weight))
        if keys:
            prototypes.centroids = torch.tensor(keys)
    return prototypes


def readable_model(kind: str, **settings: Any) -> HyperAdapterModel:
    """A model as `make_model` makes it, with the tiny tokenizer."""
    model = make_model(kind, **settings)
    model.tokenizer = tiny_tokenizer()
    return model


def random_texts(count: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(0, 40, (n,), generator=generator).tolist()) for n in lengths]


def random_examples(count: int, seed: int = 0) -> list[Example]:
    return [Example(index % 3, text) for index, text in enumerate(random_texts(count, seed))]


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def untold(kind: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch without tasks, and with what the decoder reads given."""
    inputs = inputs_of(batch)
    if kind in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = batch["labels"]
    return inputs


def layers_of(model: HyperAdapterModel) -> nn.ModuleList:
    """The layers that hold generated adapters, and for encoders those below."""
    backbone: Any = model.backbone
    return backbone.decoder.block if model.text_to_text else backbone.encoder.layer


def count_calls(modules: dict[str, nn.Module]) -> Counter[str]:
    calls: Counter[str] = Counter()
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


def fail(*_: Any) -> None:
    raise ZeroDivisionError


# Similarity by hand


def test_without_keys_the_prototype_counts() -> None:
    prototypes = table([[1.0, 0.0], [0.0, 5.0]])
    found = prototypes.similarity(torch.tensor([[3.0, 4.0], [-2.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [-1.0, 0.0]]))
    assert prototypes.nearest(torch.tensor([[3.0, 4.0], [4.0, 3.0]])).tolist() == [1, 0]


def test_with_a_key_the_prototype_counts_no_longer() -> None:
    prototypes = table([[1.0, 0.0], [0.0, 1.0]], [[[0.0, 0.0]], [[-2.0, 0.0]]])
    torch.testing.assert_close(prototypes.similarity(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.6, -0.6]]))
    assert prototypes.nearest(torch.tensor([[3.0, 4.0]])).tolist() == [0]


def test_the_nearest_of_several_keys_counts() -> None:
    prototypes = table([[1.0, 0.0], [1.0, 0.0]], [[[0.0, 2.0], [-1.0, 0.0]], [[1.0, 0.0], [-3.0, -4.0]]])
    found = prototypes.similarity(torch.tensor([[3.0, 4.0], [-3.0, -4.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.8, 0.6], [0.6, 1.0]]))


def test_a_key_of_zeros_is_absent_beside_one_that_is_there() -> None:
    prototypes = table([[0.0, -1.0], [0.0, 1.0]], [[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    found = prototypes.similarity(torch.tensor([[-3.0, -4.0]]))
    torch.testing.assert_close(found, torch.tensor([[-0.6, -0.8]]))  # neither 0 for the empty key nor the prototype's


def test_of_equally_similar_tasks_the_first_wins() -> None:
    prototypes = table([[0.0, 1.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    assert prototypes.nearest(torch.tensor([[1.0, 0.0]])).tolist() == [1]
    prototypes = table([[1.0, 0.0], [0.0, 1.0]], [[[0.0, 1.0]], [[0.0, 1.0]]])
    assert prototypes.nearest(torch.tensor([[1.0, 2.0]])).tolist() == [0]


def test_a_mixture_weighs_prototypes_by_the_softmax_of_similarity() -> None:
    found = table([[10.0, 0.0], [0.0, 1.0]]).mixture(torch.tensor([[3.0, 4.0]]), temperature=0.1)
    share = 1 / (1 + math.exp(2.0))
    torch.testing.assert_close(found, torch.tensor([[10 * share, 1 - share]]))


def test_a_mixture_weighs_by_the_keys_and_mixes_the_prototypes() -> None:
    found = table([[10.0, 0.0], [0.0, 1.0]], [[[0.0, 1.0]], [[1.0, 0.0]]]).mixture(torch.tensor([[3.0, 4.0]]), 0.2)
    share = 1 / (1 + math.exp(-1.0))
    torch.testing.assert_close(found, torch.tensor([[10 * share, 1 - share]]))


# Keys and thresholds by hand


def test_a_single_centroid_is_the_mean_direction() -> None:
    found = centroids(torch.tensor([[2.0, 0.0], [0.0, 30.0], [3.0, 4.0]]), 1)
    torch.testing.assert_close(found, torch.tensor([[1.6 / 3, 1.8 / 3]]))


def test_two_centroids_find_two_clumps_of_directions() -> None:
    points = torch.tensor([[1.0, 0.1], [50.0, -5.0], [-0.1, 1.0], [0.5, 5.0], [1.0, 0.0]])
    found = centroids(points, 2)
    found = found[found[:, 0].argsort(descending=True)]
    directions = points / points.norm(dim=1, keepdim=True)
    expected = torch.stack([directions[[0, 1, 4]].mean(dim=0), directions[[2, 3]].mean(dim=0)])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_fewer_distinct_directions_than_centroids_leave_zeros() -> None:
    found = centroids(torch.tensor([[1.0, 0.0], [0.0, 2.0], [4.0, 0.0], [0.0, 2.0]]), 4)
    assert sorted(map(tuple, found.tolist())) == [(0.0, 0.0), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0)]
    assert not found[2:].any()
    assert not centroids(torch.empty(0, 3), 2).any()


def test_centroids_repeat_themselves_and_draw_no_global_random_numbers() -> None:
    points = torch.randn(60, 8)
    state = torch.get_rng_state()
    first = centroids(points, 3, seed=1)
    torch.rand(5)
    assert torch.equal(centroids(points, 3, seed=1), first)
    torch.set_rng_state(state)
    before = torch.rand(3)
    torch.set_rng_state(state)
    centroids(points, 3)
    assert torch.equal(torch.rand(3), before)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 0.29, 0.5, 0.99])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_at_most_the_given_share_of_the_rows_nearest_to_a_task_lies_below_its_threshold(rate: float, rows: int) -> None:
    similarity = torch.rand(rows, 4) * 2 - 1
    found = thresholds(similarity, torch.randint(0, 4, (rows,)), rate)
    for task_id in range(4):
        nearest = similarity[similarity.argmax(dim=1) == task_id, task_id]
        declined = int((nearest < found[task_id]).sum())
        assert declined <= rate * len(nearest)
        assert not len(nearest) or declined == int(rate * len(nearest))


def test_thresholds_by_hand() -> None:
    similarity = torch.tensor([[0.9, 0.1], [0.8, 0.1], [0.7, 0.1], [0.6, 0.1], [0.2, 0.5]])
    owners = torch.tensor([0, 0, 1, 0, 1])
    torch.testing.assert_close(thresholds(similarity, owners, 0.0), torch.tensor([0.6, 0.5]))
    torch.testing.assert_close(thresholds(similarity, owners, 0.25), torch.tensor([0.7, 0.5]))
    torch.testing.assert_close(thresholds(similarity, owners, 0.5), torch.tensor([0.8, 0.5]))


def test_weights_count_in_thresholds_as_repeated_rows_do() -> None:
    similarity, owners = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    weights = torch.ones(40)
    weights[::5] = 3.0
    repeated = torch.cat([torch.arange(40), torch.arange(0, 40, 5), torch.arange(0, 40, 5)])
    expected = thresholds(similarity[repeated], owners[repeated], 0.2)
    assert torch.equal(thresholds(similarity, owners, 0.2, weights), expected)
    assert not torch.equal(thresholds(similarity, owners, 0.2), expected)


def test_a_task_that_no_row_is_nearest_to_is_judged_by_its_own_rows_and_without_any_declines_nothing() -> None:
    similarity = torch.tensor([[0.9, 0.2, 0.0], [0.8, 0.4, 0.0]])
    found = thresholds(similarity, torch.tensor([0, 1]), 0.0)
    torch.testing.assert_close(found, torch.tensor([0.8, 0.4, -torch.inf]))


# Calibration of a model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_calibration_declines_at_most_the_given_share_of_validation_rows(kind: str, rate: float) -> None:
    model = readable_model(kind)
    validation = random_examples(50, seed=1)
    calibrate(model, random_examples(40), validation, rate)
    found = model.route(validation)
    declined = Counter(result.candidates[0].task for result in found if not result.accepted)
    sizes = Counter(result.candidates[0].task for result in found)
    assert len(sizes) > 1
    for task, size in sizes.items():
        assert declined[task] <= rate * size
    assert declined.total() <= rate * len(found)
    assert bool(declined) == (rate > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_calibration_that_declines_no_row_declines_none_in_other_batches_either(kind: str) -> None:
    model, rows = readable_model(kind), random_examples(60)
    calibrate(model, rows, rows, 0.0)
    for batch_size in (1, 2, 3, 5, 64):
        assert all(result.accepted for result in model.route(rows, batch_size=batch_size)), batch_size


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_leaves_tasks_of_one_prototype_to_their_prototypes(kind: str) -> None:
    model, rows = readable_model(kind), random_examples(30)
    calibrate(model, rows, rows[:3])
    instances = model.instance_vectors(**model.collator.inputs(rows)).detach()
    assert not model.method.prototypes.centroids.any()
    expected = nn.functional.cosine_similarity(instances[:, None], model.method.prototypes.weight[None], dim=-1)
    torch.testing.assert_close(model.method.prototypes.similarity(instances), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_without_validation_rows_the_training_rows_set_the_thresholds(kind: str) -> None:
    rows = random_examples(40)
    models = [readable_model(kind), readable_model(kind)]
    calibrate(models[0], rows, [], 0.2)
    calibrate(models[1], rows, rows, 0.2)
    assert models[0].method.thresholds.isfinite().all()
    similarity, _ = similarities(models[0], rows)
    owners = torch.tensor([row.task_id for row in rows])
    assert torch.equal(models[0].method.thresholds, thresholds(similarity, owners, 0.2) - ROUNDING)
    # Only validation rows bound the share of declined inputs, for which thresholds may have to be lower.
    conformal = torch.tensor([threshold for threshold, _ in conformal_thresholds(similarity, 0.2)])
    expected = torch.minimum(thresholds(similarity, owners, 0.2), conformal) - ROUNDING
    assert torch.equal(models[1].method.thresholds, expected)
    assert torch.equal(models[0].method.prototypes.centroids, models[1].method.prototypes.centroids)


def test_calibration_leaves_no_graph_behind() -> None:
    model, rows = readable_model("bert"), random_examples(12)
    calibrate(model, rows, rows)
    assert not [name for name, buffer in model.named_buffers() if buffer.requires_grad]
    copy.deepcopy(model.method.thresholds)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_thresholds_are_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "backbone", kind)
    tasks = HEAD_TASKS if kind == "bert" else TEXT_TASKS
    model = HyperAdapterModel.from_backbone(
        str(folder), tasks, routing="prototypes", adapter_dim=4, centroids_per_task=2
    )
    calibrate(model, random_examples(30), random_examples(20, seed=1), 0.2)
    model.save_pretrained(tmp_path / "run")
    loaded = HyperAdapterModel.from_pretrained(tmp_path / "run")
    assert loaded.method.prototypes.centroids.shape == (3, 2, 64)
    assert torch.equal(loaded.method.prototypes.centroids, model.method.prototypes.centroids)
    assert torch.equal(loaded.method.thresholds, model.method.thresholds)
    texts = random_texts(10, seed=2)
    assert loaded.route(texts) == model.route(texts)


# route()


@pytest.mark.parametrize("kind", KINDS)
def test_route_names_the_most_similar_tasks_and_declines_below_the_threshold(kind: str) -> None:
    model, texts = readable_model(kind), random_texts(6)
    batch = model.collator.inputs([Example(None, text) for text in texts])
    similarity = model.method.prototypes.similarity(model.instance_vectors(**batch)).tolist()
    names = [task.name for task in model.tasks]
    model.method.thresholds.fill_(sorted(max(row) for row in similarity)[3] - 1e-6)
    found = model.route(texts)
    assert sum(result.accepted for result in found) == 3
    for result, row in zip(found, similarity, strict=True):
        best = sorted(zip(row, names, strict=True), reverse=True)
        assert [candidate.task for candidate in result.candidates] == [name for _, name in best]
        shown = [candidate.similarity for candidate in result.candidates]
        assert shown == pytest.approx([value for value, _ in best], abs=1e-6)
        assert result.similarity == result.candidates[0].similarity
        assert result.margin == pytest.approx(best[0][0] - best[1][0], abs=1e-6)
        assert result.accepted == (best[0][0] >= model.method.thresholds[0])
        assert result.task == (best[0][1] if result.accepted else None)


def test_route_shows_three_of_many_candidates() -> None:
    tasks = [Task.regression(f"task {index}") for index in range(6)]
    model = HyperAdapterModel(tiny_backbone("bert"), tasks)
    model.tokenizer = tiny_tokenizer()
    (result,) = model.route(["w1 w2"])
    shown = [candidate.similarity for candidate in result.candidates]
    assert len(shown) == 3
    assert shown == sorted(shown, reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_route_takes_texts_pairs_mappings_and_examples(kind: str) -> None:
    model = readable_model(kind)
    single, pair = model.route(["w1 w2", ("w1 w2", "good")])
    assert single.similarity != pair.similarity
    inputs = [
        {"text": "w1 w2"},
        {"text": "w1 w2", "task": "mood"},
        Example(None, "w1 w2"),
        Example(1, "w1 w2", None, 3.0),
        {"text": "w1 w2", "text_pair": "good"},
        Example(None, "w1 w2", "good"),
    ]
    found = model.route(value for value in inputs)
    expected = [single] * 4 + [pair] * 2
    assert [r.similarity for r in found] == pytest.approx([r.similarity for r in expected], abs=1e-6)


def test_route_of_nothing_is_nothing_and_a_single_text_is_refused() -> None:
    model = readable_model("bert")
    assert model.route([]) == []
    for single in ("w1 w2", {"text": "w1"}, Example(None, "w1")):
        with pytest.raises(DataError, match="put it in a list"):
            model.route(single)
    with pytest.raises(DataError, match="input 2: expected a string"):
        model.route(["w1", 7])


@pytest.mark.parametrize("kind", KINDS)
def test_route_keeps_the_order_whatever_the_batch_size(kind: str) -> None:
    model, texts = readable_model(kind), random_texts(23)
    expected = [model.route([text])[0] for text in texts]
    assert len({result.similarity for result in expected}) > 15
    for batch_size in (1, 2, 7, 64):
        found = model.route(texts, batch_size=batch_size)
        assert [r.candidates[0].task for r in found] == [r.candidates[0].task for r in expected]
        assert [r.similarity for r in found] == pytest.approx([r.similarity for r in expected], abs=1e-5)
        assert [r.margin for r in found] == pytest.approx([r.margin for r in expected], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_route_with_one_task_has_an_infinite_margin(kind: str) -> None:
    model = readable_model(kind)
    model.remove_task("colour")
    model.remove_task("size")
    (result,) = model.route(["w1 w2"])
    assert result == RoutingResult("mood", result.similarity, math.inf, True, result.candidates)
    assert len(result.candidates) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_route_runs_nothing_above_the_features(kind: str) -> None:
    model = readable_model(kind, **({"feature_layer": 1} if kind == "bert" else {}))
    backbone: Any = model.backbone
    parts = {f"layer {index}": layer for index, layer in enumerate(layers_of(model))}
    parts |= {"hypernetwork": model.method.hypernetwork, "retriever": model.method.retriever}
    if kind == "t5":
        parts |= {"encoder": backbone.encoder, "decoder": backbone.decoder}
    calls = count_calls(parts)
    model.route(["w1 w2", "w3"])
    assert calls == ({"layer 0": 1, "retriever": 1} if kind == "bert" else {"encoder": 1, "retriever": 1})


@pytest.mark.parametrize("kind", KINDS)
def test_routing_of_equally_similar_tasks_names_the_first_as_forward_does(kind: str) -> None:
    tasks = [Task.regression(f"task {index}") for index in range(20)]
    model = HyperAdapterModel(tiny_backbone(kind), tasks)
    model.tokenizer = tiny_tokenizer()
    with torch.no_grad():
        # One number each: a product with it is exact, in whatever order a processor adds the zeros.
        model.method.prototypes.weight.zero_()
        model.method.prototypes.weight[:, 0] = 1.0
    (routed,) = model.route(["w1"])
    assert routed.candidates[0].task == "task 0"
    (prediction,) = Predictor(model)(["w1"])
    assert (prediction.task, prediction.routing.task) == ("task 0", "task 0")


@pytest.mark.parametrize("kind", KINDS)
def test_route_and_calibration_are_free_of_dropout_and_leave_the_mode_alone(kind: str) -> None:
    dropout = {"dropout_rate": 0.5} if kind == "t5" else {"hidden_dropout_prob": 0.5}
    model = HyperAdapterModel(tiny_backbone(kind, **dropout), HEAD_TASKS if kind == "bert" else TEXT_TASKS)
    model.tokenizer = tiny_tokenizer()
    rows = random_examples(9)
    expected = model.eval().route(rows)
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    assert model.route(rows) == expected
    assert {name: module.training for name, module in model.named_modules()} == modes


# Several prototypes a task


def test_training_with_two_prototypes_a_task_recognises_both_clumps_of_its_inputs(tmp_path: Path) -> None:
    clumps = {"outer": ("red", "blue"), "inner": ("yes", "no")}
    generator = torch.Generator().manual_seed(0)

    def text(word: str) -> str:
        return f"{word} {word} {word} w{int(torch.randint(0, 40, (), generator=generator))}"

    entries = []
    for name, words in clumps.items():
        for split, count in (("train", 24), ("validation", 8), ("test", 8)):
            rows = [
                {"text": f"{text(words[row % 2])} {label}", "label": label}
                for row in range(count)
                for label in ("good", "bad")
            ]
            (tmp_path / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries.append({"name": name, "source": {"path": f"{name}-{{split}}.jsonl"}})
    recipe = {
        "backbone": str(save_backbone(tmp_path / "backbone", "bert", initializer_range=0.3, num_hidden_layers=2)),
        "model": {"adapter_dim": 4, "feature_layer": 1, "routing": "prototypes", "centroids_per_task": 2},
        "data": {"max_length": 32},
        "training": {"max_steps": 4, "batch_size": 16, "false_decline_rate": 0.1},
        "tasks": entries,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = train(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run")
    model = HyperAdapterModel.from_pretrained(tmp_path / "run")
    assert model.method.prototypes.centroids.shape == (2, 2, 64)
    assert model.method.prototypes.centroids.any(dim=-1).all()
    assert model.method.thresholds.isfinite().all()
    for task_id, (name, words) in enumerate(clumps.items()):
        nearest = []
        for word in words:
            texts = [text(word) for _ in range(8)]
            assert Counter(r.candidates[0].task for r in model.route(texts)).most_common(1)[0][0] == name
            batch = model.collator.inputs([Example(None, value) for value in texts])
            directions = nn.functional.normalize(model.instance_vectors(**batch), dim=1)
            chosen = (directions @ nn.functional.normalize(model.method.prototypes.centroids[task_id], dim=1).T).argmax(
                dim=1
            )
            nearest.append(chosen.mode().values.item())
        assert sorted(nearest) == [0, 1]
    assert run.metrics["routing_accuracy"] > 0.8


# Soft routing


@pytest.mark.parametrize(("kind", "features"), [("bert", "layer"), ("bert", "backbone"), ("t5", "layer")])
def test_soft_routing_generates_from_the_mixture_of_prototypes(kind: str, features: str) -> None:
    batch = make_batch(kind)
    model, told = (make_model(kind, features=features, temperature=0.3).double() for _ in range(2))
    key = torch.randn(64)
    empty_centroids(model)[1, 0] = key
    found = model(**untold(kind, batch), route="soft")
    prototypes = model.method.prototypes.weight.detach().clone()
    points = torch.stack([prototypes[0], key, prototypes[2]])
    for row in range(6):
        inputs = {name: value[row : row + 1] for name, value in untold(kind, batch).items()}
        instance = model.instance_vectors(**inputs_of(inputs))
        similarity = torch.cosine_similarity(instance, points)
        shares = (similarity / 0.3).exp() / (similarity / 0.3).exp().sum()
        assert shares.max() < 0.9
        assert found.task_ids[row] == similarity.argmax()
        with torch.no_grad():  # a task whose prototype is the mixture gives what the soft route gives
            told.method.prototypes.weight[similarity.argmax()] = (shares[:, None] * prototypes).sum(dim=0)
        expected = told(**inputs, task_ids=similarity.argmax()[None]).logits
        logits = found.logits[row : row + 1, ..., : expected.shape[-1]]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_soft_and_nearest_routing_differ_and_rows_are_independent_of_their_batch(kind: str) -> None:
    model, inputs = make_model(kind).double(), untold(kind, make_batch(kind))
    soft = model(**inputs, route="soft")
    assert (soft.logits - model(**inputs).logits).nan_to_num().abs().max() > 1e-4
    assert torch.equal(soft.task_ids, model(**inputs).task_ids)
    for row in range(6):
        alone = model(**{name: value[row : row + 1] for name, value in inputs.items()}, route="soft").logits
        together = soft.logits[row : row + 1, ..., : alone.shape[-1]]
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_soft_routing_with_one_task_is_nearest_routing(kind: str) -> None:
    model, inputs = make_model(kind).double(), untold(kind, make_batch(kind))
    model.remove_task("size")
    model.remove_task("mood")
    torch.testing.assert_close(model(**inputs, route="soft").logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_soft_routing_leaves_told_rows_alone(kind: str) -> None:
    model, batch = make_model(kind), make_batch(kind)
    assert torch.equal(model(**batch, route="soft").logits, model(**batch).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_route_is_refused_with_or_without_tasks(kind: str) -> None:
    model, batch = make_model(kind), make_batch(kind)
    for inputs in (batch, untold(kind, batch)):
        with pytest.raises(TaskError, match=r"Unknown route 'softt'. Did you mean 'soft'\?"):
            model(**inputs, route="softt")
    if kind == "t5":
        with pytest.raises(TaskError, match="Unknown route"):
            model.generate(**inputs_of(batch), route="hard")
    assert model(**batch).loss.isfinite()


def test_gradients_reach_prototypes_and_hypernetwork_through_a_soft_route() -> None:
    model = make_model("bert")
    model(**inputs_of(make_batch("bert")), route="soft").logits.nan_to_num(neginf=0).sum().backward()
    assert model.method.prototypes.weight.grad is not None
    assert model.method.prototypes.weight.grad.abs().sum() > 0


# Two passes


@pytest.mark.parametrize("kind", ENCODERS)
def test_with_two_passes_instances_are_read_from_the_bare_backbones_last_hidden_states(kind: str) -> None:
    model, batch = make_model(kind, features="backbone", feature_layer=1), make_batch(kind)
    bare = tiny_backbone(kind)(**inputs_of(batch)).last_hidden_state
    expected = model.method.retriever(masked_mean(bare, batch["attention_mask"]))
    assert torch.equal(model(**batch).instances, expected)
    assert torch.equal(model.instance_vectors(**inputs_of(batch)), expected)
    assert not torch.allclose(make_model(kind, feature_layer=1)(**batch).instances, expected)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("feature_layer", [0, 2, 3])
def test_with_two_passes_answers_of_given_tasks_are_those_of_one_pass(kind: str, feature_layer: int) -> None:
    batch = make_batch(kind)
    one, two = (make_model(kind, features=name, feature_layer=feature_layer) for name in ("layer", "backbone"))
    assert torch.equal(two(**batch).logits, one(**batch).logits)
    found, expected = (m(**batch, output_hidden_states=True).encoder_hidden_states for m in (two, one))
    assert len(found) == 5
    assert all(torch.equal(*states) for states in zip(found, expected, strict=True))


def _dropout_model(**settings: Any) -> HyperAdapterModel:
    backbone = tiny_backbone("bert", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    torch.manual_seed(1)
    return HyperAdapterModel(
        backbone, HEAD_TASKS, ModelConfig(preset="paper", adapter_dim=4, feature_layer=2, **settings)
    )


def test_dropout_leaves_the_frozen_pass_alone_and_reaches_the_adapted_one() -> None:
    model, batch = _dropout_model(features="backbone"), make_batch("bert")
    expected = model.eval()(**batch)
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    found = model(**batch)
    assert torch.equal(found.instances, expected.instances)
    assert not torch.allclose(found.losses.task, expected.losses.task)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.backbone.encoder.layer[2].training
    assert not model.backbone.encoder.layer[1].training


def _gradients(model: HyperAdapterModel, batch: dict[str, Tensor], encode: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    lower_output = model.forward_lower_layers(**inputs_of(batch)) if encode else None
    model(**batch, lower_output=lower_output).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_two_passes_give_the_same_gradients_under_gradient_checkpointing() -> None:
    model, batch = make_model("bert", features="backbone").double().train(), make_batch("bert")
    plain = _gradients(model, batch)
    model.activation_checkpointing_enable()
    checkpointed = _gradients(model, batch)
    assert plain.keys() == checkpointed.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_layers_below_the_features_run_once_in_two_passes() -> None:
    model, batch = make_model("bert", features="backbone", feature_layer=3), make_batch("bert")
    attentions = {str(index): layer.attention for index, layer in enumerate(layers_of(model))}
    calls = count_calls(attentions)
    model(**batch)
    assert calls == {"0": 1, "1": 1, "2": 1, "3": 2}


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_two_passes_are_refused_on_an_encoder_decoder(kind: str) -> None:
    with pytest.raises(RecipeError, match="'backbone' is for encoders"):
        make_model(kind, features="backbone")


def test_a_model_of_two_passes_is_saved_and_loaded(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "backbone", "bert")
    model = HyperAdapterModel.from_backbone(str(folder), HEAD_TASKS, features="backbone", feature_layer=1)
    model.save_pretrained(tmp_path / "run")
    loaded, batch = HyperAdapterModel.from_pretrained(tmp_path / "run"), make_batch("bert")
    model.eval()
    assert loaded.adapter_config == model.adapter_config
    assert torch.equal(loaded(**batch).instances, model(**batch).instances)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


# Forward from what was lower_output before

PASSES = [*((kind, "layer") for kind in ALL), *((kind, "backbone") for kind in ENCODERS)]


@pytest.mark.parametrize(("kind", "features"), PASSES)
@pytest.mark.parametrize("told", [True, False])
def test_forward_from_encoded_is_bit_equal_to_plain_forward(kind: str, features: str, told: bool) -> None:
    model, batch = make_model(kind, features=features), make_batch(kind)
    inputs = batch if told else untold(kind, batch)
    plain = model(**inputs)
    found = model(**inputs, lower_output=model.forward_lower_layers(**inputs_of(batch)))
    for name in ("logits", "instances", "task_ids"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    if told:
        assert torch.equal(found.loss, plain.loss)


@pytest.mark.parametrize("kind", ALL)
def test_forward_from_encoded_has_the_hidden_states_of_plain_forward(kind: str) -> None:
    model, batch = make_model(kind), make_batch(kind)
    plain = model(**batch, output_hidden_states=True)
    found = model(**batch, lower_output=model.forward_lower_layers(**inputs_of(batch)), output_hidden_states=True)
    assert torch.equal(found.logits, plain.logits)
    for name in ("encoder_hidden_states", "decoder_hidden_states"):
        expected, states = getattr(plain, name), getattr(found, name)
        assert (states is None) == (expected is None), name
        assert expected is None or all(torch.equal(*pair) for pair in zip(states, expected, strict=True)), name


@pytest.mark.parametrize(("kind", "features"), PASSES)
def test_forward_from_encoded_gives_the_gradients_of_plain_forward_under_checkpointing(
    kind: str, features: str
) -> None:
    model, batch = make_model(kind, features=features).train(), make_batch(kind)
    model.activation_checkpointing_enable()
    plain, found = _gradients(model, batch), _gradients(model, batch, encode=True)
    assert plain.keys() == found.keys()
    for name, gradient in plain.items():
        assert torch.equal(found[name], gradient), name


def test_forward_from_encoded_leaves_the_layers_below_out() -> None:
    model, batch = make_model("bert", feature_layer=3), make_batch("bert")
    lower_output = model.forward_lower_layers(**inputs_of(batch))
    calls = count_calls({str(index): layer.attention for index, layer in enumerate(layers_of(model))})
    model(**batch, lower_output=lower_output)
    assert calls == {"3": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_above_the_features_leaves_nothing_behind(kind: str) -> None:
    model, batch = make_model(kind), make_batch(kind)
    lower_output, before = model.forward_lower_layers(**inputs_of(batch)), model(**batch).logits
    forwards = [layer.forward for layer in layers_of(model)]
    handle = layers_of(model)[-1].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(**batch, lower_output=lower_output)
    handle.remove()
    assert [layer.forward for layer in layers_of(model)] == forwards
    assert not [layer for layer in layers_of(model) if "forward" in vars(layer)]
    with pytest.raises(RuntimeError, match="no task is active"):
        model.backbone(**untold(kind, batch))
    assert torch.equal(model(**batch, lower_output=lower_output).logits, before)
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("features", ["layer", "backbone"])
def test_an_exception_below_the_features_leaves_nothing_behind(features: str) -> None:
    model, batch = make_model("bert", features=features).train(), make_batch("bert")
    before = model(**batch).logits
    modes = {name: module.training for name, module in model.named_modules()}
    handle = layers_of(model)[0].register_forward_pre_hook(fail)
    for call in (lambda: model.forward_lower_layers(**inputs_of(batch)), lambda: model(**batch)):
        with pytest.raises(ZeroDivisionError):
            call()
    handle.remove()
    assert {name: module.training for name, module in model.named_modules()} == modes
    with pytest.raises(RuntimeError, match="no task is active"):
        model.backbone(**inputs_of(batch))
    assert torch.equal(model(**batch).logits, before)


def test_encode_leaves_nothing_behind_where_the_backbone_is_set_to_return_hidden_states() -> None:
    model, batch = make_model("bert"), make_batch("bert")
    before = model(**batch).logits
    model.backbone.config.output_hidden_states = True
    lower_output = model.forward_lower_layers(**inputs_of(batch))
    assert torch.equal(model(**batch).logits, before)
    assert torch.equal(model(**batch, lower_output=lower_output).logits, before)
    assert not [layer for layer in layers_of(model) if "forward" in vars(layer)]


def test_a_forward_that_another_library_put_on_a_layer_is_still_there_afterwards() -> None:
    model, batch = make_model("bert"), make_batch("bert")
    layer = layers_of(model)[0]
    calls: list[int] = []
    own_forward = layer.forward

    def forward(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return own_forward(*args, **options)

    layer.forward = forward
    model(**batch, lower_output=model.forward_lower_layers(**inputs_of(batch)))
    assert layer.forward is forward
    model(**batch)
    assert len(calls) == 2
