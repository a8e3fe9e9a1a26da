"""Codes that start orthogonal, and heads that also read the texts as the frozen backbone encodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ENCODERS,
    FROZEN_TEXTS,
    HEAD_TASKS,
    HIDDEN_SIZE,
    PAIR_TASKS,
    SIZES,
    make_batch,
    make_frozen_texts_model,
    pair_examples,
    pair_recipe,
    tiny_backbone,
)
from tolerance import rounding
from torch import Tensor

from hyperadapters.backbones.passes import evaluating
from hyperadapters.backbones.text_features import features_size, split_pairs, text_features
from hyperadapters.checkpoints.format import stored_state
from hyperadapters.config import ModelConfig, Task, parse
from hyperadapters.core import OrthogonalHypernetwork, PrototypeTable, bottleneck_tensors, masked_mean
from hyperadapters.data.examples import Example, label_examples
from hyperadapters.errors import DataError, RecipeError
from hyperadapters.fewshot import add_task as fewshot
from hyperadapters.heads.new_heads import make_head
from hyperadapters.heads.task_heads import TaskHeads
from hyperadapters.inference.predictor import Predictor
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.run import load_run, train
from hyperadapters.training.text_heads import SHARES_UNCHECKED, HeadRows, fit_text_heads, set_text_heads

CLS, SEP, PAD = 7, 8, 0


# Codes


def test_the_released_codes_network_is_fixed() -> None:
    with pytest.raises(RecipeError, match="codes: preset 'official' only has 'trunk'"):
        parse(ModelConfig, {"preset": "official", "codes": "orthogonal"}, RecipeError)


def assert_orthogonal(rows: Tensor) -> None:
    """Rows of 8 numbers and of the length sqrt(8): two products of matrices of this width, and their factorisation."""
    torch.testing.assert_close(rows @ rows.T, 8 * torch.eye(len(rows)), atol=rounding(4 * 8, 8.0), rtol=0)


def test_prototypes_and_codes_start_orthogonal_and_of_one_length() -> None:
    table, network = (
        PrototypeTable(5, 8, orthogonal=True),
        OrthogonalHypernetwork(3, bottleneck_tensors(HIDDEN_SIZE, 4), 8),
    )
    assert_orthogonal(table.weight)
    codes = network.codes(table.weight)
    assert codes.shape == (3, 5, 8)
    for of_site in codes:
        assert_orthogonal(of_site)


def test_more_tasks_than_numbers_are_orthogonal_in_parts() -> None:
    table = PrototypeTable(11, 8, orthogonal=True).weight
    assert_orthogonal(table[:8])
    assert_orthogonal(table[8:])


def test_generated_down_weights_have_the_variance_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    table, network = PrototypeTable(20, 64, orthogonal=True), OrthogonalHypernetwork(2, bottleneck_tensors(384, 32))
    weights = network(table.weight)
    assert float(weights["down_weight"].detach().std()) == pytest.approx((3 * 384) ** -0.5, rel=0.02)
    assert not any(tensor.any() for tensor in (weights[name] for name in ("up_weight", "up_bias", "down_bias")))


def test_at_a_site_a_step_of_the_heads_for_one_task_leaves_the_others_as_they_are() -> None:
    table, network = (
        PrototypeTable(3, 8, orthogonal=True),
        OrthogonalHypernetwork(1, bottleneck_tensors(HIDDEN_SIZE, 4), 8),
    )
    table, network = table.double(), network.double()
    before = network(table.weight)
    network(table.weight)["up_weight"][:, 1].sum().backward()
    with torch.no_grad():
        network.up_weight.weight -= network.up_weight.weight.grad
    after = network(table.weight)
    torch.testing.assert_close(after["up_weight"][:, [0, 2]], before["up_weight"][:, [0, 2]], atol=1e-5, rtol=0)
    assert float((after["up_weight"][:, 1] - before["up_weight"][:, 1]).abs().detach().min()) > 1.0


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_fresh_model_is_its_backbone(kind: str) -> None:
    model, batch = make_frozen_texts_model(HEAD_TASKS, kind).double(), make_batch(kind)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), model.adapters_disabled():
        expected = masked_mean(model.backbone(**inputs).last_hidden_state, inputs["attention_mask"])
    weights = model.method.adapters(torch.tensor([1]))
    torch.testing.assert_close(
        model.forward_with_adapter(inputs, weights, model.forward_lower_layers(**inputs))[0],
        expected,
        atol=1e-5,
        rtol=1e-5,
    )


# Texts


def row(*tokens: int, length: int = 9) -> list[int]:
    return [*tokens, *[PAD] * (length - len(tokens))]


def test_pairs_are_split_as_bert_and_roberta_write_them() -> None:
    ids = torch.tensor(
        [
            row(CLS, 1, 2, SEP, 3, SEP),  # BERT
            row(CLS, 1, SEP, SEP, 3, 4, 5, SEP),  # RoBERTa
            row(CLS, 1, 2, 3, SEP),  # a single text
            row(CLS, 1, SEP, 2, SEP),  # a single text that holds a separator
            row(CLS, 1, 2, 3, 4, 5, 6, 1, SEP),
            row(CLS, 1, SEP, 2, SEP, 3, SEP),  # a pair whose second text holds one
        ]
    )
    mask = torch.tensor(
        [[1] * 6 + [0] * 3, [1] * 8 + [0], [1] * 5 + [0] * 4, [1] * 5 + [0] * 4, [1] * 9, [1] * 7 + [0] * 2]
    )
    sequences = torch.full_like(ids, -1)
    sequences[0, [1, 2, 4]] = torch.tensor([0, 0, 1])
    sequences[1, [1, 4, 5, 6]] = torch.tensor([0, 1, 1, 1])
    sequences[5, [1, 3, 4, 5]] = torch.tensor([0, 1, 1, 1])
    found, real = split_pairs(ids, mask, torch.tensor([True, True, False, False, False, True]), sequences)
    texts = [tokens[: int(count)].tolist() for tokens, count in zip(found, real.sum(dim=1), strict=True)]
    firsts = [
        [CLS, 1, 2, SEP],
        [CLS, 1, SEP],
        [CLS, 1, 2, 3, SEP],
        [CLS, 1, SEP, 2, SEP],
        ids[4].tolist(),
        [CLS, 1, SEP],
    ]
    assert texts == [*firsts, [CLS, 3, SEP], [CLS, 3, 4, 5, SEP], [CLS, 2, SEP, 3, SEP]]
    assert all(real[index, : len(text)].all() for index, text in enumerate(texts))


def test_an_empty_second_text_is_no_error() -> None:
    ids = torch.tensor([[CLS, 1, 2, SEP, SEP]])
    sequences = torch.tensor([[-1, 0, 0, -1, -1]])
    found, real = split_pairs(ids, torch.ones_like(ids), torch.tensor([True]), sequences)
    assert [found[row, : int(real[row].sum())].tolist() for row in (0, 1)] == [[CLS, 1, 2, SEP], [CLS, SEP]]


def test_features_are_those_of_each_text_encoded_alone() -> None:
    backbone = tiny_backbone("bert").double()

    def encode(ids: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden

    def alone(*tokens: int) -> Tensor:
        ids = torch.tensor([tokens])
        return F.normalize(encode(ids, torch.ones_like(ids)).mean(dim=1), dim=-1)[0].float()

    ids = torch.tensor([row(CLS, 1, 2, SEP, 3, SEP), row(CLS, 4, 5, 6, SEP)])
    mask = torch.tensor([[1] * 6 + [0] * 3, [1] * 5 + [0] * 4])
    with torch.no_grad():
        sequences = torch.tensor([row(-1, 0, 0, -1, 1, -1), row(-1, 0, 0, 0, -1)])
        found = text_features(encode, ids, mask, torch.tensor([True, False]), sequence_ids=sequences)
        first, second, single = alone(CLS, 1, 2, SEP), alone(CLS, 3, SEP), alone(CLS, 4, 5, 6, SEP)
    assert found.shape == (2, features_size(HIDDEN_SIZE, compared=True))
    pair = torch.cat([first + second, (first - second).abs(), (first @ second)[None]])
    torch.testing.assert_close(found[0], pair, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], torch.cat([single, torch.zeros(HIDDEN_SIZE + 1)]), atol=1e-5, rtol=1e-5)


# Heads


def fitted(**settings: Any) -> HyperAdapterModel:
    model, rows = make_frozen_texts_model(**settings), pair_examples()
    assert model.heads is not None
    model.heads.set_target_scale(1, [0.0, 1.0, 2.0, 3.0])
    fit_text_heads(model, rows[:48], rows[48:], batch_size=8)
    return model


def answers(model: HyperAdapterModel, rows: list[Example]) -> list[Any]:
    return [prediction.target for prediction in Predictor(model)(rows)]


def test_features_are_not_computed_before_heads_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make_frozen_texts_model(), pair_examples(4)
    calls = []
    real = model.passes.text_features
    monkeypatch.setattr(model.passes, "text_features", lambda *args: calls.append(1) or real(*args))
    batch = model.collator(rows)
    model.train()(**batch).loss.backward()
    assert not calls
    assert model.heads is not None
    assert not model.heads.wide_weight.grad[:, : model.heads.features_size].any()  # type: ignore[index]
    fit_text_heads(model, rows, rows, batch_size=8)
    calls.clear()
    model.eval()(**batch)
    assert len(calls) == 1


def test_fitted_heads_read_what_adapters_have_not_learned() -> None:
    rows = pair_examples()
    assert answers(fitted(), rows[:48])[::3] == [example.target for example in rows[:48][::3]]


@pytest.mark.parametrize("head_inputs", ["text_features", "pair_features"])
def test_a_mixed_batch_equals_single_rows_and_a_checkpoint_repeats_them(head_inputs: str, tmp_path: Path) -> None:
    model, rows = fitted(head_inputs=head_inputs), pair_examples(4)
    model.save_pretrained(tmp_path)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, tiny_backbone("bert"))
    with torch.no_grad(), evaluating(model):
        mixed = model(**model.collator(rows)).logits
        assert torch.equal(loaded(**model.collator(rows)).logits, mixed)
        for index, example in enumerate(rows):
            single = model(**model.collator([example])).logits[0]
            torch.testing.assert_close(mixed[index, : len(single)], single, atol=1e-5, rtol=1e-5)


def test_a_new_task_is_fitted_on_the_same_features_and_changes_no_other() -> None:
    model, rows = fitted(), pair_examples(6)
    before = [prediction.probabilities for prediction in Predictor(model)(rows)]
    new = Task.classification("near", ["no", "yes"], fields=("text", "text_pair"))
    model.add_task(
        new, [{"text": e.text, "text_pair": e.text_pair, "label": ("no", "yes")[int(e.target)]} for e in rows[::3]]
    )  # type: ignore[arg-type]
    assert model.heads is not None
    assert model.heads.head(3).weight.shape == (2, features_size(HIDDEN_SIZE, compared=True) + HIDDEN_SIZE)
    assert [prediction.probabilities for prediction in Predictor(model)(rows)] == before
    found = [p.target for p in Predictor(model)([Example(None, e.text, e.text_pair) for e in rows[::3]], task="near")]
    assert found == [example.target for example in rows[::3]]


def shares(validation_targets: list[int], trained_logits: Tensor) -> tuple[float, float]:
    """Shares of regression and trained head, read from the fitted head of a task that the regression cannot learn."""
    task = Task.classification("coin", ["heads", "tails"])
    model = make_frozen_texts_model([task])
    assert model.heads is not None
    with torch.no_grad():
        model.heads.wide_weight.fill_(0.0)
        model.heads.wide_weight[0, -1] = 1.0
    generator = torch.Generator().manual_seed(0)
    width = model.heads.features_size
    rows = [Example(0, "w1", None, index % 2) for index in range(8)]
    features = torch.randn(len(rows), width, generator=generator)
    checked = [Example(0, "w1", None, target) for target in validation_targets]
    noise = torch.randn(len(checked), width, generator=generator)
    set_text_heads(model, HeadRows(rows, features), HeadRows(checked, noise, list(trained_logits)))
    head = model.heads.head(0)
    return float(head.weight[:, :width].norm()), float(head.weight[0, -1])


def test_a_trained_head_that_says_nothing_has_no_say() -> None:
    targets = [0, 1] * 8
    assert shares(targets, torch.zeros(16, 2))[1] == pytest.approx(0.0, abs=1e-4)


def test_a_trained_head_that_is_right_has_its_say_and_one_that_is_wrong_has_none() -> None:
    targets = [0, 1] * 8
    right = torch.tensor([[1.0, -1.0] if target == 0 else [-1.0, 1.0] for target in targets])
    assert shares(targets, right)[1] > 0.5
    assert shares(targets, -right)[1] == 0.0


def test_without_validation_rows_both_have_fixed_shares() -> None:
    assert shares([], torch.zeros(0, 2))[1] == SHARES_UNCHECKED[1]


def test_a_trained_head_that_diverged_has_no_say() -> None:
    assert shares([0, 1] * 8, torch.full((16, 2), torch.nan))[1] == 0.0


def test_heads_are_fitted_once() -> None:
    model, rows = fitted(), pair_examples()
    with pytest.raises(ValueError, match="fitted to text features already and cannot be fitted again"):
        fit_text_heads(model, rows[:48], rows[48:], batch_size=8)


def test_a_label_without_a_training_row_is_named() -> None:
    model, rows = make_frozen_texts_model(), pair_examples()
    with pytest.raises(DataError, match="task 'same': expected a training example of each label, found none of yes"):
        fit_text_heads(model, [e for e in rows if e.task_id or not e.target], rows, batch_size=8)


def test_fresh_wide_heads_read_no_features() -> None:
    heads = TaskHeads(4, PAIR_TASKS, [True] * 3, 9)
    assert not heads.reads_features
    assert heads.wide_weight.shape == (5, 13)


@pytest.mark.parametrize("has_validation", [True, False])
def test_training_ends_with_heads_that_read_texts(has_validation: bool, tmp_path: Path) -> None:
    run = train(pair_recipe(tmp_path, {**FROZEN_TEXTS, **SIZES}, has_validation), tmp_path / "run")
    assert run.model.heads is not None
    assert run.model.heads.reads_features
    assert run.evaluations["test"].mean > 0.9  # equal or different texts: the frozen backbone sees that at once
    loaded, _ = load_run(tmp_path / "run")
    rows = [Example(0, e.text, e.text_pair, e.target) for e in pair_examples(4)[::3]]
    assert answers(loaded, rows) == answers(run.model, rows)


# Names of labels


def test_a_label_name_is_one_more_row_of_the_regression() -> None:
    rows = [row for row in pair_examples() if row.task_id == 2]
    with_names, without = make_frozen_texts_model(PAIR_TASKS), make_frozen_texts_model(PAIR_TASKS, label_names=False)
    by_hand = make_frozen_texts_model(PAIR_TASKS, label_names=False)
    other = [row for row in pair_examples() if row.task_id != 2]
    for model, extra in ((with_names, []), (without, []), (by_hand, label_examples(PAIR_TASKS))):
        fit_text_heads(model, [*rows, *other, *extra], pair_examples(9))
    weights = [model.heads.wide_weight for model in (with_names, by_hand, without) if model.heads is not None]
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


@pytest.mark.parametrize("label_names", [True, False])
def test_a_task_with_one_example_a_label_can_learn_from_their_names(label_names: bool) -> None:
    model = make_frozen_texts_model(label_names=label_names)
    report = model.add_task(
        Task.classification("colour", ["red", "blue"]),
        [{"text": "w1 w2", "label": "red"}, {"text": "w3 w4", "label": "blue"}],
    )
    assert report.examples == 2
    # With one row a label nothing can be left out to choose a number of steps.
    assert report.stopping == ("leave-one-out" if label_names else "fixed")


# What a checkpoint keeps of heads


def test_a_checkpoint_keeps_fitted_heads_in_half_the_bytes_and_without_zeros(tmp_path: Path) -> None:
    model = make_frozen_texts_model()
    fit_text_heads(model, pair_examples(), pair_examples(9))
    assert model.heads is not None
    state = stored_state(model)
    wide = features_size(HIDDEN_SIZE, compared=True) + HIDDEN_SIZE
    assert (state["heads.wide_weight"].shape, state["heads.wide_weight"].dtype) == ((2, wide), torch.float16)
    assert (state["heads.single_weight"].shape, state["heads.single_weight"].dtype) == (
        (3, 2 * HIDDEN_SIZE),
        torch.float16,
    )
    model.save_pretrained(tmp_path)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone("bert"))
    assert loaded.heads is not None
    for name, value in model.heads.state_dict().items():
        assert torch.equal(value, loaded.heads.state_dict()[name]), name


def test_heads_that_need_all_their_bytes_keep_them(tmp_path: Path) -> None:
    model = make_frozen_texts_model()
    assert model.heads is not None
    torch.nn.init.normal_(model.heads.wide_weight)
    assert stored_state(model)["heads.wide_weight"].dtype == torch.float32
    model.save_pretrained(tmp_path)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone("bert"))
    assert loaded.heads is not None
    assert torch.equal(loaded.heads.wide_weight, model.heads.wide_weight)


# What new tasks learn from known heads


def test_a_head_learns_from_a_related_one_and_leaves_an_unrelated_one() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, known = torch.randn(400, 48, generator=generator), torch.randn(2, 48, generator=generator)
    labels = (inputs @ (known[1] - known[0]) > 0).long()
    task = Task.classification("new", ["no", "yes"])
    rows = [*(labels == 0).nonzero()[:8, 0].tolist(), *(labels == 1).nonzero()[:8, 0].tolist()]

    def accuracy(known: list[Tensor]) -> float:
        head = make_head(task, inputs, labels.tolist(), rows, known=known)
        assert head is not None
        assert head.weight.shape == (2, 48)
        return float((F.linear(inputs, head.weight, head.bias).argmax(dim=1) == labels).float().mean())

    alone = accuracy([])
    assert accuracy([known]) > alone + 0.1
    unrelated = torch.randn(2, 48, generator=generator)
    assert accuracy([unrelated]) > alone - 0.1
    assert accuracy([torch.zeros(2, 48)]) == alone


def test_a_regression_learns_from_a_related_head() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, known = torch.randn(300, 48, generator=generator), torch.randn(1, 48, generator=generator)
    targets = (2.0 + 3.0 * inputs @ known[0]).tolist()

    def error(known: list[Tensor]) -> float:
        head = make_head(Task.regression("new"), inputs, targets, range(12), known=known)
        assert head is not None
        values = F.linear(inputs, head.weight, head.bias)[:, 0] * head.target_std + head.target_mean
        return float((values - torch.tensor(targets)).square().mean())

    assert error([known]) < 0.5 * error([])


def test_only_what_known_heads_make_of_texts_of_the_same_kind_is_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_frozen_texts_model()
    fit_text_heads(model, pair_examples(), pair_examples(9))
    given: list[list[Tensor]] = []
    fit = fewshot.fit_task

    def spy(*args: Any) -> Any:
        given.append(list(args[6]))
        return fit(*args)

    monkeypatch.setattr(fewshot, "fit_task", spy)
    task = Task.classification("new", ["a", "b"], fields=("text", "text_pair"))
    model.add_task(task, [{"text": f"w{n}", "text_pair": f"w{n % 3}", "label": "ab"[n % 2]} for n in range(6)])
    assert model.heads is not None
    ((known,),) = given
    wide = model.heads.head(0).weight
    assert torch.equal(known[:, :-HIDDEN_SIZE], wide[:, :-HIDDEN_SIZE])
    assert not known[:, -HIDDEN_SIZE:].any()


def test_other_tasks_keep_their_answers_bit_for_bit_when_one_is_added() -> None:
    model = make_frozen_texts_model()
    fit_text_heads(model, pair_examples(), pair_examples(9))
    inputs = [Example(None, row.text, row.text_pair) for row in pair_examples() if row.task_id == 0]
    before = [prediction.probabilities for prediction in Predictor(model)(inputs, task="same")]
    model.add_task(
        Task.classification("colour", ["red", "blue"]),
        [{"text": f"w{n} w{n + 1}", "label": ("red", "blue")[n % 2]} for n in range(8)],
    )
    assert [prediction.probabilities for prediction in Predictor(model)(inputs, task="same")] == before
