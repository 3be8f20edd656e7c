"""The only file that imports from modules which torch keeps to itself; seen working with torch 2.13."""

from __future__ import annotations

from torch.distributed import Store
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_box(tensor: DTensor) -> tuple[slice, ...]:
    """Where this rank's part of a tensor lies in the whole, as one slice per dimension."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def fake_store() -> Store:
    """A meeting place for the backend ``fake``, which importing it registers: collectives that send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()
