"""Shared fixtures: tiny models built from configs, a tiny tokenizer, the golden values. Nothing is downloaded."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

# Tiny models gain nothing from threads, and sums come out the same however busy the machine is.
torch.set_num_threads(int(os.environ.get("HYPERADAPTERS_TEST_THREADS", "1")))

DATA = Path(__file__).parent / "recorded"
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


BART_SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 80,
    "dropout": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
DECODER_SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "head_dim": 8,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "n_embd": 16,
    "n_layer": 4,
    "n_head": 2,
    "n_positions": 80,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
DISTILBERT_SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "dim": 16,
    "n_layers": 4,
    "n_heads": 2,
    "hidden_dim": 32,
    "max_position_embeddings": 80,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
}
MODERNBERT_SIZES: dict[str, Any] = {**ENCODER_SIZES, "local_attention": 8, "cls_token_id": 2, "sep_token_id": 1}
DEBERTA_SIZES: dict[str, Any] = {
    **ENCODER_SIZES,
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}
MAKERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", ENCODER_SIZES),
    "roberta": ("RobertaModel", ENCODER_SIZES),
    "xlm-roberta": ("XLMRobertaModel", ENCODER_SIZES),
    "mpnet": ("MPNetModel", ENCODER_SIZES),
    "deberta-v2": ("DebertaV2Model", DEBERTA_SIZES),
    "distilbert": ("DistilBertModel", DISTILBERT_SIZES),
    "modernbert": ("ModernBertModel", MODERNBERT_SIZES),
    "t5": ("T5ForConditionalGeneration", T5_SIZES),
    "flan-t5": ("T5ForConditionalGeneration", {**T5_SIZES, "feed_forward_proj": "gated-gelu"}),
    "mt5": ("MT5ForConditionalGeneration", T5_SIZES),
    "bart": ("BartForConditionalGeneration", BART_SIZES),
    "gpt2": ("GPT2LMHeadModel", GPT2_SIZES),
    "llama": ("LlamaForCausalLM", DECODER_SIZES),
    "mistral": ("MistralForCausalLM", {**DECODER_SIZES, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {k: v for k, v in DECODER_SIZES.items() if k != "head_dim"}),
    "qwen3": ("Qwen3ForCausalLM", DECODER_SIZES),
    "gemma": ("GemmaForCausalLM", DECODER_SIZES),
    "gemma2": ("Gemma2ForCausalLM", {**DECODER_SIZES, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3ForCausalLM", {**DECODER_SIZES, "sliding_window": 8, "query_pre_attn_scalar": 8}),
}
"""Class and sizes of a tiny backbone of each architecture."""
WITH_POOLER = ("bert", "roberta", "xlm-roberta", "mpnet")
ENCODERS = ("bert", "roberta", "xlm-roberta")
ENCODER_DECODERS = ("t5", "flan-t5", "mt5")
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


def tiny_backbone(kind: str, seed: int = 0, **settings: Any) -> nn.Module:
    """A random model of one of the supported architectures, in evaluation mode."""
    torch.manual_seed(seed)
    name, sizes = MAKERS[kind]
    model_class: Any = getattr(transformers, name)
    options = {"add_pooling_layer": False} if kind in WITH_POOLER else {}
    model: nn.Module = model_class(model_class.config_class(**{**sizes, **settings}), **options)
    return model.eval()


def tiny_tokenizer(vocabulary: Sequence[str] = VOCABULARY) -> PreTrainedTokenizerFast:
    """A word-level tokenizer for a vocabulary that ends every input with </s>."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def tiny_language_model_tokenizer() -> PreTrainedTokenizerFast:
    """As `tiny_tokenizer`, but as language models have them: nothing ends an input, and nothing is there to pad it."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>", model_max_length=64)


def save_backbone(folder: Path, kind: str = "bert", **settings: Any) -> Path:
    """Write a tiny backbone with its tokenizer to a folder, as `from_pretrained` reads it."""
    tiny_backbone(kind, **settings).save_pretrained(folder)
    (tiny_language_model_tokenizer() if kind in DECODERS else tiny_tokenizer()).save_pretrained(folder)
    return folder


def empty_centroids(model: Any, num_keys: int = 1) -> Tensor:
    """Places for keys of a model's tasks, to be filled in."""
    weight = model.method.prototypes.weight
    model.method.prototypes.centroids = torch.zeros(len(weight), num_keys, weight.shape[1])
    return model.method.prototypes.centroids


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
