"""Work on whole tensors, divided among ranks: results, who does what, and what is left alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from megatron_vilg.parallel.divided import divided, portions
from tests.helpers import run_distributed

SHAPES = [(4, 6), (6, 4), (8, 8), (5, 3), (2, 2), (1, 7)]


def whole_tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def work(tensor: Tensor) -> Tensor:
    return tensor.cumsum(0) + tensor.sum()  # needs all of it


def on_a_mesh(shape: tuple[int, ...]) -> tuple[int, list[Tensor]]:
    """How much this rank did, and the results it has."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")[-len(shape) :])
    placements = [Replicate(), Shard(0)][-len(shape) :]
    tensors = [distribute_tensor(tensor, mesh, placements) for tensor in whole_tensors()]
    done, found = 0, {}

    def counted(tensor: Tensor) -> Tensor:
        nonlocal done
        done += 1
        return work(tensor)

    for portion in portions(tensors):
        for tensor, result in zip(portion, divided(counted, portion), strict=True):
            found[next(place for place, each in enumerate(tensors) if each is tensor)] = result.to_local()  # type: ignore[attr-defined]
    return done, [found[place] for place in range(len(SHAPES))]


def test_every_rank_has_every_result_and_did_its_share() -> None:
    expected = [work(tensor) for tensor in whole_tensors()]
    for mesh, shares in (((2,), [3, 3]), ((2, 2), [2, 2, 1, 1])):
        ranks = run_distributed(on_a_mesh, len(shares), mesh)
        assert [done for done, _ in ranks] == shares
        for _, results in ranks:
            torch.testing.assert_close(results, expected, rtol=0, atol=0)


def test_plain_tensors_are_worked_on_where_they_are() -> None:
    tensors = whole_tensors()
    assert [len(portion) for portion in portions(tensors)] == [1] * len(tensors)
    torch.testing.assert_close(list(divided(work, tensors[:1])), [work(tensors[0])], rtol=0, atol=0)


def test_large_ones_come_first() -> None:
    sizes = [portion[0].numel() for portion in portions(whole_tensors())]
    assert sizes == sorted(sizes, reverse=True)
