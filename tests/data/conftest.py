from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from megatron_vilg.data.shards import ShardWriter


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
