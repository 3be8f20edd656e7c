"""``vilg train-restyler`` on a tiny run, and drawings that it makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_vilg.checkpoint.manifest import read_manifest
from megatron_vilg.checkpoint.restyler import load_restyler, save_restyler
from megatron_vilg.cli.main import EXIT_ERROR, EXIT_STOPPED, main
from megatron_vilg.errors import CheckpointError
from megatron_vilg.generate.pipeline import Pipeline
from megatron_vilg.train import restyler
from tests.styled_run import write_styled_run
from tests.tiny_run import write_tiny_run

SETTINGS = ["restyler.width=16", "restyler.num_heads=2", "restyler.num_layers=1", "restyler.num_steps=4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("restyler") / "run"
    write_styled_run(folder, data)
    return folder


def command(run: Path, data: Path, *words: str) -> list[str]:
    return ["train-restyler", "--load", str(run), "--data", str(data), "--device", "cpu", *SETTINGS, *words]


@pytest.fixture(scope="module")
def trained(run_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(run_folder, folder)
    assert main(command(folder, data)) == 0
    return folder


def test_a_restyler_lies_beside_the_run_with_its_library(trained: Path) -> None:
    assert {path.name for path in (trained / "restyler").iterdir()} == {
        "model.safetensors",
        "config.json",
        "manifest.json",
    }
    model, library, manifest = load_restyler(trained / "restyler")
    assert model.config.width == 16 and manifest.step == 4 and manifest.counters.keys() == {"val-pairs/code(nats)"}
    assert library.find("线描风格的猫") == (1, 1) and len(library) == 9
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert (trained / "restyler_training" / "metrics.jsonl").is_file()


def test_again_it_is_done(trained: Path, data: Path) -> None:
    before = read_manifest(trained / "restyler").files
    assert main(command(trained, data)) == 0
    assert read_manifest(trained / "restyler").files == before


def test_a_signal_stops_it_with_a_code_of_its_own_and_it_goes_on(
    trained: Path, run_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(restyler.StopSignals):
        requested = True

    out = ["--out", str(tmp_path / "restyler")]
    with monkeypatch.context() as patch:
        patch.setattr(restyler, "StopSignals", Stop)
        assert main(command(run_folder, data, *out)) == EXIT_STOPPED
    assert not (tmp_path / "restyler").exists()
    assert main(command(run_folder, data, *out)) == 0
    files = [read_manifest(folder / "restyler").files["model.safetensors"] for folder in (trained, tmp_path)]
    assert files[0] == files[1]


def test_what_training_did_not_show_is_drawn_by_it_and_said(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["--prompt", "扁平风格的苹果", "--prompt", "线描风格的苹果"]
    records = {}
    for sets in ("0", "2"):
        words = ["generate", "--load", str(trained), *prompts, "-n", "2", "--restyle", sets]
        assert main([*words, "--out", str(tmp_path / sets)]) == 0
        records[sets] = json.loads((tmp_path / sets / "generate.json").read_text("utf-8"))
        assert records[sets]["sample"]["restyle"] == int(sets)
    assert records["2"]["restyler"]["width"] == 16
    assert [entry["restyled"] for entry in records["2"]["prompts"]] == [True, False]
    assert [entry["restyled"] for entry in records["0"]["prompts"]] == [False, False]


def test_a_report_says_that_a_restyler_drew(trained: Path, data: Path, tmp_path: Path) -> None:
    command = [
        "evaluate",
        "--load",
        str(trained),
        "--data",
        str(data),
        "--max-prompts",
        "2",
        "--samples-per-prompt",
        "1",
    ]
    assert main([*command, "--out", str(tmp_path / "with")]) == 0
    assert main([*command, "--out", str(tmp_path / "not"), "sample.restyle=0"]) == 0
    found = {name: json.loads((tmp_path / name / "report.json").read_text("utf-8")) for name in ("with", "not")}
    assert found["with"]["restyler"]["width"] == 16 and found["not"]["restyler"] is None
    for name, is_said in (("with", True), ("not", False)):
        page = (tmp_path / name / "report.html").read_text("utf-8")
        assert ("are drawn by a restyler, which looks at their trained pictures in other styles" in page) == is_said


def test_it_is_found_from_the_export(trained: Path, tmp_path: Path) -> None:
    assert Pipeline.load(trained / "export").restyling is not None
    shutil.copytree(trained / "export", tmp_path / "moved")
    assert Pipeline.load(tmp_path / "moved").restyling is None


def test_one_of_another_image_tokenizer_is_refused(trained: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    write_tiny_run(tmp_path / "run", checkpoint=False)
    shutil.copytree(trained / "restyler", tmp_path / "run" / "restyler")
    with pytest.raises(CheckpointError, match=r"restyler: was trained with another image tokenizer \(.*Works: vilg tr"):
        Pipeline.load(tmp_path / "run")


def test_something_else_in_its_place_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "image_tokenizer", tmp_path / "restyler")
    with pytest.raises(CheckpointError, match="restyler: holds 'image-tokenizer', not 'restyler'; move it away"):
        load_restyler(tmp_path / "restyler")


def test_it_can_be_verified_and_what_is_wrong_is_said(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "verify", str(trained / "restyler")]) == 0
    assert "restyler: sound" in capsys.readouterr().out
    model, library, _ = load_restyler(trained / "restyler")
    del model.norm
    save_restyler(model, library, tmp_path / "restyler", image_tokenizer="0" * 64, counters={})
    assert main(["checkpoint", "verify", str(tmp_path / "restyler")]) != 0
    assert "norm.weight" in "".join(capsys.readouterr())
    with pytest.raises(CheckpointError, match="weights do not fit the configuration beside them"):
        load_restyler(tmp_path / "restyler")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.seed=3"], "train.seed=3: this command has settings of the restyler alone. Works: restyler.num_layers"),
        (["restyler.num_heads=3"], "restyler.num_heads=3: must divide restyler.width=16. Works: 1, 2, 4, 8"),
        (["restyler.batch_size=99999999"], "restyler.batch_size=99999999: is more than one step can take."),
        (["restyler.num_references=5000"], "restyler.num_references=5000: is more than a model or a job can have."),
        (["restyler.lr=0"], "restyler.lr=0: must be a number above 0"),
    ],
)
def test_each_mistake_has_its_message(
    run_folder: Path, data: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(command(run_folder, data, *words)) == EXIT_ERROR
    assert message in capsys.readouterr().err
    assert not (run_folder / "restyler").exists() and not (run_folder / "restyler_training").exists()


def test_pairs_without_styles_other_pairs_and_several_processes_are_refused(
    run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_styled_run(tmp_path / "other" / "run", tmp_path / "other" / "pairs")
    (tmp_path / "empty").mkdir()
    assert main(command(run_folder, tmp_path / "empty", "--out", str(tmp_path / "a" / "restyler"))) == EXIT_ERROR
    assert str(tmp_path / "empty") in capsys.readouterr().err
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(command(run_folder, data)) == EXIT_ERROR
    assert "2 processes, but one does all the work. Works: one" in capsys.readouterr().err
