"""The optimizer of the released implementation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch


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
