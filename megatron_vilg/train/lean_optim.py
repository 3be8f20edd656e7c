"""AdamW with quantised moments (torchao): 2 or 1 bytes of optimizer state per parameter instead of 8.

8 bits: Dettmers et al., arXiv 2110.02861, blocks of 256 values with one scale. 4 bits: Li et al., arXiv 2309.01507,
blocks of 128. Here matrices are quantised and vectors are not, and a block never leaves its row, so that a matrix cut
by rows (or into columns of whole blocks) has the same numbers in every layout.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from megatron_vilg.config.check_engine import LEAN, OTHER_OPTIMIZER
from megatron_vilg.errors import MissingPackageError
from megatron_vilg.parallel.local import local_part, placed_like

SMALLEST = 4096
"""Tensors with fewer values are not quantised (as in bitsandbytes)."""
_CLASSES = {"adamw_8bit": "AdamW8bit", "adamw_4bit": "AdamW4bit"}


def lean_adamw(groups: list[dict[str, Any]], name: str, rates: dict[str, Any]) -> Optimizer:
    """torchao's AdamW with 8 or 4 bits per moment. Weights in bf16 are rounded stochastically, weights in fp32 are not.

    Raises:
        MissingPackageError: torchao is not installed.
    """
    try:
        base: Any = getattr(importlib.import_module("torchao.optim"), _CLASSES[name])
    except ImportError as error:
        raise MissingPackageError(f"optim.name={name}: {error}. {OTHER_OPTIMIZER}") from error
    block = LEAN[name]

    class LeanAdamW(base):
        """Its update, with moments that can be named and cut."""

        def new_moment(self, parameter: Tensor, signed: bool) -> Tensor:
            """Zeros; ``signed`` for the first moment."""
            part = local_part(parameter)
            if not is_quantised(parameter, block) or not part.numel():
                return torch.zeros_like(parameter)
            return placed_like(self._subclass_zeros(part, signed, block), parameter)

        _new_buffer = new_moment

        def step(self, closure: Any = None) -> Any:
            # torchao compiles the update. On a CPU that takes longer than it saves, and needs a C++ compiler.
            on_cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
            with torch.compiler.set_stance("force_eager") if on_cpu else contextlib.nullcontext():
                return super().step(closure)

    return LeanAdamW(groups, **rates, block_size=block, bf16_stochastic_round=True)


def is_quantised(parameter: Tensor, block: int) -> bool:
    """Whether its moments are: a matrix, not small, whose rows, or this rank's part of them, are whole blocks."""
    return parameter.ndim >= 2 and parameter.numel() >= SMALLEST and local_part(parameter).shape[-1] % block == 0


def open_moment(optimizer: Optimizer, moment: Tensor, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a moment consists of, each with the ending of its name; writing to them changes the moment.

    A plain moment is itself, without ending. A quantised one is ``.codes``, uint8 of the parameter's shape (4 bits: two
    values in a byte, so half as wide), and ``.scale``, float32 with one value per block of a row.
    """
    block = getattr(optimizer, "block_size", 0)
    if not block or not is_quantised(parameter, block):
        yield "", moment
        return
    part, inside = local_part(parameter), local_part(moment)
    widths = {".codes": 2 if block == LEAN["adamw_4bit"] else 1, ".scale": block}
    if not part.numel():  # a rank without rows
        tensors = {".codes": inside.to(torch.uint8), ".scale": inside.float()}
    else:
        tensors = {".codes": inside.codes, ".scale": inside.scale}  # type: ignore[attr-defined]
    for name, width in widths.items():
        tensor = tensors[name].reshape(*part.shape[:-1], part.shape[-1] // width)
        yield name, placed_like(tensor, parameter, parameter.shape[-1] // width)
