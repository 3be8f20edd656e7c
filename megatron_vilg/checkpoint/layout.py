"""Which rank of a tensor x pipeline layout holds which part of which tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vilg.checkpoint.tensors import TensorInfo, parameter_of
from megatron_vilg.errors import CheckpointError
from megatron_vilg.parallel.layout import stage_layers
from megatron_vilg.parallel.plan import Cut, rule_of, shard_dim

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_LAST = ("norm.", "heads.", "reconstructor.")
"""Beginnings of names that only the last stage has."""
_UNCUT = ("embed.codebook", "reconstructor.")
"""Beginnings of names outside the table of cuts: a buffer, and a part that is never cut."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank holds of a tensor."""

    dim: int | None = None
    """Dimension that is cut; None: everything."""
    start: int = 0
    stop: int = 0
    padding: int = 0
    """Rows of zeros behind the part, where a vocabulary does not divide by the ranks."""

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the part."""
        if self.dim is None:
            return whole
        size = self.stop - self.start + self.padding
        return (*whole[: self.dim], size, *whole[self.dim + 1 :])

    def of(self, rows: Tensor, first: int, num_rows: int) -> Tensor:
        """What belongs to the part of some rows of the tensor, which stand at ``first`` of ``num_rows``."""
        if self.dim is None:
            return rows
        if self.dim:
            return rows.narrow(self.dim, self.start, self.stop - self.start)
        low, high = max(self.start, first), min(self.stop, first + len(rows))
        own = rows[low - first : max(low, high) - first] if low < high else rows[:0]
        is_last = first + len(rows) == num_rows
        if not (self.padding and is_last):
            return own
        return torch.cat([own, own.new_zeros((self.padding, *own.shape[1:]))])


@dataclass(frozen=True, slots=True)
class Layout:
    """Ranks of a model: ``tensor`` of them share each layer, ``pipeline`` of them share the layers."""

    tensor: int
    pipeline: int
    num_layers: int

    def folder(self, tensor_rank: int, stage: int) -> str:
        """Folder of a rank, as Megatron-LM names it."""
        return f"mp_rank_{tensor_rank:02d}_{stage:03d}"

    def stage_of(self, name: str) -> int:
        """Stage that holds a tensor, by full name."""
        parameter = parameter_of(name)
        if match := _BLOCK.match(parameter):
            layer = int(match[1])
            return next(
                number for number, layers in enumerate(stage_layers(self.num_layers, self.pipeline)) if layer in layers
            )
        return self.pipeline - 1 if parameter.startswith(_LAST) else 0

    def parts(self, name: str, info: TensorInfo, cut: int | None) -> list[Part]:
        """One part per tensor rank."""
        if cut is None or self.tensor == 1:
            return [Part()] * self.tensor
        size = info.shape[cut]
        each = math.ceil(size / self.tensor)
        bounds = [(min(rank * each, size), min((rank + 1) * each, size)) for rank in range(self.tensor)]
        return [Part(cut, start, stop, each - (stop - start)) for start, stop in bounds]


def cut_of(name: str, info: TensorInfo, whole: TensorInfo | None) -> int | None:
    """Dimension along which tensor ranks cut a tensor.

    Args:
        name: full name.
        info: its shape.
        whole: the parameter itself; optimizer state of another shape, such as a step count, is copied.
    """
    if whole is None or info.shape != whole.shape:
        return None
    parameter = parameter_of(name)
    return None if parameter.startswith(_UNCUT) else shard_dim(parameter)


def check_layout(layout: Layout, num_heads: int, tensors: Mapping[str, TensorInfo], cuts: Mapping[str, int]) -> None:
    """Refuse layouts that cannot hold the model.

    Raises:
        CheckpointError: with every rule that is broken and the values that work.
    """
    problems = []
    works = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    if layout.tensor < 1 or num_heads % layout.tensor:
        problems.append(
            f"--target-tensor-parallel-size={layout.tensor}: must divide the {num_heads} attention heads. "
            f"Works: {', '.join(map(str, works))}."
        )
    if not 1 <= layout.pipeline <= layout.num_layers:
        problems.append(
            f"--target-pipeline-parallel-size={layout.pipeline}: must leave each stage a layer. "
            f"Works: 1 to {layout.num_layers}."
        )
    for name, dim in cuts.items():
        divides = tensors[name].shape[dim] % max(1, layout.tensor) == 0
        if not problems and not divides and rule_of(parameter_of(name)).cut is not Cut.VOCABULARY:
            problems.append(f"{name} {list(tensors[name].shape)} cannot be cut in {layout.tensor} along {dim}.")
    if problems:
        raise CheckpointError("\n".join(problems))
