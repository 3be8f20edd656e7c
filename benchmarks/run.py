"""Print speed beside its peers, one row per metric: python benchmarks/run.py --suite cpu [--only C1,C4] [--json F]."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

# Before torch: one thread, so that CPU seconds mean the same for everyone.
os.environ["OMP_NUM_THREADS"] = "1"
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.attention_layers import attention_layers
from benchmarks.checkpoints import checkpoint_tools
from benchmarks.counts import cache_capacity, cache_reads
from benchmarks.decoding import decoding, samples_of_one_prompt
from benchmarks.gpu import attention_kernels, ceilings, drawing, image_tokenizer
from benchmarks.gpu_training import training_10b, training_10b_slice, training_300m
from benchmarks.loss_head import loss_head
from benchmarks.measure import Bench, Row
from benchmarks.start import import_time, muon_update, optimizer_update
from benchmarks.training import training_step, training_step_of_peers

Metric = Callable[[Bench], Iterator[Row]]

CPU_METRICS: dict[str, Metric] = {
    "C1": training_step,
    "C2": training_step_of_peers,
    "C3": attention_layers,
    "C4": decoding,
    "C5": cache_reads,
    "C6": cache_capacity,
    "C7": samples_of_one_prompt,
    "C8": loss_head,
    "C14": image_tokenizer,
    "C15": optimizer_update,
    "C16": import_time,
    "C17": muon_update,
    "K1": checkpoint_tools,
}
GPU_METRICS: dict[str, Metric] = {
    "G0": ceilings,
    "G1": attention_kernels,
    "G2": training_300m,
    "G3": training_10b_slice,
    "G4": training_10b,
    "G5": drawing,
    "G6": image_tokenizer,
    "C1": training_step,
    "C4": decoding,
    "C8": loss_head,
}
METRICS = {"cpu": CPU_METRICS, "gpu": GPU_METRICS}
"""By suite. The gpu suite repeats the comparisons that hold there too."""
PACKAGES = ("torch", "transformers", "x-transformers", "dalle-pytorch", "triton", "numpy", "safetensors", "deepspeed")
COLUMNS = "{:4} {:58} {:>10} {:24} {:25} {:>10} {:>7} {:>8} {:>8}  {}"


def main(arguments: Sequence[str] | None = None, suites: Mapping[str, Mapping[str, Metric]] = METRICS) -> int:
    """Run the suite; 0, 1 if a goal is missed and ``--strict`` was given, or 2 if it cannot run here."""
    options = _parse(arguments, suites)
    metrics = suites[options.suite]
    if options.suite == "gpu" and not (torch.cuda.is_available() or options.dry_run):
        print(
            "benchmarks: no CUDA device is visible to torch, so the gpu suite cannot run here; --dry-run works.",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if options.suite == "gpu" and not options.dry_run else "cpu")
    bench = Bench(device, options.rounds, tiny=options.dry_run)
    words = sys.argv[1:] if arguments is None else list(arguments)
    header = describe(device, shlex.join(["python", "benchmarks/run.py", *words]))
    for key, value in header.items():
        print(f"{key:9} {value}")
    print(COLUMNS.format("id", "metric", "value", "unit", "peer", "its value", "ratio", "of limit", "goal", "ok"))
    rows: list[Row] = []
    for name in options.only or (_dry(metrics) if options.dry_run else metrics):
        for measured in metrics[name](bench):
            row = replace(measured, goal=None) if options.dry_run else measured  # toy sizes meet or miss nothing
            print(line(row), flush=True)
            rows.append(row)
        if options.json is not None:  # after each metric: a run of an hour that is cut short keeps what it measured
            write_rows(options.json, header, rows)
    if options.dry_run:
        print("dry run: everything ran; sizes are toys, so no figure above says anything")
        return 0
    missed = [row for row in rows if row.ok is False]
    print(f"{len(missed)} of {sum(row.goal is not None for row in rows)} goals missed")
    return int(bool(missed) and options.strict)


def _dry(metrics: Mapping[str, Metric]) -> list[str]:
    """Those that have sizes for a dry run."""
    return [name for name in metrics if name.startswith("G") or name == "C8"]


def line(row: Row) -> str:
    """A row as text."""
    return COLUMNS.format(
        row.id,
        row.metric,
        _number(row.value),
        row.unit,
        row.peer,
        _number(row.peer_value),
        "" if row.ratio is None else f"{row.ratio:.2f}x",
        "" if row.share_of_limit is None else f"{row.share_of_limit:.0%}",
        "" if row.goal is None else str(row.goal),
        {None: "", True: "yes", False: "NO"}[row.ok],
    ).rstrip()


def describe(device: torch.device, command: str) -> dict[str, Any]:
    """What a number needs to be repeated."""
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": name,
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.1f} processes wanted a core in the minute before",
        "versions": ", ".join(f"{key} {value}" for key, value in versions.items()),
    }


def _cpu_name() -> str:
    """The instruction set that torch uses, and the cores: the name of the processor says less."""
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _parse(arguments: Sequence[str] | None, suites: Mapping[str, Mapping[str, Metric]]) -> argparse.Namespace:
    metrics = {name: metric for suite in suites.values() for name, metric in suite.items()}

    def names(text: str) -> list[str]:
        wanted = text.split(",")
        if unknown := [name for name in wanted if name not in metrics]:
            raise argparse.ArgumentTypeError(f"no such metric: {', '.join(unknown)}; there are {', '.join(metrics)}")
        return wanted

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of rounds; 1 or more work")
        return int(text)

    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)
    parser.add_argument("--suite", choices=("cpu", "gpu"), required=True)
    parser.add_argument("--only", type=names, metavar="C1,C4", help=f"some of {', '.join(metrics)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows, with every round's seconds")
    parser.add_argument("--rounds", type=count, default=5, help="timed rounds of the long metrics (default 5)")
    parser.add_argument("--strict", action="store_true", help="exit 1 if a goal is missed")
    parser.add_argument("--dry-run", action="store_true", help="smallest sizes on the CPU, to see that all of it runs")
    options = parser.parse_args(arguments)
    own = suites[options.suite]
    if foreign := [name for name in options.only or () if name not in own]:
        parser.error(f"--only {','.join(foreign)}: not in the {options.suite} suite, which has {', '.join(own)}")
    return options


def write_rows(path: Path, header: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write what ``describe`` said and the rows as JSON, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    content = {**header, "rows": [row.record() for row in rows]}
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.rename(path)


if __name__ == "__main__":
    sys.exit(main())
