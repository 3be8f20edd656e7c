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
    num_references: PositiveInt = 7
    """Pictures of the thing in other manners that a drawing is shown at most. In training the pictures of a thing, one
    more at most, stand in a random order, and each is drawn behind all before it."""
    num_steps: PositiveInt = 6000
    """Optimizer steps."""
    batch_size: PositiveInt = 12
    """Things per step."""
    lr: Positive = 3e-3
    """Peak learning rate: 3 % of the steps to get there, then a cosine to a fiftieth. Muon for matrices of blocks."""
    weight_decay: NonNegative = 0.1
    """On matrices."""
    grad_clip: Positive = 1.0
    """Largest norm of the gradient."""
    input_noise: Fraction = 0.5
    """Share of the codes drawn so far that are replaced at random in the first step, so that references have to be
    looked at. It goes to ``last_input_noise`` in a straight line."""
    last_input_noise: Fraction = 0.1
    """The same in the last step: the fewer, the better what is drawn hangs together."""
    hidden_manners: Fraction = 0.1
    """Share of the drawings that are not told their manner: what guidance by it compares with."""
    turned_colours: Fraction = 0.3
    """Share of the moved rows whose colours are turned around the grey axis, all pictures of a row alike."""
    view_fall: Fraction = 1.0
    """Share of the steps in which fewer and fewer rows are moved and coloured; behind it all are shown as they are."""
    checkpoint_every: PositiveInt = 200
    """Steps between two checkpoints of training."""
    log_every: PositiveInt = 50
    """Steps between two log lines."""
    seed: int = 0
    """Initial weights, order, references, noise."""
