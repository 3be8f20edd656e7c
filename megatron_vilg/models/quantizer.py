"""Nearest-code quantisation: moving-average or gradient codebooks, k-means start, replacement of dead codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_vilg.config.schema import ImageTokenizerConfig

_MAX_SCORES = 1 << 22
"""Most scores (vectors times codes) held at once in the search for the nearest code: 16 MiB of float32."""
_LEAST_COUNT = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps
"""Average use below which sum and count of a code's vectors are too small for float32 to divide: 9.9e-32."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """What :meth:`VectorQuantizer.forward` returns for M vectors of size C."""

    vectors: Tensor
    """[M, C]: the codes; gradients pass straight through to the encoder output."""
    ids: Tensor
    """int64 [M]: which codes."""
    commitment_loss: Tensor
    """Scalar: squared distance of the encoder output from its (fixed) code, averaged over vectors."""
    codebook_loss: Tensor
    """Scalar: squared distance of the code from its (fixed) encoder output; zero for moving averages."""


@dataclass(frozen=True, slots=True)
class CodebookUse:
    """How a set of vectors used the codebook."""

    used: float
    """Share of the codes that occur."""
    perplexity: float
    """Exponential of the entropy of the code frequencies: 1 (one code) to K (all equally often)."""


def codebook_use(counts: Tensor) -> CodebookUse:
    """Statistics from how often each of the K codes was used, int64 [K]."""
    share = counts.double() / counts.sum().clamp(min=1)
    entropy = -torch.xlogy(share, share).sum()
    return CodebookUse(used=float((counts > 0).double().mean()), perplexity=float(entropy.exp()))


