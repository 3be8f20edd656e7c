"""Batches for training as a pure function of (seed, step), and clean ones for evaluation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_vilg.config.schema import DataConfig
from megatron_vilg.data.batch import PairBatch
from megatron_vilg.data.pair_pixels import PixelCache, SplitPixels
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.errors import DataError
from megatron_vilg.sequence import Direction, StreamSpec

_ROUNDS = 6
_ORDER, _CHANGES, _NOISE = 0, 1, 2


class PairLoader:
    """Draws batches from one split of a token cache.

    Step ``s`` uses the samples ``s * batch_size`` to ``(s + 1) * batch_size`` of an endless sequence: every epoch is
    a permutation of all pairs, and batches run across the border of two epochs. So the step number is all the state
    there is: ``samples_consumed`` and the epoch follow from it, and resuming is calling ``batch`` with the next step;
    after :meth:`resume` where steps before had another batch size.
    """

    def __init__(
        self,
        cache: TokenCache,
        split: str,
        data: DataConfig,
        spec: StreamSpec,
        batch_size: int,
        seed: int,
        pixels: PixelCache | None = None,
        share: tuple[int, int] = (0, 1),
        num_steps: int = 0,
    ) -> None:
        """Open a split.

        Args:
            cache: encoded pairs.
            split: its name.
            data: what is randomly changed.
            spec: row layout of the run, which must be that of the cache.
            batch_size: pairs per step over all shares; must divide by their number.
            seed: order and changes.
            share: (number, count): ``batch`` gives this one of ``count`` equal parts of each step's pairs. What is
                drawn for a pair does not depend on it.
            num_steps: steps of the whole run, for what changes over it.

        Raises:
            DataError: the split is empty, or the cache was written for other sizes.
        """
        settings = cache.settings
        here = (settings["num_text_slots"], settings["grid_side"])
        if here != (spec.num_text_slots, spec.image_side):
            raise DataError(
                f"token cache {str(cache.folder)!r} has {here[0]} text slots and {here[1]} x {here[1]} codes; the run "
                f"has model.num_text_slots = {spec.num_text_slots} and {spec.image_side} x {spec.image_side}"
            )
        self._tokens = cache.split(split)
        if len(self._tokens) == 0:
            raise DataError(f"token cache {str(cache.folder)!r}: split {split!r} is empty")
        self._data, self._batch_size, self._seed = data, batch_size, seed
        self._origin = 0
        self._own = slice(share[0] * batch_size // share[1], (share[0] + 1) * batch_size // share[1])
        self._num_codes = int(settings["codebook_size"])
        self._pixels = None if pixels is None else pixels.split(split)
        self._fall = data.target_view_fall * num_steps

    def __len__(self) -> int:
        """Pairs in the split."""
        return len(self._tokens)

    def resume(self, step: int, samples_consumed: int) -> None:
        """Let ``step`` begin behind so many samples, and all later ones follow; what is changed at random stays that of
        the step."""
        self._origin = samples_consumed - step * self._batch_size

    def samples_consumed(self, step: int) -> int:
        """Samples drawn before ``step`` (0 for the first)."""
        return self._origin + step * self._batch_size

    def epoch(self, step: int) -> float:
        """Passes over the split made before ``step``."""
        return self.samples_consumed(step) / len(self)

    def sample_ids(self, step: int) -> np.ndarray:
        """Numbers of the pairs of a step, over all shares: int64 [batch_size]."""
        position = np.arange(self._batch_size, dtype=np.int64) + self.samples_consumed(step)
        epoch, offset = position // len(self), position % len(self)
        ids = np.empty_like(position)
        for number in np.unique(epoch):
            chosen = epoch == number
            ids[chosen] = permute(offset[chosen], len(self), _key(self._seed, _ORDER, int(number)))
        return ids

    def batch(self, step: int) -> PairBatch:
        """This share of a training step's batch, with all random changes of ``DataConfig``."""
        data, tokens = self._data, self._tokens
        pairs = self.sample_ids(step)[self._own]
        count = len(pairs)
        rng = np.random.Generator(np.random.PCG64(_key(self._seed, _CHANGES, step)))
        # All decisions of all shares at once: neither an option nor a share moves the draws of another.
        draw = rng.random((7, self._batch_size))[:, self._own]

        num_alternates = tokens.num_captions(pairs) - 1
        wording = 1 + (draw[1] * num_alternates).astype(np.int64)
        wording[(draw[0] >= data.alternate_caption_probability) | (num_alternates == 0)] = 0
        drawn_ids, drawn_len = tokens.captions(pairs, wording)
        dropped = draw[2] < data.caption_dropout
        drawn_ids[dropped], drawn_len[dropped] = 0, 0
        plain_ids, plain_len = tokens.captions(pairs, np.zeros(count, np.int64))

        target = tokens.images(pairs, self._view(draw[3], draw[4], self.target_view_probability(step)))
        source = tokens.images(pairs, self._view(draw[5], draw[6], data.source_view_probability))
        return _pair_batch(
            text_ids=(drawn_ids, plain_ids),
            text_len=(drawn_len, plain_len),
            image_ids=(
                self._noised(target, data.image_input_noise, step, Direction.TEXT_TO_IMAGE),
                self._noised(source, data.image_source_noise, step, Direction.IMAGE_TO_TEXT),
            ),
            target=target,
            pairs=pairs,
            pixels=self._pixels,
        )

    def target_view_probability(self, step: int) -> float:
        """How often text-to-image has a copy as its target at this step."""
        left = max(0.0, 1.0 - step / self._fall) if self._fall else 1.0
        return left * self._data.target_view_probability

    def clean_batch(self, indices: Tensor | np.ndarray | list[int]) -> PairBatch:
        """The pairs with these numbers, canonical captions, plain pictures, no randomness; both rows alike."""
        pairs = np.asarray(indices, np.int64)
        if len(pairs) and not (pairs.min() >= 0 and pairs.max() < len(self)):
            raise DataError(f"pair numbers {pairs.min()} to {pairs.max()}: the split has 0 to {len(self) - 1}")
        zeros = np.zeros(len(pairs), np.int64)
        ids, lengths = self._tokens.captions(pairs, zeros)
        images = self._tokens.images(pairs, zeros)
        return _pair_batch((ids, ids), (lengths, lengths), (images, images), images, pairs, self._pixels)

    def _view(self, draw: np.ndarray, choice: np.ndarray, probability: float) -> np.ndarray:
        """View numbers, 0 (the picture itself) where no copy is drawn."""
        views = 1 + (choice * self._tokens.num_views).astype(np.int64)
        return np.where((draw < probability) & (self._tokens.num_views > 0), views, 0)

    def _noised(self, ids: np.ndarray, share: float, step: int, direction: Direction) -> np.ndarray:
        if share == 0.0:
            return ids
        rng = np.random.Generator(np.random.PCG64(_key(self._seed, _NOISE + direction, step)))
        shape = (self._batch_size, *ids.shape[1:])
        hit = rng.random(shape, dtype=np.float32)[self._own] < share
        return np.where(hit, rng.integers(0, self._num_codes, shape, dtype=np.uint16)[self._own], ids)


