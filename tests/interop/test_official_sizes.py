"""Promise 1 at other sizes than those of the golden values: a loaded model against a second, independent forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import official_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadapters.config import ModelConfig
from hyperadapters.interop.official import load_official, official_parameters
from hyperadapters.model.model import HyperAdapterModel

BASE: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
    "relative_attention_num_buckets": 32,
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "encoder_adapter": "manual",
    "decoder_adapter": "pro-hyper",
    "encoder_adapter_dim": 8,
    "decoder_adapter_dim": 8,
    "hypernetwork_bottleneck": 128,
    "adapter_norm_input": True,
    "process_encoder_output": True,
    "mean_task_embeddings": False,
}
# With this seed every input of a ReLU is further than 2e-5 from 0, so that rounding decides about no gradient.
SEED = 12


@dataclass(frozen=True)
class Case:
    """What differs from `BASE`, and the sizes of the batch."""

    changes: dict[str, Any] = field(default_factory=dict)
    num_tasks: int = 5
    opposite_prototypes: bool = False
    source_length: int = 11
    target_length: int = 6


CASES = {
    "deep-encoder": Case({"num_layers": 3, "num_decoder_layers": 1}),
    "deep-decoder": Case({"num_layers": 1, "num_decoder_layers": 4}),
    "two-adapter-sizes": Case({"encoder_adapter_dim": 3, "decoder_adapter_dim": 7}),
    "generated-bottleneck-of-one": Case({"decoder_adapter_dim": 1}),
    "unnormed-relu-tied": Case({"adapter_norm_input": False}),
    "unnormed-gated-untied": Case(
        {"adapter_norm_input": False, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    ),
    "gated-tied": Case({"feed_forward_proj": "gated-gelu"}),
    "relu-untied": Case({"tie_word_embeddings": False}),
    "narrow-heads": Case({"d_kv": 5, "num_heads": 2}),
    "wide-heads": Case({"d_kv": 16}),
    "large-epsilon": Case({"layer_norm_epsilon": 1e-2}),
    "few-buckets": Case({"relative_attention_num_buckets": 8}, source_length=40, target_length=20),
    "long-input": Case({"feed_forward_proj": "gated-gelu"}, source_length=150, target_length=140),
    "one-task": Case(num_tasks=1),
    "two-opposite-prototypes": Case(num_tasks=2, opposite_prototypes=True),
}


@dataclass(frozen=True)
class Official:
    """A checkpoint of the released implementation with random weights, and a batch."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    tasks: list[str]
    batch: dict[str, Tensor]

    def load(self) -> HyperAdapterModel:
        return load_official(self.state, self.config, self.tasks).train()

    def reference(self) -> dict[str, Tensor]:
        """The weights in double precision, those that are trained with a gradient."""
        return {name: value.double().requires_grad_(oracle.is_trainable(name)) for name, value in self.state.items()}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def official(request: pytest.FixtureRequest) -> Official:
    case: Case = request.param
    config = {**BASE, **case.changes}
    generator = torch.Generator().manual_seed(SEED)
    state = oracle.random_state(config, case.num_tasks, generator)
    batch = _batch(case, config["vocab_size"], generator)
    if case.opposite_prototypes:
        _separate(state, oracle.forward(state, config, batch)[1])
    return Official(config, state, [f"task {index}" for index in range(case.num_tasks)], batch)


def _separate(state: dict[str, Tensor], instances: Tensor) -> None:
    """Turn two prototypes along and against the instances, where the released loss is minus infinity."""
    prototypes = state["decoder.adapter_task_embedding.weight"]
    prototypes[0] = F.normalize(instances.mean(dim=0), dim=0) * prototypes[0].norm()
    prototypes[1] = -prototypes[0]
    assert F.cosine_similarity(instances, prototypes[:1]).max() > 0.9


def _batch(case: Case, vocab_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Of five tasks two are in several rows, two in one and one in none."""
    task_ids = torch.tensor([3, 0, 1, 0, 3, 2, 0]) % case.num_tasks
    tokens, masks = [], []
    for length in (case.source_length, case.target_length):
        lengths = torch.linspace(length, 2, len(task_ids)).long()
        masks.append((torch.arange(length) < lengths[:, None]).long())
        tokens.append(torch.randint(2, vocab_size, masks[-1].shape, generator=generator) * masks[-1])
    return {"input_ids": tokens[0], "attention_mask": masks[0], "labels": tokens[1], "task_ids": task_ids}


def _check(found: Tensor, expected: Tensor) -> None:
    tolerance = 1e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("mask_given", [True, False])
def test_logits_and_instances(official: Official, mask_given: bool) -> None:
    """Without a mask every position is real."""
    batch = dict(official.batch)
    if not mask_given:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    with torch.no_grad():
        logits, instances = oracle.forward(official.reference(), official.config, batch)
    if not mask_given:
        del batch["attention_mask"]
    output = official.load().double()(**batch)
    _check(output.logits, logits)
    _check(output.instances, instances)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_and_gradients(official: Official, reduction: Any) -> None:
    model, reference = official.load().double(), official.reference()
    found = model.training_loss(official.batch, reduction=reduction)
    logits, instances = oracle.forward(reference, official.config, official.batch)
    expected = oracle.losses(reference, logits, instances, official.batch, reduction)
    for term in expected._fields:
        value = getattr(expected, term).item()
        assert getattr(found, term).item() == pytest.approx(value, rel=1e-5, abs=1e-8), term

    found.total.backward()
    sum(expected).backward()
    gradients = {name: p.grad for name, p in official_parameters(model).items() if p.grad is not None}
    expected_gradients = {name: value.grad for name, value in reference.items() if value.grad is not None}
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        tolerance = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[name].double(), gradient, atol=tolerance, rtol=0)


def test_sizes_are_found_and_survive_a_round_trip(official: Official) -> None:
    loaded = official.load()
    assert loaded.adapter_config == ModelConfig(
        preset="official",
        prototype_dim=64,
        hidden_dim=128,
        adapter_dim=official.config["decoder_adapter_dim"],
        shared_adapter_dim=official.config["encoder_adapter_dim"],
        adapter_norm_input=official.config["adapter_norm_input"],
    )
    parameters = official_parameters(loaded)
    assert parameters.keys() == official.state.keys()
    # of the official settings these two are not in the backbone's config: transformers 5 calls every T5 tied
    kept = {key: official.config[key] for key in ("adapter_norm_input", "tie_word_embeddings")}
    config = {**loaded.backbone.config.to_dict(), **kept}
    again = load_official(parameters, config, official.tasks).train()
    assert again.adapter_config == loaded.adapter_config
    assert torch.equal(again(**official.batch).logits, loaded(**official.batch).logits)
