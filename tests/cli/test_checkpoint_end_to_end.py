"""From a trained generator to the start of an end-to-end run, and from such a run back to its parts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_vilg.checkpoint.image_tokenizer import load_image_tokenizer
from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import read_manifest
from megatron_vilg.checkpoint.parts import split_end_to_end
from megatron_vilg.checkpoint.sources import open_source
from megatron_vilg.checkpoint.tensors import read_whole
from megatron_vilg.checkpoint.verify import differences
from megatron_vilg.cli.main import main
from megatron_vilg.config.load import read_run_folder_config
from megatron_vilg.config.schema import CheckpointConfig
from megatron_vilg.errors import CheckpointError
from megatron_vilg.generate.load import load_parts
from megatron_vilg.train.end_to_end import EndToEndEngine
from tests.tiny_run import write_tiny_run


def convert(origin: str, to: str, load: Path, save: Path, *settings: str) -> int:
    words = ["checkpoint", "convert", "--from", origin, "--to", to, "--load-dir", str(load), "--save-dir", str(save)]
    return main([*words, *settings])


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and the start of an end-to-end run made of it."""
    folder = tmp_path_factory.mktemp("end")
    write_tiny_run(folder / "run")
    # As the demo's presets have it; a reconstructor learns the pictures themselves.
    copies = {"num_views": 2, "target_view_probability": 0.3, "target_view_fall": 1.0}
    config = json.loads((folder / "run" / "config.json").read_text())
    (folder / "run" / "config.json").write_text(json.dumps(config | {"data": config["data"] | copies}))
    settings = ["reconstructor.warmup_steps=3", "text_tokenizer.vocab_size=320"]
    assert convert("vilg", "end-to-end", folder / "run", folder / "start", *settings) == 0
    return folder / "run", folder / "start"


def test_the_start_has_the_generator_the_decoder_and_a_fresh_mapping(started: tuple[Path, Path]) -> None:
    run, start = started
    config = read_run_folder_config(start)
    assert config.reconstructor.enabled and config.reconstructor.warmup_steps == 3
    assert (config.data.target_view_probability, config.data.target_view_fall) == (0.0, 0.0)
    tokenizer = load_image_tokenizer(start / "image_tokenizer")
    path = Checkpointer(start / "checkpoints", config.checkpoint).latest()
    assert path is not None and path.name == "step-00000000"
    generator = load_parts(run, torch.device("cpu")).model.state_dict()
    with open_source(start) as source:
        for name, value in generator.items():
            assert torch.equal(read_whole(source, f"model.{name}"), value), name
        for name, value in tokenizer.decoder.state_dict().items():
            assert torch.equal(read_whole(source, f"model.reconstructor.decoder.{name}"), value), name
        assert float(read_whole(source, "model.reconstructor.mapping.up.weight").std()) > 0
        assert float(read_whole(source, "optimizer.exp_avg.norm.weight").abs().max()) == 0


def test_the_trainer_goes_on_from_the_start(started: tuple[Path, Path]) -> None:
    _, start = started
    config = read_run_folder_config(start)
    engine = EndToEndEngine(config, torch.device("cpu"), load_image_tokenizer(start / "image_tokenizer"))
    checkpointer = Checkpointer(start / "checkpoints", config.checkpoint)
    path = checkpointer.latest()
    assert path is not None
    identity = dataclasses.replace(read_manifest(path), model=dataclasses.asdict(config.model))
    assert checkpointer.load(path, engine.state_dict(), expected=identity).step == 0


def test_a_start_that_has_seen_no_picture_is_sound_and_can_be_merged(
    started: tuple[Path, Path], tmp_path: Path
) -> None:
    assert main(["checkpoint", "verify", str(started[1])]) == 0
    merge = ["checkpoint", "merge", "--load-dir", str(started[1]), "--save-dir", str(tmp_path / "whole"), "--optimizer"]
    assert main(merge) == 0
    assert main(["checkpoint", "verify", str(tmp_path / "whole"), "--against", str(started[1])]) == 0


