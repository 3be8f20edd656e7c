"""C15, C16, C17: the optimizer's update, what importing costs, and Muon's update."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.measure import OURS, Bench, Goal, Row, rate_rows
from benchmarks.sizes import demo_size, paper_size
from megatron_vilg.models.cost import is_hidden_matrix
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.precision import choose_precision
from megatron_vilg.train.muon import MOMENTUM, Muon
from megatron_vilg.train.optim import build_optimizer


def optimizer_update(bench: Bench) -> Iterator[Row]:
    """What we use, torch's fused AdamW, on all weights of the 32 x 32 model, beside torch's foreach AdamW.

    Both are torch's own; on a CPU its default is neither, but a loop over the tensors.
    """
    run = paper_size("fp32")

    def weights() -> ViLG:
        model = ViLG(run.model).to(bench.device)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        return model

    ours, theirs = weights(), weights()
    update = build_optimizer(list(ours.named_parameters()), run.optim, bench.device)
    foreach = torch.optim.AdamW(theirs.parameters(), lr=run.optim.lr, foreach=True)
    contenders: dict[str, Callable[[], object]] = {OURS: update.step, "AdamW, foreach": foreach.step}
    seconds = bench.interleave(contenders, 2 * bench.rounds)
    count = sum(parameter.numel() for parameter in ours.parameters()) / 1e6
    unit = f"million values/{bench.unit}"
    goal = Goal("ratio", ">=", 1.0)
    yield from rate_rows("C15", "fused AdamW", unit, dict.fromkeys(contenders, count), seconds, goal)


def muon_update(bench: Bench) -> Iterator[Row]:
    """Muon on the matrices of the demo's blocks, in the precision that ``auto`` means here, beside torch's in bf16."""
    precision, _ = choose_precision("auto", bench.device)

    def matrices() -> list[torch.nn.Parameter]:
        model = ViLG(demo_size("fp32").model).to(bench.device)
        found = [p for name, p in model.named_parameters() if is_hidden_matrix(name, p.ndim)]
        for parameter in found:
            parameter.grad = torch.randn_like(parameter)
        return found

    ours, theirs = matrices(), matrices()
    muon = Muon([{"params": ours}], 1e-3, torch.bfloat16 if precision == "bf16" else torch.float32)
    torchs = torch.optim.Muon(theirs, lr=1e-3, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    seconds = bench.interleave({OURS: muon.step, "torch.optim.Muon": torchs.step}, bench.rounds)
    count = sum(parameter.numel() for parameter in ours) / 1e6
    unit = f"million values/{bench.unit}"
    yield from rate_rows(
        "C17", f"Muon, {precision}", unit, dict.fromkeys(seconds, count), seconds, Goal("ratio", ">=", 0.95)
    )


def import_time(bench: Bench) -> Iterator[Row]:
    """CPU seconds of new processes (user and system) that import a module and end."""
    modules = {OURS: "megatron_vilg.train.engine", "import torch": "torch", "command": "megatron_vilg.cli.main"}
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(max(2, bench.rounds // 2)):
        for name, module in modules.items():
            seconds[name].append(_import_seconds(module))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    goal = Goal("value", "<=", 3.0)
    yield Row(
        "C16", "import the training engine", median[OURS], "s", "import torch", median["import torch"], goal,
        less_is_better=True, rounds=seconds,
    )  # fmt: skip
    goal = Goal("value", "<=", 1.0)
    yield Row("C16", "import the command line", median["command"], "s", goal=goal, less_is_better=True)


def _import_seconds(module: str) -> float:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    start = spent()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, cwd=Path(__file__).resolve().parents[1])
    return spent() - start
