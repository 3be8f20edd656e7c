"""A place for results is asked for without being made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_vilg.cli.outputs import require_writable
from megatron_vilg.errors import ConfigError


def test_a_folder_that_is_there_or_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "new" / "deeper", Path(), Path("new")):
        require_writable(folder, "--out=x")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "new" / "deeper"):
        with pytest.raises(ConfigError, match=f"--out=x: cannot be written .{tmp_path / 'file'} is no folder"):
            require_writable(folder, "--out=x")


def test_a_folder_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(ConfigError, match=f"--out=x: cannot be written .{tmp_path} is not writable"):
        require_writable(tmp_path / "new", "--out=x")
