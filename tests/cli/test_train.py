"""``vilg train`` refuses at once what only the engine would notice after hours of preparation."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vilg.cli.main import EXIT_ERROR, main


def test_attention_that_cannot_train_here_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--preset", "demo", "--data", str(tmp_path / "none"), "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "run"), "ops.attention=flex"]) == EXIT_ERROR
    assert "ops.attention=flex: torch's FlexAttention has no backward pass on a CPU" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["logs"]
