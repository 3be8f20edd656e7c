"""C1: the training step beside the plain loop and Hugging Face's GPT-2."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.measure import OURS, Bench, Goal, Row, rate_rows
from benchmarks.plain_loop import train_step
from benchmarks.sizes import SIZES, Precision, gpt2, plain_model, random_pairs, random_rows
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.train.engine import NativeEngine

GOALS = {"8x8": Goal("ratio", ">=", 1.0), "32x32": Goal("ratio", ">=", 1.3)}


def training_step(bench: Bench) -> Iterator[Row]:
    """Positions per second of one optimizer step: rows of equal number and length for all; our padding not counted."""
    precisions: tuple[Precision, ...] = ("bf16",) if bench.device.type == "cuda" else ("fp32", "bf16")
    for size, configure in SIZES.items():
        for precision in precisions:
            run = configure(precision)
            contenders = {
                OURS: _ours(run, bench.device),
                "plain loop": _plain(run, bench.device),
                "GPT-2": _gpt2(run, bench.device),
            }
            seconds = bench.interleave(contenders, 4 * bench.rounds if size == "8x8" else max(1, bench.rounds // 2 + 1))
            positions = dict.fromkeys(contenders, 2 * run.train.batch_size * run.model.spec.num_used)
            name = f"training step, {size} codes, {precision}"
            yield from rate_rows("C1", name, f"tokens/{bench.unit}", positions, seconds, GOALS[size])


def _ours(run: RunConfig, device: torch.device) -> Callable[[], object]:
    codebook = None
    if run.model.codebook_dim:
        codebook = torch.randn(run.model.image_vocab_size, run.model.codebook_dim)
    engine = NativeEngine(run, device, codebook)
    batch = random_pairs(run.model, run.train.batch_size, seed=0)
    return lambda: engine.train_step(batch)


def _adamw(model: torch.nn.Module, run: RunConfig) -> torch.optim.AdamW:
    """The peers' optimizer: the fused update too, which is not torch's default on CPUs."""
    optim = run.optim
    return torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )


def _plain(run: RunConfig, device: torch.device) -> Callable[[], object]:
    model = plain_model(run.model).to(device)
    optimizer = _adamw(model, run)
    ids = random_rows(run.model, 2 * run.train.batch_size, run.model.spec.num_used + 1, seed=1)
    return lambda: train_step(model, optimizer, ids.to(device), run.train.precision == "bf16")


def _gpt2(run: RunConfig, device: torch.device) -> Callable[[], object]:
    model = gpt2(run.model).to(device).train()
    optimizer = _adamw(model, run)
    ids = random_rows(run.model, 2 * run.train.batch_size, run.model.spec.num_used, seed=2)

    def step() -> None:
        rows = ids.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=run.train.precision == "bf16"):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
