"""ZeRO 1, 2, 3 and HSDP by torch's ``fully_shard``; the number means the same with and without a pipeline.

========  ==========================  ===========================  ======================================
``zero``  whole between micro-batches  in each backward             traffic per step, M micro-batches
========  ==========================  ===========================  ======================================
1         weights and gradients        nothing                      1 gather, 1 reduce-scatter
2         weights                      reduce-scatter               1 gather, M reduce-scatters
3         nothing                      reduce-scatter, drop weights 2 M gathers, M reduce-scatters
========  ==========================  ===========================  ======================================

Weights, gradients and optimizer state are sharded between steps in all three, in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from megatron_vilg.models.vilg import ViLG
from megatron_vilg.parallel.mesh import Mesh

Zero = Literal[1, 2, 3]


def apply_zero(
    model: ViLG,
    mesh: Mesh,
    *,
    zero: Zero,
    in_bf16: bool,
    reduce_dtype: torch.dtype = torch.float32,
    cpu_offload: bool = False,
) -> None:
    """Cut every parameter over the axis ``shard``: one unit per block, one for everything else of this part.

    With ``in_bf16`` gathered weights and hidden states are bfloat16; shards, and the gradients that reach the
    optimizer, stay float32. On their way between ranks gradients are of ``reduce_dtype``.
    """
    # With tensor parallelism a block's output is a DTensor's local tensor, which torch sees as a view. It warns of
    # changing that in place; blocks and heads never do (sums are out of place), and gradients are those of one process.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDP(Block|ViLG)\) returned a view tensor", UserWarning)
    grid = mesh.axis("replica", "shard") if mesh.size("replica") > 1 else mesh.axis("shard")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if in_bf16 else None, reduce_dtype=reduce_dtype)
    offload = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if cpu_offload else OffloadPolicy()
    for module in [*model.blocks.values(), model]:
        fully_shard(module, mesh=grid, reshard_after_forward=zero == 3, mp_policy=policy, offload_policy=offload)


def before_backward(model: ViLG, zero: Zero, *, is_last: bool) -> None:
    """Say what the next backward pass of a micro-batch does with gradients and gathered weights."""
    sharded = cast(FSDPModule, model)
    reduces = is_last or zero >= 2
    sharded.set_is_last_backward(reduces)
    sharded.set_requires_gradient_sync(reduces)
    sharded.set_requires_all_reduce(is_last)  # replicas need only the sum over all micro-batches
    sharded.set_reshard_after_backward(is_last or zero == 3)


def release_gathered(models: Sequence[ViLG]) -> None:
    """Drop weights that a forward pass without backward has left whole."""
    for model in models:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
