"""Foreign image tokenizers, against an independent computation of their published architecture."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_vilg.checkpoint.foreign import read_dalle, read_llamagen, read_taming
from megatron_vilg.checkpoint.image_tokenizer import load_image_tokenizer
from megatron_vilg.checkpoint.reshape import convert
from megatron_vilg.checkpoint.transfer import Options
from megatron_vilg.errors import CheckpointError
from tests.checkpoint import foreign_models as published

SHAPE = {"channels": 32, "multipliers": (1, 2, 2), "blocks": 2, "z_channels": 8, "codes": 24, "code_dim": 8}


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    for read in (read_taming, read_llamagen):
        with pytest.raises(
            CheckpointError, match="nowhere: does not exist. Works: --load-dir FILE, or the folder that"
        ):
            read(tmp_path / "nowhere")


def pictures(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def taming_yaml(folder: Path, *, gumbel: bool, **changes: object) -> Path:
    network = {
        "double_z": False,
        "z_channels": 8,
        "resolution": 32,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2, 2],
        "num_res_blocks": 2,
        "attn_resolutions": [8],
        "dropout": 0.0,
    }
    params = {"embed_dim": 8, "n_embed": 24, "ddconfig": network | changes, "lossconfig": {"target": "a.b.C"}}
    target = "taming.models.vqgan." + ("GumbelVQ" if gumbel else "VQModel")
    file = folder / "model.yaml"
    file.write_text(yaml.safe_dump({"model": {"base_learning_rate": 4.5e-6, "target": target, "params": params}}))
    return file


class ModelCheckpoint:
    """Stands for what Lightning keeps in a checkpoint besides weights."""


def write_taming(folder: Path, weights: dict[str, Tensor]) -> None:
    (folder / "checkpoints").mkdir()
    extra = {"loss.discriminator.main.0.weight": torch.zeros(3), "loss.perceptual_loss.lin0.weight": torch.zeros(2)}
    content = {"epoch": 3, "callbacks": {ModelCheckpoint: {"best": ModelCheckpoint()}}, "state_dict": weights | extra}
    torch.save(content, folder / "checkpoints" / "last.ckpt")


@torch.no_grad()
@pytest.mark.parametrize("gumbel", [False, True], ids=["VQ", "Gumbel"])
def test_a_vqgan_of_taming_gives_the_published_codes_and_pixels(tmp_path: Path, caplog, gumbel: bool) -> None:
    source = tmp_path / "taming"
    source.mkdir()
    weights = published.random_vqgan(**SHAPE, attention_levels=(2,), gumbel=gumbel)
    write_taming(source, weights)
    taming_yaml(source, gumbel=gumbel)
    with caplog.at_level(logging.INFO, logger="megatron_vilg"):
        convert(read_taming(source), tmp_path / "ours", "vilg", options=Options())
    assert "left out, needed for training only: loss" in caplog.text
    ours = load_image_tokenizer(tmp_path / "ours")
    x = pictures(32)
    z = published.vqgan_encode(weights, x, 3, 2, llamagen=False)
    table = weights["quantize.embed.weight" if gumbel else "quantize.embedding.weight"]
    ids = published.conv(weights, "quantize.proj", z).argmax(1) if gumbel else published.nearest(table, z)
    assert ids.unique().numel() > 8, "the test would not notice a wrong code"
    assert torch.equal(ours.encode(x), ids.flatten(1))
    wanted = published.vqgan_decode(weights, published.lookup(table, ids), 3, 2, llamagen=False)
    torch.testing.assert_close(ours.decode(ours.lookup(ids.flatten(1))), wanted, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_tokenizer_of_llamagen_gives_the_published_codes_and_pixels(tmp_path: Path) -> None:
    weights = published.random_vqgan(**SHAPE, attention_levels=(2,), llamagen=True)
    torch.save({"model": weights | {"quantize.codebook_used": torch.zeros(65536)}}, tmp_path / "vq.pt")
    convert(read_llamagen(tmp_path / "vq.pt", image_size=32), tmp_path / "ours", "pretrained", options=Options())
    ours = load_image_tokenizer(tmp_path / "ours")
    x = pictures(32)
    z = F.normalize(published.vqgan_encode(weights, x, 3, 2, llamagen=True), dim=1)
    table = F.normalize(weights["quantize.embedding.weight"], dim=1)
    ids = published.nearest(table, z)
    assert ids.unique().numel() > 8
    assert torch.equal(ours.encode(x), ids.flatten(1))
    wanted = published.vqgan_decode(weights, published.lookup(table, ids), 3, 2, llamagen=True)
    torch.testing.assert_close(ours.decode(ours.lookup(ids.flatten(1))), wanted, atol=2e-5, rtol=1e-5)


def test_llamagen_s_averages_are_taken_rather_than_its_last_weights(tmp_path: Path, caplog) -> None:
    last = dict(published.random_vqgan(**SHAPE, attention_levels=(2,), llamagen=True))
    average = {name: value + 0.5 for name, value in last.items()}
    name = "quantize.embedding.weight"
    for ema, taken in ((average, "ema"), ({}, "model"), (None, "model")):
        torch.save({"model": last, "ema": ema, "steps": 3}, tmp_path / "vq.pt")
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="megatron_vilg"):
            found = read_llamagen(tmp_path / "vq.pt", image_size=32).values["model.quantizer.code"]
        assert torch.equal(found, average[name] if taken == "ema" else last[name])
        assert f"vq.pt: weights taken from '{taken}'" in caplog.text


class Conv2d(nn.Module):
    """DALL-E's own convolution: parameters ``w`` and ``b``."""

    def __init__(self, w: Tensor, b: Tensor) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w), nn.Parameter(b)


