"""Which layouts are possible for a number of GPUs, how long a step would take on given hardware, and which to take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vilg.config.check import check
from megatron_vilg.config.deepspeed import offload_of
from megatron_vilg.config.schema import ParallelConfig, RunConfig
from megatron_vilg.parallel.estimate import Estimate, estimate

GIB = 2.0**30
PEAKS = {"bf16": 989.0, "fp32": 67.0}
"""TFLOP/s of dense products of an H100 or H200 by ``train.precision``; fp32 as torch has it, without TF32."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """Peak figures that times are computed from. The defaults are the data sheet of an H100 or H200 with 80 GiB in use,
    NVLink 4, and one 400 Gb/s port per GPU."""

    memory: float = 80.0
    """GiB per GPU."""
    peak: float = PEAKS["bf16"]
    """TFLOP/s of dense matrix products in the run's precision."""
    efficiency: float = 0.45
    """Share of it that a step reaches while it computes; measure your own."""
    gpus_per_node: int = 8
    node_bandwidth: float = 400.0
    """GB/s that a GPU sends inside its node."""
    network_bandwidth: float = 50.0
    """GB/s that a GPU sends to other nodes."""
    memory_share: float = 0.92
    """Share of the memory that a plan may fill; the allocator, the libraries and NCCL need the rest."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step, as estimated."""

    compute: float
    """Arithmetic, recomputation included."""
    idle: float
    """Waiting in the pipeline."""
    tensor: float
    """Exchanges over tp; nothing overlaps with them."""
    data: float
    """What is left of gathering and reducing over shard and replica behind the arithmetic."""
    update: float
    """Muon's Newton-Schulz steps and their messages; other optimizers' updates are not counted."""
    mfu: float
    """Model FLOPs utilisation over the whole step, kept attention only."""

    @property
    def step(self) -> float:
        """The whole step."""
        return self.compute + self.idle + self.tensor + self.data + self.update


def step_time(cost: Estimate, hardware: Hardware) -> StepTime:
    """Seconds of a step at the given peaks; messages between stages are taken to hide behind the arithmetic.

    Whatever is offloaded, nothing is counted for moving it or for updating it on the host: see :func:`offloads`.
    """
    layout = cost.layout
    rate = hardware.peak * 1e12 * hardware.efficiency
    compute = (cost.flops_executed - cost.flops_update) / (layout.world_size * rate)
    spans = {"tp": layout.tensor, "shard": layout.tensor * layout.shard}
    spans["replica"] = spans["shard"] * layout.replica

    def seconds(axis: str, size: float) -> float:
        is_inside = spans[axis] <= hardware.gpus_per_node
        return size / (1e9 * (hardware.node_bandwidth if is_inside else hardware.network_bandwidth))

    # What the busiest rank sends over an axis, Muon's update left out: that cannot begin before the arithmetic is over.
    sent = {axis: max(r.sent[axis] - r.update.sent.get(axis, 0.0) for r in cost.ranks) for axis in spans}
    tensor = seconds("tp", sent["tp"])
    data = seconds("shard", sent["shard"]) + seconds("replica", sent["replica"])
    idle = (compute + tensor) * cost.bubble / (1.0 - cost.bubble)
    exposed = max(0.0, data - compute)
    update = max(
        rank.update.flops_busiest / rate + sum(seconds(axis, size) for axis, size in rank.update.sent.items())
        for rank in cost.ranks
    )
    whole = compute + idle + tensor + exposed + update
    mfu = cost.flops_kept / (layout.world_size * hardware.peak * 1e12 * whole)
    return StepTime(compute, idle, tensor, exposed, update, mfu)


def fits(cost: Estimate, hardware: Hardware) -> bool:
    """Whether the fullest rank fits."""
    return cost.fullest.peak <= hardware.memory * hardware.memory_share * GIB


def offloads(run: RunConfig) -> bool:
    """Whether states live outside the GPU, so that a step takes longer than :func:`step_time` says."""
    places = offload_of(run)
    return places.optimizer != "none" or places.weights != "none"


def nearest_layout(run: RunConfig, world_size: int) -> ParallelConfig | None:
    """The possible layout that differs least from an impossible one; None if no layout helps."""
    wanted = run.parallel
    best: tuple[float, ParallelConfig] | None = None
    for tensor, pipeline, replica, shard in _grids(world_size):
        grid = dataclasses.replace(wanted, tensor=tensor, pipeline=pipeline, replica=replica, shard=shard)
        for micro in sorted({max(wanted.num_microbatches, pipeline), pipeline, 2 * pipeline}):
            parallel = dataclasses.replace(grid, num_microbatches=micro)
            if pipeline == 1 or parallel.schedule == "1f1b":
                parallel = dataclasses.replace(parallel, schedule="1f1b", stages_per_rank=1)
            distance = _distance(wanted, parallel)
            if best is not None and distance >= best[0]:
                continue
            if not check(dataclasses.replace(run, parallel=parallel), world_size):
                best = (distance, parallel)
    return best[1] if best else None


