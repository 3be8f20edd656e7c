from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from megatron_vilg.checkpoint import export
from megatron_vilg.checkpoint.export import load_model_folder, save_model_folder
from megatron_vilg.checkpoint.manifest import Manifest, read_manifest
from megatron_vilg.errors import CheckpointError

CONFIG = {"model": {"width": 8}, "说明": "小"}
MANIFEST = Manifest(kind="pretrain", step=5, tokenizers={"text": "ab"})


def weights() -> dict[str, torch.Tensor]:
    base = torch.arange(12.0).reshape(3, 4)
    return {"embed.text.weight": base, "heads.text.weight": base.t(), "blocks.0.norm1.weight": base[1], "n": base[:2]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = tmp_path / "text_tokenizer"
    tokenizer.mkdir()
    (tokenizer / "spm.model").write_bytes(b"pieces")
    (tmp_path / "card.md").write_text("a card")
    extra = {"text_tokenizer": tokenizer, "README.md": tmp_path / "card.md"}
    return save_model_folder(tmp_path / "export", weights(), CONFIG, MANIFEST, extra)


def test_round_trip(folder: Path) -> None:
    config, state = load_model_folder(folder)
    assert config == CONFIG
    assert state.keys() == weights().keys()
    for name, tensor in weights().items():
        assert torch.equal(state[name], tensor), name
    assert (folder / "text_tokenizer" / "spm.model").read_bytes() == b"pieces"
    assert (folder / "README.md").read_text() == "a card"
    manifest = read_manifest(folder)
    assert manifest.step == 5
    assert set(manifest.files) == {"model.safetensors", "config.json", "text_tokenizer/spm.model", "README.md"}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(weights())


def test_others_may_read_what_the_umask_lets_them(folder: Path) -> None:
    modes = {name: (folder / name).stat().st_mode & 0o777 for name in ("model.safetensors", "manifest.json")}
    assert modes["model.safetensors"] == modes["manifest.json"], modes


def test_only_tensors_that_share_memory_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(export, "save_file", lambda tensors, path, **_: written.update(tensors) or path.touch())
    state = {**weights(), "alone": torch.arange(6.0), "alone.t": torch.arange(6.0).reshape(2, 3).t()}
    save_model_folder(tmp_path / "export", state, CONFIG, MANIFEST)
    assert [name for name in state if written[name].data_ptr() == state[name].data_ptr()] == ["alone"]
    assert len({tensor.untyped_storage().data_ptr() for tensor in written.values()}) == len(state)
    assert all(tensor.is_contiguous() for tensor in written.values())


def test_writing_again_replaces_the_folder(folder: Path) -> None:
    save_model_folder(folder, {"w": torch.ones(2)}, {"a": 1}, MANIFEST)
    config, state = load_model_folder(folder)
    assert config == {"a": 1} and list(state) == ["w"]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["card.md", "export", "text_tokenizer"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "text_tokenizer/spm.model"])
def test_a_flipped_byte_is_noticed(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"damaged: {name} has the right size but its content changed"):
        load_model_folder(folder)


def test_a_truncated_file_is_noticed(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 20)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has 20 bytes instead of"):
        load_model_folder(folder)


def test_other_folders_are_refused_on_both_ways(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="exists and is no model folder"):
        save_model_folder(tmp_path / "mine", weights(), CONFIG, MANIFEST)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(CheckpointError, match=r"nowhere: no manifest\.json"):
        load_model_folder(tmp_path / "nowhere")


def test_a_training_checkpoint_is_no_model_folder(tmp_path: Path) -> None:
    from megatron_vilg.checkpoint.manager import Checkpointer
    from megatron_vilg.config.schema import CheckpointConfig

    path = Checkpointer(tmp_path, CheckpointConfig()).save(1, {"w": torch.ones(1)}, Manifest(kind="pretrain", step=1))
    with pytest.raises(CheckpointError, match=r"lists no model\.safetensors and no config\.json"):
        load_model_folder(path)


def test_bad_extras_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"extra 'config\.json': the name is reserved"):
        save_model_folder(tmp_path / "e", weights(), CONFIG, MANIFEST, {"config.json": tmp_path})
    with pytest.raises(CheckpointError, match=r"extra 'x': .*missing does not exist"):
        save_model_folder(tmp_path / "e", weights(), CONFIG, MANIFEST, {"x": tmp_path / "missing"})
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    "said",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "safetensors"],
)
def test_a_failed_write_keeps_the_old_folder(folder: Path, monkeypatch, said: Exception) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise said

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(
        CheckpointError, match=r"export: cannot be written \(OSError: \[Errno 28\] No space left on device\)"
    ):
        save_model_folder(folder, {"w": torch.ones(2)}, {"a": 1}, MANIFEST)
    assert load_model_folder(folder)[0] == json.loads(json.dumps(CONFIG))
    assert not (folder.parent / "export.partial").exists()
