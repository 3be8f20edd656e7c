"""Warns when the codebook collapses: too few codes in use, or a few codes doing most of the work."""

from __future__ import annotations

from megatron_vilg.log import get_logger
from megatron_vilg.models.quantizer import CodebookUse

log = get_logger(__name__)

HEALTHY_USED = 0.6
"""Least healthy share of codes in use; low-dimensional codes of length 1 reach 0.95 (ViT-VQGAN, table 4)."""
HEALTHY_PERPLEXITY_SHARE = 0.2
"""Least healthy perplexity as a share of the number of codes."""
MIN_VECTORS_PER_CODE = 4
"""Below this many vectors per code the figures say nothing."""


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
