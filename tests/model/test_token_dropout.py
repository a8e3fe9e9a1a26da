"""Tokens that are masked in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import ENCODERS, HEAD_TASKS, make_batch, make_plus_model, stirred

from hyperadapters.model.inputs import mask_tokens


def test_each_token_but_the_first_is_masked_with_the_given_probability() -> None:
    torch.manual_seed(0)
    mask = torch.ones(400, 101, dtype=torch.long)
    mask[0, :50] = 0  # padding on the left
    mask[1, 40:] = 0
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": mask}
    found = mask_tokens(inputs, 0.3)
    assert found["input_ids"] is inputs["input_ids"]
    kept = found["attention_mask"]
    assert kept.dtype == mask.dtype
    assert bool((kept[:, 0] == mask[:, 0]).all())
    assert kept[0, 50] == 1
    assert not bool((kept > mask).any())
    share = kept[2:, 1:].double().mean()
    assert share == pytest.approx(0.7, abs=0.012)  # five standard deviations of the mean of 39,800 draws


@pytest.mark.parametrize(
    "settings", [{}, {"feature_layer": 0}, {"features": "backbone"}, {"feature_layer": 0, "features": "backbone"}]
)
@pytest.mark.parametrize("kind", ENCODERS)
def test_tokens_are_masked_in_training_only_and_not_for_the_retriever(kind: str, settings: dict[str, Any]) -> None:
    model, plain = (
        stirred(make_plus_model(HEAD_TASKS, kind, token_dropout=share, **settings)).double() for share in (0.5, 0.0)
    )
    batch = make_batch(kind)
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "task_ids")}
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    frozen = model.forward_frozen_layers(**inputs)
    model.train()
    outputs = []
    for given in (None, frozen):
        torch.manual_seed(3)
        outputs.append(model(**batch, frozen_output=given))
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    torch.testing.assert_close(outputs[0].instances, plain(**batch).instances)
    assert not torch.allclose(outputs[0].logits, plain(**batch).logits)
    assert not torch.allclose(outputs[0].logits, model(**batch).logits)
