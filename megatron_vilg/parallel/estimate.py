"""What a layout costs each rank: parameters, memory by kind, bytes sent by axis, idle time. Arithmetic only, no torch.

The cuts are those of ``parallel/plan.py`` and ``parallel/zero.py``; tests compare these figures with tensors that were
really allocated and bytes that were really sent. Times follow from peak figures that the caller gives.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_vilg.config.deepspeed import Place, offload_of
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.models.cost import (
    Sizes,
    backward_bytes_per_row,
    block_bytes_per_row,
    fold_bytes_per_row,
    forward_flops,
    input_bytes_per_row,
    layer_kinds,
    left_out_bytes_per_row,
    mask_bytes_per_row,
    num_parameters,
    num_stack_parameters,
)
from megatron_vilg.ops.attention_choice import Implementation, executed_by, implementation_of
from megatron_vilg.parallel.joint_estimate import JointCost, joint_cost
from megatron_vilg.parallel.layout import Layout, stages_of_rank
from megatron_vilg.parallel.part import Part, part_of
from megatron_vilg.parallel.update_cost import UpdateCost, update_cost

MASTER_BYTES = 4
"""Weights, gradients and gradient sums are kept in float32."""
OPTIMIZER_BYTES = {
    "adamw": 8.0,
    "muon": 8.0,
    "apex_fused_adam": 8.0,
    "adamw_8bit": 2 * (1 + 4 / 256),
    "adamw_4bit": 2 * (0.5 + 4 / 128),
}
"""Bytes per parameter of the optimizer's state: two moments, quantised ones with a float32 scale per block."""
MUON_BYTES = 4.0
"""The same for the matrices that Muon updates: one momentum."""
KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
AXES = ("tp", "shard", "replica", "pp")


@dataclass(frozen=True, slots=True)
class RankCost:
    """One rank of the pipeline; ranks along the other axes cost the same."""

    parameters: int
    """Values this rank keeps between steps."""
    memory: dict[str, float]
    """Largest bytes by kind (``KINDS``); they do not all peak together."""
    peak: float
    """Largest bytes of all kinds together, at one time."""
    host: dict[str, float]
    """Bytes in main memory instead, by kind; of the generator alone, as the reconstructor's stay."""
    disk: dict[str, float]
    """The same on a disk (``nvme``)."""
    sent: dict[str, float]
    """Bytes this rank sends per step, by axis (``AXES``)."""
    update: UpdateCost
    """What of it, and of the operations, is Muon's update: behind the backward pass, with nothing to hide behind."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A whole layout."""

    layout: Layout
    parameters: int
    """Of the model: generator and reconstructor."""
    stack_parameters: int
    reconstructor_parameters: int
    ranks: tuple[RankCost, ...]
    drawn: float
    """Bytes that the first rank gathers besides, every ``train.sample_every`` steps; part of its peak."""
    bubble: float
    """Share of a step in which a rank of the pipeline waits for others."""
    flops_kept: float
    """Per optimizer step over all ranks: what the model needs, attention counted where its rules allow it; with a
    reconstructor and critic theirs too."""
    flops_dense: float
    """The same with attention from everywhere to everywhere."""
    flops_executed: float
    """``flops_kept``, what is computed again, with tensor parallelism or a reconstructor the last block whole, and
    Muon's Newton-Schulz steps."""

    @property
    def flops_update(self) -> float:
        """Of ``flops_executed``, what comes once a step however large the batch is."""
        return sum(rank.update.flops for rank in self.ranks)

    @property
    def fullest(self) -> RankCost:
        """The rank of the pipeline with the highest peak."""
        return max(self.ranks, key=lambda rank: rank.peak)

    @property
    def busiest(self) -> dict[str, float]:
        """Bytes sent per step by axis, of the rank that sends most over it."""
        return {axis: max(rank.sent[axis] for rank in self.ranks) for axis in AXES}


