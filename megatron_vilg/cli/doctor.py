"""``vilg doctor``: what this machine offers, one plain line each."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vilg import __version__
from megatron_vilg.cli.device import add_device_option, chosen_device
from megatron_vilg.cli.options import add_config_options, load_from_args
from megatron_vilg.cli.outputs import require_writable
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.config.world import World, read_world
from megatron_vilg.errors import ConfigError

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "numpy", "sentencepiece", "safetensors", "pydantic", "pillow", "tensorboard", "resvg-py")
_OPTIONAL = ("deepspeed", "torchao", "triton", "transformers", "pycocoevalcap", "jieba")
_GIB = 2**30


def add_parser(subparsers: Any) -> None:
    """Register the verb; ``subparsers`` is what ``ArgumentParser.add_subparsers`` returns."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="say what this machine offers",
        description="Say what this machine offers: versions, devices, threads, npm, fonts, disk. Started by torchrun "
        "or srun it also says whether all processes answer, have the same versions, see one folder, and can sum along "
        "each axis of the layout; ranks that do not are named. Exit code 1 if something that every run needs is "
        "missing.",
        epilog="example: vilg doctor; srun python -m megatron_vilg doctor --path /shared/runs parallel.tensor=2",
    )
    parser.add_argument("--path", type=Path, default=Path(), help="where runs will be written (default: here)")
    parser.add_argument(
        "--timeout", type=_seconds, default=60.0, metavar="S", help="seconds to wait for other processes"
    )
    add_device_option(parser)
    add_config_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the lines; 1 if a base package is missing or the processes cannot work together."""
    world = read_world()
    config = load_from_args(args).run
    if world.size == 1:  # several processes name those ranks whose device or folder does not work
        _require_options(args)
    if world.is_main:
        for name, answer in _checks(args.path):
            print(f"{name:<14} {answer()}", flush=True)
    missing = [name for name in _PACKAGES if _version(name) is None]
    if missing:
        print(f"{'missing':<14} {', '.join(missing)}: install them with `pip install -e .`")
    if world.size == 1 or missing:
        return 1 if missing else 0
    return _together(args, config, world)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return value


def _require_options(args: argparse.Namespace) -> None:
    """Refuse a device that torch cannot use, and a place that was named but cannot be written."""
    if _version("torch") is not None and args.device != "auto":
        chosen_device(args.device)
    if args.path != Path():
        require_writable(args.path, f"--path={args.path}")


def _checks(path: Path) -> tuple[tuple[str, Callable[[], str]], ...]:
    return (
        ("python", lambda: f"{platform.python_version()} on {platform.platform()}"),
        ("megatron_vilg", lambda: __version__),
        ("packages", lambda: _versions(_PACKAGES)),
        ("optional", lambda: _versions(_OPTIONAL)),
        ("devices", _devices),
        ("arithmetic", _arithmetic),
        ("threads", _threads),
        ("memory", _memory),
        ("npm", _npm),
        ("fonts", _fonts),
        ("disk", lambda: _disk(path)),
    )


def _together(args: argparse.Namespace, run: RunConfig, world: World) -> int:
    """What several processes find out together; rank 0 prints it."""
    from megatron_vilg.parallel.launch import device_of
    from megatron_vilg.parallel.layout import Layout
    from megatron_vilg.parallel.probe import Probe

    if Layout.of(run.parallel, world.size).world_size != world.size:
        raise ConfigError(
            [
                f"{world.size} processes: tensor x pipeline x replica x shard does not give them. "
                "Works: parallel.shard=-1 and factors that divide their number"
            ]
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError([f"{name}: not set, so {world.size} processes cannot meet. Works: torchrun or srun."])
    device = device_of(world, chosen_device(args.device))
    probe = Probe(world, args.timeout)
    versions = {name: _version(name) or "missing" for name in (*_PACKAGES, *_OPTIONAL)}
    versions |= {"python": platform.python_version(), "megatron_vilg": __version__, "device": _device_name(device)}
    findings = [*probe.meet(versions), probe.share(args.path)]
    if not findings[0].problems:
        findings += probe.reduce(run.parallel, device)
    problems = [problem for finding in findings for problem in finding.problems]
    if world.is_main:
        for finding in findings:
            print(f"{finding.name:<14} {finding.answer}")
            for problem in finding.problems:
                print(f"{'':<14} {problem}")
    sys.stdout.flush()
    probe.part()
    # A collective that hangs would keep the process from ending.
    os._exit(1 if problems else 0)


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    import torch

    return torch.cuda.get_device_name(device)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions(packages: tuple[str, ...]) -> str:
    return ", ".join(f"{package} {_version(package) or 'missing'}" for package in packages)


def _devices() -> str:
    if _version("torch") is None:
        return "unknown without torch"
    import torch

    if not torch.cuda.is_available():
        return f"CPU only (torch built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU'})"
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if properties.major >= 8 else "no bf16"
        names.append(f"{properties.name} ({properties.total_memory / _GIB:.0f} GiB, {bf16})")
    return "; ".join(names)


def _arithmetic() -> str:
    if _version("torch") is None:
        return "unknown without torch"
    import torch

    from megatron_vilg.ops.precision import choose_precision

    precision, reason = choose_precision("auto", "cuda" if torch.cuda.is_available() else "cpu")
    return f"precision=auto is {precision}: {reason}"


def _threads() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    settings = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    return f"{usable} CPU cores usable" + (f", {', '.join(settings)}" if settings else "")


def _memory() -> str:
    info = Path("/proc/meminfo")
    if not info.is_file():
        return "unknown on this system"
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return f"{available / _GIB:.1f} GiB available"


def _npm() -> str:
    path = shutil.which("npm")
    if path is None:
        return "missing: `vilg data demo` needs it to fetch the emoji; your own pictures do not"
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not answer ({error})"
    return f"{done.stdout.strip()} ({path})" if done.returncode == 0 else f"{path} fails: {done.stderr.strip()}"


def _fonts() -> str:
    if _version("pylopdf-fonts-zh-cn") is None:
        return "missing: pylopdf-fonts-zh-cn, for Chinese text on pictures"
    from pylopdf_fonts_zh_cn import sans_path

    return f"Noto Sans SC ({sans_path()})"


def _disk(path: Path) -> str:
    existing = next(parent for parent in (path.resolve(), *path.resolve().parents) if parent.exists())
    usage = shutil.disk_usage(existing)
    return f"{usage.free / _GIB:.1f} GiB free of {usage.total / _GIB:.1f} at {existing}"
