"""Which implementation executes attention, from sizes alone. No torch in here, so that ``vilg plan`` can ask too."""

from __future__ import annotations

from typing import Literal, cast, get_args

Implementation = Literal["dense", "sdpa", "fold", "flex", "triton"]

FOLD_FROM_SIDE = 16
"""Image side from which folding is faster than a dense mask (measured on CPU; see ``benchmarks/``)."""


def implementation_of(requested: Implementation | Literal["auto"], image_side: int) -> tuple[Implementation, str]:
    """The implementation that ``ops.attention`` stands for, and the reason, for the log; whatever the device."""
    if requested in get_args(Implementation):
        chosen, reason = cast(Implementation, requested), "asked for"
    elif image_side >= FOLD_FROM_SIDE:
        chosen, reason = "fold", f"model.image_side={image_side} >= {FOLD_FROM_SIDE}"
    else:
        chosen, reason = "dense", f"model.image_side={image_side} < {FOLD_FROM_SIDE}"
    if chosen == "fold":
        reason += "; full layers, and windows over most of the picture, by sdpa"
    return chosen, reason
