from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_vilg.checkpoint import dcp_write, tensors
from megatron_vilg.checkpoint.export import load_model_folder
from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import FILE_NAME, Manifest, read_sound_manifest
from megatron_vilg.checkpoint.owner import Process, partial_of
from megatron_vilg.checkpoint.reshape import merge, shard
from megatron_vilg.checkpoint.run_folder import write_run_folder
from megatron_vilg.checkpoint.sources import open_source
from megatron_vilg.checkpoint.tensors import DictSource
from megatron_vilg.checkpoint.transfer import Options
from megatron_vilg.config.schema import CheckpointConfig, ModelConfig
from megatron_vilg.errors import CheckpointError
from tests.checkpoint.ckpt_source import (
    STEP,
    assert_same,
    manifest_for,
    memory_source,
    nested,
    random_values,
    write_checkpoint,
)
from tests.tiny import tiny_config


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ModelConfig, list[tuple[int, int]]]:
    """A small model, and two tensor x pipeline layouts that fit it."""
    heads = draw(st.sampled_from([1, 2, 4]))
    layers = draw(st.integers(1, 5))
    config = tiny_config(
        num_layers=layers,
        num_heads=heads,
        width=4 * heads * draw(st.sampled_from([1, 2])),
        text_vocab_size=draw(st.integers(7, 30)),
        image_vocab_size=draw(st.integers(3, 20)),
        qk_norm=draw(st.booleans()),
        sandwich_norm=draw(st.booleans()),
        codebook_dim=draw(st.sampled_from([0, 3])),
        segment_embedding=draw(st.booleans()),
    )
    pairs = [
        (draw(st.sampled_from([t for t in (1, 2, 4) if heads % t == 0])), draw(st.integers(1, layers)))
        for _ in range(2)
    ]
    return config, pairs


_WAYS = given(
    case=layouts(),
    optimizer=st.booleans(),
    piece=st.sampled_from([1, 64, 4 << 20]),
    part=st.sampled_from([None, 1, 300]),
)
_ON_DISK = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=4, **_ON_DISK)
@_WAYS
def test_any_way_through_the_formats_is_the_identity(tmp_path_factory, case, optimizer, piece, part) -> None:
    _go_through_the_formats(tmp_path_factory.mktemp("way"), case, optimizer, piece, part)


@pytest.mark.slow
@settings(max_examples=30, **_ON_DISK)
@_WAYS
def test_more_ways_through_the_formats_are_the_identity(tmp_path_factory, case, optimizer, piece, part) -> None:
    _go_through_the_formats(tmp_path_factory.mktemp("way"), case, optimizer, piece, part)


def _go_through_the_formats(folder: Path, case: Any, optimizer: bool, piece: int, part: int | None) -> None:
    config, pairs = case
    source = memory_source(config, optimizer=optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "PIECE_BYTES", piece)
        if part is not None:
            patch.setattr(dcp_write, "ONE_FILE_BYTES", 0)
            patch.setattr(dcp_write, "PART_BYTES", part)
        shard(source, folder / "a", *pairs[0], optimizer=optimizer)
        with open_source(folder / "a") as ranks:
            shard(ranks, folder / "b", *pairs[1], optimizer=optimizer)
        with open_source(folder / "b") as ranks:
            if optimizer:  # without it the trainer could not go on
                write_run_folder(ranks, folder / "c")
            else:
                merge(ranks, folder / "c")
        with open_source(folder / "c") as checkpoint:
            manifest = merge(checkpoint, folder / "d", optimizer=optimizer, file_bytes=8000)
    for name in "abcd":
        with open_source(folder / name) as found:
            assert_same(found, source.values)
    assert (manifest.step, manifest.samples_seen) == (STEP, 70)
    assert manifest.model == dataclasses.asdict(config)


