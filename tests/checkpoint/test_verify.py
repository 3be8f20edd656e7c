from __future__ import annotations

from pathlib import Path

import torch

from megatron_vilg.checkpoint.tensors import DictSource
from megatron_vilg.checkpoint.verify import differences, problems_of
from tests.checkpoint.ckpt_source import memory_source


def test_types_are_compared_by_rounding_floats_only_and_in_both_directions(tmp_path: Path) -> None:
    value = torch.tensor([0.3, 1.7, -2.4])

    def found(one: torch.Tensor, other: torch.Tensor) -> list[str]:
        sources = [DictSource({"model.w": tensor}, None, tmp_path) for tensor in (one, other)]
        return differences(*sources)

    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert found(value, value.to(dtype)) == found(value.to(dtype), value) == []
    assert found(value, value.bfloat16() + 1) and found(value.bfloat16() + 1, value)
    pairs = [(value, value.to(dtype)) for dtype in (torch.int8, torch.int32, torch.int64)]
    pairs += [(value.half(), value.bfloat16()), (value.long(), value.int()), (value.half(), value.short())]
    for one, other in pairs:
        for pair in ((one, other), (other, one)):
            (line,) = found(*pair)
            types = f"{pair[0].dtype} and {pair[1].dtype}"
            assert line == f"model.w: element types {types}, and neither rounds to the other"


def test_a_weight_of_integers_is_not_sound() -> None:
    source = memory_source()
    values = dict(source.values)
    values["model.norm.weight"] = values["model.norm.weight"].int()
    assert problems_of(DictSource(values, source.manifest, source.path)) == [
        "norm.weight: has element type torch.int32, expected a floating-point type"
    ]
