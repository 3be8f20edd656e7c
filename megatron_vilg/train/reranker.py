"""Train the reranker on a run's token cache: pictures are rendered from their codes, as drawings will be.

Features of the frozen network are computed once and kept in a nameless file, so that every step after that costs
milliseconds. Each step compares all captions of a batch with all of its pictures (InfoNCE in both directions, as CLIP,
arXiv 2103.00020).
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vilg.config.reranker import RerankerConfig
from megatron_vilg.data.token_cache import SplitTokens, TokenCache
from megatron_vilg.errors import DataError
from megatron_vilg.log import get_logger
from megatron_vilg.models.dual_encoder import DualEncoder
from megatron_vilg.models.features import load_feature_network
from megatron_vilg.models.image_tokenizer import ImageTokenizer
from megatron_vilg.train.optim import set_learning_rate

log = get_logger(__name__)

_RENDERED = 64
"""Pictures rendered and described at a time."""
_MEASURED = 1024
"""Pairs of a split that are measured, each among all of them."""
_LOG_EVERY = 100
_WARMUP = 1 / 12


@dataclass(frozen=True, slots=True)
class Wordings:
    """How captions are drawn: of this text vocabulary, with other words this often."""

    text_vocab_size: int
    num_text_slots: int
    alternate_probability: float


class Descriptions:
    """Features of P pairs in V renderings, float16 [V, P, C], in a file: written once from end to end, then read."""

    def __init__(self, file: IO[bytes], num_renderings: int, num_pairs: int) -> None:
        self._file, self._shape = file, (num_renderings, num_pairs)
        self._rows: np.ndarray | None = None

    def append(self, features: Tensor) -> None:
        """The next pictures, [B, C]: pair after pair, rendering after rendering."""
        self._file.write(features.cpu().half().numpy().tobytes())

    def __getitem__(self, at: tuple[np.ndarray, np.ndarray]) -> Tensor:
        """Features float32 [B, C] of pairs ``at[1]`` in renderings ``at[0]``."""
        if self._rows is None:
            self._file.flush()
            self._rows = np.memmap(self._file, np.float16, "r").reshape(*self._shape, -1)
        return torch.from_numpy(self._rows[at].astype(np.float32))


def train_reranker(
    config: RerankerConfig,
    cache: TokenCache,
    image_tokenizer: ImageTokenizer,
    wordings: Wordings,
    *,
    device: torch.device,
    scratch: Path,
) -> tuple[DualEncoder, dict[str, float]]:
    """A reranker, trained, and how often it finds the right caption of a picture by split.

    Args:
        config: what to build and how to train it.
        cache: the run's pairs; its split ``train`` is trained, the others are measured.
        image_tokenizer: renders codes, on ``device``.
        wordings: how captions are drawn.
        device: where to compute.
        scratch: existing folder on a disk with room for the features.

    Returns:
        the model on ``device``, and for each split the share of (at most 1,024) pictures that find their caption among
        those of all.

    Raises:
        DataError: fewer than two pairs to train on.
        MissingPackageError, ConfigError, CheckpointError: the feature network cannot be had.
    """
    tokens = cache.split("train")
    if len(tokens) < 2:
        raise DataError(
            f"token cache {str(cache.folder)!r} has {len(tokens)} training pairs; two are compared at least"
        )
    rng = np.random.default_rng(config.seed)
    pairs = np.sort(rng.permutation(len(tokens))[: config.max_pairs])
    # Without a name, the file is gone however this process ends.
    with _seeded(config.seed), tempfile.TemporaryFile(dir=scratch) as file:
        network = load_feature_network(config.feature_network, "reranker.feature_network").to(device)
        encoder = DualEncoder(config, wordings.text_vocab_size, wordings.num_text_slots, network).to(device)
        described = Descriptions(file, config.renderings, len(pairs))
        _describe(encoder, described, tokens, pairs, image_tokenizer, rng)
        _learn(encoder, described, tokens, pairs, wordings, rng)
    encoder.requires_grad_(False).eval()
    found = {name: _found(encoder, cache.split(name), image_tokenizer) for name, count in cache.splits.items() if count}
    return encoder, found


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch from ``seed``, and the caller's afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _describe(
    encoder: DualEncoder,
    described: Descriptions,
    tokens: SplitTokens,
    pairs: np.ndarray,
    image_tokenizer: ImageTokenizer,
    rng: np.random.Generator,
) -> None:
    """Render all pairs, describe what is seen, and note mean and deviation of each feature."""
    config, num_codes = encoder.config, image_tokenizer.config.codebook_size
    total = torch.zeros(2, encoder.mean.numel(), dtype=torch.float64, device=encoder.mean.device)
    for rendering in range(config.renderings):
        for first in range(0, len(pairs), _RENDERED):
            part = pairs[first : first + _RENDERED]
            views = rng.integers(0, tokens.num_views + 1, len(part)) if rendering else np.zeros(len(part), np.int64)
            codes = tokens.images(part, views).astype(np.int64)
            if rendering:
                noised = rng.random(codes.shape) < config.code_noise
                codes[noised] = rng.integers(0, num_codes, int(noised.sum()))
            features = _features(encoder, image_tokenizer, codes)
            total += torch.stack([features.sum(dim=0), features.square().sum(dim=0)]).double()
            described.append(features)
        log.info("pictures described: %d of %d", (rendering + 1) * len(pairs), config.renderings * len(pairs))
    mean, square = total / (config.renderings * len(pairs))
    encoder.standardise(mean.float(), (square - mean.square()).clamp(min=0.0).sqrt().float())


@torch.no_grad()
def _features(encoder: DualEncoder, image_tokenizer: ImageTokenizer, codes: np.ndarray) -> Tensor:
    ids = torch.from_numpy(codes).to(encoder.mean.device)
    return encoder.features(image_tokenizer.decode(image_tokenizer.lookup(ids)))


def _learn(
    encoder: DualEncoder,
    described: Descriptions,
    tokens: SplitTokens,
    pairs: np.ndarray,
    wordings: Wordings,
    rng: np.random.Generator,
) -> None:
    config, device = encoder.config, encoder.mean.device
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    same = _same_captions(tokens, pairs)
    order = np.empty(0, np.int64)
    encoder.train()
    for step in range(config.num_steps):
        if len(order) < min(config.batch_size, len(pairs)):
            order = rng.permutation(len(pairs))
        chosen, order = np.split(order, [config.batch_size])
        text_ids, text_len = _captions(tokens, pairs[chosen], wordings.alternate_probability, rng)
        pictures = encoder.embed_features(described[rng.integers(0, config.renderings, len(chosen)), chosen].to(device))
        texts = encoder.embed_texts(text_ids.to(device), text_len.to(device))
        loss = _contrast(encoder.scale * pictures @ texts.T, same[chosen].to(device))
        set_learning_rate(optimizer, config.lr * _share_of_rate(step, config.num_steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % _LOG_EVERY == 0 or step + 1 == config.num_steps:
            log.info("step %d/%d  loss %.3f nats", step + 1, config.num_steps, loss.item())


def _captions(
    tokens: SplitTokens, pairs: np.ndarray, alternate_probability: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A wording of each pair: ids int64 [B, L] and lengths [B]."""
    others = tokens.num_captions(pairs) - 1
    wording = 1 + (rng.random(len(pairs)) * others).astype(np.int64)
    wording[(rng.random(len(pairs)) >= alternate_probability) | (others == 0)] = 0
    ids, lengths = tokens.captions(pairs, wording)
    return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(lengths.astype(np.int64))


