"""What Muon's update costs: products of its Newton-Schulz steps, and messages that divide them. Arithmetic, no torch.

``train/muon.py`` computes them, ``parallel/divided.py`` shares them: every rank gathers every matrix that it holds a
piece of, works on its own share, and sends the results to all. AdamW sends nothing and multiplies no matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

from megatron_vilg.config.schema import ModelConfig, RunConfig
from megatron_vilg.models.cost import is_hidden_matrix, parameter_shapes
from megatron_vilg.parallel.layout import Layout
from megatron_vilg.parallel.plan import Cut, rule_of

STEPS = 5
"""Newton-Schulz steps of an update."""
GRAM_ASPECT = 1.5
"""Sides of a matrix from whose ratio on its steps take fewer products on its Gram matrix: 5 + 10 a times the short side
cubed for a ratio of a, against 17 + 2 a."""


@dataclass(frozen=True, slots=True)
class UpdateCost:
    """Of one rank of the pipeline with all that share its stages; nothing without Muon."""

    flops: float = 0.0
    """Over all ranks that share the matrices."""
    flops_busiest: float = 0.0
    """Of the rank with most to do, which the others wait for."""
    sent: Mapping[str, float] = field(default_factory=dict)
    """Bytes that each rank sends, by axis: gathered pieces, and results. Rows that fill up uneven shards are left
    out."""


def update_cost(run: RunConfig, layout: Layout, num_layers: int) -> UpdateCost:
    """Costs of one update of the ``num_layers`` blocks of a pipeline rank, in a resolved configuration."""
    if run.optim.name != "muon":
        return UpdateCost()
    in_bf16 = run.train.precision == "bf16"
    cuts = list(_matrices(run.model))
    each = [newton_schulz_flops(*shape, in_bf16=in_bf16) for _, shape in cuts]
    flops = num_layers * sum(each)
    ranks = layout.replica * layout.shard * layout.tensor
    sent = dict.fromkeys(("tp", "shard", "replica"), 0.0)
    for cut, shape in cuts:
        size = num_layers * prod(shape) * (2 if in_bf16 else 4)
        for axis, share in _shares_sent(cut, layout).items():
            sent[axis] += share * size
    return UpdateCost(flops=float(flops), flops_busiest=max(flops / ranks, float(max(each))), sent=sent)


def newton_schulz_flops(rows: int, columns: int, *, in_bf16: bool) -> int:
    """Operations of ``train.muon.orthogonal`` on a matrix [rows, columns]."""
    short, long = sorted((rows, columns))
    if not in_bf16 and long >= GRAM_ASPECT * short:
        on_gram = STEPS + (STEPS - 1) + 2 * (STEPS - 1)  # factors, their product, the next Gram matrix
        return 2 * (2 * short**2 * long + on_gram * short**3)
    return 2 * STEPS * (2 * short**2 * long + short**3)


@lru_cache(maxsize=64)
def _matrices(model: ModelConfig) -> tuple[tuple[Cut, tuple[int, int]], ...]:
    """How the matrices of one block are cut over ``tp``, and their whole shapes; all blocks are alike."""

    def found() -> Iterator[tuple[Cut, tuple[int, int]]]:
        for name, shape in parameter_shapes(model).items():
            if name.startswith("blocks.0.") and is_hidden_matrix(name, len(shape)):
                yield rule_of(name).cut, (shape[0], shape[1])

    return tuple(found())


def _shares_sent(cut: Cut, layout: Layout) -> dict[str, float]:
    """What a rank sends of a matrix over each axis, as a share of its bytes.

    A matrix that both axes cut by rows is gathered over ``shard`` first, one that ``tp`` cuts by columns over ``tp``
    first, so that DTensor moves whole pieces. Results are broadcast along every axis, and are whole.
    """
    tensor, shard = 1 - 1 / layout.tensor, 1 - 1 / layout.shard
    by_rows = cut.dim == 0
    return {
        "tp": (tensor if by_rows else tensor / layout.shard) + (layout.tensor > 1),
        "shard": (shard / layout.tensor if by_rows else shard) + (layout.shard > 1),
        "replica": float(layout.replica > 1),
    }
