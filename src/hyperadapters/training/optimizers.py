"""Learning rates of the parts of a model, when they are trained, and the optimizer of the released implementation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from hyperadapters.config import ModelConfig

LEARNING_RATE = 3e-4
"""Default learning rate of a model without a common adapter."""
COMMON_LEARNING_RATE = 1e-3
"""Default learning rate of a common adapter."""
RETRIEVER_LEARNING_RATE = 3e-3
"""Default learning rate of the retriever and the prototypes of a model with a common adapter."""
HYPERNETWORK_LEARNING_RATE = 5e-5
"""Default learning rate of a hypernetwork with a common adapter, except for this adapter. A generated weight is a sum
over the elements of a code, so that it moves with many weights at once. At the rate of an adapter, the generated part
would fit the training rows of each task within a few dozen steps."""
COMMON_SHARE = 0.5
"""Share of the training steps, from the first, in which a common adapter is trained. The rest of the hypernetwork is
trained in the other steps, so that it learns only what the common adapter has not learned from all tasks."""
DIRECTIONS_LEARNING_RATE = 1e-2
"""Default for heads that read normalised vectors. Hidden states are longer, for example by a factor of 7 on MiniLM."""


def learning_rates(
    config: ModelConfig,
    learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    retriever_learning_rate: float | None = None,
    hypernetwork_learning_rate: float | None = None,
) -> dict[str, float]:
    """Return the learning rates of the parts of a model.

    Args:
        config: Settings of the model with all defaults resolved.
        learning_rate: Learning rate of all parameters without a rate of their own, to which a common adapter belongs.
            Default: `COMMON_LEARNING_RATE` with a common adapter, otherwise `LEARNING_RATE`.
        head_learning_rate: Learning rate of the task heads. Default: `DIRECTIONS_LEARNING_RATE` if they read normalised
            vectors, otherwise `learning_rate`.
        retriever_learning_rate: Learning rate of the retriever and, with a common adapter, of the prototypes. Default:
            `RETRIEVER_LEARNING_RATE` with a common adapter, otherwise `learning_rate`.
        hypernetwork_learning_rate: Learning rate of the hypernetwork, except for its common adapter. Default:
            `HYPERNETWORK_LEARNING_RATE` with a common adapter, otherwise `learning_rate`.

    Returns:
        Learning rates by the beginning of the names of the parameters, of which the first that matches applies.
    """
    if learning_rate is None:
        learning_rate = COMMON_LEARNING_RATE if config.common_adapter else LEARNING_RATE
    heads = DIRECTIONS_LEARNING_RATE if config.head_inputs != "adapted" else learning_rate
    if not config.common_adapter:
        return {
            "heads.": head_learning_rate or heads,
            "method.retriever.": retriever_learning_rate or learning_rate,
            "method.hypernetwork.": hypernetwork_learning_rate or learning_rate,
            "": learning_rate,
        }
    retriever = retriever_learning_rate or RETRIEVER_LEARNING_RATE
    return {
        "heads.": head_learning_rate or heads,
        "method.retriever.": retriever,
        "method.prototypes.": retriever,  # the contrastive losses train them together with the retriever
        "method.hypernetwork.common.": learning_rate,
        "method.hypernetwork.": hypernetwork_learning_rate or HYPERNETWORK_LEARNING_RATE,
        "": learning_rate,
    }


def training_phases(config: ModelConfig) -> dict[str, tuple[float, float]]:
    """Return the training steps in which the parts of a model are trained.

    Args:
        config: Settings of the model with all defaults resolved.

    Returns:
        Begin and end as shares of all steps, by the beginning of the names of the parameters, of which the first that
        matches applies.
    """
    if not config.common_adapter:
        return {"": (0.0, 1.0)}
    return {
        "method.hypernetwork.common.": (0.0, COMMON_SHARE),
        "method.hypernetwork.": (COMMON_SHARE, 1.0),
        "": (0.0, 1.0),
    }


def phased_schedule(optimizer: torch.optim.Optimizer, schedule: Callable[[int], float], num_steps: int) -> LambdaLR:
    """Make a scheduler in which each parameter group passes through a schedule during its own phase.

    Outside its phase, the learning rate of a group is zero.

    Args:
        optimizer: Optimizer whose groups may have a `phase`, a value of `training_phases`. Default: all steps.
        schedule: Function that returns the factor of the learning rate at a step, of a training with `num_steps` steps.
        num_steps: Number of training steps.

    Returns:
        The scheduler.
    """

    def of_phase(begin: float, end: float) -> Callable[[int], float]:
        first, last = begin * num_steps, end * num_steps
        return lambda step: schedule(int((step - first) / (end - begin))) if first <= step < last else 0.0

    return LambdaLR(optimizer, [of_phase(*group.get("phase", (0.0, 1.0))) for group in optimizer.param_groups])


class OfficialAdamW(torch.optim.Optimizer):
    """AdamW as implemented in transformers 4.14, which the released code uses.

    The difference from `torch.optim.AdamW` is that epsilon is added to sqrt(v) before the bias correction:

        p -= lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)

    The difference matters in the first steps, for gradients near epsilon. Weight decay is decoupled and applied after
    the step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Set up the optimizer.

        Args:
            params: Parameters to optimize, or dictionaries of parameter groups.
            lr: Learning rate. Default: 3e-4.
            betas: Decay rates b1 and b2 of the running averages of the gradient and of its square. Default: (0.9,
                0.999).
            eps: Term added to the denominator. Default: 1e-8.
            weight_decay: Coefficient of the weight decay. Default: 0.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Perform one optimization step. Parameters without a gradient do not change.

        Args:
            closure: Function that evaluates the model again and returns the loss.

        Returns:
            The loss that `closure` returns; None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                state["exp_avg"].mul_(beta1).add_(parameter.grad, alpha=1.0 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1.0 - beta2)
                correction = math.sqrt(1.0 - beta2 ** state["step"]) / (1.0 - beta1 ** state["step"])
                scale = state["exp_avg_sq"].sqrt().add_(group["eps"])
                parameter.addcdiv_(state["exp_avg"], scale, value=-group["lr"] * correction)
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        return loss
