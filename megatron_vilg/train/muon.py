"""Muon for the matrices inside the blocks, AdamW for everything else, as one optimizer.

Muon (Jordan et al., kellerjordan.github.io/posts/muon; torch.optim.Muon) replaces the averaged gradient of a matrix by
the nearest orthogonal one, found by five Newton-Schulz steps. It is meant for hidden matrices: embeddings, heads and
vectors keep AdamW. Its updates are scaled to the root mean square of AdamW's (Liu et al., arXiv 2502.16982), so both
parts share the learning rate and the weight decay.

Two things differ from torch's own. The steps are computed in the run's precision: torch has them in bfloat16 only,
whose products a CPU without instructions for them computes a hundred times slower than fp32 ones. And where ranks share
the matrices, each takes the steps of some of them: torch's, given DTensors, computes every matrix on every rank, and
communicates at each product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim import Muon as TorchMuon

from megatron_vilg.parallel.divided import divided, portions

MOMENTUM = 0.95
"""Of the averaged gradient, with Nesterov's look ahead: Jordan's value."""
STEPS = 5
COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of ``X``, ``X X^T X`` and ``X X^T X X^T X`` in one step: Jordan's, whose slope at 0 is largest."""
_EPS = 1e-7
"""What the Frobenius norm of an update is at least taken for."""
_RMS = 0.2
"""Root mean square that AdamW's updates have, by which Muon's are scaled (arXiv 2502.16982, section 2.2)."""


class Muon(TorchMuon):
    """``torch.optim.Muon`` with Nesterov's momentum and AdamW's scale, in any precision, its work divided among ranks.

    Args:
        params: groups of matrices; whole, or DTensors.
        lr: learning rate.
        dtype: in which Newton-Schulz steps are computed and communicated.
    """

    def __init__(self, params: list[dict[str, Any]], lr: float, dtype: torch.dtype) -> None:
        super().__init__(params, lr=lr, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            for portion in portions(with_grad):
                ahead = [self._ahead(p, group["momentum"]).to(self._dtype) for p in portion]
                for parameter, direction in zip(portion, divided(orthogonal, ahead), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction, alpha=-group["lr"] * _RMS * math.sqrt(max(parameter.shape)))

    def _ahead(self, parameter: Tensor, momentum: float) -> Tensor:
        """The averaged gradient as it will be if the next one is like this."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        average: Tensor = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)


def orthogonal(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix [m, n] near 1, from 0.7 to 1.2, by Newton-Schulz steps in its own dtype."""
    linear, cubic, quintic = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(STEPS):
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
        muon = Muon(matrices, rates["lr"], torch.bfloat16 if in_bf16 else torch.float32)
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