def estimate(run: RunConfig, world_size: int) -> Estimate:
    """Costs of a resolved configuration that ``config.check`` has nothing against, for ``world_size`` processes."""
    layout = Layout.of(run.parallel, world_size)
    flops, pairs = forward_flops(run.model), run.train.batch_size
    joint = joint_cost(run, layout, OPTIMIZER_BYTES[run.optim.name])
    unread = flops.unread if _computes_all(run, layout) else 0
    again = {"none": 0, "selective": flops.attention_kept, "block": flops.linear + unread + flops.attention_kept}
    ranks = tuple(_rank_cost(run, layout, rank, joint) for rank in range(layout.pipeline))
    executed = pairs * (3.0 * (flops.kept + unread) + again[run.parallel.recompute] + joint.flops_executed)
    return Estimate(
        layout=layout,
        parameters=num_parameters(run.model) + joint.parameters,
        stack_parameters=num_stack_parameters(run.model),
        reconstructor_parameters=joint.parameters,
        ranks=ranks,
        drawn=_drawn_bytes(run, layout, joint),
        bubble=bubble(layout),
        flops_kept=pairs * pair_flops(run),
        flops_dense=pairs * (3.0 * flops.dense + joint.flops_needed),
        flops_executed=executed + sum(rank.update.flops for rank in ranks),
    )


def pair_flops(run: RunConfig) -> float:
    """What one pair needs, forward and backward, as ``Estimate.flops_kept`` has it; the numerator of ``mfu(%)``."""
    alone = Layout(tensor=1, pipeline=1, replica=1, shard=1)
    return 3.0 * forward_flops(run.model).kept + joint_cost(run, alone, OPTIMIZER_BYTES[run.optim.name]).flops_needed


def bubble(layout: Layout) -> float:
    """``(p - 1) / (v m + p - 1)`` for p ranks, m micro-batches and v stages on each (arXiv 2104.04473, section 2.2)."""
    idle = layout.pipeline - 1
    return idle / (layout.stages_per_rank * layout.num_microbatches + idle)


def _rank_cost(run: RunConfig, layout: Layout, rank: int, joint: JointCost) -> RankCost:
    part = part_of(run.model, dataclasses.replace(layout, replica=1, num_microbatches=1), rank)
    sizes = _sizes(run, layout)
    drawn = _drawn_bytes(run, layout, joint) if rank == 0 else 0.0
    joint = joint if part.has_heads else JointCost()
    states = _states(run, layout, part)
    memory, peak = _memory(run, layout, part, sizes, rank, joint, states["none"])
    memory["buffers"] = max(memory["buffers"], drawn)
    # Between steps, when activations and gradients are gone.
    peak = max(peak, memory["weights"] + memory["optimizer"] + joint.critic_gradients + drawn)
    sent = _sent(run, layout, part, sizes, rank)
    update = update_cost(run, layout, len(part.patterns))
    for more in (joint.sent, update.sent):
        sent |= {axis: sent[axis] + size for axis, size in more.items()}
    return RankCost(part.sharded + joint.parameters, memory, peak, states["cpu"], states["nvme"], sent, update)


def _drawn_bytes(run: RunConfig, layout: Layout, joint: JointCost) -> float:
    """The whole model, in float32, which the first rank gathers to draw samples with (``Engine.whole_model``)."""
    averages = run.reconstructor.enabled and bool(run.reconstructor.ema_decay)
    gathers = layout.world_size > 1 or run.train.engine == "deepspeed" or averages
    if not run.train.sample_every or not gathers:
        return 0.0
    return float(MASTER_BYTES * (num_parameters(run.model) + joint.parameters))


def _states(run: RunConfig, layout: Layout, part: Part) -> dict[Place, dict[str, float]]:
    """Bytes of the generator's weights, gradients and optimizer state, by the place that they are kept in."""
    parallel, places = run.parallel, offload_of(run)
    is_native = run.train.engine == "native"
    optimizer = OPTIMIZER_BYTES[run.optim.name] * part.sharded
    if run.optim.name == "muon":
        optimizer -= (OPTIMIZER_BYTES["muon"] - MUON_BYTES) * part.matrices
    # DeepSpeed keeps shards of gradients in main memory where its update runs there, also of states on a disk.
    offloads = parallel.cpu_offload if is_native else parallel.zero == 3 and places.optimizer != "none"
    # FSDP moves them when they have been summed over ranks, which is after the last micro-batch here.
    is_whole = layout.world_size > 1 and parallel.zero == 1 and layout.num_microbatches > 1
    weights_place = "cpu" if parallel.cpu_offload and is_native else places.weights
    states: dict[Place, dict[str, float]] = {"none": {}, "cpu": {}, "nvme": {}}
    states[weights_place]["weights"] = MASTER_BYTES * part.sharded
    states["cpu" if offloads else "none"]["gradients"] = MASTER_BYTES * part.sharded
    if is_whole:
        states["none"]["gradients"] = MASTER_BYTES * part.whole
    states[places.optimizer]["optimizer"] = optimizer
    return states


