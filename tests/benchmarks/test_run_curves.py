"""The plots of a run's instruments as one picture."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.run_curves import main


def write_metrics(folder: Path, **more: float) -> Path:
    lines = [{"step": step, "loss/text_to_image(nats/token)": 5.0 - 0.1 * step} | more for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_a_panel_for_each_kind_of_instrument(tmp_path: Path) -> None:
    layers = {f"attention/max_logit(layer {layer})": 3.0 + layer for layer in range(8)}
    run = write_metrics(tmp_path, **{"hidden/last_rms": 2.0}, **layers)
    assert main([str(run), "--out", str(tmp_path / "a.svg")]) == 0
    first = (tmp_path / "a.svg").read_text()
    assert first.count(">Largest attention logit of each layer (logit), first layers lighter<") == 1
    assert ">Size of the last block's output (root mean square)<" in first and "Cross-entropy" in first
    assert main([str(run), "--out", str(tmp_path / "b.svg")]) == 0
    assert (tmp_path / "b.svg").read_text() == first


def test_a_run_without_instruments_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_metrics(tmp_path)), "--out", str(tmp_path / "a.svg")]) == 2
    assert "train with log.instruments_every=20" in capsys.readouterr().err
