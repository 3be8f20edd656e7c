"""K1: merging and sharding a large checkpoint beside a plain copy of its files, torch's converters and DeepSpeed's."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.measure import OURS, Bench, Goal, Row

GIGABYTES = float(os.environ.get("VILG_BENCH_GB", "8"))
"""Size of the checkpoint, at least; another one is for trying out."""
FOLDER = os.environ.get("VILG_BENCH_DIR")
"""Where there is room; the default is the system's folder for temporary files."""
COPIES = 6
"""How many times the checkpoint must fit on the disk: four inputs, one result, and some air."""
MOST_ROUNDS = 3
"""A round takes many minutes."""
ROOT = Path(__file__).resolve().parents[1]
COPY, ZERO_TO_FP32 = "cp", "zero_to_fp32"
TORCH_SAVE, TO_DCP, SAFETENSORS = "torch dcp_to_torch_save", "torch torch_save_to_dcp", "safetensors load, save"
MERGE, SHARD, BACK, WEIGHTS = "merge --optimizer", "shard 2 x 2 --optimizer", "shard --to dcp --optimizer", "merge"
_FAST, _SMALL = Goal("ratio", ">=", 0.7), Goal("value", "<=", 2.0)
_WORK = """
import json, os, resource, subprocess, sys, time
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
source, target = Path({source!r}), Path({target!r})
{setup}
def peak():
    text = open("/proc/self/status").read()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024
def cpu():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
memory, used, start = peak(), cpu(), time.perf_counter()
{work}
for path in [target, *target.rglob("*")]:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
print(json.dumps({{"seconds": time.perf_counter() - start, "cpu": cpu() - used, "memory": max(0, peak() - memory)}}))
"""
_COPY = "subprocess.run(['cp', '-r', source, target], check=True)"
_TOOL = "from megatron_vilg.checkpoint.sources import open_source\nfrom megatron_vilg.checkpoint.{} import {}"
_CALL = "with open_source(source) as opened: {}"
_LOADED = "{k: v for f in sorted(source.glob('*.safetensors')) for k, v in load_file(f).items()}"


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that turns ``source`` into ``target``, as Python."""

    source: Path
    setup: str
    work: str


@dataclass(frozen=True, slots=True)
class Took:
    """What one run of a contender took."""

    seconds: float
    """Wall clock until everything is on the disk."""
    cpu: float
    memory: int
    """Bytes of resident memory at the peak, beyond what imports took; pages of mapped files count."""


def checkpoint_tools(bench: Bench) -> Iterator[Row]:
    """Bytes per wall second, the disk's own time included, CPU seconds, and memory in units of the largest tensor.

    Raises:
        RuntimeError: the disk has too little room, or a contender failed.
    """
    base = Path(tempfile.mkdtemp(prefix="vilg-bench-", dir=FOLDER))
    try:
        free = shutil.disk_usage(base).free
        if free < COPIES * GIGABYTES * 1e9:
            raise RuntimeError(
                f"{base}: {free / 1e9:.0f} GB are free, K1 needs {COPIES * GIGABYTES:.0f}. Works: VILG_BENCH_DIR on "
                "another disk, or a smaller VILG_BENCH_GB to try it out"
            )
        size, largest, weights = _write_inputs(base)
        took = _interleaved(_contenders(base), base / "result", min(bench.rounds, MOST_ROUNDS))
        yield from _rows(took, size, largest, weights)
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _write_inputs(base: Path) -> tuple[int, int, int]:
    """Checkpoint, merged form, torch's file, DeepSpeed's folder; bytes of all tensors, of the largest, of weights."""
    size, largest = json.loads(_python("-m", "benchmarks.checkpoint_inputs", "ours", str(base / "run"), str(GIGABYTES)))
    contenders = _contenders(base)
    _run(contenders[MERGE], base / "merged")
    _run(contenders[TORCH_SAVE], base / "torch.pt")
    if ZERO_TO_FP32 not in contenders:
        return size, largest, 0
    arguments = ("-m", "benchmarks.checkpoint_inputs", "deepspeed", str(base / "deepspeed"), str(GIGABYTES))
    return size, largest, json.loads(_python(*arguments))


def _contenders(base: Path) -> dict[str, Contender]:
    """By name; zero_to_fp32 only where DeepSpeed is installed."""
    step, merged = base / "run" / "checkpoints" / "step-00000001", base / "merged"
    torch_setup = "from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp"
    cut = _CALL.format("shard(opened, target, 2, 2, optimizer=True)")
    found = {
        COPY: Contender(step, "", _COPY),
        MERGE: Contender(step, _TOOL.format("reshape", "merge"), _CALL.format("merge(opened, target, optimizer=True)")),
        TORCH_SAVE: Contender(step, torch_setup, "dcp_to_torch_save(source, target)"),
        SHARD: Contender(merged, _TOOL.format("reshape", "shard"), cut),
        SAFETENSORS: Contender(
            merged, "from safetensors.torch import load_file, save_file", f"save_file({_LOADED}, target)"
        ),
        BACK: Contender(
            merged,
            _TOOL.format("run_folder", "write_run_folder"),
            _CALL.format("write_run_folder(opened, target)"),
        ),
        TO_DCP: Contender(base / "torch.pt", torch_setup, "torch_save_to_dcp(source, target)"),
    }
    if find_spec("deepspeed") is not None:
        setup = "from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert"
        work = "convert(str(source), str(target), safe_serialization=True)"
        found[WEIGHTS] = Contender(
            base / "deepspeed", _TOOL.format("reshape", "merge"), _CALL.format("merge(opened, target)")
        )
        found[ZERO_TO_FP32] = Contender(base / "deepspeed", setup, work)
    return found


def _interleaved(contenders: Mapping[str, Contender], target: Path, rounds: int) -> dict[str, list[Took]]:
    """Every contender once a round, each time from another start; results are deleted."""
    took: dict[str, list[Took]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        first = number * len(names) // rounds
        for name in names[first:] + names[:first]:
            took[name].append(_run(contenders[name], target))
            shutil.rmtree(target) if target.is_dir() else target.unlink()
            print(f"K1: round {number + 1} of {rounds}: {name}: {took[name][-1]}", file=sys.stderr, flush=True)
    return took


def _run(contender: Contender, target: Path) -> Took:
    """Run in a fresh process, with a source that is not in memory."""
    for path in [contender.source, *contender.source.rglob("*")]:
        if path.is_file():
            _forget(path)
    script = _WORK.format(
        root=str(ROOT), source=str(contender.source), target=str(target), setup=contender.setup, work=contender.work
    )
    return Took(**json.loads(_python("-c", script).splitlines()[-1]))


def _forget(path: Path) -> None:
    """Drop a file from the page cache, so that who comes first does not warm it for the next."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _python(*arguments: str) -> str:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