def _sizes(run: RunConfig, layout: Layout) -> Sizes:
    is_alone, is_bf16 = layout.world_size == 1, run.train.precision == "bf16"
    # Alone, autocast leaves hidden states between blocks in float32; sharded modules get and give bf16.
    return Sizes(
        compute=2 if is_bf16 else 4,
        residual=2 if is_bf16 and not is_alone else 4,
        split=layout.tensor,
        autocast=is_bf16 and is_alone,
    )


def _memory(
    run: RunConfig, layout: Layout, part: Part, sizes: Sizes, rank: int, joint: JointCost, states: dict[str, float]
) -> tuple[dict[str, float], float]:
    """Bytes by kind, and of the fullest moment; ``states`` are the generator's that stay on the GPU."""
    parallel, model = run.parallel, run.model
    rows = 2 * layout.pairs_each(run.train.batch_size)
    executed = _attention(run)
    scores = "dense" in executed
    block_whole = rows * block_bytes_per_row(model, sizes, scores=scores)
    block_kept = {
        "none": block_whole,
        "selective": rows * block_bytes_per_row(model, sizes, scores=False, attention_inside=False),
        "block": rows * input_bytes_per_row(model, sizes),
    }[parallel.recompute]
    recomputed = block_whole - block_kept
    # Folded attention keeps more in some layers than in others; computed again, it does so in one at a time.
    folded = _fold_bytes(run, part, sizes, rows)
    widest = max(folded)
    recomputed += widest
    each = len(part.patterns) * block_kept - _left_out(run, layout, part, sizes, rows)
    if parallel.recompute == "none":
        each, recomputed, block_kept = each + sum(folded), 0.0, block_whole + widest
    kept = layout.micro_batches_in_flight(rank) * each
    passing = rows * backward_bytes_per_row(model, sizes, scores=scores, folded=widest / rows)
    masks = rows * mask_bytes_per_row(model, sizes, executed.count("dense") + executed.count("sdpa"))
    weights, gradients, optimizer = (states.get(kind, 0.0) for kind in ("weights", "gradients", "optimizer"))
    has_earlier = layout.num_microbatches > 1
    gathered, on_their_way = _buffers(run, layout, part, sizes)
    saved, chunk = _logits(run, layout, part, sizes)
    lasting = weights + optimizer + joint.weights + joint.optimizer + joint.critic_gradients
    memory = {
        "weights": weights + joint.weights,
        "gradients": gradients + joint.gradients + joint.critic_gradients,
        "optimizer": optimizer + joint.optimizer,
        "activations": kept + max(recomputed + passing, joint.turning) + masks,
        "logits": saved + chunk,
        "buffers": gathered + on_their_way,
    }
    # Gradients of a single micro-batch come as activations go; those of earlier ones are there all the time.
    earlier, earlier_joint = (gradients, joint.gradients) if has_earlier else (0.0, 0.0)
    # The reconstructor comes behind the heads, and its backward pass before that of the blocks.
    pictures = saved + earlier_joint + joint.turning
    behind = joint.gradients + recomputed + passing
    turning = kept + earlier + max(earlier_joint + saved + chunk, pictures, behind)
    before_last = gradients * (1 - (part.block + part.rest) / part.whole) if len(part.patterns) > 1 else 0.0
    end = max(earlier, before_last) + block_kept + recomputed + passing + on_their_way
    # Autocast's copies of weights go as the backward pass goes.
    at_end = sizes.compute * part.block if sizes.autocast else gathered
    moments = (gathered + turning, at_end + end + joint.gradients, at_end + gradients + joint.gradients)
    return memory, lasting + max(masks + max(moments), joint.judging)


def _attention(run: RunConfig) -> list[Implementation]:
    """What executes each kind of layer that the model has; either all of them or none are ``dense``."""
    implementation, _ = implementation_of(run.ops.attention, run.model.image_side)
    kinds = sorted(set(layer_kinds(run.model.num_layers, run.model.pattern)))
    return [executed_by(implementation, run.model, kind) for kind in kinds]


def _fold_bytes(run: RunConfig, part: Part, sizes: Sizes, rows: int) -> list[float]:
    """What attention of each layer copies and keeps of a micro-batch."""
    implementation, _ = implementation_of(run.ops.attention, run.model.image_side)
    kinds = [(executed_by(implementation, run.model, pattern), pattern) for pattern in part.patterns]
    return [rows * fold_bytes_per_row(run.model, sizes, pattern) if by == "fold" else 0.0 for by, pattern in kinds]


