"""A moving average of a module's weights: smoother than the last step's, and what is kept in the end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_RAMP = 10.0


class WeightAverage:
    """Average ``a <- d a + (1 - d) w`` after every step; counters and other buffers are copied.

    The decay rises as ``(1 + t) / (10 + t)`` up to its value, so that an early average is not the start weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self.steps = torch.zeros((), dtype=torch.int64)

    def state_dict(self) -> dict[str, object]:
        """The live tensors, for a checkpoint that fills them in place."""
        return {"values": self.values, "steps": self.steps}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights after an accepted step."""
        count = int(self.steps)
        decay = min(self.decay, (1.0 + count) / (_RAMP + count))
        learned = {name for name, _ in module.named_parameters()}
        for name, value in module.state_dict().items():
            if name in learned:
                self.values[name].lerp_(value, 1.0 - decay)
            else:
                self.values[name].copy_(value)
        self.steps += 1

    def named(self) -> dict[str, Tensor]:
        """Averaged values by the module's own names."""
        return self.values
