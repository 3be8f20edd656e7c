"""``vilg caption``: lines, JSON, and one message for everything that cannot work."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from megatron_vilg.cli.main import main
from megatron_vilg.generate.pipeline import Pipeline
from tests.tiny_run import CAPTIONS, write_tiny_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caption") / "run"
    write_tiny_run(folder, checkpoint=False)
    return folder


@pytest.fixture(scope="module")
def pictures(run_folder: Path) -> list[str]:
    paths = []
    for number, picture in enumerate(Pipeline.load(run_folder).draw(CAPTIONS[:3])):
        picture.save(run_folder / f"{number}.png")
        paths.append(str(run_folder / f"{number}.png"))
    return paths


def caption(run_folder: Path, *options: str) -> int:
    return main(["caption", "--load", str(run_folder), "--device", "cpu", *options])


@pytest.mark.parametrize("beam", [1, 3])
def test_lines_and_json(
    run_folder: Path, pictures: list[str], tmp_path: Path, beam: int, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "captions.json"
    assert caption(run_folder, *pictures, "--beam", str(beam), "--json", str(target)) == 0
    expected = Pipeline.load(run_folder).caption(pictures, beam=beam)
    assert capsys.readouterr().out.splitlines() == [f"{p}\t{c}" for p, c in zip(pictures, expected, strict=True)]
    found = json.loads(target.read_text(encoding="utf-8"))
    assert found == [{"id": p, "caption": c} for p, c in zip(pictures, expected, strict=True)]


def test_pictures_that_cannot_be_read_are_named_and_the_others_captioned(
    run_folder: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("words")
    bad = [str(tmp_path / name) for name in ("text.png", "missing.png")]
    target = tmp_path / "captions.json"
    assert caption(run_folder, pictures[0], bad[0], pictures[1], bad[1], "--json", str(target)) == 2
    captured = capsys.readouterr()
    assert [line.split("\t")[0] for line in captured.out.splitlines()] == pictures[:2]
    assert [entry["id"] for entry in json.loads(target.read_text())] == pictures[:2]
    assert "DataError: 2 of 4 pictures; the other 2 have their captions\n" in captured.err
    assert "text.png: not a readable picture (5 bytes): no format that Pillow knows\n" in captured.err
    assert "missing.png: " in captured.err and "0x" not in captured.err
    assert caption(run_folder, *bad) == 2
    assert "DataError: 2 of 2 pictures\n" in capsys.readouterr().err


def test_names_of_any_bytes_are_written(run_folder: Path, pictures: list[str], tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"odd\xff.png")
    odd.write_bytes(Path(pictures[0]).read_bytes())
    assert caption(run_folder, str(odd), "--json", str(tmp_path / "captions.json")) == 0
    assert json.loads((tmp_path / "captions.json").read_text())[0]["id"].endswith("odd\\udcff.png")


def test_candidates(run_folder: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert caption(run_folder, *pictures, "--candidates", "5", "--seed", "2") == 0
    expected = Pipeline.load(run_folder).caption_of_candidates(pictures, 5, seed=2)
    assert capsys.readouterr().out.splitlines() == [f"{p}\t{c}" for p, c in zip(pictures, expected, strict=True)]


def test_sampling_follows_the_seed(run_folder: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(seed: str, *options: str) -> str:
        assert caption(run_folder, *pictures, "--temperature", "1.5", "--seed", seed, *options) == 0
        return capsys.readouterr().out

    assert drawn("1") == drawn("1", "--max-batch", "2") != drawn("2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--question", "什么颜色？"], "--question=什么颜色？: needs a generator trained on questions"),
        (["--beam", "0"], "--beam=0: must be at least 1"),
        (["--beam", "2", "--length-penalty", "nan"], "--length-penalty=nan: must be from -10 to 10, such as 1"),
        (["--beam", "2", "--length-penalty", "5000"], "--length-penalty=5000.0: must be from -10 to 10, such as 1"),
        (["--length-penalty", "2"], "--length-penalty=2.0: is of beam search. Works: beside --beam 5"),
        (["--candidates", "-1"], "--candidates=-1: must be at least 0, which is greedy decoding"),
        (
            ["--candidates", "4", "--beam", "2"],
            "--candidates=4: candidates are sampled at temperature 1; leave out --beam=2",
        ),
        (
            ["--candidates", "4", "--top-k", "3"],
            "--candidates=4: candidates are sampled at temperature 1; leave out --top-k",
        ),
        (["--max-batch", "0"], "--max-batch=0: must be at least 1"),
        (
            ["--beam", "2", "--top-k", "3"],
            "--beam=2: beam search draws nothing at random, so it has no use for --top-k",
        ),
        (
            ["--beam", "2", "--min-p", "0.1"],
            "--beam=2: beam search draws nothing at random, so it has no use for --min-p",
        ),
        (
            ["--candidates", "4", "--min-p", "0.1"],
            "--candidates=4: candidates are sampled at temperature 1; leave out --min-p",
        ),
        (
            ["--min-p", "0.1"],
            "--min-p=0.1: leaves out unlikely tokens, and temperature 0 draws none anyway. Works",
        ),
        (["--top-k", "5"], "--top-k=5: leaves out unlikely tokens"),
        (["--temperature", "0", "--top-p", "0.9"], "--top-p=0.9: leaves out unlikely tokens"),
        (["--top-p", "7"], "--top-p=7.0: input should be less than or equal to 1"),
        (["absent.png"], "absent.png: cannot be read"),
    ],
)
def test_what_cannot_work_is_said(
    run_folder: Path, pictures: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert caption(run_folder, pictures[0], *options) == 2
    assert message in capsys.readouterr().err


def test_json_that_cannot_be_written_is_named(
    run_folder: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "file.png")
    # Before the model is looked for.
    assert caption(tmp_path / "no-run", pictures[0], "--json", str(tmp_path / "file.png" / "captions.json")) == 2
    assert "captions.json: cannot be written" in capsys.readouterr().err


def test_sampling_options_go_together_with_a_temperature(
    run_folder: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--temperature", "1", "--top-k", "5", "--top-p", "0.9", "--min-p", "0.1"]
    assert caption(run_folder, pictures[0], *options) == 0
    assert capsys.readouterr().out.startswith(pictures[0])
