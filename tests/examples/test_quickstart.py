"""The whole way, as ``make demo`` goes it, in its two-minute form; fetches the demo's pictures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 900


def run_quickstart(folder: Path, name: str) -> dict[str, Any]:
    environment = os.environ | {
        "SMOKE": "1",
        "OUT": str(folder / name),
        "DATA": str(folder / "data"),
        "VILG": f"{sys.executable} -m megatron_vilg",
        "PYTHON": sys.executable,
    }
    script = [str(ROOT / "examples" / "quickstart.sh")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / name / "report.png").is_file()
    report: dict[str, Any] = json.loads((folder / name / "report.json").read_text(encoding="utf-8"))
    return report


@pytest.mark.parametrize(
    ("knobs", "name"),
    [({}, "demo"), ({"SMOKE": "1"}, "demo-smoke"), ({"FULL": "1"}, "demo-full")],
    ids=["demo", "smoke", "full"],
)
def test_each_form_has_folders_of_its_own(tmp_path: Path, knobs: dict[str, str], name: str) -> None:
    stub = tmp_path / "vilg"
    stub.write_text('#!/bin/sh\necho "$@"\n[ "$1" != train ]\n')  # ends the script before anything is written
    stub.chmod(0o755)
    knobs = knobs | {"VILG": str(stub), "WORKERS": "1", "PATH": os.environ["PATH"]}
    script = [str(ROOT / "examples" / "quickstart.sh")]
    done = subprocess.run(script, env=knobs, capture_output=True, text=True, timeout=60, check=False)
    data, train = (line.split() for line in done.stdout.splitlines() if line.startswith(("data ", "train ")))
    assert data[:4] == ["data", "demo", "--out", f"data/{name}"]
    assert train[3:7] == ["--data", f"data/{name}", "--out", f"runs/{name}"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="the demo's pictures are fetched with npm")
def test_same_seed_gives_the_same_report_but_for_the_seconds(tmp_path: Path) -> None:
    first, second = run_quickstart(tmp_path, "first"), run_quickstart(tmp_path, "second")
    assert first.pop("seconds")
    assert second.pop("seconds")
    assert first == second
    assert {"ce", "ce_unseen", "caption", "retrieval", "style", "reconstruction", "seed", "config"} <= set(first)
