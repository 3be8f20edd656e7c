"""What each step of training a restyler learns from: pictures of things, moved and coloured alike, as codes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_vilg.config.restyler import RestylerConfig
from megatron_vilg.config.schema import DataConfig
from megatron_vilg.data.images import random_views
from megatron_vilg.data.library import Library, label_of
from megatron_vilg.data.pair_pixels import SplitPixels
from megatron_vilg.data.token_cache import SplitTokens
from megatron_vilg.errors import DataError
from megatron_vilg.models.image_tokenizer import ImageTokenizer
from megatron_vilg.train.pixel_source import seeded

_PLAIN = 0.25
"""Share of the rows that are shown as they are from the first step on."""
_UNTOLD = 0.1
"""Share of the references whose manner is not told, so that a picture from elsewhere will do."""
_MEASURED = 256
"""Pairs of a split that are measured."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a restyler learns from."""

    library: Library
    pixels: SplitPixels
    """Pictures of all pairs of the split."""
    pairs: np.ndarray
    """int64 [P]: pair numbers of the library's pictures."""
    views: DataConfig
    """``view_*``: how far pictures are shifted and zoomed, and whether they are mirrored."""


@dataclass(frozen=True, slots=True)
class Rows:
    """R + 1 pictures of each of B things. Shapes as in :class:`Restyler`."""

    pictures: Tensor
    """Codes; a row with fewer pictures begins with hidden ones."""
    shown_in: Tensor
    wanted_in: Tensor
    drawn: Tensor
    """bool [B, R + 1]: what is to be learnt, or measured."""

    def to(self, device: torch.device) -> Rows:
        """The same on another device."""
        return Rows(*(part.to(device) for part in (self.pictures, self.shown_in, self.wanted_in, self.drawn)))


class Batches:
    """The rows of every step."""

    def __init__(
        self,
        config: RestylerConfig,
        source: Source,
        image_tokenizer: ImageTokenizer,
        device: torch.device,
        *,
        in_bf16: bool = False,
    ) -> None:
        """Take what there is; the image tokenizer is on ``device``, and computes in bfloat16 if asked to.

        Raises:
            DataError: no thing is shown in two manners.
        """
        self.config, self.source = config, source
        self.image_tokenizer, self.device, self.in_bf16 = image_tokenizer, device, in_bf16
        counts = np.bincount(source.library.thing, minlength=1)
        self.things = np.flatnonzero(counts > 1)
        if not len(self.things):
            raise DataError(
                "a restyler learns from things that are shown in two styles at least, and no two pairs have the same "
                f"field 'concept' and another field 'style' ({len(source.library)} pairs have both fields)"
            )
        self._order: tuple[int, np.ndarray] = (-1, self.things)

    def rows(self, step: int) -> Rows:
        """What the step with this number (from 0) learns from, on the image tokenizer's device."""
        pictures, real = self._pictures(step)
        num_manners = len(self.source.library.manners)
        codes = self._codes(step, pictures, real)
        draws = seeded(self.config.seed, "restyler hidden", step)
        manner = torch.from_numpy(self.source.library.manner[pictures])
        untold = ~real | (torch.rand(real.shape, generator=draws) < _UNTOLD)
        unwanted = torch.rand(real.shape, generator=draws) < self.config.hidden_manners
        rows = Rows(codes, manner.masked_fill(untold, num_manners), manner.masked_fill(unwanted, num_manners), real)
        return rows.to(self.device)

    def _thing(self, position: int) -> int:
        """Which thing stands at a position of the endless stream of passes."""
        turn, offset = divmod(position, len(self.things))
        if self._order[0] != turn:
            order = np.random.default_rng([self.config.seed % 2**64, 0, turn]).permutation(self.things)
            self._order = (turn, order)
        return int(self._order[1][offset])

    def _pictures(self, step: int) -> tuple[np.ndarray, Tensor]:
        """Numbers of pictures int64 [B, R + 1], and which of them are there, bool [B, R + 1]: the last of each row."""
        config, rng = self.config, np.random.default_rng([self.config.seed % 2**64, 1, step])
        size = config.num_references + 1
        pictures = np.empty((config.batch_size, size), np.int64)
        real = torch.zeros(config.batch_size, size, dtype=torch.bool)
        for row in range(config.batch_size):
            found = rng.permutation(self.source.library.pictures(self._thing(step * config.batch_size + row)))[:size]
            pictures[row] = np.resize(found[::-1], size)[::-1]
            real[row, size - len(found) :] = True
        return pictures, real

    @torch.no_grad()
    def _codes(self, step: int, pictures: np.ndarray, real: Tensor) -> Tensor:
        """Codes int64 [B, n, N] of pictures [B, n], those of a row moved and coloured alike; hidden ones not there."""
        config, views = self.config, self.source.views
        rows, count = pictures.shape
        pixels = torch.from_numpy(self.source.pixels.read(self.source.pairs[pictures.ravel()]))
        device, tokenizer = self.device, self.image_tokenizer.config
        stacked = (pixels.float() / 127.5 - 1.0).view(rows, -1, *pixels.shape[2:])
        moved = random_views(
            stacked,
            seeded(config.seed, "restyler views", step),
            shift_pixels=views.view_shift_pixels,
            zoom=views.view_zoom,
            flip=views.view_flip,
        )
        draws = seeded(config.seed, "restyler colours", step)
        plain = torch.rand(rows, generator=draws) < self._plain(step)
        stacked = torch.where(plain[:, None, None, None], stacked, moved)
        turned = (torch.rand(rows, generator=draws) < config.turned_colours) & ~plain
        angle = torch.rand(rows, generator=draws) * (2 * math.pi) * turned
        pictures_of = stacked.view(rows, count, 3, *pixels.shape[2:]).to(device)
        pictures_of = torch.einsum("bij,bnjhw->bnihw", colour_rotation(angle).to(device), pictures_of).clamp(-1, 1)
        codes = torch.full((rows, count, tokenizer.grid_side**2), tokenizer.codebook_size, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.in_bf16):
            codes[real.to(device)] = self.image_tokenizer.encode(pictures_of[real.to(device)])
        return codes

    def _plain(self, step: int) -> float:
        """Share of the rows of a step that are shown as they are."""
        until = self.config.view_fall * self.config.num_steps
        return 1.0 if step >= until else _PLAIN + (1.0 - _PLAIN) * step / until


