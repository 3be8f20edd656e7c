"""Folders in the layout of DeepSpeed's checkpoints, written with torch.save alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vilg.config.schema import ModelConfig
from megatron_vilg.models.vilg import ViLG


class LossScaler:
    """DeepSpeed pickles objects of its own, which must not be needed to read the file."""

    def __init__(self) -> None:
        self.cur_scale = 1.0


class FragmentAddress:
    """Where in a rank's part of a group a parameter begins."""

    def __init__(self, start: int) -> None:
        self.start = start


def _slices(groups: list[list[tuple[str, int]]], sizes: list[int], rank: int) -> list[dict[str, FragmentAddress]]:
    """What stages 1 and 2 say about a rank's part: names of parameters and where they begin in it."""
    found: list[dict[str, FragmentAddress]] = []
    for group, size in zip(groups, sizes, strict=True):
        found.append({})
        place = -rank * size
        for name, numel in group:
            if place < size and place + numel > 0:
                found[-1][name] = FragmentAddress(max(0, place))
            place += numel
    return found


def _padded(flat: Tensor, multiple: int) -> Tensor:
    return nn.functional.pad(flat, (0, -flat.numel() % multiple))


def _shares(groups: list[list[Tensor]], stage: int, world: int) -> list[list[Tensor]]:
    """By rank, then by group: what the rank holds of each group."""
    if stage == 3:
        return [
            [torch.cat([_padded(t.flatten(), world).chunk(world)[rank] for t in group]) for group in groups]
            for rank in range(world)
        ]
    flat = [_padded(torch.cat([t.flatten() for t in group]), 2 * world) for group in groups]
    return [[vector.chunk(world)[rank].clone() for vector in flat] for rank in range(world)]


def write_deepspeed(folder: Path, config: ModelConfig, values: Mapping[str, Tensor], *, stage: int, world: int) -> Path:
    """Two parameter groups (matrices, vectors), Adam state, one buffer."""
    step = folder / "global_step7"
    step.mkdir(parents=True)
    (folder / "latest").write_text(step.name)
    with torch.device("meta"):
        model = ViLG(config)
    names = [[n for n, p in model.named_parameters() if (p.ndim > 1) == wide] for wide in (True, False)]
    weights = _shares([[values[f"model.{n}"] for n in group] for group in names], stage, world)
    moments = {
        slot: _shares([[values[f"optimizer.{slot}.{n}"] for n in group] for group in names], stage, world)
        for slot in ("exp_avg", "exp_avg_sq")
    }
    module = {n: (torch.empty(0) if stage == 3 else values[f"model.{n}"]) for group in names for n in group}
    buffers = [n for n, _ in model.named_buffers()]
    content: dict[str, Any] = {
        "module": module | {n: values[f"model.{n}"] for n in buffers},
        "buffer_names": buffers,
        "param_shapes": [{n: torch.Size(values[f"model.{n}"].shape) for n in group} for group in names],
        "shared_params": {},
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "global_steps": 7,
        "global_samples": 70,
        "mp_world_size": 1,
        "ds_version": "0.19.8",
    }
    for rank in range(world):
        if stage == 3 or rank == 0:
            prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
            torch.save(content, step / f"{prefix}mp_rank_00_model_states.pt")
        adam = {
            "state": {
                group: {"step": torch.tensor(7.0)} | {slot: moments[slot][rank][group] for slot in moments}
                for group in range(len(names))
            },
            "param_groups": [{}, {}],
        }
        state: dict[str, Any] = {"zero_stage": stage, "partition_count": world, "loss_scaler": LossScaler()}
        state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] = weights[rank]
        state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"] = adam
        if stage < 3:
            sized = [[(n, values[f"model.{n}"].numel()) for n in group] for group in names]
            state["param_slice_mappings"] = _slices(sized, [part.numel() for part in weights[0]], rank)
        torch.save({"optimizer_state_dict": state}, step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    assert math.prod(weights[0][0].shape) > 0
    return folder
