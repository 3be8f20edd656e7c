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
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import AdamW, Optimizer
from torch.optim import Muon as TorchMuon

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
            for portion in _portions(with_grad):
                ahead = [self._ahead(p, group["momentum"]).to(self._dtype) for p in portion]
                for parameter, direction in zip(portion, _directions(ahead), strict=True):
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


def _portions(parameters: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Parameters, large ones first, in lists of one mesh each, no longer than that has ranks."""
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in parameters:
        by_mesh.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    for mesh, those in by_mesh.items():
        those.sort(key=Tensor.numel, reverse=True)  # of one size in one list, so that nobody waits long for others
        size = 1 if mesh is None else mesh.size()
        yield from (those[first : first + size] for first in range(0, len(those), size))


def _directions(updates: list[Tensor]) -> list[Tensor]:
    """Orthogonal directions of as many updates as their mesh has ranks, or fewer; of one that is no DTensor.

    Every rank gathers all, one after the other, keeps the one whose place in the list is its own, works on that, and
    sends the result to all.
    """
    first = updates[0]
    if not isinstance(first, DTensor):
        return [orthogonal(update) for update in updates]
    mesh = first.device_mesh
    mine: Tensor | None = None
    for place, update in enumerate(updates):
        assert isinstance(update, DTensor)
        whole = update.full_tensor()
        if _coordinate(place, mesh) == tuple(mesh.get_coordinate() or ()):
            mine = whole
    if mine is not None:
        mine = orthogonal(mine)
    found: list[Tensor] = []
    for place, update in enumerate(updates):
        owner = _coordinate(place, mesh)
        is_mine = owner == tuple(mesh.get_coordinate() or ())
        whole = mine.contiguous() if is_mine and mine is not None else first.to_local().new_empty(update.shape)
        # Along one axis after the other: first to the owner's row, then from that row to all others.
        for axis in reversed(range(mesh.ndim)):
            if mesh.size(axis) > 1:
                dist.broadcast(whole, group=mesh.get_group(axis), group_src=owner[axis])
        found.append(DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False))
    return found


def _coordinate(place: int, mesh: DeviceMesh) -> tuple[int, ...]:
    """Where on the mesh the rank of this number is, counted along the last axis first."""
    coordinate: list[int] = []
    for size in reversed(mesh.shape):
        place, along = divmod(place, size)
        coordinate.insert(0, along)
    return tuple(coordinate)


def orthogonal(
    matrix: Tensor, *, coefficients: tuple[float, float, float] = COEFFICIENTS, steps: int = STEPS, eps: float = _EPS
) -> Tensor:
    """Bring the singular values of a matrix [m, n] near 1, from 0.7 to 1.2, by Newton-Schulz steps in its own dtype."""
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
