"""The Muon optimizer, computing in a type of choice: torch.optim.Muon always orthogonalizes in bfloat16.

On a CPU without bfloat16 instructions that is many times slower. Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, for matrices.

    Args:
        matrices: what learns.
        lr: of a square matrix; a higher one gets it times the root of rows ÷ columns.
        dtype: of the orthogonalization.
        momentum: Nesterov's.

    """

    def __init__(self, matrices: Iterable[torch.Tensor], lr: float, dtype: torch.dtype, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all matrices that have a gradient."""
        if closure is not None:
            raise NotImplementedError("this optimizer takes no closure")
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalize(matrix.grad.lerp(momentum, group["momentum"]).to(self._dtype))
                rate = group["lr"] * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.add_(update, alpha=-rate)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Return about U Vᵀ for the singular value decomposition U S Vᵀ, by Newton and Schulz's iteration."""
    a, b, c = COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide
