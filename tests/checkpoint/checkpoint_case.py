"""A small state, and what keeps checkpoints of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import Manifest
from megatron_vilg.config.schema import CheckpointConfig

State = dict[str, dict[str, Tensor]]


def make_state(step: int, size: int = 64) -> State:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"w": torch.randn(size, size, generator=generator), "b": torch.randn(size, generator=generator)},
        "optimizer": {"step.w": torch.tensor(float(step))},
    }


def empty_state(size: int = 64) -> State:
    return {part: {k: torch.full_like(v, -1.0) for k, v in d.items()} for part, d in make_state(0, size).items()}


def assert_equal(found: State, wanted: State) -> None:
    for part, tensors in wanted.items():
        for name, tensor in tensors.items():
            assert torch.equal(found[part][name], tensor), f"{part}.{name}"


def keeper(folder: Path, **config: int) -> Checkpointer:
    return Checkpointer(folder, CheckpointConfig(**config))


def save(checkpointer: Checkpointer, step: int) -> Path:
    return checkpointer.save(step, make_state(step), Manifest(kind="test", step=step, samples_seen=10 * step))
