"""The optimizers that must leave frozen prototypes where they are, and one that does not."""

from __future__ import annotations

from typing import Any

import torch


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.9, weight_decay=1e-3)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def adam_with_coupled_decay(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1)


class Lars(torch.optim.Optimizer):
    """SGD at a rate in proportion to |w| / (|g| + decay · |w|) per parameter (You et al. 2017).

    Without a gradient there is no such ratio, and the plain rate serves.
    """

    def __init__(self, parameters: Any, rate: float = 0.3, trust: float = 0.05) -> None:
        super().__init__(parameters, {"rate": rate, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        decay, momentum = 1e-3, 0.9
        for group in self.param_groups:
            for parameter in group["params"]:
                size, of_gradient = parameter.norm(), parameter.grad.norm()
                ratio = group["trust"] * size / (of_gradient + decay * size)
                rate = group["rate"] * torch.where(of_gradient == 0, 1, ratio)
                velocity = self.state[parameter].setdefault("velocity", torch.zeros_like(parameter))
                velocity.mul_(momentum).add_(rate * (parameter.grad + decay * parameter))
                parameter.sub_(velocity)