def as_module(weights: dict[str, Tensor]) -> nn.Module:
    """Nested modules, as in the published files, which are modules pickled whole."""
    root = nn.Module()
    for name in [n.removesuffix(".w") for n in weights if n.endswith(".w")]:
        *path, last = name.split(".")
        place = root
        for part in path:
            if part not in dict(place.named_children()):
                place.add_module(part, nn.Sequential())
            place = place.get_submodule(part)
        place.add_module(last, Conv2d(weights[f"{name}.w"], weights[f"{name}.b"]))
    return root


@torch.no_grad()
def test_the_dvae_of_dalle_gives_the_published_codes_and_pixels(tmp_path: Path) -> None:
    encoder, decoder = published.random_dalle(hidden=16, init=8, codes=24)
    encoder["blocks.input.w"] -= encoder["blocks.input.w"].mean((1, 2, 3), keepdim=True)
    encoder["blocks.input.w"] *= 8.0  # so that codes depend on the picture more than on biases
    source = tmp_path / "dalle"
    source.mkdir()
    torch.save(as_module(encoder), source / "encoder.pkl")
    torch.save(as_module(decoder), source / "decoder.pkl")
    convert(read_dalle(source, image_size=32), tmp_path / "ours", "vilg", options=Options())
    ours = load_image_tokenizer(tmp_path / "ours")
    x = F.interpolate(pictures(8), scale_factor=4.0)
    ids = published.dalle_run(encoder, 0.8 * (x + 1) / 2 + 0.1, decoder=False).argmax(1)
    assert ids.unique().numel() > 4
    assert torch.equal(ours.encode(x), ids.flatten(1))
    one_hot = F.one_hot(ids, 24).permute(0, 3, 1, 2).float()
    mu = published.dalle_run(decoder, one_hot, decoder=True)[:, :3]
    wanted = (torch.sigmoid(mu) - 0.1) / 0.8 * 2 - 1
    torch.testing.assert_close(ours.decode(ours.lookup(ids.flatten(1))), wanted, atol=2e-5, rtol=1e-5)


