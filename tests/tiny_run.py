"""A whole run folder with random weights, small enough to be written in a second."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from PIL import Image

from megatron_vilg.checkpoint.export import save_model_folder
from megatron_vilg.checkpoint.image_tokenizer import save_image_tokenizer
from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import Manifest
from megatron_vilg.config.load import dump_run_config, write_run_folder_config
from megatron_vilg.config.schema import (
    ImageTokenizerConfig,
    ReconstructorConfig,
    RunConfig,
    SampleConfig,
    TextTokenizerConfig,
)
from megatron_vilg.data.text import train_text_tokenizer
from megatron_vilg.models.reconstructor import Reconstructor
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.models.vqgan import VQGAN
from megatron_vilg.parallel.init import init_weights
from tests.tiny import tiny_config

CAPTIONS = ["水彩画的红苹果", "扁平风格的猫", "线描的树，白底", "立体的蓝色汽车", "a red apple"]


def write_tiny_pairs(folder: Path) -> Path:
    """Six pairs to train on and four held out, every caption twice; returns the folder."""
    for number, caption in enumerate(CAPTIONS * 2):
        part = folder / ("train" if number < 6 else "val")
        part.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (25 * number, 250 - 20 * number, 90)).save(part / f"{number}.png")
        (part / f"{number}.txt").write_text(caption, encoding="utf-8")
    return folder


def tiny_pictures(*, grid_side: int = 4, codebook_size: int = 11) -> ImageTokenizerConfig:
    """A VQGAN of two levels, with so many codes in a row."""
    return ImageTokenizerConfig(
        image_size=4 * grid_side,
        patch=2,
        channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        bottom_attention=False,
        norm_groups=4,
        codebook_size=codebook_size,
        codebook_dim=4,
    )


def write_tiny_run(
    folder: Path, *, export: bool = True, checkpoint: bool = True, reconstructor: ReconstructorConfig | None = None
) -> RunConfig:
    """Tokenizers, configuration, and the same generator as export and as checkpoint of step 3."""
    image = tiny_pictures()
    text = train_text_tokenizer(CAPTIONS, TextTokenizerConfig(vocab_size=320), folder / "text_tokenizer")
    image_tokenizer = VQGAN(image).eval()
    save_image_tokenizer(image_tokenizer, folder / "image_tokenizer")
    run = RunConfig(
        model=tiny_config(text_vocab_size=text.vocab_size, codebook_dim=4, num_text_slots=6),
        image_tokenizer=image,
        sample=SampleConfig(temperature=0.9, top_k=6),
        reconstructor=reconstructor or ReconstructorConfig(),
    )
    write_run_folder_config(run, folder)
    model = ViLG(run.model)
    if run.reconstructor.enabled:
        model.reconstructor = Reconstructor(run.reconstructor, run.model, image)
    init_weights(model, seed=3, std=0.3, num_layers=run.model.num_layers)
    assert model.embed is not None
    model.embed.get_buffer("codebook").copy_(image_tokenizer.codebook)
    manifest = Manifest(kind="pretrain", step=3, model=dataclasses.asdict(run.model))
    if export:
        extra = {name: folder / name for name in ("text_tokenizer", "image_tokenizer")}
        save_model_folder(folder / "export", model.state_dict(), dump_run_config(run), manifest, extra)
    if checkpoint:
        Checkpointer(folder / "checkpoints", run.checkpoint).save(3, {"model": model.state_dict()}, manifest)
    return run
