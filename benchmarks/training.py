"""C1, C2: the training step beside the plain loop, Hugging Face's GPT-2, x-transformers and dalle-pytorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks import peers
from benchmarks.measure import OURS, Bench, Goal, Row, rate_rows
from benchmarks.plain_loop import train_step
from benchmarks.sizes import SIZES, Precision, gpt2, joint_vocabulary, plain_model, random_pairs, random_rows
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.models.cost import forward_flops
from megatron_vilg.ops.linear import linear
from megatron_vilg.train.engine import NativeEngine

GOALS = {"8x8": Goal("ratio", ">=", 1.0), "32x32": Goal("ratio", ">=", 1.3)}
PEER_GOALS = {peers.X_TRANSFORMERS: Goal("ratio", ">=", 1.3), peers.DALLE: Goal("ratio", ">=", 2.0)}


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
            rounds = 4 * bench.rounds if size == "8x8" else max(1, bench.rounds // 2 + 1)
            yield from _rows("C1", bench, run, size, contenders, rounds, GOALS[size])


def training_step_of_peers(bench: Bench) -> Iterator[Row]:
    """The same against packages; dalle-pytorch trains axial layers and one direction, on as many rows as the others."""
    run = SIZES["32x32"]("fp32")
    contenders = {OURS: _ours(run, bench.device)}
    if peers.has(peers.X_TRANSFORMERS):
        contenders[peers.X_TRANSFORMERS] = _x_transformers(run, bench.device)
    if peers.has(peers.DALLE):
        contenders[peers.DALLE] = _dalle(run, bench.device)
    rounds = max(1, bench.rounds // 2 + 1)
    yield from _rows("C2", bench, run, "32x32", contenders, rounds, PEER_GOALS)


def _rows(
    id: str,
    bench: Bench,
    run: RunConfig,
    size: str,
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    goal: Goal | dict[str, Goal],
) -> Iterator[Row]:
    seconds = bench.interleave(contenders, rounds)
    positions = 2 * run.train.batch_size * run.model.spec.num_used
    flops = 3 * run.train.batch_size * forward_flops(run.model).kept
    limit = positions / (flops / _matmul_rate(bench, run))
    name = f"training step, {size} codes, {run.train.precision}"
    amounts = dict.fromkeys(contenders, positions)
    yield from rate_rows(id, name, f"tokens/{bench.unit}", amounts, seconds, goal, limit)


def _matmul_rate(bench: Bench, run: RunConfig) -> float:
    """Operations per second of the feed-forward product of this size by the faster of torch and oneDNN; the limit is a
    step of nothing else."""
    dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
    rows, width = 2 * run.train.batch_size * run.model.spec.num_used, run.model.width
    x = torch.randn(rows, width, device=bench.device, dtype=dtype)
    weight = torch.randn(run.model.mlp_ratio * width, width, device=bench.device, dtype=dtype)
    seconds = bench.interleave({"torch": lambda: x @ weight.T, OURS: lambda: linear(x, weight)}, 10)
    return 2 * rows * weight.numel() / min(min(each) for each in seconds.values())


def _ours(run: RunConfig, device: torch.device) -> Callable[[], object]:
    codebook = None
    if run.model.codebook_dim:
        codebook = torch.randn(run.model.image_vocab_size, run.model.codebook_dim)
    engine = NativeEngine(run, device, codebook)
    batch = random_pairs(run.model, run.train.batch_size, seed=0)
    return lambda: engine.train_step(batch)


def _adamw(model: nn.Module, run: RunConfig) -> torch.optim.AdamW:
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


def _step(
    run: RunConfig, device: torch.device, model: nn.Module, loss: Callable[[], torch.Tensor]
) -> Callable[[], object]:
    """An optimizer step on what ``loss`` returns."""
    optimizer = _adamw(model, run)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=run.train.precision == "bf16"):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _gpt2(run: RunConfig, device: torch.device) -> Callable[[], object]:
    model = gpt2(run.model).to(device).train()
    ids = random_rows(run.model, 2 * run.train.batch_size, run.model.spec.num_used, seed=2)

    def loss() -> torch.Tensor:
        rows = ids.to(device)
        return model(input_ids=rows, labels=rows).loss

    return _step(run, device, model, loss)


def _x_transformers(run: RunConfig, device: torch.device) -> Callable[[], object]:
    model = peers.x_transformer(run.model, joint_vocabulary(run.model)).to(device).train()
    ids = random_rows(run.model, 2 * run.train.batch_size, run.model.spec.num_used + 1, seed=2)
    return _step(run, device, model, lambda: model(ids.to(device)))


def _dalle(run: RunConfig, device: torch.device) -> Callable[[], object]:
    model = peers.dalle(run.model, axial=True).to(device).train()
    pairs = random_pairs(run.model, 2 * run.train.batch_size, seed=2)
    text, codes = pairs.text_ids[:, 0], pairs.target_image_ids
    return _step(run, device, model, lambda: model(text.to(device), codes.to(device), return_loss=True))
