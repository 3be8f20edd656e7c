"""Options of the reranker, a contrastive model of captions and pictures, and how it is trained."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from megatron_vilg.config.fields import STRICT, Count, Fraction, NonNegative, Positive, PositiveInt


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RerankerConfig:
    """A dual encoder that says which drawing fits a prompt (paper section 4.2; ``vilg train-reranker`` makes it)."""

    width: PositiveInt = 256
    """Size of the space that captions and pictures share."""
    text_layers: Count = 0
    """Transformer blocks over the pieces of a caption, for captions whose order matters; with one, a step takes twelve
    times as long on a CPU. 0: a caption is what its pieces say together."""
    num_heads: PositiveInt = 4
    """Attention heads of these blocks; must divide ``width``."""
    feature_network: str = "efficientnet-lite0"
    """Frozen network that looks at pictures: ``efficientnet-lite0``, ``efficientnet-lite2``, or a Lite0 state dict."""
    feature_dropout: Fraction = 0.3
    """Share of a picture's features that a training step does not see."""
    text_dropout: Fraction = 0.1
    """Dropout in the blocks."""
    num_steps: PositiveInt = 400
    """Optimizer steps."""
    batch_size: PositiveInt = 768
    """Pairs per step, each beside the captions and pictures of all others; of fewer pairs, all."""
    lr: Positive = 1.5e-3
    """Peak learning rate: a twelfth of the steps to get there, then a cosine to 0."""
    weight_decay: NonNegative = 0.1
    """AdamW's."""
    renderings: PositiveInt = 2
    """Pictures of each pair: its own, then other views, rendered from their codes as drawings are."""
    code_noise: Fraction = 0.12
    """Share of the codes of all but the first rendering that are replaced at random: drawings have wrong ones, too."""
    max_pairs: PositiveInt = 200_000
    """Pairs trained at most, a random choice of more: features of 200,000 in two renderings take 4 GB of disk."""
    seed: int = 0
    """Initial weights, order, noise."""
