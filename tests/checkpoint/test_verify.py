from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vilg.checkpoint.manifest import read_manifest, write_manifest
from megatron_vilg.checkpoint.sources import open_source
from megatron_vilg.checkpoint.tensors import DictSource
from megatron_vilg.checkpoint.verify import differences, output_difference, problems_of
from megatron_vilg.config.schema import ReconstructorConfig
from tests.checkpoint.ckpt_source import memory_source
from tests.tiny_run import write_tiny_run


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


def test_a_value_that_is_nan_in_one_of_two_is_no_difference_of_zero(tmp_path: Path) -> None:
    value = torch.tensor([0.3, 1.7, -2.4])
    broken = value.clone()
    broken[1] = torch.nan
    sources = [DictSource({"model.w": tensor}, None, tmp_path) for tensor in (value, broken)]
    assert differences(*sources) == ["model.w: values differ by up to nan"]


def test_a_weight_of_integers_is_not_sound() -> None:
    source = memory_source()
    values = dict(source.values)
    values["model.norm.weight"] = values["model.norm.weight"].int()
    assert problems_of(DictSource(values, source.manifest, source.path)) == [
        "norm.weight: has element type torch.int32, expected a floating-point type"
    ]


@pytest.fixture(scope="module")
def end_to_end(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a reconstructor."""
    folder = tmp_path_factory.mktemp("end") / "run"
    write_tiny_run(folder, reconstructor=ReconstructorConfig(enabled=True))
    return folder


def test_a_model_with_a_reconstructor_computes_its_logits(end_to_end: Path) -> None:
    with open_source(end_to_end) as run, open_source(end_to_end / "export") as export:
        assert problems_of(run) == problems_of(export) == []
        assert output_difference(run, export) == (0.0, 0.0)


def test_weights_of_a_reconstructor_are_those_of_the_configuration_beside_them(
    end_to_end: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(end_to_end / "export", folder)
    weights = load_file(folder / "model.safetensors")
    weights["reconstructor.mapping.upp.weight"] = weights.pop("reconstructor.mapping.up.weight")
    weights["reconstructor.mapping.down.bias"] = torch.zeros(7)
    save_file(weights, folder / "model.safetensors")
    write_manifest(folder, read_manifest(folder))
    with open_source(folder) as source:
        assert problems_of(source) == [
            "reconstructor.mapping.down.bias: has shape [7], expected [4]",
            "reconstructor.mapping.up.weight: missing",
            "reconstructor.mapping.upp.weight: not part of this model",
        ]
    (folder / "config.json").unlink()
    write_manifest(folder, read_manifest(folder))
    with open_source(folder) as source:
        assert problems_of(source) == []
