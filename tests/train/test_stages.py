"""``vilg train`` from raw pairs: every stage leaves its folder, is not done twice, and refuses what does not fit."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch.distributed as dist
from PIL import Image

from megatron_vilg.checkpoint.image_tokenizer import load_image_tokenizer
from megatron_vilg.cli.main import main
from megatron_vilg.config.load import load_run_config
from megatron_vilg.config.world import World
from megatron_vilg.data.records import read_records
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.parallel.launch import Job
from megatron_vilg.train.run_tokenizers import IMAGE_TOKENIZER, TEXT_TOKENIZER
from megatron_vilg.train.stages import prepare, timed
from tests.helpers import run_distributed

TINY = [
    "image_tokenizer.image_size=16",
    "image_tokenizer.patch=2",
    "image_tokenizer.channels=16",
    "image_tokenizer.channel_multipliers=[1,1]",
    "image_tokenizer.codebook_size=16",
    "image_tokenizer.codebook_dim=4",
    "image_tokenizer_train.num_steps=12",
    "image_tokenizer_train.warmup_steps=2",
    "image_tokenizer_train.batch_size=4",
    "image_tokenizer_train.perceptual_weight=0",
    "model.num_layers=2",
    "model.width=16",
    "model.num_heads=2",
    "model.num_text_slots=6",
    "model.codebook_dim=4",
    "model.conv_kernel=3",
    "text_tokenizer.vocab_size=300",
    "train.num_steps=6",
    "train.batch_size=4",
    "train.eval_every=3",
    "train.sample_every=3",
    "optim.warmup_steps=2",
    "checkpoint.every=3",
    "log.tensorboard=false",
    "data.num_views=1",
]
COLOURS = {"红": (220, 30, 30), "绿": (30, 200, 60), "蓝": (40, 60, 220), "黄": (240, 220, 40)}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for number, (name, colour) in enumerate(list(COLOURS.items()) * 3):
        picture = io.BytesIO()
        Image.new("RGB", (16, 16), tuple(max(0, c - 10 * (number // 4)) for c in colour)).save(picture, "PNG")
        (folder / f"{number:02d}.png").write_bytes(picture.getvalue())
        (folder / f"{number:02d}.txt").write_text(f"{name}色{number}", encoding="utf-8")
    return folder


def train(data: Path, out: Path, *more: str) -> int:
    return main(["train", "--preset", "demo", "--data", str(data), "--out", str(out), *more, *TINY])


def test_one_command_from_pairs_to_export(tmp_path: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(pairs, out) == 0
    said = capsys.readouterr().err
    assert "no pair is held out, so the image tokenizer is measured on training pictures; raise data.val_share" in said
    assert "image_tokenizer: training pictures: l1 " in said and "held-out" not in said
    settled = json.loads((out / "config.json").read_text())
    assert {settled[part]["precision"] for part in ("train", "image_tokenizer_train")} <= {"fp32", "bf16"}
    present = {path.name for path in out.iterdir()}
    assert present >= {"config.json", "text_tokenizer", "image_tokenizer", "tokens", "checkpoints", "export", "samples"}
    assert {path.name for path in (out / "export").iterdir()} >= {"text_tokenizer", "image_tokenizer", "manifest.json"}
    assert sorted(path.name for path in (out / "samples").iterdir()) == [
        "train-step-00000003.png",
        "train-step-00000006.png",
    ]
    seconds = json.loads((out / "seconds.json").read_text())
    assert list(seconds) == ["text_tokenizer", "image_tokenizer", "tokens", "train"]
    before = {path: path.stat().st_mtime_ns for path in (out / "image_tokenizer").iterdir()}
    assert train(pairs, out) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "image_tokenizer").iterdir()} == before

    # Tokens and tokenizers of one run can feed another; without the tokenizers the cache is refused.
    other = tmp_path / "other"
    assert train(out / "tokens", other) == 2
    assert "name its tokenizer with --text-tokenizer FOLDER" in capsys.readouterr().err
    given = [f"--{name}-tokenizer={out / f'{name}_tokenizer'}" for name in ("text", "image")]
    assert train(out / "tokens", other, *given, "optim.lr=1e-3") == 0
    assert not (other / "tokens").exists() and (other / "export" / "image_tokenizer").is_dir()


def test_held_out_pairs_are_held_out_of_every_stage(
    tmp_path: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(pairs, out, "data.val_share=0.3") == 0
    said = capsys.readouterr().err
    assert "image_tokenizer: held-out pictures: l1 " in said and "no pair is held out" not in said
    cache = TokenCache.open(out / "tokens")
    expected = {split: [r.key for r in read_records(pairs, split, val_share=0.3)] for split in ("train", "val")}
    assert {split: [r.key for r in cache.records(split)] for split in cache.splits} == expected
    assert 0 < len(expected["val"]) < 12
    text = json.loads((out / "text_tokenizer" / "manifest.json").read_text())
    assert text["num_captions"] == len(expected["train"])


def test_a_cache_of_another_tokenizer_is_refused(
    tmp_path: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(pairs, first) == 0
    assert train(pairs, second, "image_tokenizer_train.seed=1") == 0
    given = [f"--text-tokenizer={first / 'text_tokenizer'}", f"--image-tokenizer={second / 'image_tokenizer'}"]
    assert train(first / "tokens", tmp_path / "third", *given) == 2
    assert "image_tokenizer_sha256" in capsys.readouterr().err


LATE = (TEXT_TOKENIZER, IMAGE_TOKENIZER)


def prepared_late(data: Path, out: Path, notes: Path) -> tuple[bool, float]:
    """Whether this rank is ready to train, where rank 1 does not see the tokenizers yet; and its first code."""
    job = Job(World(dist.get_rank(), 2, dist.get_rank()), dist.FileStore(str(notes), 2))
    is_there = Path.is_dir
    if dist.get_rank() == 1:
        Path.is_dir = lambda path: path.name not in LATE and is_there(path)  # type: ignore[method-assign, assignment]
    ready = prepare(load_run_config("demo", None, TINY), data, out, job=job)
    return ready is not None, 0.0 if ready is None else float(ready.image_tokenizer.codebook[0, 0])


def test_ranks_that_see_a_shared_folder_late_take_the_main_ranks_word(tmp_path: Path, pairs: Path) -> None:
    assert train(pairs, tmp_path / "run") == 0
    first = float(load_image_tokenizer(tmp_path / "run" / IMAGE_TOKENIZER).codebook[0, 0])
    text = (tmp_path / "run" / TEXT_TOKENIZER).stat().st_ino
    answers = run_distributed(prepared_late, 2, pairs, tmp_path / "run", tmp_path / "notes", timeout=60)
    assert answers == [(True, first)] * 2
    assert (tmp_path / "run" / TEXT_TOKENIZER).stat().st_ino == text, "rank 1 trained another text tokenizer"


def test_wrong_vocabulary_is_refused(tmp_path: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(pairs, tmp_path / "run", "model.text_vocab_size=5000") == 2
    assert "model.text_vocab_size=5000: the text tokenizer has" in capsys.readouterr().err


def test_seconds_add_up(tmp_path: Path) -> None:
    (tmp_path / "seconds.json").write_text('{"train": 100.0, "tokens": 1.0}')
    with timed(tmp_path, "train"):
        pass
    assert json.loads((tmp_path / "seconds.json").read_text()) == {"train": 100.0, "tokens": 1.0}


def test_seconds_that_cannot_be_written_take_no_errors_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with timed(tmp_path / "gone", "train"):
        pass
    with pytest.raises(ZeroDivisionError), timed(tmp_path / "gone", "train"):
        raise ZeroDivisionError
    assert caplog.text.count(f"{tmp_path / 'gone' / 'seconds.json'}: cannot be written (") == 2


@pytest.mark.parametrize("damaged", ['{"train": 1', "[1]", '{"train": null}', "\0"])
def test_damaged_seconds_count_as_none(tmp_path: Path, damaged: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "seconds.json").write_text(damaged)
    with timed(tmp_path, "tokens"):
        pass
    assert json.loads((tmp_path / "seconds.json").read_text()) == {"tokens": 0.0}
    assert f"{tmp_path / 'seconds.json'}: cannot be read (" in caplog.text


def test_a_damaged_token_cache_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = tmp_path / "tokens" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text('{"format": 1, "sett')
    assert train(manifest.parent, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert f"DataError: {manifest}: cannot be read (" in error and "encode again" in error and "Traceback" not in error


@pytest.mark.parametrize("where", ["file", "file/run", "run"])
def test_a_run_folder_that_cannot_be_written_is_named(
    tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "logs" / "rank-0000.log").mkdir(parents=True)
    assert train(tmp_path, tmp_path / where) == 2
    error = capsys.readouterr().err
    assert f"--out={tmp_path / where}: cannot be written (" in error and "Traceback" not in error