def colour_rotation(angle: Tensor) -> Tensor:
    """Rotations of (red, green, blue) around the grey axis by angles [B] in radians: [B, 3, 3]; greys stay."""
    axis = torch.full((3,), 3**-0.5)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) * 3**-0.5
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return cosine * torch.eye(3) + (1 - cosine) * torch.outer(axis, axis) + sine * cross


def held_out(config: RestylerConfig, library: Library, tokens: SplitTokens, codebook_size: int) -> Rows | None:
    """At most 256 pairs of a split, each behind the first pictures of its thing in other manners; None: there are
    none whose thing and manner the library has.

    Args:
        config: how many references.
        library: where they are from.
        tokens: the split.
        codebook_size: K.
    """
    pairs: list[int] = []
    asked: list[tuple[int, int]] = []
    for pair, record in enumerate(tokens.records()):
        if len(pairs) < _MEASURED and (known := library.number(label_of(record))) is not None:
            pairs.append(pair)
            asked.append(known)
    if not pairs:
        return None
    numbers = np.array(pairs, np.int64)
    targets = torch.from_numpy(tokens.images(numbers, np.zeros_like(numbers)).astype(np.int64))
    size = config.num_references
    pictures = torch.full((len(pairs), size + 1, targets.shape[1]), codebook_size)
    manners = torch.full((len(pairs), size + 1), len(library.manners))
    pictures[:, -1] = targets
    for row, (thing, manner) in enumerate(asked):
        others = library.pictures(thing, but=manner)[:size]
        pictures[row, size - len(others) : size] = torch.from_numpy(library.codes[others].astype(np.int64))
        manners[row, size - len(others) : size] = torch.from_numpy(library.manner[others])
        manners[row, -1] = manner
    drawn = torch.zeros_like(manners, dtype=torch.bool)
    drawn[:, -1] = True
    return Rows(pictures, manners, manners, drawn)
