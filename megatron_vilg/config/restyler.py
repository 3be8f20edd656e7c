"""Options of the restyler, which draws a thing in a manner that it was never shown in, and how it is trained."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from megatron_vilg.config.fields import STRICT, Fraction, NonNegative, Positive, PositiveInt


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RestylerConfig:
    """A transformer that draws a picture behind pictures of the same thing (``vilg train-restyler`` makes it)."""

    num_layers: PositiveInt = 4
    """Transformer blocks."""
    width: PositiveInt = 256
    """Hidden size."""
    num_heads: PositiveInt = 8
    """Attention heads; must divide ``width``."""
    num_references: PositiveInt = 2
    """Pictures of the thing in other manners that each drawing is shown at most."""
    num_targets: PositiveInt = 4
    """Pictures drawn behind the same references in a training step; each sees the references and itself."""
    num_steps: PositiveInt = 6000
    """Optimizer steps."""
    batch_size: PositiveInt = 24
    """Things per step."""
    lr: Positive = 3e-3
    """Peak learning rate: 3 % of the steps to get there, then a cosine to a fiftieth. Muon for matrices of blocks."""
    weight_decay: NonNegative = 0.1
    """On matrices."""
    grad_clip: Positive = 1.0
    """Largest norm of the gradient."""
    input_noise: Fraction = 0.5
    """Share of the codes drawn so far that are replaced at random, so that references have to be looked at."""
    hidden_references: Fraction = 0.1
    """Share of the rows that do without references: what guidance by them compares with."""
    hidden_manners: Fraction = 0.1
    """Share of the drawings that are not told their manner: what guidance by it compares with."""
    turned_colours: Fraction = 0.3
    """Share of the rows whose colours are turned around the grey axis, references and targets alike."""
    checkpoint_every: PositiveInt = 200
    """Steps between two checkpoints of training."""
    log_every: PositiveInt = 50
    """Steps between two log lines."""
    seed: int = 0
    """Initial weights, order, references, noise."""
