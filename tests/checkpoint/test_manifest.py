from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path

import pytest

from megatron_vilg.checkpoint import manifest as manifest_module
from megatron_vilg.checkpoint.files import sha256_of
from megatron_vilg.checkpoint.manifest import (
    FILE_NAME,
    FileEntry,
    Manifest,
    fair_share,
    find_damage,
    read_manifest,
    read_sound_manifest,
    write_manifest,
)
from megatron_vilg.config.schema import ModelConfig
from megatron_vilg.errors import CheckpointError
from megatron_vilg.sequence import StreamSpec


def example(**changes: object) -> Manifest:
    manifest = Manifest(
        kind="pretrain",
        step=7,
        samples_seen=84,
        model=dataclasses.asdict(ModelConfig()),
        stream=dataclasses.asdict(StreamSpec(num_text_slots=4, image_side=2)),
        tokenizers={"text": "ab", "image": "cd"},
        text_vocab_size=300,
        image_vocab_size=16,
        layout={"tensor": 1},
        counters={"skipped": 2},
    )
    return dataclasses.replace(manifest, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights.bin").write_bytes(bytes(range(200)))
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "manifest.json").write_text("{}")
    write_manifest(tmp_path, example())
    return tmp_path


def test_files_that_other_ranks_have_read_back_are_listed_though_not_seen_here(folder: Path) -> None:
    """Left out, their loss would never be noticed: what a manifest does not list is not compared."""
    theirs = FileEntry(size=3, xxh3="00")
    write_manifest(folder, example(), {"__1_0.distcp": theirs})
    manifest = read_manifest(folder)
    assert manifest.files["__1_0.distcp"] == theirs and "weights.bin" in manifest.files
    assert find_damage(folder, manifest) == ["__1_0.distcp is missing"]


def test_what_was_written_is_read_back(folder: Path) -> None:
    manifest = read_sound_manifest(folder)
    assert manifest == dataclasses.replace(example(), files=manifest.files)
    assert set(manifest.files) == {"weights.bin", "nested/manifest.json"}
    assert manifest.files["weights.bin"].size == 200
    assert manifest.versions["torch"].startswith("2.")
    assert [p.name for p in folder.glob("*.partial")] == []


def test_compare_ignores_progress_and_layout() -> None:
    other = example(step=9, samples_seen=1, layout={"tensor": 2}, counters={}, versions={"torch": "9"})
    assert other != example()
    example().compare(other)
    with pytest.raises(CheckpointError) as caught:
        example().compare(dataclasses.replace(other, image_vocab_size=17))
    assert [line for line in str(caught.value).splitlines() if "checkpoint has" in line] == [
        "  image_vocab_size: checkpoint has 16, this run has 17"
    ]


def test_compare_prints_both_sides_of_every_difference() -> None:
    other = example(
        model=dataclasses.asdict(ModelConfig(width=512, num_heads=8)), tokenizers={"text": "ab"}, image_vocab_size=17
    )
    with pytest.raises(CheckpointError) as caught:
        example().compare(other, where="runs/a/step-00000007")
    text = str(caught.value)
    assert "runs/a/step-00000007: belongs to another configuration" in text
    assert "model.width: checkpoint has 256, this run has 512" in text
    assert "model.num_heads: checkpoint has 4, this run has 8" in text
    assert "tokenizers.image: checkpoint has 'cd', this run has '(absent)'" in text
    assert "image_vocab_size: checkpoint has 16, this run has 17" in text
    assert "kind" not in text and "stream" not in text


def test_compare_treats_tuples_as_the_lists_json_makes_of_them(tmp_path: Path) -> None:
    write_manifest(tmp_path, example(model={"channels": (1, 2)}))
    found = read_manifest(tmp_path)
    assert found.model == {"channels": [1, 2]}
    found.compare(example(model={"channels": (1, 2)}))
    with pytest.raises(CheckpointError, match=r"model\.channels: checkpoint has \[1, 2\], this run has \[2, 1\]"):
        found.compare(example(model={"channels": (2, 1)}))


def test_each_kind_of_damage_is_named(folder: Path) -> None:
    content = bytearray((folder / "weights.bin").read_bytes())
    content[100] ^= 1
    (folder / "weights.bin").write_bytes(content)
    assert find_damage(folder, read_manifest(folder)) == ["weights.bin has the right size but its content changed"]
    (folder / "weights.bin").write_bytes(content[:150])
    assert find_damage(folder, read_manifest(folder)) == ["weights.bin has 150 bytes instead of 200"]
    (folder / "weights.bin").unlink()
    with pytest.raises(CheckpointError, match=r"damaged: weights\.bin is missing"):
        read_sound_manifest(folder)


def test_readers_share_the_files_fairly() -> None:
    sizes = {"a": 1, "b": 50, "c": 49, "d": 2, "e": 100}
    manifest = example(files={name: FileEntry(size=size) for name, size in sizes.items()})
    assert [fair_share(manifest, index, 3) for index in range(3)] == [{"e", "d"}, {"b", "a"}, {"c"}]
    assert fair_share(manifest, 0, 1) == set(sizes) and fair_share(manifest, 6, 7) == set()


def test_folders_of_format_1_are_still_checked(folder: Path) -> None:
    content = json.loads((folder / FILE_NAME).read_text())
    files = {
        name: {"size": entry["size"], "sha256": sha256_of(folder / name)} for name, entry in content["files"].items()
    }
    old = content | {"files": files, "format_version": 1}
    del old["digest"]
    (folder / FILE_NAME).write_text(json.dumps(old | {"digest": manifest_module._digest(old)}))
    assert find_damage(folder, read_sound_manifest(folder)) == []
    (folder / "weights.bin").write_bytes(bytes(200))
    with pytest.raises(CheckpointError, match=r"weights\.bin has the right size but its content changed"):
        read_sound_manifest(folder)
    written = write_manifest(folder, read_manifest(folder))
    assert written.format_version == 2
    assert written.files["weights.bin"].sha256 == ""


def test_a_file_that_the_disk_cannot_read_is_damage(folder: Path, monkeypatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(manifest_module, "digest_of", fail)
    problems = find_damage(folder, read_manifest(folder))
    assert "weights.bin cannot be read (Input/output error)" in problems


def test_a_folder_without_manifest_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no manifest\.json, so this is no complete checkpoint"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read .*; the folder is damaged"),
        (lambda text: "[]", "not a JSON object"),
        (lambda text: text.replace('"step": 7', '"step": 8'), "does not match its own digest"),
        (
            lambda text: text.replace('"format_version": 2', '"format_version": 99'),
            "is 99, this package reads 1 and 2. Works: the",
        ),
    ],
)
def test_a_changed_manifest_is_refused(folder: Path, change, message: str) -> None:
    path = folder / FILE_NAME
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        read_manifest(folder)


def test_unknown_fields_are_refused(tmp_path: Path) -> None:
    from megatron_vilg.checkpoint.manifest import _digest

    content = {"format_version": 1, "files": {}, "kind": "pretrain", "colour": "red"}
    (tmp_path / FILE_NAME).write_text(json.dumps({**content, "digest": _digest(content)}))
    with pytest.raises(CheckpointError, match=r"fields do not fit format_version 1.*colour"):
        read_manifest(tmp_path)
