"""A run takes over tokenizers that fit it, keeps those it has, and says what does not fit before it writes anything."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from megatron_vilg.checkpoint.image_tokenizer import save_image_tokenizer
from megatron_vilg.config.load import load_run_config, read_run_folder_config, write_run_folder_config
from megatron_vilg.config.schema import ImageTokenizerConfig, RunConfig, TextTokenizerConfig
from megatron_vilg.config.world import World
from megatron_vilg.data.text import train_text_tokenizer
from megatron_vilg.errors import ConfigError
from megatron_vilg.models.vqgan import VQGAN
from megatron_vilg.parallel.launch import Job
from megatron_vilg.train.run_tokenizers import settle_tokenizers, unusable_tokenizer
from megatron_vilg.train.stages import prepare, timed
from tests.train.test_stages import TINY, pairs  # noqa: F401 - a fixture

NONE: dict[str, Path | None] = {"text_tokenizer": None, "image_tokenizer": None}


def config(*more: str) -> RunConfig:
    return load_run_config("demo", overrides=[*TINY, *more])


def image_folder(folder: Path, seed: int = 0, **sizes: int) -> Path:
    torch.manual_seed(seed)
    options: ImageTokenizerConfig = dataclasses.replace(config().image_tokenizer, **sizes)  # type: ignore[arg-type]
    return save_image_tokenizer(VQGAN(options), folder)


def text_folder(folder: Path, captions: str = "红色0", vocab_size: int = 280) -> Path:
    train_text_tokenizer([captions], TextTokenizerConfig(vocab_size=vocab_size), folder)
    return folder


def refusal(run: RunConfig, out: Path, **given: Path | None) -> str:
    """What is said; nothing may have been written."""
    before = sorted(out.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        settle_tokenizers(run, out, NONE | given)
    assert sorted(out.rglob("*")) == before
    return str(caught.value)


def test_folders_that_hold_no_such_tokenizer_are_not_copied(tmp_path: Path) -> None:
    out, run = tmp_path / "run", tmp_path / "other"
    image, text = image_folder(run / "image_tokenizer"), text_folder(run / "text_tokenizer")
    said = refusal(config(), out, image_tokenizer=tmp_path / "nowhere", text_tokenizer=tmp_path / "no")
    assert f"--image-tokenizer={tmp_path / 'nowhere'}: no such folder. Works: the folder of a trained tok" in said
    assert f"--text-tokenizer={tmp_path / 'no'}: no such folder" in said
    said = refusal(config(), out, image_tokenizer=run, text_tokenizer=run)  # the run instead of its tokenizers
    assert "--image-tokenizer=" in said and f"for example {image}" in said
    assert "--text-tokenizer=" in said and f"for example {text}" in said
    said = refusal(config(), out, image_tokenizer=text, text_tokenizer=image)
    assert said.startswith("2 problems") and "format_version" not in said
    assert f"--image-tokenizer={text}: is a text tokenizer, where an image tokenizer is needed. Works: the fold" in said
    assert f"--text-tokenizer={image}: is an image tokenizer, where a text tokenizer is needed. Works: the fold" in said
    settle_tokenizers(config(), out, {"image_tokenizer": image, "text_tokenizer": text})
    assert {path.name for path in out.iterdir()} == {"image_tokenizer", "text_tokenizer"}


@pytest.mark.parametrize("damaged", ['{"text_tokenizer": 1', "[1]", '{"text_tokenizer": "long"}'])
def test_damaged_seconds_do_not_keep_a_run_from_going_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: str
) -> None:
    image, text = image_folder(tmp_path / "image_tokenizer"), text_folder(tmp_path / "text_tokenizer")
    before = {path: path.read_bytes() for path in [*image.iterdir(), *text.iterdir()]}
    seconds = tmp_path / "seconds.json"
    seconds.write_text(damaged)
    settle_tokenizers(config(), tmp_path, NONE)
    assert f"{seconds}: cannot be read (" in caplog.text
    assert "the seconds of earlier stages do not count" in caplog.text
    with timed(tmp_path, "tokens"):
        pass
    assert set(json.loads(seconds.read_text())) == {"tokens"}
    assert {path: path.read_bytes() for path in before} == before
    caplog.clear()
    settle_tokenizers(config(), tmp_path, NONE)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "no tokenizer in this folder"),
        ({"manifest.json": "[]"}, "no tokenizer in this folder"),
        ({"manifest.json": '{"settings": {}}'}, "is a token cache"),
        ({"manifest.json": '{"kind": "pretrain"}'}, "is a folder of other weights"),
        ({"checkpoints/step-00000001/manifest.json": "{}"}, "is the folder of a run or of an exported model"),
    ],
)
def test_what_was_given_as_a_tokenizer(tmp_path: Path, files: dict[str, str], found: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (problem,) = unusable_tokenizer("image_tokenizer", tmp_path)
    assert problem.startswith(f"--image-tokenizer={tmp_path}: {found}, where an image tokenizer is needed. Works: ")


def test_a_damaged_tokenizer_is_not_copied(tmp_path: Path) -> None:
    image = image_folder(tmp_path / "image")
    with (image / "model.safetensors").open("ab") as file:
        file.write(b"!")
    assert "model.safetensors has" in refusal(config(), tmp_path / "run", image_tokenizer=image)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"codebook_size": 8}, "image_tokenizer.codebook_size=16: --image-tokenizer={} has 8. Works: 8"),
        ({"image_size": 32}, "image_tokenizer.image_size=16: --image-tokenizer={} has 32. Works: 32"),
        ({"codebook_dim": 8}, "image_tokenizer.codebook_dim=4: --image-tokenizer={} has 8. Works: 8"),
        ({"patch": 4}, "make 4 tokens a side, --image-tokenizer={} makes 2. Works: 4 and [1,1]"),
    ],
)
def test_other_sizes_are_named(tmp_path: Path, sizes: dict[str, int], message: str) -> None:
    image = image_folder(tmp_path / "image", **sizes)
    assert message.format(image) in refusal(config(), tmp_path / "run", image_tokenizer=image)
    shutil.copytree(image, tmp_path / "run" / "image_tokenizer")  # by hand
    assert message.split("--")[0] in refusal(config(), tmp_path / "run")


def test_a_reconstructor_needs_the_tokenizers_decoder(tmp_path: Path) -> None:
    image = image_folder(tmp_path / "image", channels=32)
    joint = config("reconstructor.enabled=true")
    assert "image_tokenizer.channels=16:" in refusal(joint, tmp_path / "run", image_tokenizer=image)
    scratch = config("reconstructor.enabled=true", "reconstructor.decoder_start=scratch")
    settle_tokenizers(scratch, tmp_path / "run", NONE | {"image_tokenizer": image})
    settle_tokenizers(config(), tmp_path / "run", NONE)


def test_a_text_tokenizer_of_another_size_is_not_copied(tmp_path: Path) -> None:
    text = text_folder(tmp_path / "text")
    said = refusal(config("model.text_vocab_size=5000"), tmp_path / "run", text_tokenizer=text)
    assert f"model.text_vocab_size=5000: --text-tokenizer={text} has " in said


def test_a_run_keeps_the_tokenizers_that_it_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, first, second = tmp_path / "run", image_folder(tmp_path / "a"), image_folder(tmp_path / "b", seed=1)
    text, other = text_folder(tmp_path / "text"), text_folder(tmp_path / "other", "蓝色的天")
    given = {"image_tokenizer": first, "text_tokenizer": text}
    for _ in range(2):
        settle_tokenizers(config(), out, given)
    said = refusal(config(), out, image_tokenizer=second, text_tokenizer=other)
    for source, target in ((second, "image_tokenizer"), (other, "text_tokenizer")):
        assert f"={source}: is not the tokenizer that this run has, {out / target} (SHA-256 " in said
    shutil.rmtree(first)
    monkeypatch.setattr(logging.getLogger("megatron_vilg"), "propagate", True)
    settle_tokenizers(config(), out, given)
    assert f"--image-tokenizer={first}: is not there" in caplog.text


def test_other_settings_than_the_run_trained_its_tokenizers_with_are_refused(tmp_path: Path, pairs: Path) -> None:  # noqa: F811
    out = tmp_path / "run"
    run = config("image_tokenizer_train.num_steps=1", "image_tokenizer_train.warmup_steps=0")
    assert prepare(run, pairs, out) is not None
    write_run_folder_config(run, out)
    before = (out / "config.json").read_bytes()
    changed = dataclasses.replace(
        run,
        text_tokenizer=dataclasses.replace(run.text_tokenizer, character_coverage=0.99),
        image_tokenizer=dataclasses.replace(run.image_tokenizer, channels=32),
        image_tokenizer_train=dataclasses.replace(run.image_tokenizer_train, num_steps=2, checkpoint_every=7),
        data=dataclasses.replace(run.data, view_shift_pixels=1.0),
    )
    with pytest.raises(ConfigError) as caught:
        prepare(changed, pairs, out)
    said = str(caught.value)
    assert f"{out / 'text_tokenizer'}: was trained with text_tokenizer.character_coverage=1.0 (now 0.99). Work" in said
    assert f"{out / 'image_tokenizer'}: was trained with image_tokenizer.channels=16 (now 32), " in said
    assert "image_tokenizer_train.num_steps=1 (now 2)" in said and "data.view_shift_pixels=" in said
    assert "checkpoint_every" not in said and "precision" not in said
    assert (out / "config.json").read_bytes() == before

    # The same settings go on, as they were asked for and as the run wrote them down; so does one taken as it is.
    for again in (run, read_run_folder_config(out)):
        assert prepare(again, pairs, out) is not None
    coarser = dataclasses.replace(changed, image_tokenizer=run.image_tokenizer, data=run.data)
    assert (
        prepare(coarser, pairs, out, text_tokenizer=out / "text_tokenizer", image_tokenizer=out / "image_tokenizer")
        is not None
    )


def test_a_batch_takes_the_pairs_a_number_of_times_at_most(tmp_path: Path, pairs: Path) -> None:  # noqa: F811
    image = image_folder(tmp_path / "image")
    for size in (12_000, 12_001):
        run = config(f"train.batch_size={size}")
        if size == 12_000:
            assert prepare(run, pairs, tmp_path / "run", image_tokenizer=image) is not None
            continue
        with pytest.raises(ConfigError) as caught:
            prepare(run, pairs, tmp_path / "run", image_tokenizer=image)
        rule = "each step would take each of the 12 training pairs 1000 times"
        assert f"train.batch_size=12001: {rule}. Works: 1 to 12000, better up to 12." in str(caught.value)


def test_only_the_main_process_writes_seconds(tmp_path: Path, pairs: Path) -> None:  # noqa: F811
    out, image = tmp_path / "run", image_folder(tmp_path / "image")
    run = config("reconstructor.enabled=true", "data.target_view_probability=0", "data.target_view_fall=0")
    assert prepare(run, pairs, out, image_tokenizer=image) is not None
    assert '"pixels"' in (out / "seconds.json").read_text()
    (out / "seconds.json").unlink()
    ready = prepare(run, pairs, out, image_tokenizer=image, job=Job(World(1, 2, 1), None))
    assert ready is not None and ready.pixels is not None
    assert not (out / "seconds.json").exists()
