"""Shared fixtures: tiny models built from configs, a tiny tokenizer, the golden values. Nothing is downloaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaModel,
)

# Tiny models gain nothing from threads, and sums come out the same however busy the machine is.
torch.set_num_threads(1)

DATA = Path(__file__).parent / "data"
WORDS = [f"w{index}" for index in range(40)] + ["good", "bad", "yes", "no", "red", "blue", ":", "."]
SPECIAL = ["<pad>", "</s>", "<unk>"]
VOCABULARY = SPECIAL + WORDS
ENCODER_SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 80,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
T5_SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}


def tiny_backbone(kind: str, seed: int = 0, **settings: Any) -> nn.Module:
    """A random model of one of the supported architectures, in evaluation mode."""
    torch.manual_seed(seed)
    makers: dict[str, Callable[[], nn.Module]] = {
        "bert": lambda: BertModel(BertConfig(**{**ENCODER_SIZES, **settings}), add_pooling_layer=False),
        "roberta": lambda: RobertaModel(RobertaConfig(**{**ENCODER_SIZES, **settings}), add_pooling_layer=False),
        "xlm-roberta": lambda: XLMRobertaModel(
            XLMRobertaConfig(**{**ENCODER_SIZES, **settings}), add_pooling_layer=False
        ),
        "t5": lambda: T5ForConditionalGeneration(T5Config(**{**T5_SIZES, **settings})),
        "flan-t5": lambda: T5ForConditionalGeneration(
            T5Config(**{**T5_SIZES, "feed_forward_proj": "gated-gelu", **settings})
        ),
        "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**{**T5_SIZES, **settings})),
    }
    return makers[kind]().eval()


ENCODERS = ("bert", "roberta", "xlm-roberta")
ENCODER_DECODERS = ("t5", "flan-t5", "mt5")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer for `VOCABULARY` that ends every input with </s>."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def save_backbone(folder: Path, kind: str = "bert", **settings: Any) -> Path:
    """Write a tiny backbone with its tokenizer to a folder, as `from_pretrained` reads it."""
    tiny_backbone(kind, **settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def empty_keys(model: Any, num_keys: int = 1) -> Tensor:
    """Places for keys of a model's tasks, to be filled in."""
    weight = model.prototypes.weight
    model.prototypes.keys = torch.zeros(len(weight), num_keys, weight.shape[1])
    return model.prototypes.keys


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    return save_backbone(tmp_path / "bert", "bert")


@pytest.fixture
def t5_folder(tmp_path: Path) -> Path:
    return save_backbone(tmp_path / "t5", "t5")


@dataclass(frozen=True)
class Golden:
    """Golden values of the released implementation."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    @property
    def batch(self) -> dict[str, Tensor]:
        return {name: self.tensors[f"inputs/{name}"] for name in ("input_ids", "attention_mask", "labels", "task_ids")}


@pytest.fixture(params=["pha_t5_relu", "pha_t5_gated"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(
        load_file(DATA / f"{request.param}.safetensors"), json.loads((DATA / f"{request.param}.json").read_text())
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
