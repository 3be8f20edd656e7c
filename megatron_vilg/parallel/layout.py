"""How many ranks stand along each axis, and which layers a pipeline stage has. Integers only, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vilg.config.schema import ParallelConfig


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the axes and of the schedule, with every -1 resolved."""

    tensor: int
    pipeline: int
    replica: int
    shard: int
    stages_per_rank: int = 1
    num_microbatches: int = 1

    @classmethod
    def of(cls, parallel: ParallelConfig, world_size: int) -> Layout:
        """The layout of a configuration that fits ``world_size`` processes."""
        fixed = parallel.tensor * parallel.pipeline * parallel.replica
        return cls(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            replica=parallel.replica,
            shard=parallel.shard if parallel.shard > 0 else world_size // fixed,
            stages_per_rank=parallel.stages_per_rank,
            num_microbatches=parallel.num_microbatches,
        )

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.tensor * self.pipeline * self.replica * self.shard

    @property
    def data_size(self) -> int:
        """Groups of ranks that see different pairs."""
        return self.replica * self.shard

    @property
    def num_stages(self) -> int:
        """Pieces that the model is cut into along its layers."""
        return self.pipeline * self.stages_per_rank

    def pairs_each(self, batch_size: int) -> int:
        """Pairs of one micro-batch on one rank."""
        return batch_size // (self.data_size * self.num_microbatches)

    def micro_batches_in_flight(self, rank: int) -> float:
        """Micro-batches whose activations a rank of the pipeline holds at most, in units of all its stages."""
        if self.pipeline == 1:
            return 1.0
        if self.stages_per_rank == 1:
            return float(min(self.num_microbatches, self.pipeline - rank))
        pieces = (self.pipeline - rank - 1) * 2 + (self.stages_per_rank - 1) * self.pipeline + 1
        return min(pieces, self.num_microbatches * self.stages_per_rank) / self.stages_per_rank


def stage_layers(num_layers: int, num_stages: int) -> list[range]:
    """The layers of each stage; where they do not divide, stages in the middle have one more.

    The first stage also has the embedding and the last one the heads, so these two get an extra layer last.
    """
    base, extra = divmod(num_layers, num_stages)
    order = sorted(range(num_stages), key=lambda stage: (stage in (0, num_stages - 1), stage))
    larger = set(order[:extra])
    ranges, start = [], 0
    for stage in range(num_stages):
        stop = start + base + (stage in larger)
        ranges.append(range(start, stop))
        start = stop
    return ranges


def stages_of_rank(pipeline: int, stages_per_rank: int, rank: int) -> list[int]:
    """The stages that a rank of the pipeline holds: every ``pipeline``-th one."""
    return list(range(rank, pipeline * stages_per_rank, pipeline))