def _computes_all(run: RunConfig, layout: Layout) -> bool:
    """Whether the last block computes positions that predict nothing too: see ``ViLG.forward``."""
    return layout.tensor > 1 or run.reconstructor.enabled


def _left_out(run: RunConfig, layout: Layout, part: Part, sizes: Sizes, rows: int) -> float:
    """What the last block keeps less of a micro-batch than others; its input is kept whole."""
    if not part.has_heads or _computes_all(run, layout) or run.parallel.recompute == "block":
        return 0.0
    return rows * left_out_bytes_per_row(run.model, sizes)


def _buffers(run: RunConfig, layout: Layout, part: Part, sizes: Sizes) -> tuple[float, float]:
    """Gathered weights; gradients on their way to their shard."""
    if layout.world_size == 1:
        if not sizes.autocast:
            return 0.0, 0.0
        layers = len(part.patterns) if run.parallel.recompute != "block" else 1
        # Autocast's copies: kept for the backward pass, or made anew where the block is.
        return float(sizes.compute * part.block * layers), 0.0
    gathered = part.rest + 2 * part.block if run.parallel.zero == 3 else part.whole
    turning = sizes.compute + _reduce_bytes(run)
    return float(sizes.compute * gathered), float(turning * max(part.block, part.rest))


def _reduce_bytes(run: RunConfig) -> int:
    """Bytes of a gradient between ranks."""
    return 2 if run.parallel.reduce_precision == "bf16" else MASTER_BYTES


def _logits(run: RunConfig, layout: Layout, part: Part, sizes: Sizes) -> tuple[float, float]:
    """The heads: gradients that are computed beside the loss and what is kept with them; one chunk of logits."""
    if not part.has_heads:
        return 0.0, 0.0
    model, spec = run.model, run.model.spec
    pairs = layout.pairs_each(run.train.batch_size)
    saved = chunk = 0.0
    for count, vocabulary in (
        (spec.num_image_tokens, model.image_vocab_size),
        (spec.num_text_slots + 1, model.text_vocab_size),
    ):
        share = vocabulary // layout.tensor
        saved += sizes.residual * pairs * count * model.width * 3  # norm's input, its result, and the gradient
        saved += (MASTER_BYTES if layout.world_size == 1 or layout.tensor > 1 else sizes.compute) * share * model.width
        chunk = max(chunk, _chunk_rows(pairs * count, share) * share * (2.0 * sizes.compute + MASTER_BYTES))
    return saved, chunk


def _chunk_rows(rows: int, vocabulary: int) -> int:
    """``ops.cross_entropy.chunk_rows`` on a GPU."""
    return min(rows, max(128, (32 << 20) // (4 * vocabulary), -(-rows // 24)))


def _sent(run: RunConfig, layout: Layout, part: Part, sizes: Sizes, rank: int) -> dict[str, float]:
    """Bytes per step and axis. A ring over n ranks sends (n - 1) / n of what is gathered or scattered, an all-reduce
    twice that."""
    parallel, model, spec = run.parallel, run.model, run.model.spec
    micro = layout.num_microbatches
    rows = 2 * layout.pairs_each(run.train.batch_size)
    hidden = rows * spec.length * model.width * sizes.compute

    def ring(size: int) -> float:
        return (size - 1) / size

    gathers = 2 * micro if parallel.zero == 3 else 1
    reduces = 1 if parallel.zero == 1 else micro
    shard = ring(layout.shard) * part.whole * (gathers * sizes.compute + reduces * _reduce_bytes(run))
    replica = 2 * ring(layout.replica) * part.sharded * _reduce_bytes(run)
    # Each block gathers and scatters twice, forward and backward; recomputing repeats the forward ones but the last,
    # behind which nothing is kept for the backward pass.
    exchanges = len(part.patterns) * (11 if parallel.recompute == "block" else 8)
    exchanges += 2 * part.has_embedding + part.has_heads
    per_micro = ring(layout.tensor) * exchanges * hidden
    if part.has_heads:
        predicted = rows // 2 * spec.num_predicted
        per_micro += 2 * ring(layout.tensor) * predicted * (model.width + 4) * MASTER_BYTES
    stages = stages_of_rank(layout.pipeline, layout.stages_per_rank, rank)
    borders = sum((stage > 0) + (stage < layout.num_stages - 1) for stage in stages)
    return {
        "tp": micro * per_micro + reduces * 2 * ring(layout.tensor) * part.shared * sizes.compute,
        "shard": shard if layout.world_size > 1 else 0.0,
        "replica": replica,
        "pp": micro * borders * hidden / layout.tensor,
    }
