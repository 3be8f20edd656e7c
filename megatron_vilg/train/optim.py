"""The optimizer, its state by parameter name, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from megatron_vilg.config.schema import OptimConfig
from megatron_vilg.errors import CheckpointError
from megatron_vilg.log import get_logger

logger = get_logger(__name__)

NOT_DECAYED = frozenset({"position", "row", "column", "segment", "boundary"})
"""Path elements of embeddings of places and borders: few rows, each present in every sample."""
_FUSED_DEVICES = ("cpu", "cuda")


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: matrices and larger, but neither vectors nor embeddings of places and borders."""
    return parameter.ndim >= 2 and NOT_DECAYED.isdisjoint(name.split("."))


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, device: torch.device | str
) -> AdamW:
    """AdamW with decay on matrices only; torch's fused update where the device has one.

    Args:
        named_parameters: as ``module.named_parameters()`` gives them; those without gradient are left out.
        config: the rates. ``lr`` is only the start value: set each step's with :func:`set_learning_rate`.
        device: where the parameters are.
    """
    trained = [(name, p) for name, p in named_parameters if p.requires_grad]
    decayed = [p for name, p in trained if is_decayed(name, p)]
    others = [p for name, p in trained if not is_decayed(name, p)]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, config.weight_decay), (others, 0.0))
        if parameters
    ]
    fused = torch.device(device).type in _FUSED_DEVICES
    counts = [sum(p.numel() for p in parameters) for parameters in (decayed, others)]
    logger.info("AdamW (fused=%s): %d values with decay, %d without", fused, *counts)
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def learning_rate(step: int, config: OptimConfig, num_steps: int) -> float:
    """Learning rate of a step; a pure function, so that resuming needs no scheduler state.

    Args:
        step: finished steps, 0 for the first update.
        config: peak, warm-up and floor.
        num_steps: length of the run; the cosine reaches its floor there and stays.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    share = config.min_lr_share + (1.0 - config.min_lr_share) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * share


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use ``value`` in every group from the next update on."""
    for group in optimizer.param_groups:
        group["lr"] = value


def optimizer_state(
    optimizer: AdamW, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, dict[str, Tensor]]:
    """The optimizer's own tensors by parameter name: ``{"exp_avg": {name: ...}, "exp_avg_sq": ..., "step": ...}``.

    State that does not exist yet is created as the first update would, so that a checkpoint can be loaded into it
    in place before any step. Rates and decay are not in here; they come from the configuration.

    Raises:
        CheckpointError: the optimizer updates a parameter that ``named_parameters`` does not name.
    """
    names = {parameter: name for name, parameter in named_parameters}
    result: dict[str, dict[str, Tensor]] = {"step": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise CheckpointError(
                    f"the optimizer updates a parameter of shape {tuple(parameter.shape)} that has no name"
                )
            state = optimizer.state[parameter]
            if not state:
                state.update(_initial_state(parameter, on_device=bool(group["fused"])))
            for key, tensors in result.items():
                tensors[names[parameter]] = state[key]
    return result


def _initial_state(parameter: Tensor, *, on_device: bool) -> Mapping[str, Tensor]:
    """What AdamW creates at its first update; its step count is on the device only when fused."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu"),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }
