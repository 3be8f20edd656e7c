"""Times of a step that ``vilg plan`` estimates, and which layouts it proposes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_vilg.config.presets import PRESETS
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.parallel.estimate import estimate, pair_flops
from megatron_vilg.parallel.proposal import Hardware, offloads, propose, step_time


def paper_10b(optimizer: str = "adamw", **parallel: Any) -> RunConfig:
    run = PRESETS["paper-10b"]().resolve(text_vocab_size=18_000)
    return dataclasses.replace(
        run,
        optim=dataclasses.replace(run.optim, name=optimizer),
        train=dataclasses.replace(run.train, precision="bf16"),
        parallel=dataclasses.replace(run.parallel, **parallel),
    )


def test_muon_computes_more_than_adamw_and_needs_no_more() -> None:
    adamw, muon = (estimate(paper_10b(name), 1) for name in ("adamw", "muon"))
    assert muon.flops_kept == adamw.flops_kept and pair_flops(paper_10b("muon")) == pair_flops(paper_10b())
    # 48 blocks with four matrices of 4096 x 4096 (15 products of the short side cubed) and two of four times that.
    products = 48 * (4 * 15 + 2 * 45) * 2 * 4096**3
    assert muon.flops_executed - adamw.flops_executed == muon.flops_update == products
    assert adamw.flops_update == 0
    hardware = Hardware(peak=500.0, efficiency=1.0)
    times = [step_time(cost, hardware) for cost in (adamw, muon)]
    assert times[1].step - times[0].step == pytest.approx(times[1].update) == pytest.approx(products / 500e12)
    assert times[1].mfu < times[0].mfu


def test_ranks_divide_muons_work_and_wait_for_its_messages() -> None:
    hardware = Hardware()
    layout = {"replica": 32, "num_microbatches": 4}
    cost, plain = (estimate(paper_10b(name, **layout), 256) for name in ("muon", "adamw"))
    (rank,) = cost.ranks
    # 288 matrices among 256 ranks: the largest alone is more than a 256th of all.
    assert rank.update.flops_busiest == 45 * 2 * 4096**3 > rank.update.flops / 256
    whole = 2 * 48 * 12 * 4096**2  # in bf16
    assert rank.update.sent == pytest.approx({"tp": 0, "shard": (7 / 8 + 1) * whole, "replica": whole})
    for axis in ("shard", "replica"):
        assert cost.busiest[axis] - plain.busiest[axis] == pytest.approx(rank.update.sent[axis])
    time, without = step_time(cost, hardware), step_time(plain, hardware)
    assert time.compute == pytest.approx(without.compute) and time.data == without.data
    seconds = rank.update.flops_busiest / (989e12 * 0.45) + (7 / 8 + 1) * whole / 400e9 + whole / 50e9
    assert time.update == pytest.approx(seconds)


@pytest.mark.slow  # hundreds of layouts
def test_layouts_that_offload_come_last_whatever_their_estimate_says() -> None:
    found = propose(paper_10b(cpu_offload=True), 8, Hardware(memory=24.0), most=1000)
    last = [offloads(run) for run, _ in found]
    assert last == sorted(last) and set(last) == {False, True}
    times = [step_time(cost, Hardware()).step for _, cost in found]
    assert min(times[last.index(True) :]) < times[0], "the estimate alone would have ranked one first"
