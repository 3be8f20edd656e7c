"""One tensor rank's share of a model's weights, read piece by piece: no rank ever holds a whole tensor of others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_vilg.checkpoint.layout import Layout, Part, cut_of
from megatron_vilg.checkpoint.tensors import MODEL, TensorInfo, TensorSource, part_of, pieces
from megatron_vilg.errors import CheckpointError


@torch.no_grad()
def load_share(source: TensorSource, state: Mapping[str, Tensor], *, ranks: int, rank: int) -> None:
    """Fill ``state`` (canonical name to this rank's part) in place from whole tensors; element types may differ.

    Args:
        source: whole tensors, in any of our formats.
        state: what rank ``rank`` of ``ranks`` holds, cut as ``parallel/plan.py`` says; one rank holds everything.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or one too many; then nothing was changed. Or a file
            cannot be read.
    """
    layout = Layout(tensor=ranks, pipeline=1, num_layers=1)
    parts: dict[str, Part] = {}
    stored = {name.partition(".")[2] for name in source.tensors if part_of(name) == MODEL}
    problems = [f"{name}: the model has no such tensor" for name in sorted(stored - state.keys())]
    for name, tensor in state.items():
        full = f"{MODEL}.{name}"
        if name not in stored:
            problems.append(f"{name}: is missing")
            continue
        info = source.tensors[full]
        parts[name] = layout.parts(full, info, cut_of(full, info, info))[rank]
        mine = parts[name].shape(info.shape)
        if mine != tuple(tensor.shape):
            taken = f", of which rank {rank} of {ranks} takes {list(mine)}" if ranks > 1 else ""
            problems.append(f"{name}: has shape {list(info.shape)}{taken}; the model wants {list(tensor.shape)}")
    if problems:
        raise CheckpointError(f"{source.path}: does not fit\n" + "\n".join(f"  {problem}" for problem in problems))
    for name, part in parts.items():
        _fill(state[name], source, f"{MODEL}.{name}", part)


def _fill(into: Tensor, source: TensorSource, name: str, part: Part) -> None:
    info: TensorInfo = source.tensors[name]
    done = 0
    for start, stop in pieces(info):
        is_last = stop == info.num_rows  # padding follows it
        if part.dim == 0 and (stop <= part.start or start >= part.stop) and not is_last:
            continue
        rows = part.of(source.rows(name, start, stop), start, info.num_rows)
        into[done : done + len(rows)] = rows
        done += len(rows)
    assert done == len(into), f"{name}: {done} rows instead of {len(into)}"
