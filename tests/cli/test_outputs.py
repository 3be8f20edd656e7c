"""A place for results is asked for without being made."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from megatron_vilg.cli.outputs import (
    full_disk_explained,
    require_json_place,
    require_new_folder,
    require_writable,
    write_json,
)
from megatron_vilg.errors import CheckpointError, ConfigError


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


def test_a_folder_that_must_be_new(tmp_path: Path) -> None:
    require_new_folder(tmp_path, "--out=x")
    require_new_folder(tmp_path / "new" / "deeper", "--out=x")
    for name in "abcd":
        (tmp_path / name).write_text("")
    rule = r"--out=x: must be new or empty, it holds a, b, c, \.\.\.\. Works: a new folder, or remove this one"
    with pytest.raises(ConfigError, match=rule):
        require_new_folder(tmp_path, "--out=x")
    with pytest.raises(ConfigError, match="is no folder"):
        require_new_folder(tmp_path / "a", "--out=x")


def test_a_json_file_makes_its_folders_and_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "deeper" / "f.json"
    require_json_place(file)
    assert not list(tmp_path.iterdir())
    write_json(file, {"说明": 1})
    assert json.loads(file.read_text(encoding="utf-8")) == {"说明": 1} and "说明" in file.read_text(encoding="utf-8")
    assert [path.name for path in file.parent.iterdir()] == ["f.json"]


def test_a_json_file_that_is_a_folder_or_lies_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    places = {tmp_path: "it is a folder", tmp_path / "file" / "x.json": f"{tmp_path / 'file'} is no folder"}
    for place, reason in places.items():
        with pytest.raises(ConfigError, match=f"--json={place}: cannot be written .{reason}.; name a"):
            require_json_place(place)
    with pytest.raises(ConfigError, match=f"--json={tmp_path / 'file' / 'x.json'}: cannot be written"):
        write_json(tmp_path / "file" / "x.json", {})


def test_no_json_file_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_json_place(None)
    write_json(None, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a picture of 28 pixels (error 28)"),
        RuntimeError("I/O error: No such file or directory (os error 2)"),
        OSError(errno.EIO, "Input/output error"),
        CheckpointError("run/export: cannot be written (OSError: No space left on device (os error 28))"),
    ],
    ids=repr,
)
def test_what_is_no_full_disk_or_is_explained_already_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, full_disk_explained(Path("run")):
        raise error
    assert caught.value is error
