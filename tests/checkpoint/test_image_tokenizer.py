from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from megatron_vilg.checkpoint.export import save_model_folder
from megatron_vilg.checkpoint.image_tokenizer import image_tokenizer_hash, load_image_tokenizer, save_image_tokenizer
from megatron_vilg.checkpoint.manifest import Manifest, read_manifest
from megatron_vilg.checkpoint.reshape import convert
from megatron_vilg.checkpoint.sources import open_source, require_tokenizer
from megatron_vilg.checkpoint.transfer import Options
from megatron_vilg.config.schema import ImageTokenizerConfig
from megatron_vilg.errors import CheckpointError
from megatron_vilg.models.vqgan import VQGAN

CONFIG = ImageTokenizerConfig(
    image_size=16, patch=2, channels=8, channel_multipliers=(1, 2), num_res_blocks=1, norm_groups=4, codebook_size=12
)


def tokenizer(seed: int = 0) -> VQGAN:
    torch.manual_seed(seed)
    return VQGAN(CONFIG)


def test_saved_and_loaded_is_the_same_frozen_tokenizer(tmp_path: Path) -> None:
    saved = tokenizer().eval()
    folder = save_image_tokenizer(saved, tmp_path / "image_tokenizer", step=7, extra={"psnr(dB)": 22.5})
    loaded = load_image_tokenizer(folder)
    assert loaded.config == CONFIG
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert all(torch.equal(a, loaded.state_dict()[name]) for name, a in saved.state_dict().items())
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(saved.encode(pixels), loaded.encode(pixels))
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.image_vocab_size, manifest.counters) == (7, 12, {"psnr(dB)": 22.5})


def test_hash_follows_the_weights_and_nothing_else(tmp_path: Path) -> None:
    first = image_tokenizer_hash(save_image_tokenizer(tokenizer(), tmp_path / "a", step=1))
    again = image_tokenizer_hash(save_image_tokenizer(tokenizer(), tmp_path / "b", step=2))
    other = image_tokenizer_hash(save_image_tokenizer(tokenizer(seed=1), tmp_path / "a", step=1))
    assert first == again != other
    assert len(first) == 64


def test_a_copy_of_the_same_values_is_the_same_tokenizer(tmp_path: Path) -> None:
    first = save_image_tokenizer(tokenizer(), tmp_path / "a")
    for folder, into, options in (
        ("a", "b", Options()),
        ("b", "c", Options()),
        ("c", "rounded", Options(dtype=torch.bfloat16)),
    ):
        with open_source(tmp_path / folder) as source:
            convert(source, tmp_path / into, "vilg", options=options)
    assert (tmp_path / "b" / "model.safetensors").read_bytes() != (first / "model.safetensors").read_bytes()
    assert image_tokenizer_hash(tmp_path / "c") == image_tokenizer_hash(first)
    assert image_tokenizer_hash(tmp_path / "rounded") != image_tokenizer_hash(first)
    weights = Manifest(kind="pretrain", tokenizers={"image_tokenizer": image_tokenizer_hash(first)})
    shutil.copytree(tmp_path / "c", tmp_path / "run" / "image_tokenizer")
    require_tokenizer(tmp_path / "run" / "image_tokenizer", weights)
    shutil.copytree(tmp_path / "rounded", tmp_path / "other" / "image_tokenizer")
    with pytest.raises(CheckpointError, match="is not the tokenizer of these weights"):
        require_tokenizer(tmp_path / "other" / "image_tokenizer", weights)


def test_damage_is_named(tmp_path: Path) -> None:
    folder = save_image_tokenizer(tokenizer(), tmp_path / "image_tokenizer")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has the right size but its content changed"):
        load_image_tokenizer(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load_image_tokenizer(folder)
    with pytest.raises(CheckpointError, match=r"nowhere.*no complete"):
        load_image_tokenizer(tmp_path / "nowhere")


def test_other_models_and_other_configurations_are_refused(tmp_path: Path) -> None:
    other = save_model_folder(tmp_path / "other", {}, {}, Manifest(kind="pretrain"))
    with pytest.raises(CheckpointError, match="holds 'pretrain', not 'image-tokenizer'"):
        load_image_tokenizer(other)
    with pytest.raises(CheckpointError, match="holds 'pretrain'"):
        image_tokenizer_hash(other)
    strange = save_model_folder(tmp_path / "strange", {}, {"depth": 3}, Manifest(kind="image-tokenizer"))
    with pytest.raises(CheckpointError, match="configuration does not fit"):
        load_image_tokenizer(strange)
    larger = dataclasses.asdict(dataclasses.replace(CONFIG, channels=16))
    mixed = save_model_folder(tmp_path / "mixed", tokenizer().state_dict(), larger, Manifest(kind="image-tokenizer"))
    with pytest.raises(CheckpointError, match="weights do not fit"):
        load_image_tokenizer(mixed)
