"""Trade memory for time: forget activations in the forward pass and compute them again in the backward pass."""

from __future__ import annotations

from typing import Literal

from megatron_vilg.models.layers import Block
from megatron_vilg.models.vilg import ViLG

Recompute = Literal["none", "block", "selective"]


def apply_recompute(model: ViLG, mode: Recompute) -> None:
    """Set what each block forgets: nothing, all but its input, or the inside of attention alone."""
    for block in model.blocks.values():
        assert isinstance(block, Block)
        block.recompute = mode == "block"
        block.attention.recompute = mode == "selective"
