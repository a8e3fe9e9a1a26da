"""Load what write_adapterhub.py wrote with the package `adapters`, and compare the outputs. Needs no hyperadapters."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import adapters
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSeq2SeqLM

TOLERANCE = 1e-5
"""Of logits; where the largest is above 1, as a share of it."""


def mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def direction(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Direction of what the backbone makes of inputs."""
    return F.normalize(mean(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask), dim=-1)


def compared(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """u + v, and the comparison of u and v, where v is zero for single texts."""
    u = direction(model, given["text_ids"], given["text_mask"])
    if "text_pair_ids" not in given:
        return u, u.new_zeros(len(u), u.shape[1] + 1)
    v = direction(model, given["text_pair_ids"], given["text_pair_mask"])
    return u + v, torch.cat([(u - v).abs(), (u * v).sum(dim=1, keepdim=True)], dim=1)


def features(model: Any, given: dict[str, Tensor], head: dict[str, Any], output: Any) -> Tensor:
    kind, mask = head["reads"][0], given["input_mask"]
    if kind == "layer":
        return F.normalize(mean(output.hidden_states[head["layer"]], mask), dim=-1)
    with adapters.AdapterSetup(None):
        if kind == "backbone":
            return direction(model, given["input_ids"], mask)
        both, comparison = compared(model, given)
    both = F.normalize(both, dim=-1)
    return both if kind == "text_features" else torch.cat([both, comparison], dim=1)


def encoder_logits(model: Any, given: dict[str, Tensor], folder: Path, head: dict[str, Any]) -> Tensor:
    mask, weights = given["input_mask"], load_file(folder / "hyperadapters_head.safetensors")
    output = model(input_ids=given["input_ids"], attention_mask=mask, output_hidden_states=True)
    inputs = mean(output.last_hidden_state, mask)
    if head["reads"] == ["adapted_texts"]:
        inputs = torch.cat(compared(model, given), dim=1)
    if len(head["reads"]) > 1:
        inputs = torch.cat([features(model, given, head, output), F.normalize(inputs, dim=-1)], dim=1)
    return F.linear(inputs, weights["weight"], weights["bias"]) * head["target_std"] + head["target_mean"]


def outputs(model: Any, given: dict[str, Tensor], folder: Path, head: dict[str, Any] | None) -> dict[str, Tensor]:
    if head is not None:
        return {"logits": encoder_logits(model, given, folder, head)}
    batch = {"input_ids": given["input_ids"], "attention_mask": given["input_mask"]}
    # This release of transformers makes a cache of as many layers as the encoder has, which a deeper decoder overruns.
    generated = model.generate(**batch, num_beams=3, max_new_tokens=8, do_sample=False, use_cache=False)
    return {"logits": model(**batch, decoder_input_ids=given["decoder_input_ids"]).logits, "generated": generated}


@torch.no_grad()
def check(folder: Path, how: str) -> float:
    given, exported = load_file(folder / "expected.safetensors"), folder / "export"
    head = json.loads((exported / "hyperadapters_task.json").read_text())["head"]
    if how == "AutoAdapterModel":
        model = adapters.AutoAdapterModel.from_pretrained(folder / "backbone")
    else:
        model = (AutoModel if head else AutoModelForSeq2SeqLM).from_pretrained(folder / "backbone")
        adapters.init(model)
    if model.config.model_type == "mt5":
        # With tied embeddings, which published mT5 models do not have, this release of transformers scales the logits.
        model.config.tie_word_embeddings = False
    without = outputs(model.eval(), given, exported, head)
    model.load_adapter(str(exported), use_safetensors=True, set_active=True)
    found = outputs(model.eval(), given, exported, head)
    scale = max(1.0, float(given["logits"].abs().max()))
    difference = float((found["logits"] - given["logits"]).abs().max()) / scale
    moved = float((without["logits"] - given["logits"]).abs().max()) / scale
    print(f"{folder.name:24} {how:16} difference {difference:.1e}, without the adapter {moved:.1e}")
    assert difference < TOLERANCE < moved
    if "generated" in given:
        assert torch.equal(found["generated"], given["generated"])
    return difference


def main(folder: Path) -> None:
    transformers.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    print(f"adapters {adapters.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    cases = sorted(folder.iterdir())
    worst = max(check(case, "init") for case in cases)
    worst = max(worst, *(check(folder / kind, "AutoAdapterModel") for kind in ("bert", "roberta", "xlm-roberta")))
    print(f"{len(cases)} exports load with equal outputs, within {worst:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
