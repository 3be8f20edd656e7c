"""Muon for the matrices inside the blocks, AdamW for everything else, as one optimizer.

Muon (Jordan et al., kellerjordan.github.io/posts/muon; torch.optim.Muon) replaces the averaged gradient of a matrix by
the nearest orthogonal one, found by five Newton-Schulz steps. It is meant for hidden matrices, and for the kernels of
hidden convolutions, each as one row per output channel: embeddings, heads, first and last convolutions, and vectors
keep AdamW. Its updates are scaled to the root mean square of AdamW's (Liu et al., arXiv 2502.16982), so both parts
share the learning rate and the weight decay.

Three things differ from torch's own. It takes kernels, too. The steps are computed in the run's precision: torch has
them in bfloat16 only, whose products a CPU without instructions for them computes a hundred times slower than fp32
ones. And where ranks share the matrices, each takes the steps of some of them: torch's, given DTensors, computes every
matrix on every rank, and communicates at each product.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from megatron_vilg.parallel.divided import Ranks, divided, portions
from megatron_vilg.parallel.update_cost import GRAM_ASPECT, STEPS

MOMENTUM = 0.95
"""Of the averaged gradient, with Nesterov's look ahead: Jordan's value."""
COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of ``X``, ``X X^T X`` and ``X X^T X X^T X`` in one step: Jordan's, whose slope at 0 is largest."""
_EPS = 1e-7
"""What the Frobenius norm of an update is at least taken for."""
_RMS = 0.2
"""Root mean square that AdamW's updates have, by which Muon's are scaled (arXiv 2502.16982, section 2.2)."""


class Muon(Optimizer):
    """``torch.optim.Muon`` with Nesterov's momentum and AdamW's scale, in any precision, its work divided among ranks.

    Args:
        params: groups of matrices, or of kernels [out, in, height, width]; whole, or DTensors.
        lr: learning rate.
        dtype: in which Newton-Schulz steps are computed and communicated.
        ranks: those that all hold the same parameters, where those are plain tensors; None: this one alone.
    """

    def __init__(self, params: list[dict[str, Any]], lr: float, dtype: torch.dtype, ranks: Ranks | None = None) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "momentum": MOMENTUM})
        self._dtype = dtype
        self._ranks = ranks

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            for shares in portions(with_grad, self._ranks):
                ahead = [[self._ahead(p, group["momentum"]).to(self._dtype) for p in share] for share in shares]
                for parameter, direction in zip(chain(*shares), divided(orthogonal, ahead, self._ranks), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    size = -group["lr"] * _RMS * math.sqrt(max(direction.shape))
                    parameter.add_(direction.reshape(parameter.shape), alpha=size)

    def _ahead(self, parameter: Tensor, momentum: float) -> Tensor:
        """The averaged gradient as it will be if the next one is like this; of a kernel [out, in * height * width]."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        average: Tensor = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        ahead = parameter.grad.lerp(average, momentum)
        return ahead.flatten(1) if ahead.ndim > 2 else ahead


def orthogonal(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix [m, n] near 1, from 0.7 to 1.2, by Newton-Schulz steps in its own dtype."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=_EPS)
    # In half precision a Gram matrix loses what is small in it, and steps on it alone may diverge.
    by_gram = x.dtype in (torch.float32, torch.float64) and x.shape[1] >= GRAM_ASPECT * x.shape[0]
    x = _steps_on_gram(x) if by_gram else _steps(x)
    return x.T if is_tall else x


def _steps(x: Tensor) -> Tensor:
    linear, cubic, quintic = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear)
    return x


def _steps_on_gram(x: Tensor) -> Tensor:
    """The same steps on ``x x^T`` of the short side, the product of their factors applied to ``x`` once.

    Every factor is a polynomial of the first Gram matrix, so all of them commute (Gram Newton-Schulz, Dao AI Lab 2026,
    dao-lab.ai/blog/2026/gram-newton-schulz).
    """
    linear, cubic, quintic = COEFFICIENTS
    gram = x @ x.T
    product: Tensor | None = None
    for step in range(STEPS):
        factor = torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic)
        factor.diagonal().add_(linear)
        product = factor if product is None else factor @ product
        if step < STEPS - 1:
            gram = factor @ (gram @ factor)
    assert product is not None
    return product @ x


class MuonAdamW(Optimizer):
    """Both optimizers behind one set of groups and one state.

    Args:
        matrices: groups of matrices or kernels, for Muon.
        others: groups for AdamW.
        rates: ``lr``, ``betas`` and ``eps``; Muon shares ``lr``.
        fused: whether AdamW's fused kernel runs on the parameters' device.
        in_bf16: compute Muon's steps in bfloat16, else in fp32.
        ranks: as :class:`Muon` has it.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        rates: dict[str, Any],
        *,
        fused: bool,
        in_bf16: bool,
        ranks: Ranks | None = None,
    ) -> None:
        muon = Muon(matrices, rates["lr"], torch.bfloat16 if in_bf16 else torch.float32, ranks)
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
