"""What is compared: backbones, models with generated adapters on them, PEFT's LoRA on them, and batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from hyperadapters import HyperAdapterModel, Task
from hyperadapters.backbones.loading import load_backbone
from hyperadapters.config import Lengths, ModelConfig
from hyperadapters.inference.cache import AdapterCache

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CACHE_BYTES = 2**30  # enough for all tasks of every batch here
LABELS = ("yes", "no", "maybe")
LORA_RANK = 8
LORA_TARGETS = {"bert": ["query", "value"], "t5": ["q", "v"]}


def _bert(**sizes: int) -> nn.Module:
    return BertModel(BertConfig(**sizes), add_pooling_layer=False)


def _t5(**sizes: int) -> nn.Module:
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes))


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "minilm": lambda: load_backbone(MINILM),
    "bert-base": _bert,
    "bert-tiny": lambda: _bert(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256),
    "t5-small": _t5,
    "t5-base": lambda: _t5(d_model=768, d_ff=3072, num_layers=12, num_heads=12),
    "t5-tiny": lambda: _t5(d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2),
}
"""Makers by name; all but MiniLM have the sizes of the model they are named after, and random weights."""


@dataclass(frozen=True)
class Setting:
    """What to measure on.

    Attributes:
        encoder, text_to_text: names of backbones.
        preset: of the models; None is the default preset of each backbone.
        device, dtype: of the backbones; what is trained on them stays in float32, as the library makes it.
        adapter_dim: bottleneck of the generated adapters.
        rows: of a batch.
        tokens: of a row. The figures are of the first number; those of the others carry it in their names.
        data: folder of the benchmark data; figures of other texts do not need it.
        texts: that are answered, from texts to answers.
        new_tokens: that are generated.
        repeats: of each thing that is timed; a half or a third of it for what takes longer.
        max_tasks: tasks of the largest run.
        scale_tasks: numbers of tasks on the way there.
        scale_limit_s: when to stop loading one adapter after the other.
        predict_rows: of the files that are answered.
        train_batches: of an epoch, on which steps are timed.
        train_repeats: of these.
        epoch_rows: training rows of each task for a whole epoch.
        aims: by figure; those without one have none.
    """

    encoder: str = "minilm"
    text_to_text: str = "t5-small"
    preset: str | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    adapter_dim: int = 32
    rows: int = 32
    tokens: tuple[int, ...] = (18, 64)
    data: Path = DATA
    texts: int = 1024
    new_tokens: int = 16
    repeats: int = 15
    max_tasks: int = 10_000
    scale_tasks: tuple[int, ...] = (10, 30, 100, 1000, 10_000)
    scale_limit_s: float = 30.0
    predict_rows: tuple[int, ...] = (1000, 10_000, 100_000)
    train_batches: int = 8
    train_repeats: int = 3
    epoch_rows: int = 24
    aims: Mapping[str, float] = field(default_factory=dict)


def make_backbone(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A backbone in evaluation mode; each call makes another copy of the same weights."""
    torch.manual_seed(0)
    return BACKBONES[name]().to(device=device, dtype=dtype).eval()


def make_tasks(count: int, has_heads: bool = True) -> list[Task]:
    """Tasks of three labels: the same for all where there are heads, otherwise each task's own."""
    if not has_heads:
        names = [f"task_{index}" for index in range(count)]
        return [Task.classification(name, [f"{name}_{label}" for label in LABELS]) for name in names]
    return [Task.classification(f"task_{index}", LABELS) for index in range(count)]


def make_model(setting: Setting, backbone: str, num_tasks: int) -> HyperAdapterModel:
    """A model with generated adapters on a copy of a backbone, in evaluation mode."""
    return make_model_of(setting, backbone, make_tasks(num_tasks, has_heads=has_heads(backbone)))


def make_model_of(
    setting: Setting, backbone: str, tasks: Sequence[Task], lengths: Lengths | None = None
) -> HyperAdapterModel:
    """The same for given tasks and maximum lengths of texts."""
    host = make_backbone(backbone, setting.device, setting.dtype)
    config = ModelConfig(preset=setting.preset, adapter_dim=setting.adapter_dim)
    name = MINILM if backbone == "minilm" else None
    model = HyperAdapterModel(host, tasks, config, name, lengths).eval()
    invent_densities(model)
    return model


@torch.no_grad()
def invent_densities(model: HyperAdapterModel) -> None:
    """Fill the densities that a model routes by after its training, if it has any, with random numbers."""
    densities = model.method.densities
    if densities is not None:
        densities.directions.normal_(std=len(densities.directions) ** -0.5)
        densities.between.fill_(1)
        densities.replace(torch.randn_like(densities.means), torch.ones_like(densities.counts))


def has_heads(backbone: str) -> bool:
    """Whether a backbone is an encoder."""
    return not backbone.startswith("t5")


def preset_of(setting: Setting, backbone: str) -> str:
    """The preset with which models on a backbone are measured."""
    return str(ModelConfig(preset=setting.preset).for_backbone(has_heads(backbone)).preset)


def make_peft(setting: Setting, backbone: str, num_tasks: int) -> Any:
    """PEFT's LoRA of query and value in all layers of a copy of a backbone, an adapter a task, in evaluation mode."""
    from peft import get_peft_model  # not at the top: processes that measure memory without it shall not hold it

    host = make_backbone(backbone, setting.device, setting.dtype)
    config = lora_config(host)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about a name that peft uses
        model = get_peft_model(host, config, adapter_name="task_0", autocast_adapter_dtype=False)
        for index in range(1, num_tasks):
            model.add_adapter(f"task_{index}", config, autocast_adapter_dtype=False)
    return model.eval()


def lora_config(host: nn.Module) -> Any:
    """The settings of PEFT's LoRA; random weights, since one of its two matrices would start at zero."""
    from peft import LoraConfig

    targets = LORA_TARGETS[host.config.model_type]  # type: ignore[union-attr,index]
    return LoraConfig(r=LORA_RANK, target_modules=targets, init_lora_weights=False)


def save_lora(peft: Any, folder: str) -> Path:
    """Save the first adapter of PEFT's model; returns the folder that holds it."""
    peft.save_pretrained(folder, selected_adapters=["task_0"])
    return Path(folder) / "task_0"


def make_batch(setting: Setting, rows: int, tokens: int) -> dict[str, Tensor]:
    """Random token ids, none of them padding."""
    ids = torch.randint(1000, 30_000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(setting.device), "attention_mask": torch.ones_like(ids).to(setting.device)}


def make_task_ids(setting: Setting, rows: int, tasks: int) -> Tensor:
    """Task ids [rows] of so many tasks in turn."""
    return (torch.arange(rows) % tasks).to(setting.device)


def make_uneven_task_ids(setting: Setting, rows: int, tasks: int) -> Tensor:
    """Task ids [rows] as users may send them: each task once, the rest more often of some tasks than of others."""
    shares = 1 / torch.arange(1, tasks + 1)
    more = torch.multinomial(shares, rows - tasks, replacement=True, generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.arange(tasks), more]).to(setting.device)


def adapter_names(rows: int, tasks: int) -> list[str]:
    """What PEFT is told in the place of task ids."""
    return [f"task_{row % tasks}" for row in range(rows)]


@contextmanager
def serving(model: HyperAdapterModel, cache: AdapterCache | None) -> Iterator[None]:
    """As the predictor runs a model: without gradients, with a cache of adapters."""
    with torch.inference_mode(), nullcontext() if cache is None else model.method.adapters_from(cache):
        yield
