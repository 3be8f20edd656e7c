"""A tiny run whose pairs show things in several styles, one of each thing held out."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from megatron_vilg.checkpoint.image_tokenizer import image_tokenizer_hash, load_image_tokenizer
from megatron_vilg.config.schema import DataConfig
from megatron_vilg.data.records import find_records
from megatron_vilg.data.shards import ShardWriter
from megatron_vilg.data.text import TextTokenizer
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.data.token_writer import write_token_cache
from tests.tiny_run import tiny_pictures, write_tiny_run

THINGS = ("苹果", "猫", "树", "汽车", "月亮")
STYLES = {"flat": "扁平风格", "line": "线描风格", "solid": "立体风格"}


def write_styled_pairs(folder: Path) -> Path:
    """Shards of ``train`` (things in two styles, the moon in one, a scene) and ``val-pairs``; returns the folder."""
    with ShardWriter(folder, "train") as train, ShardWriter(folder, "val-pairs") as held_out:
        for number, thing in enumerate(THINGS):
            for place, (style, words) in enumerate(STYLES.items()):
                picture = io.BytesIO()
                Image.new("RGB", (20, 20), (50 * number, 90 * place, 200 - 40 * number)).save(picture, "PNG")
                fields = {"concept": f"c{number}", "style": style, "alternates": [f"{thing}，{words}"]}
                writer = held_out if (number + place) % 3 == 0 else train
                if thing != "月亮" or style == "flat":
                    writer.add(f"{number}-{style}", picture.getvalue(), f"{words}的{thing}", fields)
        train.add("scene", picture.getvalue(), "一个很小的苹果，蓝色背景", {"style": "flat"})
    return folder


class Levels:
    """In place of an image tokenizer with random weights, which has one code for everything: 4 x 4 cells, each one of
    11 levels of red, green or blue in turn."""

    config = tiny_pictures()

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] in [-1, 1] to int64 [B, 16]."""
        cells = torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(2)
        place = torch.arange(cells.shape[2])
        return ((cells[:, place % 3, place] + 1) / 2 * (self.config.codebook_size - 1)).round().long()

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] to vectors [..., 2], on half a circle."""
        angle = ids / self.config.codebook_size * math.pi
        return torch.stack([angle.cos(), angle.sin()], dim=-1)


def write_styled_run(
    folder: Path, pairs: Path, encode: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> TokenCache:
    """A run folder with random weights and the tokens of ``pairs``, which it writes there; by ``encode`` if given."""
    torch.manual_seed(1)
    run = write_tiny_run(folder, checkpoint=False)
    tokenizer = load_image_tokenizer(folder / "image_tokenizer")
    write_token_cache(
        folder / "tokens",
        find_records(write_styled_pairs(pairs), val_share=run.data.val_share, part_size=run.data.shard_size),
        TextTokenizer.load(folder / "text_tokenizer"),
        encode or tokenizer.encode,
        image_size=tokenizer.config.image_size,
        views=DataConfig(num_views=0),
        image_tokenizer_hash=image_tokenizer_hash(folder / "image_tokenizer"),
        codebook_size=tokenizer.config.codebook_size,
        grid_side=tokenizer.config.grid_side,
        num_text_slots=6,
        seed=0,
    )
    return TokenCache.open(folder / "tokens")