def _same_captions(tokens: SplitTokens, pairs: np.ndarray) -> Tensor:
    """A number for each pair, the same where captions are: int64 [P]."""
    ids, _ = tokens.captions(pairs, np.zeros(len(pairs), np.int64))
    return torch.from_numpy(np.unique(ids, axis=0, return_inverse=True)[1].reshape(-1))


def _contrast(logits: Tensor, same: Tensor) -> Tensor:
    """InfoNCE in both directions over logits [B, B]; pairs of the same caption are no contrast to each other."""
    diagonal = torch.arange(len(logits), device=logits.device)
    is_twin = (same[:, None] == same) & (diagonal[:, None] != diagonal)
    logits = logits.masked_fill(is_twin, -math.inf)
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


def _share_of_rate(step: int, num_steps: int) -> float:
    return min(1.0, (step + 1) / max(1.0, _WARMUP * num_steps)) * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))


@torch.no_grad()
def _found(encoder: DualEncoder, tokens: SplitTokens, image_tokenizer: ImageTokenizer) -> float:
    """Share of pictures whose nearest caption of a split is their own, or says the same."""
    pairs = np.linspace(0, len(tokens) - 1, min(_MEASURED, len(tokens))).astype(np.int64)
    zeros, device = np.zeros(len(pairs), np.int64), encoder.mean.device
    ids, lengths = (torch.from_numpy(part.astype(np.int64)).to(device) for part in tokens.captions(pairs, zeros))
    codes = tokens.images(pairs, zeros).astype(np.int64)
    parts = [
        encoder.embed_features(_features(encoder, image_tokenizer, codes[first : first + _RENDERED]))
        for first in range(0, len(pairs), _RENDERED)
    ]
    nearest = (torch.cat(parts) @ encoder.embed_texts(ids, lengths).T).argmax(dim=1).cpu()
    same = _same_captions(tokens, pairs)
    return float((same[nearest] == same).float().mean())