@pytest.mark.parametrize(
    ("limit", "part"),
    [(0, 64 << 20), (0, 200), (1 << 30, 64 << 20)],
    ids=["a file per tensor", "large tensors in parts", "one file"],
)
def test_the_trainer_loads_what_shard_wrote(tmp_path: Path, monkeypatch, limit: int, part: int) -> None:
    monkeypatch.setattr(dcp_write, "ONE_FILE_BYTES", limit)
    monkeypatch.setattr(dcp_write, "PART_BYTES", part)
    source = memory_source()
    write_run_folder(source, tmp_path / "run")
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints", CheckpointConfig())
    path = checkpointer.latest()
    assert path is not None and path.name == "step-00000007"
    state = nested({name: torch.zeros_like(value) for name, value in source.values.items()})
    loaded = checkpointer.load(path, state, expected=manifest_for(tiny_config()))
    assert loaded.samples_seen == 70
    for name, value in nested(source.values)["model"].items():
        assert torch.equal(state["model"][name], value)  # type: ignore[arg-type]


def test_ranks_hold_their_cut_and_padding_never_reaches_the_canonical_file(tmp_path: Path) -> None:
    source = memory_source()
    manifest = shard(source, tmp_path / "ranks", 2, 3)
    assert manifest.layout == {"tensor": 2, "pipeline": 3, "num_layers": 4}
    first = load_file(tmp_path / "ranks" / "mp_rank_01_000" / "model.safetensors")
    last = load_file(tmp_path / "ranks" / "mp_rank_01_002" / "model.safetensors")
    head = source.values["model.heads.text.weight"]
    assert head.shape == (23, 16)
    assert torch.equal(last["heads.text.weight"], torch.cat([head[12:], torch.zeros(1, 16)]))
    assert torch.equal(first["embed.text.weight"], source.values["model.embed.text.weight"][:, 8:])
    assert torch.equal(first["blocks.0.mlp.down.weight"], source.values["model.blocks.0.mlp.down.weight"][:, 32:])
    assert torch.equal(first["blocks.0.attention.q.bias"], source.values["model.blocks.0.attention.q.bias"][8:])
    assert "blocks.3.mlp.up.weight" in last and "norm.weight" in last and "heads.image.weight" in last
    assert "blocks.3.mlp.up.weight" not in first and "norm.weight" not in first
    assert not (tmp_path / "ranks" / "mp_rank_00_000" / "optimizer.safetensors").exists()
    with open_source(tmp_path / "ranks") as ranks:
        merge(ranks, tmp_path / "whole")
    assert load_file(tmp_path / "whole" / "model.safetensors")["heads.text.weight"].shape == (23, 16)


def test_merge_of_a_checkpoint_is_a_folder_to_generate_from(tmp_path: Path) -> None:
    source = memory_source()
    write_checkpoint(tmp_path, source)
    with open_source(tmp_path) as checkpoint:
        merge(checkpoint, tmp_path / "small", file_bytes=4000)
    folder = tmp_path / "small"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in folder.glob("model-*.safetensors")}
    assert len(index["weight_map"]) == sum(name.startswith("model.") for name in source.values)
    config, weights = load_model_folder(folder)
    assert config["model"]["width"] == 16
    assert torch.equal(weights["norm.weight"], source.values["model.norm.weight"])
    assert read_sound_manifest(folder).tensors["model.norm.weight"].shape == (16,)


def test_weights_are_rounded_and_optimizer_state_is_not(tmp_path: Path) -> None:
    source = memory_source()
    merge(source, tmp_path / "half", optimizer=True, options=Options(dtype=torch.bfloat16))
    weights = load_file(tmp_path / "half" / "model.safetensors")
    state = load_file(tmp_path / "half" / "optimizer.safetensors")
    assert torch.equal(weights["norm.bias"], source.values["model.norm.bias"].bfloat16())
    assert torch.equal(state["exp_avg.norm.bias"], source.values["optimizer.exp_avg.norm.bias"])


