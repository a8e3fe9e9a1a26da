"""What several test files use: tiny models built from configs, tokenizers, tasks, batches. Nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from hyperadapters.backbones.architectures import ARCHITECTURES
from hyperadapters.config import ModelConfig, Recipe, Task, parse
from hyperadapters.core import AdapterWeights, OwnAdapter
from hyperadapters.data.examples import Example
from hyperadapters.errors import RecipeError
from hyperadapters.fewshot.add_task import FitReport
from hyperadapters.model.model import HyperAdapterModel

RECORDED = Path(__file__).parent / "recorded"
"""Golden values of the released implementation, and checkpoints that earlier versions wrote."""
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
FORMS = ("bottleneck", "lora")
FORM_SETTINGS: dict[str, dict[str, Any]] = {
    "bottleneck": {"adapter_dim": 4},
    "lora": {"form": "lora", "lora_rank": 2, "lora_alpha": 3.0},
}
SIZES: dict[str, Any] = {"adapter_dim": 4, "prototype_dim": 8, "hidden_dim": 6}
FROZEN_TEXTS: dict[str, Any] = {
    "preset": "paper",
    "codes": "orthogonal",
    "head_inputs": "pair_features",
    "label_names": True,
}
"""Settings of codes that start orthogonal, and of heads that also read texts as the frozen backbone encodes them."""
HIDDEN_SIZE = 16
HEAD_TASKS = [
    Task.classification("colour", ["red", "blue", "green"]),
    Task.regression("size"),
    Task.classification("mood", ["bad", "good"]),
]
TEXT_TASKS = [Task.text_to_text("colour"), Task.text_to_text("size"), Task.text_to_text("mood")]
PAIR_TASKS = [
    Task.classification("same", ["no", "yes"], fields=("text", "text_pair")),
    Task.regression("size"),
    Task.classification("mood", ["bad", "good"]),
]
MANY_LABELS = ("bad", "blue", "good", "no", "red")


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


def empty_centroids(model: Any, per_task: int = 1) -> Tensor:
    """Give the tasks of a model routing centroids of zeros, and return them, to be filled in: [T, per_task, p]."""
    weight = model.method.prototypes.weight
    model.method.prototypes.centroids = torch.zeros(len(weight), per_task, weight.shape[1])
    return model.method.prototypes.centroids


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


def tokenizer_of(style: str) -> PreTrainedTokenizerFast:
    """A tokenizer for `VOCABULARY`.

    Args:
        style: "plain" is `tiny_tokenizer`, "bert" has [CLS] and [SEP], "roberta" has <s> and a double separator.
    """
    if style == "plain":
        return tiny_tokenizer()
    start, end = ("[CLS]", "[SEP]") if style == "bert" else ("<s>", "</s>")
    words = {word: index for index, word in enumerate(VOCABULARY) if word not in ("</s>", VOCABULARY[-1])}
    words |= {end: 1, start: len(VOCABULARY) - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pair = f"{start} $A {end} $B:1 {end}:1" if style == "bert" else f"{start} $A {end} {end} $B {end}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", pair=pair, special_tokens=[(end, 1), (start, len(VOCABULARY) - 1)]
    )
    types = ["token_type_ids"] if style == "bert" else []
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token=start,
        sep_token=end,
        model_max_length=64,
        model_input_names=["input_ids", *types, "attention_mask"],
    )


# Models


def kind_of(kind: str) -> str:
    return ARCHITECTURES.get(kind, ARCHITECTURES["t5"]).kind  # FLAN-T5 has the model type of T5


def make_model(kind: str, form: str = "bottleneck", seed: int = 0, **settings: Any) -> HyperAdapterModel:
    """A model on a tiny backbone, its adapters large enough to show."""
    backbone = tiny_backbone(kind)
    torch.manual_seed(seed + 1)
    tasks = HEAD_TASKS if kind_of(kind) == "encoder" else TEXT_TASKS
    model = HyperAdapterModel(backbone, tasks, ModelConfig(**{"preset": "paper", **FORM_SETTINGS[form], **settings}))
    with torch.no_grad():
        for module in (model.method.hypernetwork, model.shared_adapters):
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_method_model(kind: str, method: str, **settings: Any) -> HyperAdapterModel:
    """A model of one of the methods on a tiny backbone, all trainable parameters but the heads large enough to show."""
    backbone = tiny_backbone(kind)
    torch.manual_seed(1)
    tasks = HEAD_TASKS if kind_of(kind) == "encoder" else TEXT_TASKS
    model = HyperAdapterModel(
        backbone, tasks, ModelConfig(**{"preset": "paper", **SIZES, "method": method, **settings})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.startswith("heads"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_plus_model(tasks: list[Task] = PAIR_TASKS, kind: str = "bert", **settings: Any) -> HyperAdapterModel:
    """A fresh model of the preset `plus` on a tiny backbone, with a tokenizer."""
    backbone = tiny_backbone(kind)
    torch.manual_seed(1)
    model = HyperAdapterModel(backbone, tasks, parse(ModelConfig, {"preset": "plus", **SIZES, **settings}))
    model.tokenizer = tiny_tokenizer()
    return model.eval()


def make_frozen_texts_model(tasks: list[Task] = PAIR_TASKS, kind: str = "bert", **settings: Any) -> HyperAdapterModel:
    """A fresh model with `FROZEN_TEXTS` on a tiny backbone, with a tokenizer."""
    return make_plus_model(tasks, kind, **{**FROZEN_TEXTS, **settings})


def stirred(model: HyperAdapterModel) -> HyperAdapterModel:
    """The model with everything trained large enough to show: adapters of the preset `plus` start at no change."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def lived_in(kind: str, own: Iterable[str] = ("mood",), **settings: Any) -> HyperAdapterModel:
    """A model of three tasks, in which everything that a task can have is there and differs from task to task."""
    model = make_model(kind, **settings)
    model.tokenizer = tiny_tokenizer()
    with torch.no_grad():
        empty_centroids(model, model.adapter_config.centroids_per_task).normal_()
        model.method.thresholds.copy_(torch.tensor([0.1, -0.2, -torch.inf]))
        for name in own:
            task_id = model.task_id(name)
            weights = model.method.adapters(torch.tensor([task_id]))
            changed = AdapterWeights({part: 1.5 * tensor + 0.01 for part, tensor in weights.items()})
            model.method.own_adapters[str(task_id)] = OwnAdapter(changed)
    if model.heads is not None:
        model.heads.set_target_scale(1, [1.0, 2.5, 7.0])
        model.heads.temperature.copy_(torch.tensor([1.7, 1.0, 0.6]))
        bounds = torch.linspace(0.9, 0.1, model.heads.error_bounds[0].numel()).view(2, -1)
        model.heads.error_bounds[[0, 2]] = torch.stack([bounds, bounds.square()])
    return model.eval()


