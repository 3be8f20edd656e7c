from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "show_report.py"


def test_main_figures_are_printed_and_absent_ones_left_out(tmp_path: Path) -> None:
    report = {
        "caption": {"trained": {"exact_match": 0.75}, "unseen": {"exact_match": 0.25}},
        "reconstruction": {"l1": 0.04, "psnr": 22.2},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    command = [sys.executable, str(SCRIPT), str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines == ["captions word for word trained 0.750 unseen 0.250", "image tokenizer l1 0.040 psnr 22.200"]
