"""A real token cache, written by the real writer, of pictures that hold one colour each."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image

from megatron_vilg.config.schema import DataConfig, TextTokenizerConfig
from megatron_vilg.data.records import find_records
from megatron_vilg.data.shards import ShardWriter
from megatron_vilg.data.text import train_text_tokenizer
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.data.token_writer import write_token_cache

SIDE, CODES, SLOTS = 4, 11, 5


def encode(pixels: torch.Tensor) -> torch.Tensor:
    """Brightness of each of 4 x 4 cells as one of 11 codes: [B, 3, 8, 8] to int64 [B, 16]."""
    cells = torch.nn.functional.adaptive_avg_pool2d(pixels.mean(1, keepdim=True), SIDE).flatten(1)
    return ((cells + 1) / 2 * (CODES - 1)).round().long()


def write_cache(folder: Path, counts: dict[str, int]) -> TokenCache:
    """``counts`` pairs per split, all different."""
    pairs = folder.with_name(folder.name + "-pairs")
    captions = []
    for split, count in counts.items():
        with ShardWriter(pairs, split) as writer:
            for i in range(count):
                picture = io.BytesIO()
                Image.new("RGB", (8, 8), (25 * i % 256, 60 * i % 256, 7 * i % 256)).save(picture, "PNG")
                captions.append(f"图{i}")
                writer.add(f"{split}{i}", picture.getvalue(), captions[-1], {"alternates": [f"第{i}张"]})
    return cache_of(folder, pairs, captions)


def cache_of(folder: Path, pairs: Path, captions: list[str]) -> TokenCache:
    """The pairs that lie at ``pairs``, with a text tokenizer of ``captions``."""
    text = train_text_tokenizer(captions, TextTokenizerConfig(vocab_size=300), folder.with_name("text_tokenizer"))
    write_token_cache(
        folder,
        find_records(pairs),
        text,
        encode,
        image_size=8,
        views=DataConfig(),
        image_tokenizer_hash="0" * 64,
        codebook_size=CODES,
        grid_side=SIDE,
        num_text_slots=SLOTS,
        seed=0,
    )
    return TokenCache.open(folder)
