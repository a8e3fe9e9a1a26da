"""The arms of the benchmark: how each is trained, and the first grid of its learning rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from efficiency import finetuning_baselines
from efficiency.experiment import Cell, Setting, Trained
from efficiency.finetuning_baselines import train_alone, train_shared
from efficiency.library_methods import train_own, train_text_heads
from efficiency.linear_probe import train_probe
from efficiency.setfit_arm import train_setfit

Train = Callable[[Setting, Cell, Any], Trained]
"""Trains an arm on a cell with a learning rate, None if it has none."""


@dataclass(frozen=True)
class Arm:
    """An arm.

    Attributes:
        train: trains it.
        grid: learning rates to try first, in steps of about three; none where there is nothing to choose.
        in_layers: whether it changes the layers above the first few alone, so that their number can be chosen.
    """

    train: Train
    grid: tuple[float, ...]
    in_layers: bool = True


ADAPTER_GRID = (3e-4, 1e-3, 3e-3)
HYPERNETWORK_GRID = (3e-5, 1e-4, 3e-4)
ARMS = {
    "probe": Arm(train_probe, (), in_layers=False),
    "lora_task": Arm(partial(train_alone, finetuning_baselines.lora), (3e-4, 1e-3, 3e-3)),
    "lora_shared": Arm(partial(train_shared, finetuning_baselines.lora), (3e-4, 1e-3, 3e-3)),
    "adapter_task": Arm(partial(train_own, {"method": "task_adapter"}), ADAPTER_GRID),
    "adapter_shared": Arm(partial(train_own, {"method": "shared_adapter"}), ADAPTER_GRID),
    "hyperformer": Arm(partial(train_own, {"method": "hyperformer"}), HYPERNETWORK_GRID),
    "hyperdecoder": Arm(partial(train_own, {"method": "hyperdecoder"}), HYPERNETWORK_GRID),
    "pha": Arm(partial(train_own, {"preset": "paper"}), HYPERNETWORK_GRID),
    "plus": Arm(partial(train_own, {"preset": "plus"}), HYPERNETWORK_GRID),
    "plus_no_orthogonal": Arm(partial(train_own, {"preset": "plus", "codes": "trunk"}), HYPERNETWORK_GRID),
    "plus_no_texts": Arm(partial(train_own, {"preset": "plus", "head_inputs": "adapted"}), HYPERNETWORK_GRID),
    "plus_no_names": Arm(partial(train_own, {"preset": "plus", "label_names": False}), HYPERNETWORK_GRID),
    "plus_no_contrast": Arm(partial(train_own, {"preset": "plus", "contrast": "none"}), HYPERNETWORK_GRID),
    "plus_no_hypernetwork": Arm(partial(train_own, {"preset": "plus", "method": "task_adapter"}), ADAPTER_GRID),
    "plus_no_adapters": Arm(train_text_heads, (), in_layers=False),
    "pha_no_instance": Arm(partial(train_own, {"preset": "paper", "contrast": "prototype"}), HYPERNETWORK_GRID),
    "pha_no_prototype": Arm(partial(train_own, {"preset": "paper", "contrast": "instance"}), HYPERNETWORK_GRID),
    "pha_no_contrast": Arm(partial(train_own, {"preset": "paper", "contrast": "none"}), HYPERNETWORK_GRID),
    "ia3_task": Arm(partial(train_alone, finetuning_baselines.ia3), (3e-3, 1e-2, 3e-2)),
    "ln_task": Arm(partial(train_alone, finetuning_baselines.layer_norms), (1e-3, 3e-3, 1e-2)),
    "prompt_task": Arm(partial(train_alone, finetuning_baselines.prompt), (3e-3, 1e-2, 3e-2), in_layers=False),
    "mpt": Arm(partial(train_shared, finetuning_baselines.multitask_prompt), (1e-2, 3e-2, 1e-1), in_layers=False),
    "full": Arm(partial(train_alone, finetuning_baselines.everything), (3e-5, 1e-4, 3e-4), in_layers=False),
    "setfit": Arm(train_setfit, (1e-5, 3e-5, 1e-4), in_layers=False),
}
