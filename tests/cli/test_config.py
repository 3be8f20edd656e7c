from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vilg.cli.main import EXIT_ERROR, main
from megatron_vilg.config.load import load_run_config
from megatron_vilg.config.options import all_options
from megatron_vilg.config.presets import PRESETS


def test_every_option_is_printed_with_value_origin_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--preset", "demo", "optim.lr=1e-3"]) == 0
    text = capsys.readouterr().out
    assert [path for path in all_options() if path != "preset" and f"  {path}=" not in text] == []
    assert "  optim.lr=0.001   [command line]\n      Peak learning rate. (a number above 0)\n" in text
    assert f"  train.num_steps={PRESETS['demo']().train.num_steps}   [preset demo]\n" in text
    assert "  optim.eps=1e-08   [default]\n" in text


def test_changed_shows_only_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--changed", "--lr", "0.5"]) == 0
    assert capsys.readouterr().out == "optim: Optimizer.\n  optim.lr=0.5   [command line]\n"
    assert main(["config", "--changed"]) == 0
    assert capsys.readouterr().out == "every option is at its default\n"


def test_changed_compares_values(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["config", "--preset", "demo", "--json"]) == 0
    file = tmp_path / "all.json"
    file.write_text(capsys.readouterr().out)
    assert main(["config", "--config", str(file), "--changed"]) == 0
    from_file = capsys.readouterr().out
    assert main(["config", "--preset", "demo", "--changed"]) == 0
    assert from_file.replace(f"[{file}]", "[preset demo]") == capsys.readouterr().out
    defaults = load_run_config()
    file.write_text(f"optim: {{lr: {defaults.optim.lr}, eps: 1e-5}}")
    decay = f"optim.weight_decay={defaults.optim.weight_decay}"
    assert main(["config", "--config", str(file), "--changed", decay]) == 0
    assert capsys.readouterr().out == f"optim: Optimizer.\n  optim.eps=1e-05   [{file}]\n"


def test_changed_json_can_be_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["optim.eps=1e-5", f"train.num_steps={load_run_config().train.num_steps}"]  # not what the preset says
    assert main(["config", "--preset", "demo", "--json", "--changed", *words]) == 0
    file = tmp_path / "changed.json"
    file.write_text(capsys.readouterr().out)
    assert load_run_config(file=file) == load_run_config("demo", overrides=words)
    assert len(file.read_text()) < 3000 and "eps" in json.loads(file.read_text())["optim"]
    assert main(["config", "--json", "--changed"]) == 0
    assert json.loads(capsys.readouterr().out) == {}


def test_json_can_be_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["config", "--preset", "demo", "--json"]) == 0
    file = tmp_path / "all.json"
    file.write_text(capsys.readouterr().out)
    assert load_run_config(file=file) == load_run_config("demo")
    assert json.loads(file.read_text())["preset"] == "demo"


def test_impossible_combinations_are_printed_and_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--preset", "demo", "model.num_heads=5"]) == EXIT_ERROR
    captured = capsys.readouterr()
    assert "  model.num_heads=5   [command line]\n" in captured.out
    assert captured.err.startswith("vilg config: ConfigError: 1 problem in the configuration\n  model.num_heads=5: ")


@pytest.mark.parametrize("layout", [["parallel.tensor=2"], ["parallel.replica=2", "parallel.shard=4"]], ids=str)
def test_a_layout_of_several_processes_is_printed_by_one(layout: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--changed", *layout]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("parallel: ") and captured.err == ""
    assert main(["config", *layout, "parallel.pipeline=2"]) == EXIT_ERROR  # no number of processes makes that work
    assert "parallel.num_microbatches=1: every rank of parallel.pipeline=2" in capsys.readouterr().err
