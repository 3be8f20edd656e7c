"""Choose the next token: temperature, top-k, top-p, min-p, and one random number per sample and step.

Every sample has a random stream of its own, derived from (seed, prompt, sample). So what a sample becomes does not
depend on how many others are drawn beside it, or on how they are split into batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_vilg.config.schema import SampleConfig

_COLDEST = 1e-30
"""A lower temperature is none: logits divided by it may overflow, and the likeliest token is certain long before."""


def sample_uniforms(seed: int, streams: Sequence[tuple[int, int]], count: int) -> Tensor:
    """Random numbers in [0, 1) for samples named (prompt, sample): float32 [len(streams), count], on the CPU."""
    rows = np.empty((len(streams), count), dtype=np.float32)
    for row, stream in zip(rows, streams, strict=True):
        sequence = np.random.SeedSequence(seed % 2**64, spawn_key=stream)
        np.random.Generator(np.random.Philox(sequence)).random(out=row, dtype=np.float32)
    return torch.from_numpy(rows)


def mixed(logits: Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    """Guidance: ``free + sum over i of weights[i] * (conditional_i - free)``, in fp32.

    With one condition that is classifier-free guidance (Ho and Salimans 2022); with several it is their conjunction
    (Liu et al. 2022, equation 11), for tokens instead of noise.

    Args:
        logits: [G * B, V]: those of every sample under each of G - 1 conditions, and last without any. With G = 1 they
            are returned as they are.
        weights: G - 1 numbers.

    Returns:
        [B, V].
    """
    if len(weights) == 0:
        return logits
    *conditional, free = logits.float().chunk(len(weights) + 1)
    result = free
    for number, each in enumerate(conditional):
        result = result + weights[number] * (each - free)
    return result


def part_weights(settings: SampleConfig) -> tuple[float, float]:
    """How much manner and thing of a prompt pull on their own."""
    return settings.manner_guidance, settings.thing_guidance


def guidance_weights(settings: SampleConfig, count: int, *, has_parts: bool) -> list[list[float]]:
    """Weights for ``mixed`` of each of ``count`` tokens: that of the prompt, then those of its parts that are not zero.

    Empty lists where nothing but the prompt counts, so that nothing else needs to be computed.
    """
    parts = [weight for weight in part_weights(settings) if weight] if has_parts else []
    if settings.guidance == 1.0 and not parts:
        return [[] for _ in range(count)]
    return [[scale, *parts] for scale in guidance_scales(settings, count)]


def guidance_scales(settings: SampleConfig, count: int) -> list[float]:
    """The guidance scale of each of ``count`` tokens."""
    if settings.guidance_schedule == "constant" or count == 1:
        return [settings.guidance] * count
    done = [token / (count - 1) for token in range(count)]
    if settings.guidance_schedule == "cosine":
        done = [(1.0 - math.cos(math.pi * share)) / 2.0 for share in done]
    return [1.0 + (settings.guidance - 1.0) * share for share in done]


def sample(logits: Tensor, settings: SampleConfig, uniform: Tensor) -> Tensor:
    """Draw one token per row; -inf marks tokens that must not be drawn.

    Top-p and min-p look at the probabilities that temperature and top-k leave. The token is read off the cumulative
    distribution at ``uniform``.

    Args:
        logits: [B, V].
        settings: temperature 0 (or one below 1e-30) takes the likeliest token; ``guidance`` is not this function's
            business.
        uniform: float32 [B] in [0, 1).

    Returns:
        int64 [B].
    """
    if settings.temperature < _COLDEST:
        return logits.argmax(dim=-1)
    scaled = logits.float() / settings.temperature
    order: Tensor | None = None
    if 0 < settings.top_k < scaled.shape[-1]:
        scaled, order = scaled.topk(settings.top_k, dim=-1)
    elif settings.top_p < 1.0:
        scaled, order = scaled.sort(dim=-1, descending=True)
    probability = scaled.softmax(dim=-1)
    if settings.top_p < 1.0:
        before = probability.cumsum(dim=-1) - probability
        beyond = before >= settings.top_p
        beyond[:, 0] = False  # top_p = 0 still leaves the likeliest token
        probability = probability.masked_fill(beyond, 0.0)
    if settings.min_p > 0.0:
        highest = probability.amax(dim=-1, keepdim=True)
        probability = probability.masked_fill(probability < settings.min_p * highest, 0.0)
    # float64, so that uniform * total stays below total and a token of probability zero is never hit.
    cumulative = probability.cumsum(dim=-1, dtype=torch.float64)
    target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)
    return (index if order is None else order.gather(1, index)).squeeze(1)


def keep_best(ids: Tensor, scores: Tensor | None, keep: int) -> tuple[Tensor, Tensor | None]:
    """The ``keep`` best of several drawings of each prompt, best first; ties keep their order.

    Args:
        ids: [B, n, N].
        scores: [B, n]; None: there is no choice, the first ones are kept.

    Returns:
        [B, keep, N], and their scores [B, keep] if there are any.
    """
    if scores is None:
        return ids[:, :keep], None
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return ids.gather(1, best[:, :, None].expand(-1, -1, ids.shape[2])), scores.gather(1, best)
