"""The arms of the benchmark: how each is trained, and its first learning rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from efficiency import finetuning_baselines, text_heads
from efficiency.experiment import Cell, Setting, Trained
from efficiency.finetuning_baselines import train_alone, train_shared
from efficiency.library_methods import train_heads_alone, train_own, train_shared_then_task
from efficiency.linear_probe import train_probe
from efficiency.setfit_arm import train_setfit

Train = Callable[[Setting, Cell, Any], Trained]
"""Trains an arm on a cell with a learning rate, None if it has none."""


@dataclass(frozen=True)
class Arm:
    """An arm.

    Attributes:
        train: trains it.
        rate: the learning rate with which a search begins, and that of a run without a search; None where there is
            nothing to choose.
        in_layers: whether it changes the layers above the first few alone, so that their number can be chosen.
    """

    train: Train
    rate: float | None = None
    in_layers: bool = True


LORA_RATE = 3e-3
ADAPTER_RATE = 1e-3
HYPERNETWORK_RATE = 1e-4
PLUS_RATE = 1e-3
PUBLISHED_RATE = 3e-5
"""Of the published network of PHA, and of HyperFormer."""


def own(rate: float, **settings: Any) -> Arm:
    """A method of this library. Args: settings: those of `ModelConfig`."""
    return Arm(partial(train_own, settings), rate)


def own_texts(rate: float, **settings: Any) -> Arm:
    """The same with the heads and the token dropout of `plus`."""
    return own(rate, **text_heads.SETTINGS, **settings)


def without_choice(arm: Arm) -> Arm:
    """An arm with the heads of `plus`, in which all tasks keep their adapters."""
    assert isinstance(arm.train, partial)
    return Arm(partial(arm.train, heads="related"), arm.rate)


def plus(**settings: Any) -> Arm:
    """The preset `plus` with some settings of its own."""
    return own(PLUS_RATE, preset="plus", **settings)


ARMS = {
    "probe": Arm(train_probe, in_layers=False),
    "lora_task": Arm(partial(train_alone, finetuning_baselines.lora), LORA_RATE),
    "lora_shared": Arm(partial(train_shared, finetuning_baselines.lora), LORA_RATE),
    "adapter_task": own(ADAPTER_RATE, method="task_adapter"),
    "adapter_shared": own(ADAPTER_RATE, method="shared_adapter"),
    "hyperformer": own(PUBLISHED_RATE, method="hyperformer"),
    "hyperdecoder": own(HYPERNETWORK_RATE, method="hyperdecoder"),
    "lora_task_texts": own_texts(LORA_RATE, method="task_adapter", form="lora"),
    "lora_shared_texts": own_texts(LORA_RATE, method="shared_adapter", form="lora"),
    "lora32_shared_texts": own_texts(LORA_RATE, method="shared_adapter", form="lora", lora_rank=32, lora_alpha=64.0),
    "adapter_task_texts": own_texts(ADAPTER_RATE, method="task_adapter"),
    "adapter_shared_texts": own_texts(ADAPTER_RATE, method="shared_adapter"),
    "adapter_shared_then_task_texts": Arm(partial(train_shared_then_task, text_heads.SETTINGS), ADAPTER_RATE),
    "hyperformer_texts": own_texts(PUBLISHED_RATE, method="hyperformer"),
    "hyperdecoder_texts": own_texts(HYPERNETWORK_RATE, method="hyperdecoder"),
    "pha_texts": own_texts(PUBLISHED_RATE, preset="paper"),
    "pha": own(PUBLISHED_RATE, preset="paper"),
    "former_plus": own(HYPERNETWORK_RATE, preset="paper", codes="orthogonal", **text_heads.FROZEN_SETTINGS),
    "adapter_shared_frozen_texts": own(ADAPTER_RATE, method="shared_adapter", **text_heads.FROZEN_SETTINGS),
    "plus": plus(),
    "plus_no_common": plus(common_adapter=False),
    "plus_no_texts": plus(head_inputs="adapted"),
    "plus_no_names": plus(label_names=False),
    "plus_no_contrast": plus(contrast="none"),
    "plus_no_token_dropout": plus(token_dropout=0.0),
    "plus_no_phases": Arm(partial(train_own, {"preset": "plus"}, phases=False), PLUS_RATE),
    "plus_no_related": Arm(partial(train_own, {"preset": "plus"}, heads="own"), PLUS_RATE),
    "plus_no_refit": Arm(partial(train_own, {"preset": "plus"}, heads="trained"), PLUS_RATE),
    "plus_no_hypernetwork": own_texts(PLUS_RATE, method="task_adapter"),
    "plus_no_prototypes": own_texts(PLUS_RATE, method="shared_adapter"),
    "plus_no_adapters": Arm(train_heads_alone, in_layers=False),
    "pha_no_instance": own(PUBLISHED_RATE, preset="paper", contrast="prototype"),
    "pha_no_prototype": own(PUBLISHED_RATE, preset="paper", contrast="instance"),
    "pha_no_contrast": own(PUBLISHED_RATE, preset="paper", contrast="none"),
    "ia3_task": Arm(partial(train_alone, finetuning_baselines.ia3), 1e-2),
    "ln_task": Arm(partial(train_alone, finetuning_baselines.layer_norms), 3e-3),
    "prompt_task": Arm(partial(train_alone, finetuning_baselines.prompt), 1e-2, in_layers=False),
    "mpt": Arm(partial(train_shared, finetuning_baselines.multitask_prompt), 3e-2, in_layers=False),
    "full": Arm(partial(train_alone, finetuning_baselines.everything), 1e-4, in_layers=False),
    "setfit": Arm(train_setfit, 3e-5, in_layers=False),
}
ARMS |= {f"{arm}_no_choice": without_choice(ARMS[arm]) for arm in ("plus", "adapter_shared_texts", "lora_shared_texts")}
