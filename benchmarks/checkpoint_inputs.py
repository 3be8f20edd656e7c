"""Large checkpoints of random numbers to measure with: one of ours, and one in the form that DeepSpeed writes."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_vilg.checkpoint.manifest import Manifest
from megatron_vilg.checkpoint.plan_sizes import canonical_tensors
from megatron_vilg.checkpoint.run_folder import write_run_folder
from megatron_vilg.checkpoint.tensors import TensorInfo, TensorSource
from megatron_vilg.config.load import load_run_config
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.models.vilg import ViLG

_WIDTH, _GB_OF_TABLES, _GB_PER_LAYER = 2048, 1.3, 0.604
_BLOCK = 1 << 20
"""Random numbers that every tensor repeats: drawing others would take longer than copying them."""
_RANKS = 2


def sized(gigabytes: float) -> RunConfig:
    """A generator of which weights and Adam state have at least so many bytes (two layers are the least)."""
    layers = max(2, math.ceil((gigabytes - _GB_OF_TABLES) / _GB_PER_LAYER))
    return load_run_config("paper-10b", overrides=[f"model.width={_WIDTH}", f"model.num_layers={layers}"])


class Drawn(TensorSource):
    """Weights and Adam state of ``run`` that nobody stores."""

    format = "random numbers"

    def __init__(self, run: RunConfig, path: Path) -> None:
        super().__init__(path)
        self.tensors = canonical_tensors(run)
        self.manifest = Manifest(kind="pretrain", step=1, model=dataclasses.asdict(run.model))
        self._block = torch.randn(_BLOCK)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See :meth:`TensorSource.rows`."""
        info = self.tensors[name]
        return self.flat((stop - start) * info.row_numel).reshape(stop - start, *info.row_shape)

    def flat(self, numel: int) -> Tensor:
        """Numbers: [numel]."""
        if numel <= _BLOCK:
            return self._block[:numel]
        return self._block.repeat(-(-numel // _BLOCK))[:numel]


def write_ours(folder: Path, gigabytes: float) -> tuple[int, int]:
    """A run folder with one training checkpoint; returns the bytes of all its tensors and of the largest."""
    source = Drawn(sized(gigabytes), folder)
    write_run_folder(source, folder)
    sizes = [info.num_bytes for info in source.tensors.values() if isinstance(info, TensorInfo)]
    return sum(sizes), max(sizes)


def write_deepspeed(folder: Path, gigabytes: float) -> int:
    """The same model as two ranks of DeepSpeed's ZeRO 3 save it; returns the bytes of its weights."""
    run = sized(gigabytes)
    with torch.device("meta"):
        model = ViLG(run.model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert not list(model.buffers()), "buffers would have to be written too"
    drawn = Drawn(run, folder)
    step = folder / "global_step1"
    step.mkdir(parents=True)
    (folder / "latest").write_text(step.name)
    (folder / "config.json").write_text(json.dumps({"model": dataclasses.asdict(run.model)}))
    share = sum(-(-shape.numel() // _RANKS) for shape in shapes.values())
    for rank in range(_RANKS):
        torch.save(_model_states(shapes), step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        state = {"step": torch.tensor(1.0)} | {slot: drawn.flat(share) for slot in ("exp_avg", "exp_avg_sq")}
        optimizer = {
            "zero_stage": 3,
            "partition_count": _RANKS,
            "fp32_flat_groups": [drawn.flat(share)],
            "optimizer_state_dict": {"state": {0: state}, "param_groups": [{}]},
        }
        torch.save({"optimizer_state_dict": optimizer}, step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return 4 * sum(shape.numel() for shape in shapes.values())


def _model_states(shapes: dict[str, torch.Size]) -> dict[str, object]:
    return {
        "module": {name: torch.empty(0) for name in shapes},
        "buffer_names": [],
        "param_shapes": [shapes],
        "shared_params": {},
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "global_steps": 1,
        "global_samples": 1,
        "mp_world_size": 1,
        "ds_version": "0.19.8",
    }


def main(arguments: Sequence[str]) -> None:
    """``ours`` or ``deepspeed``, a new folder, gigabytes; prints the bytes as JSON."""
    what, folder, gigabytes = arguments
    write = {"ours": write_ours, "deepspeed": write_deepspeed}[what]
    print(json.dumps(write(Path(folder), float(gigabytes))))


if __name__ == "__main__":
    main(sys.argv[1:])
