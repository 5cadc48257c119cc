"""Muon (Jordan and others, 2024, https://kellerjordan.github.io/posts/muon/), updates scaled as in arXiv 2502.16982.

torch has one too, which computes in bfloat16: a CPU without instructions for that takes a hundred times as long.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Muon(torch.optim.Optimizer):
    """For matrices alone: the momentum is brought to singular values near 1 before it is taken off the weights.

    The root mean square of an update is 0.2 times `lr`, as AdamW's are: both may share one learning rate.
    """

    def __init__(
        self, matrices: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["average"] = torch.zeros_like(matrix)
                average = state["average"]
                average.lerp_(matrix.grad, 1 - momentum)
                update = orthogonal(matrix.grad.lerp(average, momentum))
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.add_(update, alpha=-0.2 * rate * max(matrix.shape) ** 0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values brought to about 1: between 0.7 and 1.2 (Newton-Schulz, quintic)."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    a, b, c = QUINTIC
    for _ in range(STEPS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
