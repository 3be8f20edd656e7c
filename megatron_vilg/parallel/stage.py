"""Which stages of a pipeline a rank holds, and a model cut down to one; needs none of torch's schedules."""

from __future__ import annotations

from megatron_vilg.config.schema import ParallelConfig
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.parallel import layout
from megatron_vilg.parallel.layout import stage_layers


def keep_stage(model: ViLG, stage: int, num_stages: int) -> None:
    """Drop all of the model but one stage; names stay what they are."""
    layers = stage_layers(model.config.num_layers, num_stages)[stage]
    for name in list(model.blocks):
        if int(name) not in layers:
            del model.blocks[name]
    if stage > 0:
        model.embed = None
    if stage < num_stages - 1:
        model.norm, model.heads = None, None


def stages_of_rank(parallel: ParallelConfig, rank: int) -> list[int]:
    """The stages that a rank of ``pp`` holds: every ``pipeline``-th one."""
    return layout.stages_of_rank(parallel.pipeline, parallel.stages_per_rank, rank)