def _rows(took: Mapping[str, Sequence[Took]], size: int, largest: int, weights: int) -> Iterator[Row]:
    peers: dict[str, tuple[str, ...]] = {
        MERGE: (COPY, TORCH_SAVE),
        SHARD: (COPY, SAFETENSORS),
        BACK: (COPY, TO_DCP),
        WEIGHTS: (ZERO_TO_FP32,),
    }
    for tool, others in peers.items():
        for peer in others if tool in took else ():
            moved = weights if tool == WEIGHTS else size
            yield _speed(tool, peer, took, moved)
    for tool, others in peers.items():
        for peer in others if tool in took else ():
            yield _cpu(tool, peer, took)
    for name in took:
        value = max(each.memory for each in took[name]) / largest
        what = f"{name}: extra peak memory ({largest / 1e6:.0f} MB largest)"
        yield Row("K1", what, value, "largest tensors", goal=_SMALL if name in peers else None, less_is_better=True)


def _speed(tool: str, peer: str, took: Mapping[str, Sequence[Took]], size: int) -> Row:
    seconds = {name: [each.seconds for each in took[key]] for name, key in ((OURS, tool), (peer, peer))}
    ours, theirs = (size / statistics.median(values) / 1e6 for values in seconds.values())
    goal = _FAST if peer == COPY else None
    return Row("K1", f"{tool}, verified, {size / 1e9:.1f} GB", ours, "MB/s", peer, theirs, goal, rounds=seconds)


def _cpu(tool: str, peer: str, took: Mapping[str, Sequence[Took]]) -> Row:
    seconds = {name: [each.cpu for each in took[key]] for name, key in ((OURS, tool), (peer, peer))}
    ours, theirs = (statistics.median(values) for values in seconds.values())
    return Row("K1", f"{tool}", ours, "CPU seconds", peer, theirs, less_is_better=True, rounds=seconds)
