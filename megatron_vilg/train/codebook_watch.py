"""Warns when the codebook collapses, or when its codes would be replaced whatever they do.

Collapse: too few codes in use, or a few codes doing most of the work.
"""

from __future__ import annotations

import math

from megatron_vilg.config.schema import ImageTokenizerConfig, RunConfig
from megatron_vilg.log import get_logger
from megatron_vilg.models.quantizer import CodebookUse

log = get_logger(__name__)

HEALTHY_USED = 0.6
"""Least healthy share of codes in use; low-dimensional codes of length 1 reach 0.95 (ViT-VQGAN, table 4)."""
HEALTHY_PERPLEXITY_SHARE = 0.2
"""Least healthy perplexity as a share of the number of codes."""
MIN_VECTORS_PER_CODE = 4
"""Below this many vectors per code the figures say nothing."""
_DEVIATIONS = 3.0
"""Distance from the threshold that keeps an evenly used code: one in 100,000 then falls below it in a step."""


class CodebookWatch:
    """Says once when the codebook leaves its healthy range, and once when it is back."""

    def __init__(self, codebook_size: int) -> None:
        self._size = codebook_size
        self._is_healthy = True

    def check(self, step: int, use: CodebookUse, *, num_vectors: int) -> bool:
        """Look at the use over ``num_vectors`` vectors; return whether it is healthy (or too little was seen)."""
        if num_vectors < MIN_VECTORS_PER_CODE * self._size:
            return self._is_healthy
        least = HEALTHY_PERPLEXITY_SHARE * self._size
        healthy = use.used >= HEALTHY_USED and use.perplexity >= least
        if self._is_healthy and not healthy:
            log.warning(
                "step %d: codebook collapses: codebook/used(share)=%.2f (healthy: %.2f to 1), "
                "codebook/perplexity=%.0f (healthy: %.0f to %d). Try a smaller image_tokenizer.codebook_dim, "
                "image_tokenizer.l2_normalise=true, a higher dead_code_threshold, or fewer codes",
                *(step, use.used, HEALTHY_USED, use.perplexity, least, self._size),
            )
        elif healthy and not self._is_healthy:
            log.info("step %d: codebook is healthy again (used %.2f, perplexity %.0f)", step, use.used, use.perplexity)
        self._is_healthy = healthy
        return healthy


def replaced_though_used(run: RunConfig) -> str:
    """What is wrong with the threshold of dead codes for batches this small; empty: nothing.

    A code that gets one in K of a step's vectors has them as its average use. Chance moves that average by the root of
    ``use * (1 - decay) / (1 + decay)``: where it gets below the threshold, codes that all work are replaced for ever.
    """
    tokenizer, batch_size = run.image_tokenizer, run.image_tokenizer_train.batch_size
    threshold, codes, per_picture = tokenizer.dead_code_threshold, tokenizer.codebook_size, tokenizer.grid_side**2
    use = batch_size * per_picture / codes
    least = _least_use(tokenizer)
    if use >= least:
        return ""
    highest = max(0.0, use - _DEVIATIONS * math.sqrt(use * _spread(tokenizer)))
    works = (
        f"image_tokenizer_train.batch_size={math.ceil(least * codes / per_picture)} and more",
        f"image_tokenizer.codebook_size={max(1, math.floor(batch_size * per_picture / least))} and less",
        f"image_tokenizer.dead_code_threshold={math.floor(highest * 1000) / 1000:g}" + (" and less" if highest else ""),
    )
    return (
        f"image_tokenizer.dead_code_threshold={threshold:g}: a step of {batch_size} x {per_picture} tokens uses each "
        f"of {codes} codes {use:.2g} times if all are used evenly, and by chance less often: codes in use are replaced "
        f"again and again, too. Works: {', or '.join(works)}"
    )


def _spread(tokenizer: ImageTokenizerConfig) -> float:
    """Variance of a moving average of counts, as a share of their mean."""
    return (1.0 - tokenizer.ema_decay) / (1.0 + tokenizer.ema_decay)


def _least_use(tokenizer: ImageTokenizerConfig) -> float:
    """Even use per step that lies ``_DEVIATIONS`` above the threshold; 0 where nothing is ever replaced."""
    threshold, shift = tokenizer.dead_code_threshold, _DEVIATIONS * math.sqrt(_spread(tokenizer))
    return ((shift + math.sqrt(shift**2 + 4.0 * threshold)) / 2.0) ** 2 if threshold else 0.0
