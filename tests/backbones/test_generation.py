"""Generation of language models: the prompt is read once, and any setting of end and padding tokens works."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCABULARY, pairwise, save_backbone, tiny_backbone
from torch import Tensor, nn
from transformers import GenerationConfig

from hyperadapters import HyperAdapterModel, Predictor, Task

LISTED_ENDS = [1, 5]
PROMPTS = [[7, 8, 9, 10], [11], [12, 13]]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 3},
]


def make_model(kind: str, folder: Path | None = None, **settings: Any) -> HyperAdapterModel:
    """A model of two tasks in float64 whose adapters differ."""
    tasks = [Task.text_to_text("a"), Task.text_to_text("b")]
    if folder is None:
        model = HyperAdapterModel(tiny_backbone(kind, **settings), tasks)
    else:
        model = HyperAdapterModel.from_backbone(str(save_backbone(folder, kind, **settings)), tasks)
    for parameter in model.method.hypernetwork.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def batch(left: bool = False) -> dict[str, Tensor]:
    length = max(map(len, PROMPTS))
    ids, mask = torch.zeros(len(PROMPTS), length, dtype=torch.long), torch.zeros(len(PROMPTS), length, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        place = slice(length - len(prompt), length) if left else slice(0, len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def set_ends(model: HyperAdapterModel, ends: Any, padding: int | None) -> None:
    config: Any = model.backbone.generation_config
    config.eos_token_id, config.pad_token_id = ends, padding


@pytest.mark.parametrize(
    ("kind", "ends", "options"), pairwise(["gpt2", "llama", "t5"], [LISTED_ENDS, 1, None], OPTIONS), ids=str
)
def test_a_list_of_end_tokens_and_no_padding_token_generate(kind: str, ends: Any, options: dict[str, Any]) -> None:
    model = make_model(kind)
    set_ends(model, ends, None)
    task_ids = torch.tensor([0, 1, 0])
    torch.manual_seed(0)
    found = model.generate(**batch(), task_ids=task_ids, max_new_tokens=5, **options)
    assert len(found) == len(PROMPTS) * options.get("num_return_sequences", 1)
    if not options.get("do_sample"):
        per_row = options.get("num_return_sequences", 1)
        for row, prompt in enumerate(PROMPTS):
            alone = model.generate(
                torch.tensor([prompt]), task_ids=task_ids[row : row + 1], max_new_tokens=5, **options
            )
            new = found[row * per_row : (row + 1) * per_row, 0 if kind == "t5" else 4 :]
            own = alone[:, 0 if kind == "t5" else len(prompt) :]
            width = min(new.shape[1], own.shape[1])
            assert torch.equal(new[:, :width], own[:, :width])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_a_generation_stops_at_each_of_several_end_tokens(kind: str) -> None:
    model = make_model(kind)
    ids = torch.tensor([[7, 8, 9]])
    set_ends(model, None, None)
    free = model.generate(ids, task_ids=torch.tensor([0]), max_new_tokens=6)[0, 1 if kind == "t5" else 3 :].tolist()
    set_ends(model, [41, free[2]], None)
    found = model.generate(ids, task_ids=torch.tensor([0]), max_new_tokens=6)[0, 1 if kind == "t5" else 3 :].tolist()
    assert found == free[: free.index(free[2]) + 1]


def test_a_generation_config_given_by_the_user_keeps_its_padding() -> None:
    model = make_model("llama")
    set_ends(model, LISTED_ENDS, None)
    config = GenerationConfig(eos_token_id=[5], pad_token_id=9, max_new_tokens=3)
    options: dict[str, Any] = {"generation_config": config}
    model.passes._set_padding(options)
    assert "pad_token_id" not in options
    assert len(model.generate(**batch(), task_ids=torch.tensor([0, 1, 0]), **options)) == len(PROMPTS)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_predictor_answers_with_the_settings_of_llama_3(kind: str, tmp_path: Path) -> None:
    model = make_model(kind, tmp_path / kind)
    expected = [found.text for found in Predictor(model)(["w1 w2 w3", "w4"], task="a")]
    set_ends(model, LISTED_ENDS, None)
    found = list(Predictor(model)(["w1 w2 w3", "w4"], task="a"))
    for text, answer in zip(expected, found, strict=True):
        assert text is not None
        assert answer.text == " ".join(takewhile(lambda word: word != VOCABULARY[5], text.split(" ")))


class Calls:
    """Counts the tokens that a layer reads in each of its calls."""

    def __init__(self, layer: nn.Module) -> None:
        self.shapes: list[tuple[int, int]] = []
        layer.register_forward_pre_hook(lambda _, inputs: self.shapes.append(tuple(inputs[0].shape[:2])))


LAYERS = {"gpt2": "transformer.h", "llama": "model.layers"}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("routed", [True, False])
def test_layers_below_the_features_read_the_prompt_once(kind: str, routed: bool) -> None:
    model = make_model(kind)
    calls = Calls(model.backbone.get_submodule(LAYERS[kind]).get_submodule("0"))
    task_ids = None if routed else torch.tensor([0, 1, 0])
    model.generate(**batch(), task_ids=task_ids, max_new_tokens=3, min_new_tokens=3)
    assert calls.shapes == [(3, 4), (3, 1), (3, 1)]


@pytest.mark.parametrize("kind", LAYERS)
def test_a_predictor_reads_the_prompt_once(kind: str, tmp_path: Path) -> None:
    model = make_model(kind, tmp_path / kind)
    calls = Calls(model.backbone.get_submodule(LAYERS[kind]).get_submodule("0"))
    list(Predictor(model, decline=False)(["w1 w2", "w3 w4"]))
    assert calls.shapes[0][1] == 3  # with the line break that ends a prompt
    assert all(length == 1 for _, length in calls.shapes[1:])


@pytest.mark.parametrize(
    ("kind", "options", "route", "left"),
    pairwise(tuple(LAYERS), OPTIONS[:3], ["nearest", "soft"], [True, False]),
    ids=str,
)
def test_one_pass_generates_what_two_passes_do(kind: str, options: dict[str, Any], route: Any, left: bool) -> None:
    model, inputs = make_model(kind), batch(left)
    one = model.generate_with_tasks(**inputs, route=route, max_new_tokens=5, **options)
    lower_output = model.forward_lower_layers(**inputs)
    two = model.generate_with_tasks(**inputs, route=route, lower_output=lower_output, max_new_tokens=5, **options)
    assert torch.equal(one.tokens, two.tokens)
    assert torch.equal(one.task_ids, two.task_ids)
    assert one.instances is not None
    assert two.instances is not None
    torch.testing.assert_close(one.instances, two.instances, atol=1e-5, rtol=0)


def test_a_prompt_read_in_parts_is_encoded_before() -> None:
    model = make_model("llama")
    expected = model.generate(**batch(), max_new_tokens=4)
    found = model.generate(**batch(), max_new_tokens=4, prefill_chunk_size=2)
    assert torch.equal(found, expected)