def rows_of(task: Task, per_label: int = 2) -> list[dict[str, Any]]:
    """Examples of a task: each label has words of its own."""
    if task.kind == "regression":
        return [{"text": f"w{n} w{n + 9}", "label": 0.5 * n} for n in range(2 * per_label)]
    if task.is_multi_label:
        every = range(per_label * 2 ** len(task.labels))
        sets = [[label for place, label in enumerate(task.labels) if n >> place & 1] for n in every]
        return [
            {
                "text": " ".join([f"w{n % 30}", *(f"w{30 + task.labels.index(label)}" for label in labels)]),
                "label": labels,
            }
            for n, labels in enumerate(sets)
        ]
    if task.kind == "text-to-text":
        return [{"text": f"w{n} w{n + 9} good", "label": f"w{n} red"} for n in range(2 * per_label)]
    return [
        {"text": f"w{index} w{20 + n} w{index}", "label": label}
        for index, label in enumerate(task.labels)
        for n in range(per_label)
    ]


NEW = Task.classification("new", MANY_LABELS)
NEW_ROWS = rows_of(NEW)[1:]  # one label has one row only, so that exactly the steps asked for are taken


def add_new(model: HyperAdapterModel, **options: Any) -> FitReport:
    return model.add_task(NEW, NEW_ROWS, **{"max_steps": 2, **options})


