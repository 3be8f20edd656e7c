"""This rank's part of a tensor that may be cut over ranks, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``; the tensor itself where it is not cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(part: Tensor, whole: Tensor, last: int | None = None) -> Tensor:
    """``part`` as this rank's part of a tensor that is cut as ``whole`` is.

    Args:
        part: has as many dimensions as ``whole``.
        whole: names the cut; where it is not cut, ``part`` is the answer.
        last: size of the last dimension of the new tensor over all ranks; None: that of ``whole``.
    """
    if not isinstance(whole, DTensor):
        return part
    shape = (*whole.shape[:-1], whole.shape[-1] if last is None else last)
    stride = torch.empty(shape, device="meta").stride()
    placed = DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return placed.to(part.device)  # offloaded parts would have been moved to the mesh's kind of device
