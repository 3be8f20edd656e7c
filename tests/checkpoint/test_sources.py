"""What lies beside weights, configuration and tokenizers, belongs to them or stops the tools."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vilg.checkpoint.manifest import read_manifest, write_manifest
from megatron_vilg.checkpoint.reshape import convert, merge
from megatron_vilg.checkpoint.sources import open_newest, open_source
from megatron_vilg.checkpoint.transfer import Options
from megatron_vilg.checkpoint.verify import problems_of
from megatron_vilg.errors import CheckpointError
from tests.tiny_run import write_tiny_run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with everything that belongs to it."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    write_tiny_run(folder, export=False)
    return folder


def test_a_wrong_tokenizer_or_configuration_beside_the_weights_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_tiny_run(run, export=False)
    (step,) = (run / "checkpoints").iterdir()
    manifest = json.loads((step / "manifest.json").read_text())
    source = open_source(run)
    assert source.manifest is not None and manifest["kind"] == "pretrain"
    source.manifest = type(source.manifest)(
        kind="pretrain", model=source.manifest.model, tokenizers={"text_tokenizer": "0" * 64}
    )
    with pytest.raises(CheckpointError, match=r"spm.model: is not the tokenizer of these weights .*0000"):
        merge(source, tmp_path / "whole")
    config = json.loads((run / "config.json").read_text())
    config["model"]["width"] = 32
    (run / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(CheckpointError, match="width: 16 in the manifest, 32 in config.json"),
        open_source(run) as again,
    ):
        merge(again, tmp_path / "whole")
    shutil.rmtree(run / "text_tokenizer")
    (run / "config.json").unlink()
    with open_source(run) as again, pytest.raises(CheckpointError, match="no text_tokenizer beside it"):
        convert(again, tmp_path / "whole", "pretrained", options=Options())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def change_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda run: change_json(run / "image_tokenizer" / "config.json", lambda c: c.update(channels=16)),
            "image_tokenizer: damaged: config.json has",
        ),
        (
            lambda run: (run / "image_tokenizer" / "manifest.json").unlink(),
            "image_tokenizer: no manifest.json, so this is no complete",
        ),
        (
            lambda run: (run / "text_tokenizer" / "manifest.json").write_text("{}"),
            "text_tokenizer: cannot be used .*one of them was replaced",
        ),
        (lambda run: (run / "text_tokenizer" / "manifest.json").write_text("[]"), "text_tokenizer: cannot be used"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json: is no configuration of a run"),
        (lambda run: (run / "config.json").write_text("null"), "config.json: is no configuration of a run"),
        (
            lambda run: (run / "config.json").write_text('{"_class_name": "UNet", "model": {}}'),
            r"(?s)is no configuration of a run .*_class_name",
        ),
        (lambda run: (run / "config.json").write_text('{"model": null}'), "config.json: is no configuration of a run"),
        (
            lambda run: change_json(run / "config.json", lambda c: c["reconstructor"].update(enabled=True)),
            "reconstructor.enabled: False by the weights, True in config.json",
        ),
        (
            lambda run: change_json(run / "config.json", lambda c: c["image_tokenizer"].update(image_size=32)),
            "image_side: 4 in the manifest, 8 by image_tokenizer in config.json",
        ),
    ],
)
def test_what_lies_beside_the_weights_is_checked_by_merge_and_verify(tmp_path: Path, tiny, damage, words: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny, run)
    with open_source(run) as source:
        assert problems_of(source) == []
    damage(run)
    with open_source(run) as source:
        (problem,) = problems_of(source)
        assert re.search(words, problem)
        with pytest.raises(CheckpointError, match=words):
            merge(source, tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_under_the_name_of_another_step_is_not_the_newest(tmp_path: Path, tiny) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny, run)
    steps = run / "checkpoints"
    words = (
        r"step-00000007: the folder is named for step 7, its manifest.json says step 3. Works: the name step-00000003"
    )
    (steps / "step-00000003").rename(steps / "step-00000007")
    for opened in (open_source, open_newest):
        with pytest.raises(CheckpointError, match=words):
            opened(run)
    later = steps / "step-00000005"
    shutil.copytree(steps / "step-00000007", later)
    write_manifest(later, dataclasses.replace(read_manifest(later), step=5))
    with open_source(run) as source:
        assert source.path == later
    with pytest.raises(CheckpointError, match=rf"{words}\n.*older ones are sound: step-00000005"):
        open_newest(run)


def test_what_holds_no_tensors_is_told_by_what_it_is(tmp_path: Path, tiny) -> None:
    with pytest.raises(
        CheckpointError, match=r"text_tokenizer: is a text tokenizer, which holds no tensors. Works: a r"
    ):
        open_source(tiny / "text_tokenizer")
    tokens = {"format": 1, "settings": {}, "pairs": {}, "longest_caption": 3}
    for content, words in (
        (tokens, "is a token cache, which holds"),
        ({}, "its manifest.json has no format_version, so"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=f"{tmp_path}: {words}"):
            open_source(tmp_path)
    (tmp_path / "last.ckpt").write_text("")
    with pytest.raises(
        CheckpointError, match=r"last.ckpt: is a file, and of files only .* `vilg checkpoint convert --fr"
    ):
        open_source(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        open_source(tmp_path / "nowhere")


def test_nothing_is_written_into_a_tokenizer_of_the_source(tmp_path: Path, tiny) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny, run)
    inside = run / "image_tokenizer" / "inner"
    with open_source(run) as source, pytest.raises(CheckpointError, match="inner: lies in .*image_tokenizer, which is"):
        merge(source, inside)
    assert not inside.exists()
