"""What one rank of a layout keeps, counted on the real cut model without allocating it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_vilg.config.schema import RunConfig
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.parallel.torch_compat import fake_store

FLOAT = 4


@dataclass(frozen=True, slots=True)
class LocalBytes:
    """Bytes of one rank that stay from step to step, and what is whole for a while in between."""

    weights: int
    """float32 shards."""
    gradients: int
    """float32 shards, from the first reduction to the update."""
    optimizer: int
    """AdamW's two moments and step counts."""
    buffers: int
    """The codebook, on stages that embed."""
    whole_weights: int
    """Gathered weights between micro-batches: those of the rank's stages for ZeRO 1 and 2, none for ZeRO 3."""
    whole_gradients: int
    """Gradients that wait for their reduction between micro-batches: ZeRO 1 with several micro-batches only."""
    largest_unit: int
    """Gathered weights of the largest unit (a block, or everything else of a stage)."""

    @property
    def lasting(self) -> int:
        """Weights, gradients, optimizer, buffers."""
        return self.weights + self.gradients + self.optimizer + self.buffers


@contextmanager
def pretend_to_be(rank: int, world_size: int) -> Iterator[None]:
    """A process group in which this process is one of ``world_size``; nothing is sent, and nobody else is there."""
    dist.init_process_group("fake", store=fake_store(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_bytes(parts: list[ViLG], run: RunConfig) -> LocalBytes:
    """Count the bytes of a rank's parts, as ``train.engine.cut_parts`` gives them."""
    several = run.parallel.num_microbatches > 1
    named = [named for part in parts for named in part.named_parameters()]
    shards = sum(_shard(parameter).numel() for _, parameter in named)
    units = [unit for part in parts for unit in _units(part)]
    each = 2 if run.train.precision == "bf16" else FLOAT
    whole = sum(units)
    return LocalBytes(
        weights=shards * FLOAT,
        gradients=shards * FLOAT,
        optimizer=2 * shards * FLOAT + len(named) * FLOAT,
        buffers=sum(buffer.nbytes for part in parts for buffer in part.buffers()),
        whole_weights=whole * each if run.parallel.zero < 3 else 0,
        whole_gradients=whole * FLOAT if run.parallel.zero == 1 and several else 0,
        largest_unit=max(units) * each,
    )


def _shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _units(part: ViLG) -> Iterator[int]:
    """Values of each unit that is gathered at once, of this rank of ``tp``."""
    blocks = [sum(map(_gathered, block.parameters())) for block in part.blocks.values()]
    yield from blocks
    yield sum(map(_gathered, part.parameters())) - sum(blocks)


def _gathered(parameter: Tensor) -> int:
    """Values of a parameter once its shards are together, on one rank of ``tp``."""
    if not isinstance(parameter, DTensor):
        return parameter.numel()
    names = parameter.device_mesh.mesh_dim_names or ()
    is_cut = "tp" in names and parameter.placements[names.index("tp")].is_shard()
    return parameter.numel() // (parameter.device_mesh["tp"].size() if is_cut else 1)