@pytest.mark.parametrize(
    ("tensor", "pipeline", "words"),
    [
        (3, 1, r"--target-tensor-parallel-size=3: must divide the 2 attention heads. Works: 1, 2"),
        (0, 1, r"--target-tensor-parallel-size=0"),
        (1, 5, r"--target-pipeline-parallel-size=5: must leave each stage a layer. Works: 1 to 4"),
    ],
)
def test_layouts_that_cannot_hold_the_model_are_refused(tmp_path: Path, tensor: int, pipeline: int, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        shard(memory_source(), tmp_path / "ranks", tensor, pipeline)
    assert not list(tmp_path.iterdir())


def test_values_that_are_not_finite_stop_a_merge_unless_asked_for(tmp_path: Path) -> None:
    source = memory_source()
    source.values["model.norm.weight"][3] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite: model.norm.weight \(1 of 16 values\).*--allow-non-finite"):
        merge(source, tmp_path / "whole")
    assert not list(tmp_path.iterdir())
    merge(source, tmp_path / "whole", options=Options(allow_non_finite=True))


def test_a_value_too_large_for_half_precision_is_named(tmp_path: Path) -> None:
    source = memory_source()
    source.values["model.norm.weight"][0] = 1e6
    with pytest.raises(CheckpointError, match=r"not finite as torch.float16: model.norm.weight .*--dtype=bf16"):
        merge(source, tmp_path / "whole", options=Options(dtype=torch.float16))
    merge(source, tmp_path / "whole", options=Options(dtype=torch.bfloat16))


def test_nothing_is_overwritten_and_leftovers_are_cleared(tmp_path: Path) -> None:
    left = partial_of(tmp_path / "whole", dataclasses.replace(Process.this(), start=1))
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    merge(memory_source(), tmp_path / "whole")
    before = (tmp_path / "whole" / FILE_NAME).read_bytes()
    with pytest.raises(CheckpointError, match=r"--save-dir=.*whole: exists already, nothing is overwritten"):
        merge(memory_source(seed=1), tmp_path / "whole")
    assert (tmp_path / "whole" / FILE_NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_optimizer_state_that_is_not_there_is_not_invented(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds weights only, no optimizer state"):
        merge(memory_source(optimizer=False), tmp_path / "whole", optimizer=True)


def test_a_run_that_the_trainer_would_refuse_is_not_written(tmp_path: Path) -> None:
    source = memory_source()
    merge(source, tmp_path / "half", optimizer=True, options=Options(dtype=torch.bfloat16))
    with (
        open_source(tmp_path / "half") as half,
        pytest.raises(CheckpointError, match=r"torch.bfloat16, and the .* fp32"),
    ):
        write_run_folder(half, tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds no optimizer state, without which the trainer does not go on"):
        write_run_folder(memory_source(optimizer=False), tmp_path / "run")
    source.manifest = Manifest(kind="unknown")
    with pytest.raises(CheckpointError, match="holds 'unknown', and the trainer goes on with a generator only"):
        write_run_folder(source, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_quantised_optimizer_state_comes_back(tmp_path: Path) -> None:
    source = memory_source()
    values = dict(source.values)
    for name in [name for name in values if name.startswith("optimizer.exp_avg.") and values[name].ndim > 1]:
        moment, parameter = values.pop(name), name.removeprefix("optimizer.exp_avg.")
        values[f"optimizer.exp_avg.codes.{parameter}"] = (moment * 50).to(torch.uint8)
        values[f"optimizer.exp_avg.scale.{parameter}"] = moment[:, :1].clone()
    shard(DictSource(values, source.manifest, Path("memory")), tmp_path / "ranks", 2, 2, optimizer=True)
    with open_source(tmp_path / "ranks") as ranks:
        write_run_folder(ranks, tmp_path / "run")
    with open_source(tmp_path / "run") as run:
        assert_same(run, values)


def test_random_values_are_all_different() -> None:
    values = random_values(tiny_config())
    assert torch.cat([v.flatten() for n, v in values.items() if "step" not in n]).unique().numel() > 20_000


def test_weights_must_be_those_of_a_manifest_that_lists_no_tensors(tmp_path: Path) -> None:
    source = memory_source()
    values = dict(source.values)
    for name in [name for name in values if name.endswith(".norm.weight") and "blocks" not in name]:
        values[name.replace("norm.weight", "norm.gain")] = values.pop(name)
    step = write_checkpoint(tmp_path / "run", DictSource(values, source.manifest, tmp_path))
    words = r"(?s)step-00000007: is not the model of its manifest.json: 2 problems.*norm.gain: not part of this model"
    with open_source(step) as opened:
        for write in (merge, write_run_folder):
            with pytest.raises(CheckpointError, match=words):
                write(opened, tmp_path / "result")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