class VectorQuantizer(nn.Module):
    """K codes of size C and the map from vectors to the nearest of them.

    With ``l2_normalise`` (ViT-VQGAN) inputs and codes have length 1 and the nearest code is the one with the
    largest inner product. The codebook follows the encoder by moving averages (:meth:`follow`, VQ-VAE
    appendix A.1) or, with ``codebook_update="gradient"``, by its own loss; the commitment weight is on the
    encoder's side, as the VQGAN authors later corrected.
    """

    code: Tensor
    ema_sum: Tensor
    ema_count: Tensor

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.codebook_size, config.codebook_dim)
        code = self._constrain(torch.randn(shape))
        if config.codebook_update == "gradient":
            self.code = nn.Parameter(code)
        else:
            self.register_buffer("code", code)
        self.logits = nn.Linear(config.codebook_dim, config.codebook_size) if config.code_choice == "logits" else None
        self.register_buffer("ema_sum", code.detach().clone())
        self.register_buffer("ema_count", torch.ones(config.codebook_size))

    @property
    def codebook(self) -> Tensor:
        """[K, C]; of length 1 each with ``l2_normalise``."""
        return self._constrain(self.code)

    def _constrain(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.config.l2_normalise else vectors

    def prepare(self, vectors: Tensor) -> Tensor:
        """Encoder outputs [..., C] as they are compared with codes: float32, of length 1 with ``l2_normalise``."""
        return self._constrain(vectors.float())

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """Prepared vectors [M, C] to the ids int64 [M] of their nearest codes, in slices that bound the memory."""
        codebook = self.codebook
        offset = torch.zeros(()) if self.config.l2_normalise else -0.5 * codebook.square().sum(1)
        rows = max(1, _MAX_SCORES // len(codebook))
        with torch.autocast(vectors.device.type, enabled=False):
            found = [(part @ codebook.t() + offset.to(part.device)).argmax(1) for part in vectors.split(rows)]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=vectors.device)

    @torch.no_grad()
    def choose(self, vectors: Tensor) -> Tensor:
        """Prepared vectors [M, C] to the ids int64 [M] of their codes, as ``code_choice`` says."""
        if self.logits is None:
            return self.nearest(vectors)
        rows = max(1, _MAX_SCORES // self.config.codebook_size)
        return torch.cat([self.logits(part).argmax(1) for part in vectors.split(rows)])

    def lookup(self, ids: Tensor) -> Tensor:
        """Ids of any shape to float32 [..., C]."""
        return F.embedding(ids, self.codebook)

    def forward(self, vectors: Tensor, *, frozen: bool = False) -> Quantised:
        """Replace prepared vectors [M, C] by their codes.

        Args:
            frozen: the codebook gets no gradient.
        """
        ids = self.nearest(vectors)
        codes = self.lookup(ids)
        fixed = codes.detach()
        commitment = (vectors - fixed).square().sum(1).mean()
        learns = self.config.codebook_update == "gradient" and not frozen
        codebook_loss = (codes - vectors.detach()).square().sum(1).mean() if learns else commitment.new_zeros(())
        return Quantised(vectors + (fixed - vectors).detach(), ids, commitment, codebook_loss)

    @torch.no_grad()
    def follow(self, vectors: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        """Move the averages towards prepared vectors [M, C] that chose ``ids`` [M], and replace dead codes.

        Called once per accepted step. With ``codebook_update="gradient"`` only use is averaged, to find
        dead codes.

        Args:
            generator: CPU generator that draws the encoder outputs dead codes are replaced by.

        Returns:
            How many codes were replaced (scalar tensor, so that nothing waits for the device).
        """
        config = self.config
        share = 1.0 - config.ema_decay
        counts = torch.bincount(ids, minlength=config.codebook_size).to(self.ema_count)
        self.ema_count.mul_(config.ema_decay).add_(counts, alpha=share)
        dead = self.ema_count < config.dead_code_threshold
        # Drawn for every code, dead or not: how many draws a step takes must not depend on the data.
        drawn = torch.randint(len(vectors), (config.codebook_size,), generator=generator).to(vectors.device)
        fresh = vectors.detach()[drawn].to(self.ema_sum)
        if config.codebook_update == "ema":
            self.ema_sum.mul_(config.ema_decay).index_add_(0, ids, vectors.detach().to(self.ema_sum), alpha=share)
            self.ema_sum.copy_(torch.where(dead[:, None], fresh, self.ema_sum))
            self.ema_count.masked_fill_(dead, 1.0)
            moved = self._constrain(self.ema_sum / self.ema_count[:, None])
            # Without replacement both fade to 0 where nobody chooses a code; it stays until somebody does.
            self.code.copy_(torch.where(self.ema_count[:, None] < _LEAST_COUNT, self.code, moved))
        else:
            self.ema_count.masked_fill_(dead, 1.0)
            self.code.copy_(torch.where(dead[:, None], fresh, self.code))
        return dead.sum()

    @torch.no_grad()
    def fit_kmeans(self, vectors: Tensor, generator: torch.Generator, *, iterations: int = 15) -> None:
        """Set the codebook to k-means centres of prepared vectors [M, C]; empty clusters restart at random vectors."""
        size = self.config.codebook_size
        first = torch.randperm(len(vectors), generator=generator)[:size]
        if len(first) < size:  # fewer vectors than codes: the rest are repeats, and die or drift apart in training
            first = torch.cat([first, torch.randint(len(vectors), (size - len(first),), generator=generator)])
        self.code.copy_(vectors[first.to(vectors.device)])
        for _ in range(iterations):
            ids = self.nearest(vectors)
            counts = torch.bincount(ids, minlength=size)
            centres = torch.zeros_like(self.ema_sum).index_add_(0, ids, vectors.to(self.ema_sum))
            centres = centres / counts.clamp(min=1)[:, None]
            drawn = torch.randint(len(vectors), (size,), generator=generator).to(vectors.device)
            self.code.copy_(self._constrain(torch.where(counts[:, None] > 0, centres, vectors[drawn])))
        self.ema_sum.copy_(self.code)
        self.ema_count.fill_(1.0)
