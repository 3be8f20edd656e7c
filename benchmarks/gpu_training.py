"""G2, G3, G4: training on one GPU: the 300M model, twelve layers of the 10B model, and three steps of all of it."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu import TINY
from benchmarks.measure import Bench, Goal, Row
from benchmarks.plain_loop import train_step
from benchmarks.sizes import plain_model, random_pairs, random_rows
from megatron_vilg.config.presets import PRESETS
from megatron_vilg.config.schema import OpsConfig, ParallelConfig, RunConfig
from megatron_vilg.models.cost import forward_flops
from megatron_vilg.ops.attention import Implementation, choose_implementation
from megatron_vilg.parallel.estimate import estimate
from megatron_vilg.train.engine import NativeEngine

PEAK = 989.0
"""TFLOP/s: dense bf16 products of H100 and H200 (NVIDIA's data sheets; the larger figure there is for 2:4 sparsity)."""
MFU = "MFU: 3 x forward FLOPs, kept attention only, / s / 989e12"
WITHIN_PLAN = Goal("value", "<=", 1.05)


@dataclass(frozen=True, slots=True)
class Trained:
    """What some steps of one configuration took."""

    run: RunConfig
    seconds: list[float]
    """Of each timed step."""
    peak: float
    """Bytes allocated at most in a step; 0 on a CPU, which nothing counts."""

    @property
    def tokens_per_second(self) -> float:
        """Positions of both directions, padding not counted."""
        return 2 * self.run.train.batch_size * self.run.model.spec.num_used / statistics.median(self.seconds)

    @property
    def teraflops(self) -> float:
        """What the model needs (forward, and twice that backward; attention where its rules allow it) per second."""
        flops = 3 * self.run.train.batch_size * forward_flops(self.run.model).kept
        return 1e-12 * flops / statistics.median(self.seconds)


def training_300m(bench: Bench) -> Iterator[Row]:
    """The preset e2e-300m, 16 pairs: patterns and fused, dense and fused, dense and written out, and the plain loop."""
    run = _sized(bench, "e2e-300m", pairs=16)
    fused: Implementation = choose_implementation("auto", run.model.image_side, bench.device, training=True)[0]
    variants: dict[str, tuple[str, Implementation]] = {
        f"paper's patterns, {fused}": ("paper", fused),
        "dense, fused": ("full", "sdpa"),
        "dense, written out": ("full", "dense"),
    }
    trained = {}
    for name, (pattern, implementation) in variants.items():
        model = replace(run.model, pattern=pattern)  # type: ignore[arg-type]
        trained[name] = _train(bench, replace(run, model=model, ops=OpsConfig(attention=implementation)), bench.rounds)
    (ours, *others) = trained.values()
    yield from _rows("G2", "training, 300M", ours, mfu_goal=0.45)
    for name, other, speed in zip([*variants][1:], others, (1.10, 1.25), strict=True):
        goal = Goal("ratio", ">=", speed)
        yield Row("G2", "training, 300M", ours.tokens_per_second, "tokens/s", name, other.tokens_per_second, goal)
        if ours.peak:
            memory = Goal("ratio", ">=", 2.0) if other is others[-1] else None
            values = [each.peak / 1e9 for each in (ours, other)]
            yield Row("G2", "peak memory", values[0], "GB", name, values[1], memory, less_is_better=True)
    for name, step in _plain_loops(bench, run).items():
        seconds = statistics.median(bench.interleave({name: step}, bench.rounds, warm_up=3)[name])
        rate = 2 * run.train.batch_size * run.model.spec.num_used / seconds
        yield Row("G2", "training, 300M", ours.tokens_per_second, "tokens/s", name, rate)


def training_10b_slice(bench: Bench) -> Iterator[Row]:
    """Twelve of the 48 layers of paper-10b, 4 pairs: what 10B reaches where a quarter of it fits the card."""
    run = _sized(bench, "paper-10b", pairs=4)
    if not bench.tiny:
        run = replace(run, model=replace(run.model, num_layers=12))
    for recompute in ("none", "block"):
        goal = 0.55 if recompute == "none" else None  # computing blocks again is work that MFU does not count
        again = replace(run, parallel=ParallelConfig(recompute=recompute))
        trained = _train(bench, again, bench.rounds)
        yield from _rows("G3", f"training, 12 layers of 10B, recompute {recompute}", trained, mfu_goal=goal)


def training_10b(bench: Bench) -> Iterator[Row]:
    """Three steps of the whole paper-10b with 8-bit moments, one pair, blocks computed again."""
    run = _sized(bench, "paper-10b", pairs=1)
    if bench.tiny:  # a scale for each 256 neighbours
        run = replace(run, model=replace(run.model, width=256, num_layers=2))
    run = replace(run, optim=replace(run.optim, name="adamw_8bit"), parallel=ParallelConfig(recompute="block"))
    yield from _rows("G4", "training, 10B, adamw_8bit", _train(bench, run, rounds=2, warm_up=1))


def _sized(bench: Bench, preset: str, pairs: int) -> RunConfig:
    """The preset in bf16 with so many pairs a step; the smallest sizes for a dry run."""
    run = PRESETS[preset]()
    run = run.resolve(text_vocab_size=run.text_tokenizer.vocab_size)
    train = replace(run.train, batch_size=2 if bench.tiny else pairs, precision="bf16")
    model = TINY if bench.tiny else run.model
    return replace(run, model=model, train=train, parallel=ParallelConfig(recompute="none"))


def _train(bench: Bench, run: RunConfig, rounds: int, warm_up: int = 3) -> Trained:
    """Time and memory of optimizer steps.

    Raises:
        ArithmeticError: a loss is not finite, so that no figure of the run would mean anything.
    """
    on_gpu = bench.device.type == "cuda"
    gc.collect()  # the engine before this one
    engine = NativeEngine(run, bench.device)
    batch = random_pairs(run.model, run.train.batch_size, seed=0)
    engine.train_step(batch)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    losses: list[torch.Tensor] = []
    steps = {"": lambda: losses.append(engine.train_step(batch).loss)}
    seconds = bench.interleave(steps, rounds, warm_up=warm_up - 1)[""]
    if not all(math.isfinite(float(loss)) for loss in losses):
        raise ArithmeticError(f"losses {[float(loss) for loss in losses]}: this configuration does not train")
    return Trained(run, seconds, float(torch.cuda.max_memory_allocated()) if on_gpu else 0.0)


def _rows(id: str, name: str, trained: Trained, mfu_goal: float | None = None) -> Iterator[Row]:
    """Tokens per second, MFU, and memory beside what ``vilg plan`` says."""
    yield Row(id, name, trained.tokens_per_second, "tokens/s", rounds={name: trained.seconds})
    goal = None if mfu_goal is None else Goal("value", ">=", 100 * mfu_goal)
    yield Row(id, MFU, 100 * trained.teraflops / PEAK, "%", goal=goal)
    planned = estimate(trained.run, 1).fullest.peak
    yield Row(id, "peak memory, planned", planned / 1e9, "GB", counted=True)
    if trained.peak:
        yield Row(id, "peak memory", trained.peak / 1e9, "GB", less_is_better=True)
        yield Row(id, "peak memory, measured / planned", trained.peak / planned, "", goal=WITHIN_PLAN)


def _plain_loops(bench: Bench, run: RunConfig) -> dict[str, Callable[[], object]]:
    """A dense causal transformer of the same size in the 40-line loop, as it is and compiled."""
    model = plain_model(run.model).to(bench.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = 2 * run.train.batch_size
    ids = random_rows(run.model, rows, run.model.spec.num_used + 1, seed=1).to(bench.device)
    loops: dict[str, Callable[[], object]] = {"plain loop": lambda: train_step(model, optimizer, ids, bf16=True)}
    if not bench.tiny:  # compiling takes longer than all the rest of a dry run
        compiled = torch.compile(model)
        loops["plain loop, compiled"] = lambda: train_step(compiled, optimizer, ids, bf16=True)  # type: ignore[arg-type]
    return loops