def state_of(model: HyperAdapterModel) -> dict[str, Any]:
    """What an export must leave as it is."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "names": [name for name, _ in model.named_modules()],
        "revision": model.task_table.revision,
    }


# Batches


def make_batch(kind: str, rows: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Up to eight rows of several lengths and of all three tasks.

    Of a decoder, the last two tokens of each row are the answer.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, 7, dtype=torch.long)
    for row in range(rows):
        mask[row, 7 - row % 3 :] = 0
    ids = torch.randint(3, 40, (rows, 7), generator=generator).masked_fill(mask == 0, 0)
    batch = {"input_ids": ids, "attention_mask": mask, "task_ids": torch.tensor([1, 0, 2, 0, 1, 2, 2, 1])[:rows]}
    if kind_of(kind) == "encoder":
        batch["labels"] = torch.tensor([0.3, 2.0, 1.0, 0.0, -1.5, 0.0, 1.0, 0.4])[:rows]
    elif kind_of(kind) == "encoder-decoder":
        batch["labels"] = torch.randint(3, 40, (rows, 4), generator=generator)
    else:
        from_end = mask.flip(1).cumsum(1).flip(1)
        batch["labels"] = ids.masked_fill((from_end > 2) | (mask == 0), -100)
    return batch


def select_rows(batch: dict[str, Tensor], rows: Tensor | list[int]) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in batch.items()}


def pair_examples(count: int = 24) -> list[Example]:
    """Rows of `PAIR_TASKS`; a pair is the same text twice or two different ones."""
    rows = []
    for row in range(count):
        text = f"w{row % 9} w{3 * row % 17} w{row % 5}"
        rows.append(Example(0, text, text if row % 2 else f"w{20 + row % 7} red", row % 2))
        rows.append(Example(1, f"{text} {'w30 ' * (row % 4)}", None, float(row % 4)))
        rows.append(Example(2, f"{text} {('bad', 'good')[row % 2]}", None, row % 2))
    return rows


def pair_recipe(folder: Path, model: dict[str, Any], has_validation: bool = True) -> Recipe:
    """A short training of one pair task on a tiny backbone."""
    save_backbone(folder / "bert")
    splits = {}
    for split, count in (("train", 40), ("validation", 16), ("test", 16)):
        if split != "validation" or has_validation:
            rows = [
                {"text": e.text, "text_pair": e.text_pair, "label": "ny"[int(e.target or 0)]}
                for e in pair_examples(count)[::3]
            ]
            splits[split] = f"{folder}/same-{split}.jsonl"
            Path(splits[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "backbone": str(folder / "bert"),
        "model": model,
        "data": {"max_length": 64},
        "training": {"max_steps": 4, "batch_size": 8, "eval_steps": 2},
        "tasks": [{"name": "same", "fields": ["text", "text_pair"], "source": {"path": splits}}],
    }
    return parse(Recipe, recipe, RecipeError)


def bare_outputs(backbone: nn.Module, kind: str, batch: dict[str, Tensor]) -> Tensor:
    """Hidden states of an encoder, logits of the others, without adapters."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if kind_of(kind) == "encoder-decoder":
        inputs["labels"] = batch["labels"]
    with torch.no_grad():
        output = backbone(**inputs)
    return output.last_hidden_state if kind_of(kind) == "encoder" else output.logits


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5, of the largest element where that is above 1.

    The models compared are in float64. Only what the library does in float32 is rounded to 1e-7 there, so that no
    order of summation, which differs between processors and shapes, comes near the tolerance.
    """
    largest = max([1.0, *expected[expected.isfinite()].abs().flatten().tolist()])
    torch.testing.assert_close(found, expected, atol=1e-5 * largest, rtol=0)


# Parameters


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """A part of the full grid in which every two values of different axes still occur together.

    A fault that depends on one or two of the parameters is found as the whole grid would find it; one that needs three
    certain values together may be missed. The choice is greedy and always the same: the combination that has the most
    pairs that were not there yet is next, and of several such the first of the grid.
    """
    grid = list(product(*map(range, map(len, axes))))
    pairs = {places: set(combinations(enumerate(places), 2)) for places in grid}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        best = max(grid, key=lambda places: len(pairs[places] & missing))
        missing -= pairs[best]
        chosen.append(tuple(axis[place] for axis, place in zip(axes, best, strict=True)))
    return chosen
