from __future__ import annotations

import torch

from megatron_vilg.parallel.replicas import Replicas
from tests.helpers import run_distributed


def test_one_process_changes_nothing() -> None:
    alone, value = Replicas(), torch.arange(6.0)
    assert Replicas.of_group() == alone and alone.is_main
    assert alone.part(value) is not None and torch.equal(alone.part(value), value)
    assert alone.whole(value) is value and alone.mean(value) is value
    assert alone.any(True) and not alone.any(False) and alone.from_main("x") == "x"
    assert alone.gather("x") == ["x"]
    alone.fill_from_main([value])
    assert torch.equal(value, torch.arange(6.0))


def _meet() -> dict[str, object]:
    replicas = Replicas.of_group()
    batch = torch.arange(12.0).view(6, 2)
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    unused = torch.nn.Parameter(torch.zeros(3))
    (weight.sum() * float(replicas.rank)).backward()
    replicas.average_gradients([weight, unused])
    filled = [torch.full((2,), float(replicas.rank)), torch.nn.Parameter(torch.full((3,), 5.0 + replicas.rank))]
    replicas.fill_from_main(filled)
    means = replicas.means({"a": torch.tensor(float(replicas.rank)), "b": torch.tensor(5.0)})
    return {
        "part": replicas.part(batch),
        "whole": replicas.whole(replicas.part(batch).requires_grad_()),
        "gradient": weight.grad,
        "unused": unused.grad,
        "means": {name: float(value) for name, value in means.items()},
        "filled": [tensor.tolist() for tensor in filled],
        "any": replicas.any(replicas.rank == 1),
        "none": replicas.any(False),
        "from_main": replicas.from_main(f"rank {replicas.rank}"),
        "gather": replicas.gather("abc"[: replicas.rank]),
        "is_main": replicas.is_main,
    }


def test_three_processes_see_parts_and_know_the_whole() -> None:
    batch = torch.arange(12.0).view(6, 2)
    found = run_distributed(_meet, 3)
    for rank, seen in enumerate(found):
        assert torch.equal(seen["part"], batch[[rank, rank + 3]])
        assert torch.equal(seen["whole"], batch) and not seen["whole"].requires_grad
        assert torch.equal(seen["gradient"], torch.full((2, 2), 1.0)) and seen["unused"] is None
        assert seen["filled"] == [[0.0, 0.0], [5.0, 5.0, 5.0]]
        assert seen["means"] == {"a": 1.0, "b": 5.0}
        assert seen["any"] and not seen["none"] and seen["from_main"] == "rank 0"
        assert seen["gather"] == ["", "a", "ab"]
        assert seen["is_main"] == (rank == 0)
