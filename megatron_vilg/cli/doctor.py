"""``vilg doctor``: what this machine offers, one plain line each."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_vilg import __version__

_PACKAGES = ("torch", "numpy", "sentencepiece", "safetensors", "pydantic", "pillow", "tensorboard", "resvg-py")
_OPTIONAL = ("deepspeed", "triton", "transformers")
_GIB = 2**30


def add_parser(subparsers: Any) -> None:
    """Register the verb; ``subparsers`` is what ``ArgumentParser.add_subparsers`` returns."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="say what this machine offers",
        description="Say what this machine offers: versions, devices, threads, npm, fonts, disk. Exit code 1 if "
        "something that every run needs is missing.",
        epilog="example: vilg doctor",
    )
    parser.add_argument("--path", type=Path, default=Path(), help="where runs will be written (default: here)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the lines; 1 if a base package is missing."""
    checks: tuple[tuple[str, Callable[[], str]], ...] = (
        ("python", lambda: f"{platform.python_version()} on {platform.platform()}"),
        ("megatron_vilg", lambda: __version__),
        ("packages", lambda: _versions(_PACKAGES)),
        ("optional", lambda: _versions(_OPTIONAL)),
        ("devices", _devices),
        ("threads", _threads),
        ("memory", _memory),
        ("npm", _npm),
        ("fonts", _fonts),
        ("disk", lambda: _disk(args.path)),
    )
    for name, answer in checks:
        print(f"{name:<14} {answer()}")
    missing = [name for name in _PACKAGES if _version(name) is None]
    if missing:
        print(f"{'missing':<14} {', '.join(missing)}: install them with `pip install -e .`")
    return 1 if missing else 0


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
