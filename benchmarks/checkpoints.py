"""K1: merging and sharding a large checkpoint beside a plain copy of its files and the converters of torch."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure import OURS, Bench, Goal, Row

GIGABYTES = float(os.environ.get("VILG_BENCH_GB", "8"))
"""Size of the checkpoint; another one is for trying out."""
FOLDER = os.environ.get("VILG_BENCH_DIR")
"""Where there is room for three times as much; the default is the system's folder for temporary files."""
ROOT = Path(__file__).resolve().parents[1]
_WIDTH, _GB_OF_TABLES, _GB_PER_LAYER = 2048, 1.3, 0.604
_BLOCK = 1 << 20
"""Random numbers that every tensor repeats: drawing others would take longer than copying them."""
_COPIED, _MEMORY = Goal("ratio", ">=", 0.7), Goal("value", "<=", 2.0)
_WORK = """
import json, os, resource, sys, time
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
{setup}
def peak():
    text = open("/proc/self/status").read()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024
before, start = peak(), time.perf_counter()
{work}
print(json.dumps({{"seconds": time.perf_counter() - start, "extra": peak() - before}}))
"""
_OPEN = (
    "from megatron_vilg.checkpoint.sources import open_source\nfrom megatron_vilg.checkpoint import {module} as tool\n"
)
_COPY = """
for source in Path({source!r}).iterdir():
    with open(source, "rb") as a, open(Path({target!r}) / source.name, "wb") as b:
        while piece := a.read(4 << 20):
            b.write(piece)
        b.flush(); os.fsync(b.fileno())
"""


def checkpoint_tools(bench: Bench) -> Iterator[Row]:
    """Bytes per wall second, the disk's own time included, and peak memory in units of the largest tensor."""
    base = Path(tempfile.mkdtemp(prefix="vilg-bench-", dir=FOLDER))
    try:
        size, largest = _write_checkpoint(base / "run")
        yield from _measured(base, size, largest)
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _measured(base: Path, size: int, largest: int) -> Iterator[Row]:
    step = base / "run" / "checkpoints" / "step-00000001"
    copy = _timed("", _COPY.format(source=str(step), target=str(base / "copy")), base / "copy", make=True)
    yield _speed("plain copy of the files, fsynced", size, copy, None)
    merged, dcp_merge = base / "merged", _OPEN.format(module="reshape")
    work = "with open_source(Path({!r})) as s: tool.merge(s, Path({!r}), optimizer=True)"
    merge = _timed(dcp_merge, work.format(str(step), str(merged)))
    yield _speed("merge, verified", size, merge, copy)
    yield _memory("merge", merge, largest)
    work = "with open_source(Path({!r})) as s: tool.shard(s, Path({!r}), 2, 2, optimizer=True)"
    shard = _timed(dcp_merge, work.format(str(merged), str(base / "ranks")), base / "ranks")
    yield _speed("shard to 2 x 2, verified", size, shard, copy)
    yield _memory("shard to 2 x 2", shard, largest)
    work = "with open_source(Path({!r})) as s: tool.write_run_folder(s, Path({!r}), optimizer=True)"
    back = _timed(_OPEN.format(module="run_folder"), work.format(str(merged), str(base / "again")), base / "again")
    yield _speed("shard --to dcp, verified", size, back, None)
    yield _memory("shard --to dcp", back, largest)
    setup = "from torch.distributed.checkpoint.format_utils import dcp_to_torch_save"
    peer = _timed(setup, f"dcp_to_torch_save({str(step)!r}, {str(base / 'torch.pt')!r})", base / "torch.pt")
    yield _against("merge", "torch dcp_to_torch_save", size, merge, peer)
    yield _memory("torch dcp_to_torch_save", peer, largest, goal=False)
    setup = "from safetensors.torch import load_file, save_file"
    load = (
        "save_file({{k: v for f in sorted(Path({!r}).glob('*.safetensors')) for k, v in load_file(f).items()}}, {!r})"
    )
    peer = _timed(setup, load.format(str(merged), str(base / "plain.safetensors")), base / "plain.safetensors")
    yield _against("merge", "safetensors load and save", size, merge, peer)
    yield _memory("safetensors load and save", peer, largest, goal=False)