def test_safetensors_are_read_too_and_can_be_rounded(tmp_path: Path) -> None:
    weights = published.random_vqgan(**SHAPE, attention_levels=(2,))
    save_file(dict(weights), tmp_path / "model.safetensors")
    taming_yaml(tmp_path, gumbel=False)
    options = Options(dtype=torch.bfloat16)
    convert(read_taming(tmp_path, image_size=64), tmp_path / "ours", "safetensors", options=options)
    ours = load_image_tokenizer(tmp_path / "ours")
    assert ours.config.image_size == 64 and ours.config.attention_levels == (2,)
    assert torch.equal(ours.codebook, weights["quantize.embedding.weight"].bfloat16().float())


def _without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: _without(w, "encoder.norm_out.bias"), "encoder.norm_out.bias: missing"),
        (lambda w: w | {"encoder.extra.weight": torch.zeros(1)}, "encoder.extra.weight: has no place in this arch"),
        (
            lambda w: w | {"quantize.embedding.weight": torch.zeros(30, 8)},
            r"quantize.embedding.weight: has shape \[30, 8\], expected \[24, 8\]",
        ),
        (
            lambda w: w | {"encoder.conv_out.weight": w["encoder.conv_out.weight"].permute(0, 2, 3, 1).contiguous()},
            r"encoder.conv_out.weight: has shape \[\d+, 3, 3, \d+\], expected \[\d+, \d+, 3, 3\]",
        ),
        (
            lambda w: w | {"encoder.conv_out.weight": w["encoder.conv_out.weight"].to(torch.int8)},
            r"encoder.conv_out.weight: holds torch.int8; only floating-point weights can be read",
        ),
    ],
)
def test_every_tensor_must_find_its_place(tmp_path: Path, change, words: str) -> None:
    weights = published.random_vqgan(**SHAPE, attention_levels=(2,))
    torch.save(change(dict(weights)), tmp_path / "last.ckpt")
    taming_yaml(tmp_path, gumbel=False)
    with pytest.raises(CheckpointError, match=words):
        read_taming(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"double_z": True}, "ddconfig.double_z=True: only False can be read"),
        ({"ch": 48}, "norm_groups"),
        ({"ch_mult": None}, "is no configuration of a VQGAN"),
    ],
)
def test_configurations_that_cannot_be_expressed_are_refused(tmp_path: Path, changes, words: str) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "last.ckpt")
    taming_yaml(tmp_path, gumbel=False, **changes)
    with pytest.raises(CheckpointError, match=words):
        read_taming(tmp_path)


def test_a_wrong_configuration_is_told_before_weights_are_read(tmp_path: Path, monkeypatch) -> None:
    write_taming(tmp_path, published.random_vqgan(**SHAPE, attention_levels=(2,)))
    monkeypatch.setattr(
        "megatron_vilg.checkpoint.torch_file.TorchFile.rows", lambda *_: pytest.fail("weights are read")
    )
    for file in (taming_yaml(tmp_path, gumbel=False, double_z=True), tmp_path / "absent.yaml"):
        with pytest.raises(CheckpointError, match="double_z=True: only|--config=.*absent.yaml: cannot be read as yaml"):
            read_taming(tmp_path, file)


def test_weights_and_configuration_must_be_of_one_kind(tmp_path: Path) -> None:
    torch.save(dict(published.random_vqgan(**SHAPE, attention_levels=(2,), gumbel=True)), tmp_path / "last.ckpt")
    taming_yaml(tmp_path, gumbel=False)
    with pytest.raises(CheckpointError, match="the weights are those of a Gumbel model"):
        read_taming(tmp_path)


def test_a_dictionary_that_contains_itself_is_damage(tmp_path: Path) -> None:
    content: dict[str, object] = {}
    content["state_dict"] = content
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"a.ckpt: a dictionary in it contains itself; the file is damaged"):
        read_llamagen(tmp_path)


def test_several_files_are_not_guessed_among(tmp_path: Path) -> None:
    for name in ("a.ckpt", "b.ckpt"):
        torch.save({}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"found a.ckpt, b.ckpt. Works: --load-dir FILE"):
        read_llamagen(tmp_path)
    with pytest.raises(CheckpointError, match=r"a.ckpt: no tensors in it"):
        read_llamagen(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"no encoder.pkl in it"):
        read_dalle(tmp_path)
