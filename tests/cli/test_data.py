from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from megatron_vilg.checkpoint.image_tokenizer import image_tokenizer_hash, save_image_tokenizer
from megatron_vilg.cli.main import main
from megatron_vilg.cli.shares import Share, chosen_share
from megatron_vilg.config.schema import ImageTokenizerConfig, TextTokenizerConfig
from megatron_vilg.data.emoji import DEMO_STYLES
from megatron_vilg.data.text import train_text_tokenizer
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.errors import ConfigError
from megatron_vilg.models.vqgan import VQGAN
from tests.data.fake_emoji import write_packages


def tiny_vqgan() -> VQGAN:
    return VQGAN(
        ImageTokenizerConfig(
            image_size=16,
            channels=8,
            channel_multipliers=(1, 1, 1),
            num_res_blocks=1,
            codebook_size=32,
            codebook_dim=4,
            norm_groups=8,
            bottom_attention=False,
        )
    )


def test_help_names_the_demo_styles(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "demo", "--help"])
    assert f"(default:{','.join(DEMO_STYLES)})" in "".join(capsys.readouterr().out.split())


def test_demo_tokenizer_and_encode_in_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, data, text, image = (tmp_path / name for name in ("cache", "data", "text", "image"))
    write_packages(cache)
    demo = ["data", "demo", "--out", str(data), "--concepts", "12", "--held-out-concepts", "2", "--size", "16"]
    assert main([*demo, "--styles", "noto,fluent-3d", "--cache", str(cache)]) == 0
    assert f"{data}: " in capsys.readouterr().out
    # The override stands in the middle on purpose.
    assert (
        main(["data", "text-tokenizer", "text_tokenizer.vocab_size=420", "--data", str(data), "--out", str(text)]) == 0
    )
    assert "tokens (model.num_text_slots = 16)" in capsys.readouterr().out
    save_image_tokenizer(tiny_vqgan(), image)
    encode = ["data", "encode", "--data", str(data), "--text-tokenizer", str(text), "--image-tokenizer", str(image)]
    tokens = tmp_path / "tokens"
    settings = ["--out", str(tokens), "--device", "cpu", "data.num_views=1", "model.num_text_slots=12"]
    assert main([*encode, *settings, "--worker", "0/2"]) == 0
    assert "others are not" in capsys.readouterr().out
    assert main([*encode, *settings, "--worker", "1/2"]) == 0
    assert f"{tokens}: complete" in capsys.readouterr().out
    swapped = ["--text-tokenizer", str(image), "--image-tokenizer", str(text)]
    assert main([*encode, *settings, *swapped]) == 2
    said = capsys.readouterr().err
    assert f"--text-tokenizer={image}: is an image tokenizer, where a text tokenizer is needed" in said
    assert f"--image-tokenizer={text}: is a text tokenizer, where an image tokenizer is needed" in said
    opened = TokenCache.open(tokens, expect={"image_tokenizer_sha256": image_tokenizer_hash(image), "grid_side": 4})
    assert opened.splits == json.loads((data / "manifest.json").read_text())["pairs"]
    assert opened.split("train").num_views == 1
    assert main([*encode, *settings, "data.num_views=2"]) == 2
    assert "  data.num_views: 1 there, 2 asked for" in capsys.readouterr().err


