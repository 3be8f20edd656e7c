"""What ``vilg plan`` computes is what ranks really hold: counted, not believed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from megatron_vilg.config.check import require
from megatron_vilg.config.presets import PRESETS
from megatron_vilg.config.schema import ModelConfig, OpsConfig, ParallelConfig, ReconstructorConfig, RunConfig
from megatron_vilg.models.cost import forward_flops
from megatron_vilg.ops import attention, fold, fold_plan
from megatron_vilg.parallel.account import local_bytes, pretend_to_be
from megatron_vilg.parallel.estimate import KINDS, RankCost, bubble, estimate, pair_flops
from megatron_vilg.parallel.layout import Layout, stage_layers, stages_of_rank
from megatron_vilg.parallel.mesh import build_mesh
from megatron_vilg.train.engine import NativeEngine, cut_parts
from tests.helpers import run_distributed
from tests.live_bytes import LiveBytes
from tests.parallel.cases import case_model, case_run, codebook
from tests.tiny import tiny_batch

SIZES = {"width": 128, "num_layers": 6, "image_side": 8, "conv_kernel": 5, "codebook_dim": 0}
MODEL = case_model(**SIZES, text_vocab_size=64, image_vocab_size=64)
BATCH = 8
WIDE = case_model(
    **(SIZES | {"width": 256, "image_side": 4, "conv_kernel": 3}), text_vocab_size=64, image_vocab_size=64
)
"""Weights outweigh activations, as in the 10B model on one card."""


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def paper_10b(**parallel: Any) -> RunConfig:
    run = PRESETS["paper-10b"]()
    return dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, **parallel)).resolve()


@pytest.mark.parametrize(
    ("parallel", "ranks"),
    [
        ({"tensor": 2, "shard": 32}, (0,)),
        ({"tensor": 2, "pipeline": 4, "shard": 8, "num_microbatches": 8, "zero": 1}, (0, 63)),
        ({"pipeline": 2, "replica": 4, "shard": 8, "num_microbatches": 4}, (0,)),
    ],
)
def test_a_rank_of_64_holds_what_was_planned(parallel: dict[str, Any], ranks: tuple[int, ...]) -> None:
    run = paper_10b(**parallel)
    require(run, 64)
    cost = estimate(run, 64)
    assert cost.stack_parameters == pytest.approx(9.66e9, rel=0.001)
    for rank in ranks:
        with pretend_to_be(rank, 64):
            held = local_bytes(cut_parts(run, build_mesh(run.parallel, "cpu")), run)
        planned = cost.ranks[rank // (64 // run.parallel.pipeline)]
        for kind in ("weights", "optimizer"):
            assert getattr(held, kind) == pytest.approx(planned.memory[kind], rel=0.05)
        assert max(held.gradients, held.whole_gradients) == pytest.approx(planned.memory["gradients"], rel=0.05)


def measured_peak(run: RunConfig) -> int:
    """Most bytes of tensors that live at once in the second step, optimizer state included."""
    mesh = build_mesh(run.parallel, "cpu")
    engine = NativeEngine(run, mesh, codebook(run))
    size = BATCH // mesh.data_size
    batch = tiny_batch(run.model, BATCH).slice(mesh.data_rank * size, (mesh.data_rank + 1) * size)
    engine.train_step(batch)
    known = [local(p) for _, p in engine.named_parameters()]
    known += [local(value) for state in engine.optimizer.state.values() for value in state.values()]
    with LiveBytes(known) as live:
        engine.train_step(batch)
    return live.peak


def run_of(precision: str, model: ModelConfig = MODEL, **parallel: Any) -> RunConfig:
    run = case_run(parallel, model, batch_size=BATCH, precision=precision)
    return dataclasses.replace(run, ops=OpsConfig(attention="sdpa"))


@pytest.mark.parametrize(
    ("precision", "parallel"),
    [
        ("fp32", {}),
        ("bf16", {"num_microbatches": 2}),
        ("fp32", {"recompute": "block"}),
        ("fp32", {"recompute": "selective", "num_microbatches": 2}),
    ],
)
def test_one_process_uses_the_planned_memory(precision: str, parallel: dict[str, Any]) -> None:
    run = run_of(precision, **parallel)
    assert measured_peak(run) == pytest.approx(estimate(run, 1).fullest.peak, rel=0.05)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize(
    ("attention", "changes"),
    [("auto", {"num_heads": 16, "num_layers": 4}), ("fold", {"pattern": "full", "num_layers": 4})],
    ids=["auto is dense", "full layers fold into sdpa"],
)
def test_what_executes_attention_is_counted(attention: Any, changes: dict[str, Any], recompute: Any) -> None:
    """Scores of 16 heads where ``auto`` is dense, and the mask of full layers, which cannot be folded."""
    model = case_model(**(SIZES | changes), text_vocab_size=64, image_vocab_size=64)
    run = dataclasses.replace(run_of("fp32", model, recompute=recompute), ops=OpsConfig(attention=attention))
    assert measured_peak(run) == pytest.approx(estimate(run, 1).fullest.peak, rel=0.05)


def as_on_a_gpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, parts: tuple[Any, ...]) -> torch.Tensor:
    """Folding with copies, where a CPU would do without."""
    halves = [fold.fold_attention(q[d::2], k[d::2], v[d::2], *part) for d, part in enumerate(parts)]
    return torch.stack(halves, dim=1).flatten(0, 1)


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
def test_copies_of_keys_and_values_are_counted(recompute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many against the feed-forward: blocks of half a row, of a row or of a column beside the text."""

    def with_bias(plan: fold_plan.FoldPlan, used: torch.Tensor) -> list[Any]:
        return [(plan, fold.fold_bias(plan, used, torch.float32))]

    monkeypatch.setattr(attention, "fold_rows", with_bias)
    monkeypatch.setattr(attention, "fold_attention_cpu", as_on_a_gpu)
    model = case_model(
        **(SIZES | {"image_side": 16, "mlp_ratio": 2, "conv_kernel": 3}), text_vocab_size=64, image_vocab_size=64
    )
    run = dataclasses.replace(run_of("fp32", model, recompute=recompute), ops=OpsConfig(attention="fold"))
    planned = estimate(run, 1).fullest.peak
    assert measured_peak(run) == pytest.approx(planned, rel=0.05)
    without = dataclasses.replace(run, ops=OpsConfig(attention="flex"))
    assert planned > (1.3 if recompute == "none" else 1.02) * estimate(without, 1).fullest.peak


