"""What one rank of a pipeline holds of the model under the cuts of ``parallel/plan.py``. Arithmetic only, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from megatron_vilg.config.schema import ModelConfig
from megatron_vilg.models.cost import is_hidden_matrix, layer_kinds, parameter_shapes
from megatron_vilg.parallel.layout import Layout, stage_layers, stages_of_rank
from megatron_vilg.parallel.plan import Cut, rule_of


@dataclass(frozen=True, slots=True)
class Part:
    """Values of one rank's pieces of the model, after the cut over ``tp``."""

    whole: int
    """As they are when gathered over ``shard``."""
    sharded: int
    """The share of the rank that has most of them."""
    matrices: int
    """Those of ``sharded`` that are matrices of blocks."""
    block: int
    """The largest block, gathered."""
    rest: int
    """Everything outside blocks, gathered."""
    shared: int
    """Values that every rank of ``tp`` holds and applies to something else; their gradients are summed over it."""
    patterns: tuple[str, ...]
    """The attention pattern of each of its layers."""
    has_embedding: bool
    has_heads: bool


@lru_cache(maxsize=1024)
def part_of(model: ModelConfig, layout: Layout, rank: int) -> Part:
    """What a rank of the pipeline holds of the model; copies and micro-batches of ``layout`` do not matter."""
    stages = stages_of_rank(layout.pipeline, layout.stages_per_rank, rank)
    ranges = stage_layers(model.num_layers, layout.num_stages)
    layers = {layer for stage in stages for layer in ranges[stage]}
    has_embedding, has_heads = 0 in stages, layout.num_stages - 1 in stages
    blocks = dict.fromkeys(layers, 0)
    rest = sharded = matrices = shared = 0
    for name, shape in parameter_shapes(model).items():
        top = name.split(".")
        if top[0] == "blocks" and int(top[1]) not in layers:
            continue
        if (top[0] == "embed" and not has_embedding) or (top[0] in ("norm", "heads") and not has_heads):
            continue
        local = local_shape(name, shape, layout.tensor)
        size = prod(local)
        if top[0] == "blocks":
            blocks[int(top[1])] += size
        else:
            rest += size
        largest_share = -(-local[0] // layout.shard) * prod(local[1:])
        sharded += largest_share
        matrices += largest_share if is_hidden_matrix(name, len(shape)) else 0
        if layout.tensor > 1 and rule_of(name).cut in (Cut.SEQUENCE, Cut.HEADS):
            shared += size
    return Part(
        whole=sum(blocks.values()) + rest,
        sharded=sharded,
        matrices=matrices,
        block=max(blocks.values()),
        rest=rest,
        shared=shared,
        patterns=tuple(kind for i, kind in enumerate(layer_kinds(model.num_layers, model.pattern)) if i in layers),
        has_embedding=has_embedding,
        has_heads=has_heads,
    )


def local_shape(name: str, shape: tuple[int, ...], tensor: int) -> tuple[int, ...]:
    """Shape of a parameter on one rank of ``tp``."""
    dim = rule_of(name).cut.dim
    if dim is None:
        return shape
    dim = min(dim, len(shape) - 1)
    return (*shape[:dim], shape[dim] // tensor, *shape[dim + 1 :])
