"""A tensor rank reads its share of whole tensors, rows at a time, and says what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vilg.checkpoint import tensors
from megatron_vilg.checkpoint.share import load_share
from megatron_vilg.checkpoint.tensors import DictSource
from megatron_vilg.errors import CheckpointError

WHOLE = {
    "heads.text.weight": torch.arange(7.0 * 4).view(7, 4),
    "blocks.0.attention.q.weight": torch.arange(16.0).view(4, 4),
    "blocks.0.attention.q.bias": torch.arange(4.0),
    "blocks.0.attention.out.weight": torch.arange(100.0, 116.0).view(4, 4),
    "norm.weight": torch.arange(4.0),
    "embed.codebook": torch.arange(6.0).view(3, 2),
}


def source(**changes: Tensor) -> DictSource:
    return DictSource({f"model.{name}": value for name, value in (WHOLE | changes).items()}, None, Path("folder"))


def share(rank: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Rank ``rank`` of 2, before it is filled."""
    shapes = {"heads.text.weight": (4, 4), "blocks.0.attention.out.weight": (4, 2)}
    shapes |= {"blocks.0.attention.q.weight": (2, 4), "blocks.0.attention.q.bias": (2,)}
    return {name: torch.full(shapes.get(name, value.shape), -1.0, dtype=dtype) for name, value in WHOLE.items()}


@pytest.mark.parametrize("piece_bytes", [1, 40, 1 << 20])
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_gets_its_part(rank: int, piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "PIECE_BYTES", piece_bytes)
    for dtype in (torch.float32, torch.bfloat16):
        state = share(rank, dtype)
        load_share(source(), state, ranks=2, rank=rank)
        mine = slice(2 * rank, 2 * rank + 2)
        head = torch.cat([WHOLE["heads.text.weight"], torch.zeros(1, 4)])  # rows that no token has
        expected = WHOLE | {
            "heads.text.weight": head[4 * rank : 4 * rank + 4],
            "blocks.0.attention.q.weight": WHOLE["blocks.0.attention.q.weight"][mine],
            "blocks.0.attention.q.bias": WHOLE["blocks.0.attention.q.bias"][mine],
            "blocks.0.attention.out.weight": WHOLE["blocks.0.attention.out.weight"][:, mine],
        }
        for name, value in expected.items():
            assert torch.equal(state[name], value.to(dtype)), name


def test_what_does_not_fit_is_named_before_anything_changes() -> None:
    state = share(0) | {"norm.bias": torch.zeros(4)}
    wrong = source(**{"blocks.0.attention.q.bias": torch.zeros(6), "blocks.0.attention.k.bias": torch.zeros(4)})
    with pytest.raises(CheckpointError) as caught:
        load_share(wrong, state, ranks=2, rank=0)
    lines = str(caught.value).splitlines()
    assert lines[0] == "folder: does not fit" and sorted(lines[1:]) == [
        "  blocks.0.attention.k.bias: the model has no such tensor",
        "  blocks.0.attention.q.bias: has shape [6], of which rank 0 of 2 takes [3]; the model wants [2]",
        "  norm.bias: is missing",
    ]
    assert all((value == -1.0).all() for name, value in state.items() if name != "norm.bias")
