"""Muon for the matrices inside the blocks, AdamW for everything else, as one optimizer.

Muon (Jordan et al., kellerjordan.github.io/posts/muon; torch.optim.Muon) replaces the averaged gradient of a matrix by
the nearest orthogonal one, found by five Newton-Schulz steps in bf16. It is meant for hidden matrices: embeddings,
heads and vectors keep AdamW. Its updates are scaled to the root mean square of AdamW's (Liu et al., arXiv 2502.16982),
so both parts share the learning rate and the weight decay. Where matrices are cut over ranks, DTensor gathers what the
products need.
"""

from __future__ import annotations

from typing import Any

from torch.optim import AdamW, Muon, Optimizer

MOMENTUM = 0.95
"""Of the averaged gradient, with Nesterov's look ahead: Jordan's value."""


class MuonAdamW(Optimizer):
    """Both optimizers behind one set of groups and one state.

    Args:
        matrices: groups of matrices, for Muon.
        others: groups for AdamW.
        rates: ``lr``, ``betas`` and ``eps``; Muon shares ``lr``.
        fused: whether AdamW's fused kernel runs on the parameters' device.
    """

    def __init__(
        self, matrices: list[dict[str, Any]], others: list[dict[str, Any]], rates: dict[str, Any], *, fused: bool
    ) -> None:
        muon = Muon(matrices, lr=rates["lr"], momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
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
