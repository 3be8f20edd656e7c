"""The loss of both directions (paper equations 3 to 5): cross-entropy on targets only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vilg.config.schema import LossConfig
from megatron_vilg.data.batch import IGNORE
from megatron_vilg.parallel.mesh import DATA_AXES, Mesh


@dataclass(frozen=True, slots=True)
class PairLoss:
    """0-dim tensors. The cross-entropies are means in nats per token, without weights, z-loss or smoothing."""

    loss: Tensor
    image_ce: Tensor
    text_ce: Tensor


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Predicted tokens of a whole step, over all micro-batches and ranks; what sums are divided by."""

    image: Tensor | int
    text: Tensor | int
    """0-dim int64, left on the device."""

    @classmethod
    def of(cls, targets: Tensor, num_image_tokens: int) -> TokenCounts:
        """Count labels that are not ``IGNORE`` in int64 [P, N + L + 1]."""
        valid = targets != IGNORE
        return cls(image=valid[:, :num_image_tokens].sum(), text=valid[:, num_image_tokens:].sum())

    def summed(self, mesh: Mesh) -> TokenCounts:
        """The counts of all data ranks together."""
        image, text = mesh.sum(torch.stack([torch.as_tensor(self.image), torch.as_tensor(self.text)]), DATA_AXES)
        return TokenCounts(image, text)


def weighted_loss(
    image: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor], counts: TokenCounts, config: LossConfig
) -> PairLoss:
    """Both directions' sums to one loss; divided by the counts of the whole step, so micro-batches add up.

    Args:
        image, text: summed loss with z-loss and smoothing, and the bare cross-entropy; 0-dim, in nats.
        counts: predicted tokens of the whole step.
        config: weights and switches.
    """
    if config.normalisation == "token_sum":
        image_count = text_count = _at_least_one(counts.image + counts.text)
    else:
        image_count, text_count = _at_least_one(counts.image), _at_least_one(counts.text)
    loss = config.text_to_image_weight * image[0] / image_count
    loss = loss + config.image_to_text_weight * text[0] / text_count
    return PairLoss(
        loss=loss,
        image_ce=image[1].detach() / _at_least_one(counts.image),
        text_ce=text[1].detach() / _at_least_one(counts.text),
    )


def _at_least_one(count: Tensor | int) -> Tensor | int:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(1, count)