def permute(position: np.ndarray, size: int, key: np.random.SeedSequence) -> np.ndarray:
    """Where a pseudo-random permutation of ``range(size)`` sends these positions, without writing it down.

    A Feistel network over the smallest even number of bits that holds ``size``; results beyond it go through again
    (cycle walking), so it is a permutation for every size and takes no memory even for 10 ** 8 pairs.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64(2**half - 1)
    keys = key.generate_state(_ROUNDS, np.uint64)
    values = position.astype(np.uint64)
    pending = np.ones(len(values), bool)
    while pending.any():
        left, right = values[pending] >> np.uint64(half), values[pending] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        values[pending] = left << np.uint64(half) | right
        pending = values >= np.uint64(size)
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _key(seed: int, purpose: int, number: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed % 2**63, purpose, number])


def _pair_batch(
    text_ids: tuple[np.ndarray, np.ndarray],
    text_len: tuple[np.ndarray, np.ndarray],
    image_ids: tuple[np.ndarray, np.ndarray],
    target: np.ndarray,
    pairs: np.ndarray,
    pixels: SplitPixels | None,
) -> PairBatch:
    """Stack the two rows of each pair, text-to-image first (the order of ``Direction``), and widen to int64."""

    def rows(both: tuple[np.ndarray, np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(both, axis=1).astype(np.int64))

    return PairBatch(
        text_ids=rows(text_ids),
        text_len=rows(text_len),
        image_ids=rows(image_ids),
        target_image_ids=torch.from_numpy(target.astype(np.int64)),
        sample_ids=torch.from_numpy(pairs),
        pixels=None if pixels is None else torch.from_numpy(pixels.read(pairs)),
    )
