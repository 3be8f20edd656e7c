"""A nested state as tensors by dotted name, and in what it differs from what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_vilg.errors import CheckpointError


def flatten(state: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Tensors by dotted name, as torch.distributed.checkpoint names them.

    Raises:
        CheckpointError: a key is no string, a leaf is no tensor, or two leaves have one name.
    """
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str):
            raise CheckpointError(f"state[{name}]: key is a {type(key).__name__}; keys of a state are strings")
        if isinstance(value, Mapping):
            found = flatten(value, f"{name}.")
        elif isinstance(value, Tensor):
            found = {name: value}
        else:
            raise CheckpointError(
                f"state[{name}]: is a {type(value).__name__}; a state holds tensors, numbers go to Manifest.counters"
            )
        twice = flat.keys() & found.keys()
        if twice:
            raise CheckpointError(f"state[{sorted(twice)[0]}]: the name occurs twice")
        flat.update(found)
    return flat


def mismatches(flat: Mapping[str, Tensor], stored: Mapping[str, Any], expected: set[str]) -> Iterator[str]:
    """One line per tensor whose name, shape or dtype differs between state and checkpoint."""
    for name in sorted(flat.keys() - stored.keys()):
        yield f"{name}: missing in the checkpoint"
    for name in sorted(stored.keys() - expected):
        yield f"{name}: in the checkpoint, but not expected"
    for name in sorted(flat.keys() & stored.keys()):
        entry, tensor = stored[name], flat[name]
        if not isinstance(entry, TensorStorageMetadata):
            yield f"{name}: not a tensor in the checkpoint"
        elif entry.size != tensor.size():
            yield f"{name}: checkpoint has shape {tuple(entry.size)}, expected {tuple(tensor.size())}"
        elif entry.properties.dtype != tensor.dtype:
            yield f"{name}: checkpoint has {entry.properties.dtype}, expected {tensor.dtype}"
