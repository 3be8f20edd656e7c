"""A run that averages weights is merged, split and drawn with as it is exported: by its averages."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vilg.checkpoint.export import load_model_folder
from megatron_vilg.checkpoint.image_tokenizer import load_image_tokenizer
from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import read_manifest
from megatron_vilg.checkpoint.sources import open_source
from megatron_vilg.checkpoint.tensors import read_whole
from megatron_vilg.cli.main import main
from megatron_vilg.config.load import read_run_folder_config
from megatron_vilg.generate.load import load_parts
from megatron_vilg.train.end_to_end import EndToEndEngine
from tests.tiny_run import write_tiny_run

WEIGHT = "reconstructor.mapping.up.weight"


def checkpoint(verb: str, *words: str | Path) -> int:
    return main(["checkpoint", verb, *map(str, words)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """An end-to-end run that has no export yet, and what it would export."""
    folder = tmp_path_factory.mktemp("averages")
    write_tiny_run(folder / "plain")
    settings = ["text_tokenizer.vocab_size=320", "reconstructor.ema_decay=0.9"]
    there = ["--load-dir", folder / "plain", "--save-dir", folder / "run"]
    assert checkpoint("convert", "--from", "vilg", "--to", "end-to-end", *there, *settings) == 0
    config = read_run_folder_config(folder / "run")
    tokenizer = load_image_tokenizer(folder / "run" / "image_tokenizer")
    engine = EndToEndEngine(config, torch.device("cpu"), tokenizer)
    checkpoints = Checkpointer(folder / "run" / "checkpoints", config.checkpoint)
    path = checkpoints.latest()
    assert path is not None and engine.average is not None
    manifest = read_manifest(path)
    checkpoints.load(path, engine.state_dict(), expected=manifest)
    for value in engine.average.values.values():
        value += 0.5
    checkpoints.save(1, engine.state_dict(), dataclasses.replace(manifest, step=1))
    exported = {name: tensor.clone() for name, tensor in engine.export()}
    assert not torch.equal(exported[WEIGHT], engine.model.state_dict()[WEIGHT])
    return folder / "run", exported


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_weights_alone_are_the_averages(run: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, exported = run
    assert checkpoint("merge", "--load-dir", folder, "--save-dir", tmp_path / "merged") == 0
    assert_same(load_model_folder(tmp_path / "merged")[1], exported)
    assert checkpoint("verify", tmp_path / "merged", "--against", folder) == 0
    to = ["--load-dir", folder, "--save-dir", tmp_path / "shared"]
    assert checkpoint("convert", "--from", "vilg", "--to", "pretrained", *to) == 0
    assert_same(load_model_folder(tmp_path / "shared")[1], exported)
    sizes = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "1"]
    assert checkpoint("shard", "--load-dir", folder, "--save-dir", tmp_path / "ranks", *sizes) == 0
    assert checkpoint("verify", tmp_path / "ranks", "--against", tmp_path / "merged") == 0


def test_with_the_optimizer_both_are_kept_and_drawing_takes_the_averages(
    run: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, exported = run
    assert checkpoint("merge", "--load-dir", folder, "--save-dir", tmp_path / "all", "--optimizer") == 0
    with open_source(tmp_path / "all") as source:
        assert not torch.equal(read_whole(source, f"model.{WEIGHT}"), exported[WEIGHT]), "to go on training from"
    assert_same(load_model_folder(tmp_path / "all")[1], exported)
    assert_same(load_parts(folder, torch.device("cpu")).model.state_dict(), exported)


def test_parts_are_taken_from_the_averages(run: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, exported = run
    to = ["--load-dir", folder, "--save-dir", tmp_path / "parts"]
    assert checkpoint("convert", "--from", "end-to-end", "--to", "vilg", *to) == 0
    with open_source(tmp_path / "parts" / "reconstructor") as source:
        for name in source.tensors:
            assert torch.equal(read_whole(source, name), exported[f"reconstructor.{name.removeprefix('model.')}"]), name
