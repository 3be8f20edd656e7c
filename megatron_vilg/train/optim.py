"""The optimizer, its state by parameter name, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from megatron_vilg.checkpoint.dcp_folder import read_metadata
from megatron_vilg.checkpoint.nested_state import flatten
from megatron_vilg.checkpoint.tensors import MODEL, MOMENTUM_SLOT, OPTIMIZER
from megatron_vilg.config.check_engine import LEAN
from megatron_vilg.config.schema import OptimConfig
from megatron_vilg.errors import CheckpointError
from megatron_vilg.log import get_logger
from megatron_vilg.models.cost import is_hidden_matrix
from megatron_vilg.parallel.divided import Ranks
from megatron_vilg.train.apex_optim import apex_fused_adam
from megatron_vilg.train.lean_optim import lean_adamw, open_moment
from megatron_vilg.train.muon import MuonAdamW

logger = get_logger(__name__)

NOT_DECAYED = frozenset({"position", "row", "column", "segment", "boundary"})
"""Path elements of embeddings of places and borders: few rows, each present in every sample."""
_FUSED_DEVICES = ("cpu", "cuda")


def is_decayed(name: str, ndim: int) -> bool:
    """Whether weight decay applies: matrices and larger, but neither vectors nor embeddings of places and borders."""
    return ndim >= 2 and NOT_DECAYED.isdisjoint(name.split("."))


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    device: torch.device | str,
    shapes: Mapping[str, torch.Size] | None = None,
    *,
    in_bf16: bool = False,
    ranks: Ranks | None = None,
) -> Optimizer:
    """The optimizer that ``optim.name`` names, with decay on matrices only.

    Args:
        named_parameters: as ``module.named_parameters()`` gives them; those without gradient are left out.
        config: name and rates. ``lr`` is only the start value: set each step's with :func:`set_learning_rate`.
        device: where the parameters are.
        shapes: whole shapes by name, where the parameters themselves do not show them because they are cut.
        in_bf16: whether the run computes its products in bfloat16; Muon's then are, too.
        ranks: those that all hold these parameters whole, as plain tensors, and among whom Muon's work is divided.

    Raises:
        MissingPackageError: a package that the optimizer needs is missing, or is another one of the same name.
        ConfigError: it does not run on this device.
    """
    trained = {name: p for name, p in named_parameters if p.requires_grad}
    whole = {name: p.shape if shapes is None else shapes[name] for name, p in trained.items()}
    decayed = [name for name, shape in whole.items() if is_decayed(name, len(shape))]
    others = [name for name in trained if name not in set(decayed)]
    counts = [sum(whole[name].numel() for name in names) for names in (decayed, others)]
    logger.info("%s: %d values with decay, %d without", config.name, *counts)
    rates: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}

    def groups_of(*parts: tuple[list[str], float]) -> list[dict[str, Any]]:
        return [{"params": [trained[name] for name in names], "weight_decay": decay} for names, decay in parts if names]

    fused = torch.device(device).type in _FUSED_DEVICES
    hidden = [name for name in decayed if is_hidden_matrix(name, len(whole[name]))]
    if config.name == "muon" and hidden:  # a critic or a reconstructor has none
        logger.info("muon: of those, %d values in hidden matrices", sum(whole[n].numel() for n in hidden))
        rest = [name for name in decayed if name not in set(hidden)]
        matrices = groups_of((hidden, config.weight_decay))
        other_groups = groups_of((rest, config.weight_decay), (others, 0.0))
        return MuonAdamW(matrices, other_groups, rates, fused=fused, in_bf16=in_bf16, ranks=ranks)
    groups = groups_of((decayed, config.weight_decay), (others, 0.0))
    if config.name in LEAN:
        return lean_adamw(groups, config.name, rates)
    if config.name == "apex_fused_adam":
        return apex_fused_adam(groups, rates, torch.device(device))
    return AdamW(groups, **rates, fused=fused)


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


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Use ``value`` in every group from the next update on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def update(optimizer: Optimizer, skipped: Tensor) -> None:
    """One update, or none where ``skipped`` (0-dim, on the parameters' device) is 1."""
    if isinstance(optimizer, AdamW) and optimizer.param_groups[0]["fused"]:
        # The fused kernel leaves everything as it is when this flag is 1, without asking the host.
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.step()
    elif not skipped.item():
        optimizer.step()


def create_state(optimizer: Optimizer) -> None:
    """Create the state that the first update would create, where there is none yet."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                state.update(_initial_state(optimizer, group, parameter))


def optimizer_state(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, dict[str, Tensor]]:
    """The optimizer's own tensors by parameter name: ``{"exp_avg": {name: ...}, "exp_avg_sq": ..., "step": ...}``.

    State that does not exist yet is created as the first update would, so that a checkpoint can be loaded into it
    in place before any step; call :func:`state_was_filled` then. Rates and decay are not in here; they come from the
    configuration. Quantised moments are two tensors each, as ``train.lean_optim.open_moment`` has them; matrices that
    Muon updates have a ``momentum_buffer`` instead.

    Raises:
        CheckpointError: the optimizer updates a parameter that ``named_parameters`` does not name.
    """
    names = {parameter: name for name, parameter in named_parameters}
    result: dict[str, dict[str, Tensor]] = {}
    create_state(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise CheckpointError(
                    f"the optimizer updates a parameter of shape {tuple(parameter.shape)} that has no name"
                )
            state = optimizer.state[parameter]
            if "momentum" in group:
                result.setdefault(MOMENTUM_SLOT, {})[names[parameter]] = state[MOMENTUM_SLOT]
                continue
            if "step" in group:  # Apex counts by group
                state["step"].fill_(group["step"])
            result.setdefault("step", {})[names[parameter]] = state["step"]
            for slot in ("exp_avg", "exp_avg_sq"):
                for suffix, tensor in open_moment(optimizer, state[slot], parameter):
                    result.setdefault(slot + suffix, {})[names[parameter]] = tensor
    return result


def state_was_filled(optimizer: Optimizer) -> None:
    """Take over what :func:`optimizer_state` gave and a checkpoint has filled in place."""
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = int(optimizer.state[group["params"][0]]["step"])


def other_optimizer(path: Path, name: str, state: Mapping[str, Any]) -> str:
    """What is wrong if a checkpoint has the state of another optimizer than a run asks for; empty: nothing is.

    Args:
        path: the checkpoint.
        name: ``optim.name`` of the run.
        state: its tensors, nested as checkpoints are.

    Raises:
        CheckpointError: the checkpoint's list of tensors is missing or damaged.
    """
    found = state_kind({name: info.shape for name, info in read_metadata(path)[0].items()})
    wanted = state_kind({name: tensor.shape for name, tensor in flatten(state).items()})
    if not found or not wanted or found == wanted:
        return ""
    rule = f"the checkpoint {path} has {found}, this run has {name}"
    return f"optim.name: {rule}. Works: optim.name={found}, or another --out"


def state_kind(shapes: Mapping[str, Sequence[int]]) -> str:
    """The value of ``optim.name`` whose state tensors of these names and shapes are; empty: there is no such state.

    ``apex_fused_adam`` has the state of ``adamw``, as has what is too small to be quantised.
    """
    codes = f"{OPTIMIZER}.exp_avg.codes."
    for name, shape in shapes.items():
        if name.startswith(f"{OPTIMIZER}.{MOMENTUM_SLOT}."):
            return "muon"
        if name.startswith(codes):
            whole = shapes.get(f"{MODEL}.{name.removeprefix(codes)}", shape)
            return "adamw_8bit" if shape[-1] == whole[-1] else "adamw_4bit"
    return "adamw" if any(name.startswith(f"{OPTIMIZER}.") for name in shapes) else ""


def _initial_state(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> Mapping[str, Tensor]:
    """What the first update creates; AdamW's step count is on the device only when fused."""
    if "momentum" in group:
        return {MOMENTUM_SLOT: torch.zeros_like(parameter, memory_format=torch.preserve_format)}
    make = getattr(optimizer, "new_moment", None)
    if make is None:
        moments = {
            slot: torch.zeros_like(parameter, memory_format=torch.preserve_format) for slot in ("exp_avg", "exp_avg_sq")
        }
    else:
        moments = {"exp_avg": make(parameter, signed=True), "exp_avg_sq": make(parameter, signed=False)}
    device = parameter.device if group.get("fused") else "cpu"
    return {"step": torch.zeros((), dtype=torch.float32, device=device), **moments}