def test_a_case_that_was_measured_on_a_gpu() -> None:
    """docs/performance.md, G2: 65 GB where folding's copies are kept, 47.1 GB with dense attention."""
    run = PRESETS["e2e-300m"]().resolve(text_vocab_size=18_000)
    train = dataclasses.replace(run.train, batch_size=16)
    run = dataclasses.replace(run, train=train, parallel=ParallelConfig(recompute="none"))
    half_rows = 2.4e9  # row layers of captioning were cut in halves then, which copied three times as many keys
    assert 0.92 * 65e9 < estimate(run, 1).fullest.peak + half_rows < 65e9


@pytest.mark.parametrize("side", [8, 16])
def test_attention_is_planned_as_what_it_stands_for(side: int) -> None:
    """At either side of the size from which ``auto`` folds; a mask is 2 bytes a pair of positions and kind of layer."""

    def peak(attention: str, **changes: Any) -> float:
        model = case_model(**(SIZES | {"image_side": side} | changes), text_vocab_size=64, image_vocab_size=64)
        ops = OpsConfig(attention=attention)  # type: ignore[arg-type]
        return estimate(dataclasses.replace(run_of("bf16", model), ops=ops), 1).fullest.peak

    length = case_model(**(SIZES | {"image_side": side})).spec.length
    assert peak("auto") == peak("dense" if side == 8 else "fold") != peak("flex")
    assert peak("sdpa") - peak("flex") == 3 * 2 * BATCH * 2 * length**2
    assert peak("fold", pattern="full") == peak("sdpa", pattern="full") < peak("dense", pattern="full")


@pytest.mark.parametrize(
    "parallel",
    [
        {"recompute": "block"},
        pytest.param({"recompute": "block", "num_microbatches": 2}, marks=pytest.mark.slow),
        {"recompute": "selective", "num_microbatches": 2},
        pytest.param({}, marks=pytest.mark.slow),
    ],
)
def test_copies_of_wide_weights_are_counted_while_they_last(parallel: dict[str, Any]) -> None:
    """With recomputation, one block's in bfloat16; else all of them until their backward pass."""
    run = run_of("bf16", WIDE, **parallel)
    assert measured_peak(run) == pytest.approx(estimate(run, 1).fullest.peak, rel=0.05)


@pytest.mark.parametrize(
    ("precision", "parallel"),
    [
        ("bf16", {"zero": 3, "recompute": "block"}),
        ("fp32", {"zero": 1, "num_microbatches": 2}),
        ("fp32", {"tensor": 2}),
        ("fp32", {"pipeline": 2, "num_microbatches": 4, "zero": 1}),
    ],
)
def test_two_processes_use_the_planned_memory(precision: str, parallel: dict[str, Any]) -> None:
    run = run_of(precision, **parallel)
    assert max(run_distributed(measured_peak, 2, run, timeout=240.0)) == pytest.approx(
        estimate(run, 2).fullest.peak, rel=0.05
    )


def test_layers_of_stages() -> None:
    assert [layer for layers in stage_layers(48, 16) for layer in layers] == list(range(48))
    assert [len(layers) for layers in stage_layers(6, 4)] == [1, 2, 2, 1]
    assert stages_of_rank(2, 3, 1) == [1, 3, 5]


def test_idle_share_follows_the_schedule() -> None:
    assert bubble(Layout(tensor=1, pipeline=1, replica=1, shard=8)) == 0
    assert bubble(Layout(tensor=1, pipeline=4, replica=1, shard=1, num_microbatches=13)) == pytest.approx(3 / 16)
    interleaved = Layout(tensor=1, pipeline=4, replica=1, shard=1, stages_per_rank=2, num_microbatches=12)
    assert bubble(interleaved) == pytest.approx(3 / 27)


