from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_vilg.config.schema import DataConfig, TextTokenizerConfig
from megatron_vilg.data.records import find_records
from megatron_vilg.data.shards import ShardWriter
from megatron_vilg.data.text import TextTokenizer, train_text_tokenizer
from megatron_vilg.data.token_cache import write_token_cache


def png(number: int, side: int = 12) -> bytes:
    """A small picture that depends on its number."""
    image = Image.new("RGB", (side, side), (number * 37 % 256, number * 91 % 256, number * 13 % 256))
    image.paste((255, 255, 255), (number % 5, number % 7, number % 5 + 3, number % 7 + 3))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def write_folder(root: Path, count: int) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (root / f"p{i:03d}.png").write_bytes(png(i))
        (root / f"p{i:03d}.txt").write_text(f"红色的第{i}张图", encoding="utf-8")
    return root


def write_shards(root: Path, counts: dict[str, int], per_shard: int = 100) -> Path:
    for prefix, count in counts.items():
        with ShardWriter(root, prefix, pairs_per_shard=per_shard) as writer:
            for i in range(count):
                fields = {"concept": f"c{i}", "alternates": [f"图{i}，红色", f"图{i}"]}
                writer.add(f"{prefix}{i:03d}", png(i), f"红色的图{i}", fields)
    return root


@pytest.fixture
def make_folder() -> Callable[[Path, int], Path]:
    return write_folder


@pytest.fixture
def make_shards() -> Callable[..., Path]:
    return write_shards


@pytest.fixture
def make_png() -> Callable[..., bytes]:
    return png


SIZE, GRID, CODES, SLOTS = 12, 3, 64, 8


def fake_encode(pixels: torch.Tensor) -> torch.Tensor:
    """Mean brightness of each cell as a code: deterministic, sensitive to shifts."""
    cells = torch.nn.functional.adaptive_avg_pool2d(pixels.mean(1, keepdim=True), GRID).flatten(1)
    return ((cells + 1) / 2 * (CODES - 1)).round().long().clamp(0, CODES - 1)


@dataclass
class CacheMaker:
    """Writes small token caches from a source."""

    tokenizer: TextTokenizer

    def write(self, source: Path, out: Path, **changes: Any) -> bool:
        options: dict[str, Any] = {
            "image_size": SIZE,
            "views": DataConfig(num_views=2),
            "image_tokenizer_hash": "abc",
            "codebook_size": CODES,
            "grid_side": GRID,
            "num_text_slots": SLOTS,
            "seed": 3,
            "encode_images": fake_encode,
        } | changes
        part_size = options.pop("part_size", 5)
        records = find_records(source, part_size=part_size)
        return write_token_cache(out, records, self.tokenizer, **options)


@pytest.fixture(scope="session")
def text_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    captions = [w.format(i) for i in range(30) for w in ("红色的图{}", "图{}，红色", "图{}", "红色的第{}张图")]
    return train_text_tokenizer(captions, TextTokenizerConfig(vocab_size=400), tmp_path_factory.mktemp("spm"))


@pytest.fixture
def make_cache(text_tokenizer: TextTokenizer) -> CacheMaker:
    return CacheMaker(text_tokenizer)