def _write_checkpoint(folder: Path) -> tuple[int, int]:
    """A generator's checkpoint with Adam state; returns its bytes and those of its largest tensor."""
    script = f"""
from benchmarks.checkpoints import build
print(json.dumps(build(Path({str(folder)!r}), {GIGABYTES})))
"""
    answer = _run(_WORK.format(root=str(ROOT), setup="", work=script))
    size, largest = json.loads(answer.splitlines()[0])
    return int(size), int(largest)


def build(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Write the checkpoint by our own tool, from tensors that are drawn when they are read."""
    import dataclasses

    from megatron_vilg.checkpoint.manifest import Manifest
    from megatron_vilg.checkpoint.plan_sizes import canonical_tensors
    from megatron_vilg.checkpoint.run_folder import write_run_folder
    from megatron_vilg.checkpoint.tensors import TensorInfo, TensorSource
    from megatron_vilg.config.load import load_run_config

    layers = max(2, math.ceil((gigabytes - _GB_OF_TABLES) / _GB_PER_LAYER))
    run = load_run_config("paper-10b", overrides=[f"model.width={_WIDTH}", f"model.num_layers={layers}"])

    class Drawn(TensorSource):
        format = "random numbers"

        def __init__(self) -> None:
            super().__init__(folder)
            self.tensors = canonical_tensors(run)
            self.manifest = Manifest(kind="pretrain", step=1, model=dataclasses.asdict(run.model))

        def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            info = self.tensors[name]
            numel = (stop - start) * info.row_numel
            return block.repeat(-(-numel // _BLOCK))[:numel].reshape(stop - start, *info.row_shape)

    block = torch.randn(_BLOCK)
    source = Drawn()
    write_run_folder(source, folder, optimizer=True)
    sizes = [info.num_bytes for info in source.tensors.values() if isinstance(info, TensorInfo)]
    return sum(sizes), max(sizes)


def _timed(setup: str, work: str, remove: Path | None = None, *, make: bool = False) -> dict[str, float]:
    """Run in a fresh process; returns wall seconds until everything is on the disk, and extra peak memory."""
    if make and remove is not None:
        remove.mkdir()
    os.sync()
    start = time.perf_counter()
    answer = json.loads(_run(_WORK.format(root=str(ROOT), setup=setup, work=work)).splitlines()[-1])
    inside = time.perf_counter()
    os.sync()
    answer["seconds"] += time.perf_counter() - inside
    assert answer["seconds"] <= time.perf_counter() - start
    if remove is not None:
        shutil.rmtree(remove) if remove.is_dir() else remove.unlink()
    return dict(answer)


def _run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


def _speed(what: str, size: int, ours: dict[str, float], copy: dict[str, float] | None) -> Row:
    peer = size / copy["seconds"] / 1e6 if copy else None
    return Row(
        "K1",
        f"{what}, {size / 1e9:.1f} GB",
        size / ours["seconds"] / 1e6,
        "MB/s",
        "plain copy" if copy else "",
        peer,
        _COPIED if copy else None,
        rounds={OURS: [ours["seconds"]], **({"plain copy": [copy["seconds"]]} if copy else {})},
    )


def _against(what: str, peer_name: str, size: int, ours: dict[str, float], peer: dict[str, float]) -> Row:
    speeds = [size / each["seconds"] / 1e6 for each in (ours, peer)]
    seconds = {OURS: [ours["seconds"]], peer_name: [peer["seconds"]]}
    return Row("K1", f"{what}, {size / 1e9:.1f} GB", speeds[0], "MB/s", peer_name, speeds[1], rounds=seconds)


def _memory(what: str, ours: dict[str, float], largest: int, *, goal: bool = True) -> Row:
    name = f"{what}: extra peak memory ({largest / 1e6:.0f} MB largest)"
    value = ours["extra"] / largest
    return Row("K1", name, value, "largest tensors", goal=_MEMORY if goal else None, less_is_better=True)