def test_traffic_follows_the_zero_number() -> None:
    """Design of ``parallel/zero.py``: gathers in bf16, sums in fp32; M = 4 micro-batches over 8 shards."""
    whole = estimate(paper_10b(), 1).parameters
    for zero, gathers, reduces in ((1, 1, 1), (2, 1, 4), (3, 8, 4)):
        cost = estimate(paper_10b(shard=8, zero=zero, num_microbatches=4), 8)
        assert cost.busiest["shard"] == pytest.approx(7 / 8 * whole * (2 * gathers + 4 * reduces))
        assert cost.busiest["tp"] == cost.busiest["pp"] == cost.busiest["replica"] == 0
    copies = estimate(paper_10b(replica=4, shard=8, num_microbatches=4), 32)
    assert copies.busiest["replica"] == pytest.approx(2 * 3 / 4 * 4 * whole / 8, rel=0.001)


def test_kinds_are_complete_and_offload_moves_states_to_main_memory() -> None:
    here, away = (estimate(paper_10b(shard=8, cpu_offload=flag), 8).fullest for flag in (False, True))
    assert tuple(here.memory) == KINDS
    assert here.host == here.disk == away.disk == {} and sum(away.host.values()) == pytest.approx(16 * here.parameters)
    assert away.memory["optimizer"] == 0 and away.peak < here.peak


@pytest.mark.parametrize(
    ("options", "host", "disk"),
    [
        ({"offload_optimizer": "cpu"}, {"gradients": 4, "optimizer": 8}, {}),
        ({"offload_optimizer": "nvme", "offload_weights": "cpu"}, {"weights": 4, "gradients": 4}, {"optimizer": 8}),
        ({"cpu_offload": True}, {"weights": 4, "gradients": 4, "optimizer": 8}, {}),
        ({"cpu_offload": True, "zero": 1}, {"optimizer": 8}, {}),
    ],
)
def test_deepspeed_moves_what_its_options_name(
    options: dict[str, Any], host: dict[str, int], disk: dict[str, int]
) -> None:
    """Bytes a parameter; what is moved is no part of the peak."""
    run = paper_10b(shard=4, num_microbatches=512, **options)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, engine="deepspeed"))
    nothing = {"cpu_offload": False, "offload_optimizer": "none", "offload_weights": "none"}
    keeps = dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, **nothing))
    cost, whole = estimate(run, 4).fullest, estimate(keeps, 4).fullest
    for found, expected in ((cost.host, host), (cost.disk, disk)):
        assert found == pytest.approx({kind: size * cost.parameters for kind, size in expected.items()})
    moved = {kind for kind in whole.memory if cost.memory[kind] == 0 < whole.memory[kind]}
    assert moved == {*host, *disk}
    freed = sum(host.values()) + sum(disk.values())
    assert whole.peak - cost.peak == pytest.approx(freed * cost.parameters)


def test_whole_gradients_between_micro_batches_stay() -> None:
    """The native engine at ``zero=1``: only what has been summed over ranks goes to main memory."""
    away = estimate(paper_10b(shard=8, zero=1, num_microbatches=2, cpu_offload=True), 8).fullest
    assert away.memory["gradients"] == pytest.approx(4 * estimate(paper_10b(), 1).parameters)
    assert away.host["gradients"] == pytest.approx(4 * away.parameters)


def test_a_pair_needs_the_same_in_every_layout() -> None:
    run = paper_10b(shard=8, tensor=2, num_microbatches=4)
    joint = dataclasses.replace(run, reconstructor=ReconstructorConfig(enabled=True, critic_weight=0.1))
    for each in (run, joint):
        assert pair_flops(each) * run.train.batch_size == pytest.approx(estimate(each, 16).flops_kept, rel=1e-12)
    assert pair_flops(joint) > pair_flops(run) == 3 * forward_flops(run.model).kept


def test_default_layout() -> None:
    assert Layout.of(ParallelConfig(tensor=2, pipeline=2), 16).shard == 4


def test_the_first_rank_gathers_the_model_for_samples() -> None:
    """As ``NativeEngine.whole_model`` does; a single process draws with its live model."""

    def ranks(world_size: int, sample_every: int, **parallel: Any) -> tuple[RankCost, ...]:
        run = paper_10b(**parallel)
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, sample_every=sample_every))
        return estimate(run, world_size).ranks

    layout = {"shard": 16, "pipeline": 2, "num_microbatches": 32}
    never, always = ranks(32, 0, **layout), ranks(32, 1000, **layout)
    whole = 4 * estimate(paper_10b(), 1).parameters
    assert always[1] == never[1] and always[0].memory["buffers"] == whole > never[0].memory["buffers"]
    lasting = always[0].memory["weights"] + always[0].memory["optimizer"]
    assert always[0].peak == max(never[0].peak, lasting + whole) > never[0].peak
    assert ranks(1, 1000) == ranks(1, 0)
