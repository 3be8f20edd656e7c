"""Optimizers of an image tokenizer in turn on a folder of pictures, and the rows on invented courses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.courses import Course
from benchmarks.image_tokenizers import FEATURES, PIXELS, PSNR, main, rows
from tests.train.vqgan_case import discs


def course(values: list[float], seconds: float, psnr: float) -> Course:
    curve = list(enumerate(values, 1))
    return Course([seconds] * len(values), {PIXELS: curve, FEATURES: curve, PSNR: [(len(values), psnr)]})


def test_rows_count_steps_to_the_peers_end() -> None:
    both = {"adamw": course([5.0, 4.0, 3.0, 2.0], 1.0, 18.0), "muon": course([4.0, 2.0, 1.5, 1.0], 2.0, 20.0)}
    steps, last, *_, psnr, seconds = rows(both)
    assert (steps.value, steps.peer_value, steps.ratio) == (2, 4, 2.0)
    assert (last.value, last.peer_value, last.ratio) == (1.0, 2.0, 2.0)
    assert (psnr.value, psnr.peer_value) == (20.0, 18.0) and seconds.ratio == 0.5


def test_an_end_that_is_never_reached_has_no_row() -> None:
    found = list(rows({"adamw": course([5.0, 2.0], 1.0, 20.0), "muon": course([5.0, 4.0], 1.0, 18.0)}))
    assert len(found) == 4 and found[0].ratio == 0.5


def test_pictures_are_learnt_by_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number, picture in enumerate(discs(20)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text("圆", encoding="utf-8")
    command = ["--data", str(data), "--steps", "8", "--json", str(tmp_path / "rows.json"), "data.val_share=0.3"]
    command += ["image_tokenizer_train.batch_size=2", "image_tokenizer_train.warmup_steps=2"]
    command += [
        "image_tokenizer.image_size=24",
        "model.conv_kernel=3",
        "image_tokenizer.channels=16",
        "image_tokenizer.codebook_size=16",
    ]
    assert main(command) == 0
    record = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    ends = [row for row in record["rows"] if "after 8 steps" in row["metric"]]
    assert len(ends) == 2 and all(row["value"] != row["peer_value"] for row in ends)
    assert len(record["rows"][-1]["rounds_s"]["muon"]) == 8 and "--steps 8" in record["command"]
    assert "O2" in capsys.readouterr().out
    assert main([*command, "image_tokenizer.kind=dvae"]) == 2
    assert "image_tokenizer.kind=dvae" in (error := capsys.readouterr().err) and "Works: vqgan" in error
    assert main(["--data", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