def propose(run: RunConfig, world_size: int, hardware: Hardware, most: int = 5) -> list[tuple[RunConfig, Estimate]]:
    """Layouts that fit, the fastest first (by estimate); tensor parallelism stays inside a node.

    Layout, micro-batches, ZeRO number and recomputation are chosen; the model and the batch are not touched. Where
    states are offloaded, layouts that fit without come first, since the estimate knows no time for moving them.
    """
    found: list[tuple[bool, float, RunConfig, Estimate]] = []
    for wish in (_without_offload(run), run) if offloads(run) else (run,):
        for layout in _layouts(wish, world_size, hardware):
            fitting = _with_micro_batches(layout, world_size, hardware)
            if fitting is not None:
                found.append((offloads(wish), step_time(fitting[1], hardware).step, *fitting))
    found.sort(key=lambda each: each[:2])
    return [(config, cost) for _, _, config, cost in found[:most]]


def hindrances(run: RunConfig, world_size: int, hardware: Hardware) -> list[str]:
    """Why none of the layouts that :func:`propose` looks at is possible, however much memory there is.

    What all of them have in common; if that is nothing, what the layout with the fewest problems has. Empty: at least
    one of them is possible.
    """
    fewest: list[str] | None = None
    common: set[str] | None = None
    for layout in _layouts(run, world_size, hardware):
        for candidate in _micro_batched(layout):
            problems = check(candidate, world_size)
            if not problems:
                return []
            common = set(problems) if common is None else common & set(problems)
            if fewest is None or len(problems) < len(fewest):
                fewest = problems
    if fewest is None:
        rule = f"cannot be divided over {world_size} GPUs in any layout that is proposed"
        return [f"train.batch_size={run.train.batch_size}: {rule}. Works: a multiple of {world_size}."]
    return [problem for problem in fewest if problem in (common or ())] or fewest


def _without_offload(run: RunConfig) -> RunConfig:
    parallel = dataclasses.replace(run.parallel, cpu_offload=False, offload_optimizer="none", offload_weights="none")
    return dataclasses.replace(run, parallel=parallel)


def _layouts(run: RunConfig, world_size: int, hardware: Hardware) -> Iterator[RunConfig]:
    """The run in every usual layout, in one micro-batch."""
    for tensor, pipeline, replica, shard in _grids(world_size):
        if tensor > hardware.gpus_per_node or pipeline > 16 or not _is_usual(replica, shard * tensor, hardware):
            continue
        grid = dataclasses.replace(
            run.parallel,
            tensor=tensor,
            pipeline=pipeline,
            replica=replica,
            shard=shard,
            schedule="1f1b",
            stages_per_rank=1,
        )
        for parallel in _variants(grid):
            yield dataclasses.replace(run, parallel=parallel)


def _variants(grid: ParallelConfig) -> Iterator[ParallelConfig]:
    """ZeRO 3 everywhere, and 1 as well in a pipeline; every kind of recomputation that changes something."""
    for zero in (3,) if grid.pipeline == 1 else (1, 3):
        yield dataclasses.replace(grid, zero=zero, recompute="none")  # type: ignore[arg-type]
        yield dataclasses.replace(grid, zero=zero, recompute="block")  # type: ignore[arg-type]


def _micro_batched(run: RunConfig) -> Iterator[RunConfig]:
    """The run in 1, 2, 4 micro-batches and so on: as many as its pipeline needs, and as its batch divides into."""
    data_size = run.parallel.replica * run.parallel.shard
    pieces = 1
    while run.train.batch_size % (data_size * pieces) == 0:
        if pieces >= run.parallel.pipeline:
            yield dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, num_microbatches=pieces))
        pieces *= 2


def _with_micro_batches(run: RunConfig, world_size: int, hardware: Hardware) -> tuple[RunConfig, Estimate] | None:
    """The number of micro-batches with which the layout fits and a step is fastest."""
    best: tuple[RunConfig, Estimate] | None = None
    for candidate in _micro_batched(run):
        if check(candidate, world_size):
            continue
        cost = estimate(candidate, world_size)
        if fits(cost, hardware):
            if best is not None and step_time(cost, hardware).step >= step_time(best[1], hardware).step:
                break
            best = (candidate, cost)
    return best


def _is_usual(replica: int, span: int, hardware: Hardware) -> bool:
    """Either everything is sharded, or shards fill whole nodes and nodes are copies (the paper's 2-D layout)."""
    return replica == 1 or span == hardware.gpus_per_node


def _grids(world_size: int) -> Iterator[tuple[int, int, int, int]]:
    """All (tensor, pipeline, replica, shard) with this product."""
    for tensor in _divisors(world_size):
        for pipeline in _divisors(world_size // tensor):
            for replica in _divisors(world_size // tensor // pipeline):
                yield tensor, pipeline, replica, world_size // tensor // pipeline // replica


def _distance(wanted: ParallelConfig, other: ParallelConfig) -> float:
    """In doublings; the size of the shard axis follows from the others unless it was asked for."""
    names = ["tensor", "pipeline", "replica", "num_microbatches"] + (["shard"] if wanted.shard > 0 else [])
    return sum(abs(math.log2(getattr(other, name) / getattr(wanted, name))) for name in names)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
