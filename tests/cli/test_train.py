"""What ``vilg train`` and ``vilg train-vqgan`` refuse before they make anything."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from PIL import Image
from safetensors import SafetensorError

from megatron_vilg.cli.main import EXIT_ERROR, main
from megatron_vilg.train import precision, stages
from tests.checkpoint.claim_case import leave, living
from tests.train.vqgan_case import discs


def test_attention_that_cannot_train_here_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--preset", "demo", "--data", str(tmp_path / "none"), "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "run"), "ops.attention=flex"]) == EXIT_ERROR
    assert "ops.attention=flex: torch's FlexAttention has no backward pass on a CPU" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["logs"]


@pytest.mark.parametrize("verb", ["train", "train-vqgan"])
def test_a_folder_in_which_another_job_still_makes_tokenizers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    run.mkdir()
    for index, pixels in enumerate(discs(4)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(data / f"{index}.png")
        (data / f"{index}.txt").write_text("一个圆", encoding="utf-8")
    owner = leave(run, living())
    before = owner.read_bytes()
    assert main([verb, "--preset", "demo", "--data", str(data), "--out", str(run), "--device", "cpu"]) == EXIT_ERROR
    assert f"--out={run}: process {living().pid} on " in (error := capsys.readouterr().err) and "trains in it" in error
    assert sorted(path.name for path in run.iterdir() if path.name != "logs") == ["owner.json"]
    assert owner.read_bytes() == before


@pytest.mark.parametrize(
    "said",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "safetensors"],
)
@pytest.mark.parametrize("verb", ["train", "train-vqgan"])
def test_a_full_disk_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str, said: Exception
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for index, pixels in enumerate(discs(4)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(data / f"{index}.png")
        (data / f"{index}.txt").write_text("一个圆", encoding="utf-8")

    def fail(*_: object) -> None:
        raise said

    monkeypatch.setattr(stages, "settle_precision", fail)
    monkeypatch.setattr(precision, "settle_precision", fail)
    assert main([verb, "--preset", "demo", "--data", str(data), "--out", str(run), "--device", "cpu"]) == EXIT_ERROR
    error = capsys.readouterr().err
    assert f"TrainingError: --out={run}: the disk is full or a quota is used up (" in error and "Traceback" not in error
