"""``vilg checkpoint`` as a user meets it: commands on a run folder, exit codes, messages."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_vilg.checkpoint.manifest import read_manifest, write_manifest
from megatron_vilg.checkpoint.sources import open_source
from megatron_vilg.checkpoint.tensors import read_whole
from megatron_vilg.cli.main import main
from megatron_vilg.generate.load import load_parts
from tests.checkpoint.ckpt_source import memory_source, write_checkpoint
from tests.tiny_run import write_tiny_run

SIZES = ["--target-tensor-parallel-size", "1", "--target-pipeline-parallel-size"]
ROOT = Path(__file__).resolve().parents[2]


def vilg(*words: object) -> int:
    return main(["checkpoint", *map(str, words)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_tiny_run(folder, export=False)
    return folder


def test_a_run_is_merged_shared_and_drawn_from(tmp_path: Path, run: Path, capsys) -> None:
    assert vilg("merge", "--load-dir", run, "--save-dir", tmp_path / "whole") == 0
    assert "read back and equal to" in capsys.readouterr().out
    assert vilg("verify", tmp_path / "whole", "--against", run, "--logits") == 0
    out = capsys.readouterr().out
    assert "hold the same values" in out and "differ by at most 0 " in out
    words = ["--from", "vilg", "--to", "pretrained", "--dtype", "bf16"]
    assert vilg("convert", *words, "--load-dir", run, "--save-dir", tmp_path / "share") == 0
    shared = load_parts(tmp_path / "share", torch.device("cpu"))
    weight = load_parts(run, torch.device("cpu")).model.state_dict()["norm.weight"]
    assert torch.equal(shared.model.state_dict()["norm.weight"], weight.bfloat16().float())
    assert vilg("verify", tmp_path / "share", "--against", run, "--logits") == 0


def test_one_file_carries_its_configuration(tmp_path: Path, run: Path) -> None:
    words = ["--from", "vilg", "--to", "safetensors"]
    assert vilg("convert", *words, "--load-dir", run, "--save-dir", tmp_path / "one") == 0
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"])["model"]["width"] == 16
        assert file.metadata()["step"] == "3"
    with open_source(tmp_path / "one" / "model.safetensors") as source:
        assert read_whole(source, "model.norm.weight").shape == (16,)


def test_sharded_and_back_to_the_trainer(tmp_path: Path, capsys) -> None:
    write_checkpoint(tmp_path / "run", memory_source())
    sizes = ["--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2]
    assert vilg("shard", "--load-dir", tmp_path / "run", "--save-dir", tmp_path / "ranks", "--optimizer", *sizes) == 0
    assert sorted(p.name for p in (tmp_path / "ranks").glob("mp_rank*"))[-1] == "mp_rank_01_001"
    words = ["--to", "dcp", "--optimizer"]
    assert vilg("shard", "--load-dir", tmp_path / "ranks", "--save-dir", tmp_path / "again", *words) == 0
    assert vilg("verify", tmp_path / "again", "--against", tmp_path / "run") == 0
    capsys.readouterr()
    assert vilg("inspect", tmp_path / "again", "--compare", tmp_path / "run", "--json", tmp_path / "f.json") == 0
    assert "same tensors, same values" in capsys.readouterr().out
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["parts"]["optimizer"]["tensors"] == 237 and found["not_compared"] == []
    words = ["--load-dir", tmp_path / "run", "--save-dir", tmp_path / "half", "--dtype", "bf16"]
    assert vilg("merge", *words) == 0
    capsys.readouterr()
    assert vilg("inspect", tmp_path / "run", "--compare", tmp_path / "half") == 0
    assert vilg("verify", tmp_path / "run", "--against", tmp_path / "half") == 0
    said = capsys.readouterr().out
    assert (
        said.count(f"optimizer: only in {tmp_path / 'run'}")
        == said.count("float32 beside bfloat16, compared after")
        == 2
    )


def test_verify_does_not_pass_over_a_damaged_newest_checkpoint(tmp_path: Path, run: Path, capsys) -> None:
    shutil.copytree(run, tmp_path / "run")
    steps = tmp_path / "run" / "checkpoints"
    for number in (8, 9):
        step = shutil.copytree(steps / "step-00000003", steps / f"step-{number:08d}")
        write_manifest(step, dataclasses.replace(read_manifest(step), step=number))
    assert vilg("verify", tmp_path / "run") == 0
    for step in ("step-00000008", "step-00000009"):
        file = next((steps / step).glob("*.distcp"))
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    message = "step-00000009: damaged: .*its content changed.*\n.*older ones are sound: step-00000003\n"
    assert vilg("verify", tmp_path / "run") == 2
    assert re.search(message, capsys.readouterr().err)
    assert vilg("verify", run, "--against", tmp_path / "run") == 2
    assert re.search(message, capsys.readouterr().err)
    shutil.rmtree(steps / "step-00000003")
    assert vilg("verify", tmp_path / "run") == 2
    assert "checkpoints: no older one is sound" in capsys.readouterr().err


def test_a_changed_bit_in_a_file_is_told_by_the_manifest_beside_it(tmp_path: Path, run: Path, capsys) -> None:
    assert vilg("merge", "--load-dir", run, "--save-dir", tmp_path / "whole") == 0
    file = tmp_path / "whole" / "model.safetensors"
    capsys.readouterr()
    assert vilg("verify", file) == 0 and f"{file}: sound; " in capsys.readouterr().out
    content = bytearray(file.read_bytes())
    content[len(content) // 2 & ~3] ^= 1
    file.write_bytes(content)
    assert vilg("verify", file) == 2
    assert "model.safetensors has the right size but its content changed" in capsys.readouterr().err
    shutil.copy(file, tmp_path / "alone.safetensors")
    assert vilg("verify", tmp_path / "alone.safetensors") == 0
    said = capsys.readouterr().out
    assert "no manifest.json beside it lists it, so there is no digest to compare with" in said and "sound" not in said


def test_inspect_folds_layers_and_describes_one_tensor(tmp_path: Path, run: Path, capsys) -> None:
    assert vilg("inspect", run) == 0
    out = capsys.readouterr().out
    assert "model.blocks.{0-3}.mlp.up.weight" in out and "training checkpoint (DCP)" in out
    assert vilg("inspect", run, "--all") == 0
    assert "model.blocks.2.mlp.up.weight " in capsys.readouterr().out
    assert vilg("inspect", run, "--tensor", "norm.weight") == 0
    out = capsys.readouterr().out
    assert "mean        1.0" in out and "not_finite  0" in out
    assert vilg("inspect", run, "--tensor", "mlp.up") == 2
    assert "no tensor 'mlp.up'; there is model.blocks.0.mlp.up" in capsys.readouterr().err


def test_a_model_is_planned_without_weights(tmp_path: Path, capsys) -> None:
    sizes = ["--target-tensor-parallel-size", 8, "--target-pipeline-parallel-size", 4]
    assert vilg("inspect", "--preset", "paper-10b", *sizes, "--json", tmp_path / "plan.json") == 0
    assert "model.blocks.{0-47}.mlp.up.weight" in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    whole = sum(plan["files"].values())
    copies = sum(plan["ranks"].values()) - whole
    assert whole > 3 * 4 * 9.7e9, "weights and two moments of ten billion numbers"
    assert len(plan["ranks"]) == 2 * 8 * 4 and 0 < copies < 0.01 * whole
    assert vilg("inspect", "--preset", "paper-10b", *sizes[:2]) == 2
    assert vilg("inspect") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shard", "--load-dir", "R", "--save-dir", "N"], "per-rank files need both"),
        (
            ["shard", "--load-dir", "R", "--save-dir", "N", "--to", "dcp", "--target-tensor-parallel-size", "2"],
            "fits every layout",
        ),
        (["shard", "--load-dir", "R", "--save-dir", "N", "--to", "dcp", "--dtype", "bf16"], "keeps weights in fp32"),
        (
            ["shard", "--load-dir", "R", "--save-dir", "N", "--to", "dcp"],
            "the trainer goes on from weights and",
        ),
        (
            ["shard", "--load-dir", "R", "--save-dir", "N", "--to", "dcp", "--optimizer"],
            "holds no optimizer state, without which the trainer",
        ),
        (["merge", "--load-dir", "R", "--save-dir", "N", "--optimizer"], "holds weights only, no optimizer state"),
        (["merge", "--load-dir", "nowhere", "--save-dir", "N"], "nowhere: no such folder"),
        (["merge", "--load-dir", "R/text_tokenizer", "--save-dir", "N"], "is a text tokenizer"),
        (["verify", "R", "--logits"], "--logits: compares two models"),
        (["inspect", "R", "--target-tensor-parallel-size", "2"], "plans the ranks of a --preset"),
        (["inspect", "--preset", "demo", "--tensor", "norm.weight"], "--tensor: looks into tensors, and --preset=demo"),
        (
            ["convert", "--from", "vilg", "--to", "vilg", "--load-dir", "R", "--save-dir", "N", "--config", "x"],
            "--config",
        ),
        (
            ["convert", "--from", "deepspeed", "--to", "vilg", "--load-dir", "R", "--save-dir", "N"],
            "is a training checkpoint (DCP). Works: --from vilg",
        ),
        (
            ["convert", "--from", "taming", "--to", "vilg", "--load-dir", "R", "--save-dir", "N", "--optimizer"],
            "only checkpoints of ours",
        ),
    ],
)
def test_mistakes_are_explained_and_leave_nothing(tmp_path: Path, run: Path, capsys, words, message: str) -> None:
    places = {"R": str(run), "R/text_tokenizer": str(run / "text_tokenizer"), "N": str(tmp_path / "new")}
    assert vilg(*(places.get(word, word) for word in words)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "--save-dir", "R"], "exists already, nothing is overwritten"),
        (["merge", "--save-dir", "N", "--optimizer"], "holds weights only, no optimizer state"),
        (["shard", "--save-dir", "R", "--to", "dcp", "--optimizer"], "exists already, nothing is overwritten"),
        (["shard", "--save-dir", "N", "--to", "dcp", "--optimizer"], "holds no optimizer state"),
        (["shard", "--save-dir", "N", *SIZES, "9"], "--target-pipeline-parallel-size=9: must leave each stage a layer"),
        (["convert", "--save-dir", "R", "--from", "vilg", "--to", "vilg"], "exists already, nothing is overwritten"),
        (["convert", "--save-dir", "N", "--from", "vilg", "--to", "vilg", "--optimizer"], "no optimizer state"),
    ],
)
def test_mistakes_are_told_before_a_run_is_read(
    tmp_path: Path, run: Path, capsys, monkeypatch: pytest.MonkeyPatch, words, message: str
) -> None:
    monkeypatch.setattr("megatron_vilg.checkpoint.manager.find_damage", lambda *_: pytest.fail("files are read"))
    places = {"R": str(run), "N": str(tmp_path / "new")}
    assert vilg(*(places.get(word, word) for word in words), "--load-dir", run) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_older_checkpoint_is_looked_at_where_the_newest_cannot_be_read(tmp_path: Path, run: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000009").mkdir()
    assert vilg("merge", "--load-dir", tmp_path / "run", "--save-dir", tmp_path / "whole") == 0


@pytest.mark.parametrize(
    "words",
    [
        ["merge"],
        ["merge", "--optimizer"],
        ["shard", *SIZES, "1"],
        ["shard", "--to", "dcp", "--optimizer"],
        ["convert", "--from", "vilg", "--to", "pretrained"],
    ],
)
def test_a_file_of_weights_does_not_say_what_it_is(tmp_path: Path, capsys, words: list[str]) -> None:
    save_file({"norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    assert vilg("verify", tmp_path / "model.safetensors") == 0
    assert vilg(*words, "--load-dir", tmp_path / "model.safetensors", "--save-dir", tmp_path / "new") == 2
    assert "model.safetensors: a file of weights alone does not say what they are" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(tmp_path: Path, run: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    for place, reason in (
        (tmp_path / "file" / "x.json", f"{tmp_path / 'file'} is no folder"),
        (tmp_path, "it is a folder"),
    ):
        assert vilg("inspect", run, "--json", place) == 2
        out, err = capsys.readouterr()
        assert f"--json={place}: cannot be written ({reason}" in err and not out


@pytest.mark.parametrize("tool", ["merge", "shard", "convert", "inspect", "verify"])
def test_the_tools_are_the_same_commands(tool: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / f"{tool}_checkpoint.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"vilg checkpoint {tool}" in done.stdout and "example" in done.stdout
