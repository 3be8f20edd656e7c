"""NVIDIA's FusedAdam, on request. The only file that imports Apex; never chosen by itself."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.optim import Optimizer

from megatron_vilg.config.check_engine import apex_problem
from megatron_vilg.errors import ConfigError, MissingPackageError


def apex_fused_adam(groups: list[dict[str, Any]], rates: dict[str, Any], device: torch.device) -> Optimizer:
    """``apex.optimizers.FusedAdam`` with decoupled decay: the same update as AdamW, one kernel for many tensors.

    Its step count is per group and not per parameter, and it must be set by hand after loading.

    Raises:
        ConfigError: the parameters are not on a GPU.
        MissingPackageError: NVIDIA's Apex is not there, or was built without its CUDA extension.
    """
    if device.type != "cuda":
        raise ConfigError([f"optim.name=apex_fused_adam: needs a GPU, training runs on {device.type}. Works: adamw."])
    if problem := apex_problem():
        raise MissingPackageError(problem)
    try:
        optimizer: Optimizer = importlib.import_module("apex.optimizers").FusedAdam(groups, **rates, adam_w_mode=True)
    except (ImportError, RuntimeError) as error:
        raise MissingPackageError(
            f"optim.name=apex_fused_adam: NVIDIA's Apex is there, but cannot be used ({error}). Works: build it with "
            "its C++ and CUDA extensions against this torch, or optim.name=adamw."
        ) from error
    for group in optimizer.param_groups:
        group.setdefault("step", 0)
    return optimizer
