"""The table of remedies: what counts as diverged, one cell per figure, and that every row is a valid configuration."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.stability import LOSSES, main, measure, remedies, stress_settings
from benchmarks.stability_report import table, write_report
from megatron_vilg.checkpoint.image_tokenizer import save_image_tokenizer
from megatron_vilg.config.check import check
from megatron_vilg.config.load import load_run_config
from megatron_vilg.models.vqgan import VQGAN
from tests.models.test_reconstructor import tokenizer_config


def lines(totals: list[float | None]) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            LOSSES[0]: None if total is None else total - 1.0,
            LOSSES[1]: None if total is None else 1.0,
            "attention/max_logit(layer 0)": float(step),
            "log_z(image_to_text)": 5.0,
            "step/skipped": 2.0,
            "val/text_to_image(nats/token)": 3.0,
        }
        for step, total in enumerate(totals, 1)
    ]


def test_every_row_is_valid_and_differs_from_stress_alone() -> None:
    base, rows = stress_settings(100, 0.03), remedies(100)
    runs = [load_run_config("demo", overrides=[*base, *row.settings, "image_tokenizer.image_size=24"]) for row in rows]
    assert all(check(run) == [] for run in runs)
    nothing = runs[[row.name for row in rows].index("nothing on")]
    assert sum(run == nothing for run in runs) == 1
    assert not nothing.model.qk_norm and nothing.optim.lr == 0.03 and nothing.train.precision == "bf16"
    assert runs[-1].model.qk_norm and runs[-1].model.sandwich_norm and runs[-1].train.rollback_factor


@pytest.mark.parametrize(
    ("totals", "stopped", "diverged"),
    [
        ([9.0 - 0.1 * step for step in range(40)], "", False),
        ([9.0 - 0.1 * step for step in range(40)], "too many steps in a row", True),
        ([5.0] * 30 + [6.5] * 10, "", True),
        ([5.0] * 30 + [5.5] * 10, "", False),
        ([5.0] * 39 + [None], "", True),
    ],
)
def test_what_counts_as_diverged(totals: list[float | None], stopped: str, diverged: bool) -> None:
    found = measure(lines(totals), stopped)
    assert found["diverged"] is diverged and found["stopped"] == stopped
    assert found["largest_logit"] == 40.0 and found["largest_log_z"] == 5.0 and found["largest_rms"] is None
    assert found["skipped"] == 2 and found["rollbacks"] == 0 and found["held_out"] == {"val": 3.0}


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_report_has_a_row_and_a_panel_each(tmp_path: Path) -> None:
    runs = [measure(lines([9.0] * 20)) | {"seed": seed, "curve": [[1, 9.0], [2, None], [3, 8.0]]} for seed in range(2)]
    rows = [{"row": name, "settings": settings, "runs": runs} for name, settings in (("nothing on", []), ("x", ["a"]))]
    write_report({"command": "c", "rows": rows}, tmp_path)
    assert json.loads((tmp_path / "stability.json").read_text())["rows"][1]["row"] == "x"
    text = table(rows).splitlines()
    assert len(text) == 4 and text[3].startswith("| x | 8.00 | 1.00 | - | 20 | - | 5 |") and "0 of 2" in text[3]
    assert (tmp_path / "stability.svg").read_text(encoding="utf-8").count(">x<") == 1


@pytest.mark.slow
@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_runs_that_are_done_are_not_done_again(
    tmp_path: Path, captions_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_image_tokenizer(VQGAN(tokenizer_config("vqgan")).eval(), tmp_path / "vq" / "image_tokenizer")
    command = ["--data", str(captions_folder), "--tokenizer", str(tmp_path / "vq"), "--out", str(tmp_path / "out")]
    command += ["--steps", "20", "--seeds", "1", "--only"]
    assert main([*command, "nothing on"]) == 0
    result = tmp_path / "out" / "runs" / "nothing-on-0" / "result.json"
    first = result.read_bytes()
    assert main([*command, "nothing on,z_loss"]) == 0
    assert result.read_bytes() == first
    record = json.loads((tmp_path / "out" / "stability.json").read_text())
    assert [row["row"] for row in record["rows"]] == ["nothing on", "z_loss"]
    assert main([*command, "magic"]) == 2
    assert "--only=magic: no such row" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="of other settings"):
        main([*command, "nothing on", "--stress", "3"])


@pytest.fixture
def captions_folder(tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "pairs" / "train"
    folder.mkdir(parents=True)
    for number in range(24):
        Image.new("RGB", (24, 24), (10 * number, 240 - 10 * number, 90)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"第{number}张图片，颜色{number % 5}", encoding="utf-8")
    return tmp_path / "pairs"
