"""Initial weights as a pure function of (seed, parameter name), so that every layout starts from the same numbers."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_vilg.parallel.torch_compat import local_box

RESIDUAL_OUTPUTS = ("attention.out.weight", "mlp.down.weight")
"""Projections that end in a residual sum; they start smaller by ``sqrt(2 * num_layers)`` (GPT-2, CogView)."""

FAN_IN_PART = "reconstructor."
"""Part whose weights keep the size of what passes them: N(0, 1 / fan-in)."""


def normal_values(name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    """N(0, std) for one parameter, always whole and on the CPU: float32 of ``shape``."""
    # torch's CPU generator looks at the low 32 bits of its seed only, so both must be mixed into them.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def initial_value(name: str, shape: tuple[int, ...], seed: int, std: float, num_layers: int) -> Tensor:
    """One whole parameter as training starts, on the CPU: matrices and tables normal, norms one, biases zero."""
    if len(shape) == 1:
        return torch.full(shape, 1.0 if name.endswith(".weight") else 0.0)
    scale = std / math.sqrt(2 * num_layers) if name.endswith(RESIDUAL_OUTPUTS) else std
    if name.startswith(FAN_IN_PART):
        scale = math.prod(shape[1:]) ** -0.5
    return normal_values(name, shape, seed, scale)


@torch.no_grad()
def init_weights(model: nn.Module, *, seed: int, std: float, num_layers: int) -> None:
    """Fill every parameter in place with its ``initial_value``.

    Of a cut parameter this rank's part is filled; at most one whole parameter exists at a time.
    """
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.numel() == 0:
            continue
        values = initial_value(name, tuple(parameter.shape), seed, std, num_layers)
        local.copy_(values[local_box(parameter)] if isinstance(parameter, DTensor) else values)
