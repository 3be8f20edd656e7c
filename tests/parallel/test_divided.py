"""Work on whole tensors, divided among ranks: results, who does what, and what is left alone."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from megatron_vilg.parallel.divided import SHARE_NUMEL, divided, portions
from tests.helpers import run_distributed

SHAPES = [(4, 6), (6, 4), (8, 8), (5, 3), (2, 2), (1, 7)]


def whole_tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def work(tensor: Tensor) -> Tensor:
    return tensor.cumsum(0) + tensor.sum()  # needs all of it


def on_a_mesh(shape: tuple[int, ...], share_numel: int) -> tuple[int, list[Tensor]]:
    """How much this rank did, and the results it has."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")[-len(shape) :])
    placements = [Replicate(), Shard(0)][-len(shape) :]
    tensors = [distribute_tensor(tensor, mesh, placements) for tensor in whole_tensors()]
    done, found = 0, {}

    def counted(tensor: Tensor) -> Tensor:
        nonlocal done
        done += 1
        return work(tensor)

    for shares in portions(tensors, share_numel=share_numel):
        for tensor, result in zip(chain(*shares), divided(counted, shares), strict=True):
            found[next(place for place, each in enumerate(tensors) if each is tensor)] = result.to_local()  # type: ignore[attr-defined]
    return done, [found[place] for place in range(len(SHAPES))]


@pytest.mark.parametrize(
    ("mesh", "share_numel", "done"),
    [
        ((2,), 1, [3, 3]),
        ((2,), SHARE_NUMEL, [2, 4]),  # of 64 and 4, and of 24, 24, 15 and 7 elements
        ((2, 2), 1, [2, 2, 1, 1]),
        ((2, 2), SHARE_NUMEL, [1, 1, 1, 3]),
    ],
)
def test_every_rank_has_every_result_and_did_its_share(
    mesh: tuple[int, ...], share_numel: int, done: list[int]
) -> None:
    expected = [work(tensor) for tensor in whole_tensors()]
    ranks = run_distributed(on_a_mesh, len(done), mesh, share_numel)
    assert [count for count, _ in ranks] == done
    for _, results in ranks:
        torch.testing.assert_close(results, expected, rtol=0, atol=0)


def test_fewer_tensors_than_ranks() -> None:
    for _, results in run_distributed(two_of_them, 4):
        torch.testing.assert_close(results, [work(tensor) for tensor in whole_tensors()[:2]], rtol=0, atol=0)


def two_of_them() -> tuple[int, list[Tensor]]:
    mesh = init_device_mesh("cpu", (4,))
    (shares,) = portions([distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in whole_tensors()[:2]])
    return len(shares), [result.to_local() for result in divided(work, shares)]  # type: ignore[attr-defined]


def test_plain_tensors_that_all_ranks_hold() -> None:
    for done, results in run_distributed(plain_ones, 2):
        torch.testing.assert_close(results, [work(tensor) for tensor in whole_tensors()], rtol=0, atol=0)
        assert done in (2, 4)


def plain_ones() -> tuple[int, list[Tensor]]:
    mesh = init_device_mesh("cpu", (2,))
    tensors = whole_tensors()
    (shares,) = portions(tensors, mesh)
    done = 0

    def counted(tensor: Tensor) -> Tensor:
        nonlocal done
        done += 1
        return work(tensor)

    found = dict(zip(map(id, chain(*shares)), divided(counted, shares, mesh), strict=True))
    return done, [found[id(tensor)] for tensor in tensors]


def test_plain_tensors_are_worked_on_where_they_are() -> None:
    tensors = whole_tensors()
    (shares,) = portions(tensors)
    assert len(shares) == 1
    expected = [work(tensor) for tensor in sorted(tensors, key=Tensor.numel, reverse=True)]
    torch.testing.assert_close(list(divided(work, shares)), expected, rtol=0, atol=0)


def test_shares_are_even_and_end_where_they_are_full() -> None:
    """By elements, largest first: 64 | 24, 24 | 15, 7 | 4 with 48 a portion, and all together without a limit."""
    numels = [[tensor.numel() for tensor in shares[0]] for shares in portions(whole_tensors(), share_numel=48)]
    assert numels == [[64], [24, 24], [15, 7, 4]]
    assert [len(shares[0]) for shares in portions(whole_tensors())] == [len(SHAPES)]
