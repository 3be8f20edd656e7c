from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_vilg.checkpoint.image_tokenizer import load_image_tokenizer
from megatron_vilg.cli.main import EXIT_ERROR, main
from tests.train.vqgan_case import SIZE, discs

SMALL = [
    f"image_tokenizer.image_size={SIZE}",
    "image_tokenizer.channels=8",
    "image_tokenizer.norm_groups=2",
    "image_tokenizer.codebook_size=16",
    "image_tokenizer.codebook_dim=4",
    "image_tokenizer_train.num_steps=8",
    "image_tokenizer_train.batch_size=4",
    "image_tokenizer_train.warmup_steps=1",
    "image_tokenizer_train.perceptual_weight=0",
    "model.codebook_dim=4",
    "model.conv_kernel=3",
    "log.tensorboard=true",
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for index, pixels in enumerate(discs(6)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("一个圆", encoding="utf-8")
    return folder


def test_command_trains_and_goes_on(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train-vqgan", "--preset", "demo", "--data", str(data), "--out", str(tmp_path / "run"), *SMALL]
    assert main(command) == 0
    assert load_image_tokenizer(tmp_path / "run" / "image_tokenizer").config.codebook_size == 16
    work = tmp_path / "run" / "image_tokenizer_training"
    assert json.loads((work / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 8
    assert list((work / "tensorboard").iterdir()) and list((work / "samples").iterdir())
    said = capsys.readouterr().err
    assert "no pair is held out, so the image tokenizer is measured on training pictures; raise data.val_share" in said
    assert "6 training pictures, 0 held out" in said and "image_tokenizer: training pictures: l1 " in said
    assert "held-out" not in said
    assert main([*command, "--device", "cpu"]) == 0
    assert "is already trained" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "train-vqgan"])
def test_a_finished_folder_is_no_place_for_a_run(
    tmp_path: Path, data: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that was merged or passed on would be left aside, and its files changed under its manifest."""
    model = tmp_path / "share"
    model.mkdir()
    (model / "manifest.json").write_text("{}")
    assert main([verb, "--preset", "demo", "--data", str(data), "--out", str(model), *SMALL]) == EXIT_ERROR
    error = capsys.readouterr().err
    assert f"--out={model}: has a manifest.json, so it is a finished model" in error and "Works: a new folder" in error
    assert [path.name for path in model.iterdir()] == ["manifest.json"]


def test_unknown_device_is_named(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--preset", "demo", "--data", str(data), "--out", str(tmp_path), "--device", "abacus"]
    assert main(["train-vqgan", *arguments]) == EXIT_ERROR
    error = capsys.readouterr().err
    assert "--device=abacus" in error and "Works: auto, cpu" in error


@pytest.mark.parametrize("verb", ["train", "train-vqgan"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "image_tokenizer.code_choice=logits",
            "such a tokenizer can be imported (vilg checkpoint convert), not trained",
        ),
        ("image_tokenizer_train.perceptual_network=lite7", "perceptual_network='lite7' is neither a file nor a known"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_data_is_read(
    verb: str, option: str, message: str, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [verb, "--preset", "demo", "--data", str(data), "--out", str(tmp_path / "run"), *SMALL]
    command.remove("image_tokenizer_train.perceptual_weight=0")
    assert main([*command, option]) == EXIT_ERROR
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "text_tokenizer").exists()


def test_a_place_that_cannot_be_written_is_named_before_the_data_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["--preset", "demo", "--data", str(tmp_path / "no-data"), "--out", str(tmp_path / "file" / "run")]
    assert main(["train-vqgan", *arguments]) == EXIT_ERROR
    assert f"run: cannot be written ({tmp_path / 'file'} is no folder)" in capsys.readouterr().err
