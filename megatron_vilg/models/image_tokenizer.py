"""What every image tokenizer can do, whatever its family."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from megatron_vilg.config.schema import ImageTokenizerConfig


@runtime_checkable
class ImageTokenizer(Protocol):
    """Pixels to codes and back (paper section 3.1.1). S = image_size, N = grid_side ** 2, K codes of size C."""

    config: ImageTokenizerConfig

    @property
    def codebook(self) -> Tensor:
        """float32 [K, C]: the vectors behind the ids."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [-1, 1] to ids int64 [B, N] in raster order."""
        ...

    def lookup(self, ids: Tensor) -> Tensor:
        """Ids [B, N] to their vectors, float32 [B, N, C]."""
        ...

    def decode(self, z_emb: Tensor) -> Tensor:
        """Vectors [B, N, C] to pixels [B, 3, S, S]; not clamped. Any vectors: the reconstructor feeds its own."""
        ...
