"""Muon for the matrices inside the blocks, AdamW for everything else, as one optimizer.

Muon (Jordan et al., kellerjordan.github.io/posts/muon; torch.optim.Muon) replaces the averaged gradient of a matrix by
the nearest orthogonal one, found by five Newton-Schulz steps. It is meant for hidden matrices: embeddings, heads and
vectors keep AdamW. Its updates are scaled to the root mean square of AdamW's (Liu et al., arXiv 2502.16982), so both
parts share the learning rate and the weight decay. Where matrices are cut over ranks, DTensor gathers what the products
need.

The steps are computed in the run's precision: torch has them in bfloat16 only, whose products a CPU without
instructions for them computes a hundred times slower than fp32 ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

MOMENTUM = 0.95
"""Of the averaged gradient, with Nesterov's look ahead: Jordan's value."""


class MuonInFp32(Muon):
    """``torch.optim.Muon`` with Nesterov's momentum and the scale of AdamW, its Newton-Schulz steps in fp32."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                average = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(average, group["momentum"])
                direction = orthogonal(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Bring the singular values of a matrix [m, n] near 1, from 0.7 to 1.2, by Newton-Schulz steps in its own dtype.

    Args:
        coefficients: of ``X``, ``X X^T X`` and ``X X^T X X^T X`` in one step.
        steps: how many.
        eps: what the Frobenius norm is at least taken for.
    """
    linear, cubic, quintic = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear)
    return x.T if is_tall else x


class MuonAdamW(Optimizer):
    """Both optimizers behind one set of groups and one state.

    Args:
        matrices: groups of matrices, for Muon.
        others: groups for AdamW.
        rates: ``lr``, ``betas`` and ``eps``; Muon shares ``lr``.
        fused: whether AdamW's fused kernel runs on the parameters' device.
        in_bf16: compute Muon's steps in bfloat16, else in fp32.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        rates: dict[str, Any],
        *,
        fused: bool,
        in_bf16: bool,
    ) -> None:
        of_matrices = Muon if in_bf16 else MuonInFp32
        muon = of_matrices(matrices, lr=rates["lr"], momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
        adamw = AdamW(others, **rates, fused=fused)
        # The groups are the same objects in both places, so that a new learning rate reaches the one that steps.
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._parts = (muon, adamw)
        for part in self._parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for part in self._parts:
            part.step()