@pytest.fixture
def encode(tmp_path: Path) -> list[str]:
    """``vilg data encode`` of eight pairs, whose tokens take more than 64 kB; without ``--out``."""
    data, text, image = (tmp_path / name for name in ("pairs", "text", "image"))
    data.mkdir()
    for index in range(8):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(data / f"{index}.png")
        (data / f"{index}.txt").write_text("一只猫", encoding="utf-8")
    train_text_tokenizer(["一只猫"], TextTokenizerConfig(vocab_size=280), text)
    save_image_tokenizer(tiny_vqgan(), image)
    folders = ["--data", str(data), "--text-tokenizer", str(text), "--image-tokenizer", str(image)]
    return ["data", "encode", "model.num_text_slots=4096", *folders, "--device", "cpu"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)]
    try:
        refusal = subprocess.run(mount, capture_output=True, text=True).stderr
    except FileNotFoundError:
        refusal = "there is no mount"
    if refusal:
        pytest.skip(f"no file system can be mounted here: {refusal.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_explained(small_disk: Path, encode: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = small_disk / "tokens"
    assert main([*encode, "--out", str(out)]) == 2
    assert f"DataError: --out={out}: the disk is full or a quota is used up (" in capsys.readouterr().err
    assert not list(out.iterdir())


def test_demo_pictures_that_find_no_room_can_be_drawn_again(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, out = tmp_path / "cache", small_disk / "data"
    write_packages(cache)
    demo = ["data", "demo", "--out", str(out), "--concepts", "12", "--held-out-concepts", "2", "--cache", str(cache)]
    assert main([*demo, "--styles", "noto,fluent-3d"]) == 2
    assert f"DataError: --out={out}: the disk is full or a quota is used up (" in capsys.readouterr().err
    assert not out.exists()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert main([*demo, "--styles", "noto,fluent-3d"]) == 0


def test_the_end_of_a_quota_that_safetensors_reports_is_explained(
    tmp_path: Path, encode: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arrays: object, path: Path) -> None:
        path.write_bytes(b"the beginning")
        raise SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)")

    out = tmp_path / "tokens"
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", fail)
        assert main([*encode, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"DataError: --out={out}: the disk is full or a quota is used up ([Errno 122] Disk quota exceeded)" in error
    assert not list(out.iterdir())
    assert main([*encode, "--out", str(out)]) == 0


def test_filter(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name, caption in {"a": "一只猫", "b": "一只猫🐱", "c": "两只狗"}.items():
        Image.new("RGB", (8, 8), (ord(name), 0, 0)).save(source / f"{name}.png")
        (source / f"{name}.txt").write_text(caption, encoding="utf-8")
    command = ["data", "filter", "--input", str(source), "--output", str(out)]
    assert main([*command, "--min-similarity", "0.2"]) == 2
    assert "--min-similarity=0.2: needs similarities: --scores or --scorer" in capsys.readouterr().err
    assert main([*command, "--require-noun", "yes"]) == 2
    assert "pip install 'megatron_vilg[filter]'" in capsys.readouterr().err
    (tmp_path / "scores.jsonl").write_text('{"id": "a", "score": 0.3}\n{"id": "c", "score": 0.1}')
    assert main([*command, "--scores", str(tmp_path / "scores.jsonl"), "--min-similarity", "0.2"]) == 0
    assert capsys.readouterr().out == (
        f"{out}: kept 1 of 3 pairs (1 train); rejected: 1 special_characters, 1 low_similarity\n"
        "not checked: no_noun, too_small\n"
    )
    assert json.loads((out / "report.json").read_text())["kept"] == 1
    assert main(command) == 2
    assert f"--output={out}: must be new or empty, it holds pairs-00000.tar" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "other"), "--scorer", "operator:length_hint"]) == 2
    assert "--scorer=operator:length_hint: no list of numbers came back" in capsys.readouterr().err


def test_messages_and_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "text-tokenizer", "--data", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "found no pairs at" in capsys.readouterr().err
    assert main(["data", "demo", "--out", str(tmp_path / "d"), "--styles", "apple"]) == 2
    assert "works any of noto" in capsys.readouterr().err


def test_a_text_tokenizer_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "text-tokenizer", "text_tokenizer.vocab_size=300", "--data", str(tmp_path / "pairs")]
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "a.png").write_bytes(b"")
    (tmp_path / "pairs" / "a.txt").write_text("红色的猫", encoding="utf-8")
    out = tmp_path / "runs" / "text_tokenizer"
    assert main([*command, "--out", str(out)]) == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main([*command, "--out", str(out)]) == 2
    assert f"--out={out}: must be new or empty, it holds manifest.json, spm.model. Works" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize("place", ["file", "file/new"])
@pytest.mark.parametrize("verb", ["demo", "text-tokenizer", "encode"])
def test_a_file_in_place_of_a_folder_is_named_first(
    verb: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    missing = str(tmp_path / "missing")
    inputs = {
        "demo": ["--cache", missing],
        "text-tokenizer": ["--data", missing],
        "encode": ["--data", missing, "--text-tokenizer", missing, "--image-tokenizer", missing],
    }
    out = tmp_path / place
    assert main(["data", verb, *inputs[verb], "--out", str(out)]) == 2
    assert f"--out={out}: cannot be written ({tmp_path / 'file'} is no folder)" in capsys.readouterr().err


def test_each_rank_encodes_on_the_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class MovedError(Exception):
        pass

    class Tokenizer:
        def to(self, device: torch.device) -> None:
            raise MovedError(str(device))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr("megatron_vilg.checkpoint.image_tokenizer.load_image_tokenizer", lambda _: Tokenizer())
    monkeypatch.setattr("megatron_vilg.train.run_tokenizers.unusable_tokenizer", lambda *_: [])
    command = ["data", "encode", "--data", "d", "--text-tokenizer", "t", "--image-tokenizer", "i"]
    for rank in ("3", "0"):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(MovedError, match=f"^cuda:{rank}$"):
            main([*command, "--out", str(tmp_path / "tokens")])


@pytest.mark.parametrize("text", ["3/3", "a/2", "1", "-1/2", "0/0"])
def test_wrong_workers(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--worker={text}: works auto, or INDEX/COUNT"):
        chosen_share(text)


def test_right_workers() -> None:
    assert chosen_share("2/8") == Share(2, 8)
    assert [list(Share(index, 3).prompts(4)) for index in range(3)] == [[0], [1], [2, 3]]


@pytest.mark.parametrize(
    "words", [["data"], ["data", "demo"], ["data", "filter"], ["data", "text-tokenizer"], ["data", "encode"]]
)
def test_help_has_an_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([*words, "--help"])
    assert done.value.code == 0
    assert "example" in capsys.readouterr().out
