"""The weights alone out of a training checkpoint, without the optimizer's state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_vilg.checkpoint.manifest import Manifest, read_sound_manifest
from megatron_vilg.errors import CheckpointError

PREFIX = "model."
"""In front of the names of weights in a training checkpoint."""


def load_model_weights(path: Path, state: Mapping[str, Tensor]) -> Manifest:
    """Fill ``state`` (canonical name to tensor, as ``Module.state_dict`` gives it) in place from a checkpoint folder.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, or lacks one of the names in its shape; then nothing
            was changed.
    """
    manifest = read_sound_manifest(path)
    try:
        reader = dcp.FileSystemReader(path)
        stored = reader.read_metadata().state_dict_metadata
        problems = [
            f"{name}: expected {tuple(tensor.shape)}, the checkpoint has {_shape(stored.get(PREFIX + name))}"
            for name, tensor in sorted(state.items())
            if _shape(stored.get(PREFIX + name)) != tuple(tensor.shape)
        ]
        if problems:
            raise CheckpointError(f"{path}: does not fit\n" + "\n".join(f"  {problem}" for problem in problems))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            dcp.load({PREFIX + name: tensor for name, tensor in state.items()}, storage_reader=reader, no_dist=True)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    return manifest


def _shape(entry: object) -> tuple[int, ...] | None:
    return tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