def test_the_start_is_made_on_one_process_whatever_the_layout_of_the_run(
    started: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = ["text_tokenizer.vocab_size=320", "parallel.tensor=2", "parallel.shard=2"]
    assert convert("vilg", "end-to-end", started[0], tmp_path / "start", *settings) == 0
    layout = read_run_folder_config(tmp_path / "start").parallel
    assert (layout.tensor, layout.shard) == (2, 2)
    with open_source(tmp_path / "start") as one, open_source(started[1]) as other:
        assert differences(one, other) == []


def test_a_run_is_taken_apart_again(started: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    run, start = started
    assert convert("end-to-end", "vilg", start, tmp_path / "parts") == 0
    assert "read back and equal to" in capsys.readouterr().out
    again = load_parts(tmp_path / "parts" / "generator", torch.device("cpu"))
    assert not again.config.reconstructor.enabled
    for name, value in load_parts(run, torch.device("cpu")).model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    with open_source(tmp_path / "parts" / "reconstructor") as source:
        assert source.manifest is not None and source.manifest.kind == "reconstructor"
        assert {name.split(".")[1] for name in source.tensors} == {"mapping", "decoder"}
    assert load_image_tokenizer(tmp_path / "parts" / "image_tokenizer").config.codebook_size == 11


def test_a_run_that_is_damaged_is_not_taken_apart(started: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    with open_source(started[1]) as source:
        monkeypatch.setattr(source, "verify", lambda: ["copies of norm.weight differ"])
        with pytest.raises(CheckpointError, match="damaged: copies of norm.weight differ"):
            split_end_to_end(source, tmp_path / "parts")
    assert not list(tmp_path.iterdir())


def test_training_options_of_the_model_are_those_of_the_new_run(started: tuple[Path, Path], tmp_path: Path) -> None:
    settings = ["text_tokenizer.vocab_size=320", "model.dropout=0.25", "model.width=16"]
    assert convert("vilg", "end-to-end", started[0], tmp_path / "start", *settings) == 0
    config = read_run_folder_config(tmp_path / "start")
    assert config.model == dataclasses.replace(read_run_folder_config(started[0]).model, dropout=0.25)
    manifest = read_manifest(tmp_path / "start" / "checkpoints" / "step-00000000")
    assert manifest.model == dataclasses.asdict(config.model), "the trainer would refuse the run"


def test_an_export_that_is_older_than_the_newest_checkpoint_is_not_taken(
    started: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(started[0], run)
    older = run / "checkpoints" / "step-00000003"
    state: dict[str, dict[str, torch.Tensor]] = {"model": {}}
    with open_source(older) as source:
        for name in source.tensors:
            state["model"][name.removeprefix("model.")] = read_whole(source, name) + 1
    newer = dataclasses.replace(read_manifest(older), step=5)
    Checkpointer(run / "checkpoints", CheckpointConfig()).save(5, state, newer)
    settings = ["text_tokenizer.vocab_size=320"]
    assert convert("vilg", "end-to-end", run, tmp_path / "start", *settings) == 0
    with open_source(tmp_path / "start") as source:
        assert source.manifest is not None and source.manifest.source["step"] == "5"
        assert torch.equal(read_whole(source, "model.norm.weight"), state["model"]["norm.weight"])
    shutil.copytree(started[0] / "export", tmp_path / "start" / "export")  # holds no reconstructor
    assert convert("end-to-end", "vilg", tmp_path / "start", tmp_path / "parts") == 0
    with open_source(tmp_path / "parts" / "generator") as source:
        assert torch.equal(read_whole(source, "model.norm.weight"), state["model"]["norm.weight"])


def test_steps_ranks_and_exports_are_taken_like_run_folders(started: tuple[Path, Path], tmp_path: Path) -> None:
    run, start = started
    sizes = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"]
    for name, folder in (("run", run), ("start", start)):
        assert main(["checkpoint", "shard", "--load-dir", str(folder), "--save-dir", str(tmp_path / name), *sizes]) == 0
    only_export = shutil.copytree(run, tmp_path / "exported", ignore=shutil.ignore_patterns("checkpoints"))
    settings = ["reconstructor.warmup_steps=3", "text_tokenizer.vocab_size=320"]
    forms = (tmp_path / "run", run / "checkpoints" / "step-00000003", run / "export", only_export)
    for number, form in enumerate(forms):
        assert convert("vilg", "end-to-end", form, tmp_path / f"start{number}", *settings) == 0
        with open_source(tmp_path / f"start{number}") as one, open_source(start) as other:
            assert differences(one, other) == []
    for number, form in enumerate((tmp_path / "start", start / "checkpoints" / "step-00000000")):
        assert convert("end-to-end", "vilg", form, tmp_path / f"parts{number}") == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["model.num_heads=4"],
            "model.num_heads=4: the weights are those of model.num_heads=2. Works: without it",
        ),
        (["model.dropout=2"], "model.dropout=2"),
        (["optim.betas=2,2"], "optim.betas"),
        (["optim.learning=1"], "optim.learning"),
        (["reconstructor.enabled=false"], "reconstructor.enabled=False: is what --to end-to-end switches on"),
        (["--dtype", "bf16"], "--dtype: training starts from weights in fp32"),
        (["--allow-non-finite"], "--allow-non-finite: nobody can train on from such values"),
        (["--image-size", "16"], "--image-size: --from vilg knows its sizes"),
        (["--save-dir", "RUN"], "exists already, nothing is overwritten"),
    ],
)
def test_mistakes_are_told_before_weights_are_read(
    started: tuple[Path, Path], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, settings, message: str
) -> None:
    monkeypatch.setattr("megatron_vilg.checkpoint.verify.problems_of", lambda *_: pytest.fail("weights are read"))
    settings = [str(started[0]) if word == "RUN" else word for word in settings]
    assert convert("vilg", "end-to-end", started[0], tmp_path / "start", *settings) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_not_end_to_end_is_refused(started: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    run, start = started
    assert convert("end-to-end", "vilg", run, tmp_path / "parts") == 2
    assert "no reconstructor in it" in capsys.readouterr().err
    assert convert("end-to-end", "vilg", start, tmp_path / "parts", "--image-size", "16") == 2
    assert "--image-size: --from end-to-end knows its sizes" in capsys.readouterr().err
    assert convert("vilg", "end-to-end", start, tmp_path / "again") == 2
    assert "has a reconstructor already" in capsys.readouterr().err
    assert convert("vilg", "end-to-end", run / "image_tokenizer", tmp_path / "again") == 2
    assert "holds 'image-tokenizer', not a generator" in capsys.readouterr().err
    assert convert("vilg", "end-to-end", tmp_path / "nowhere", tmp_path / "again") == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert convert("taming", "end-to-end", run, tmp_path / "again") == 2
    assert "--from taming --to end-to-end: Works" in capsys.readouterr().err
    assert convert("vilg", "vilg", run, tmp_path / "again", "train.seed=3") == 2
    assert "train.seed=3: options are for --to end-to-end" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
