"""Small files of a token cache are complete or not there, whoever writes them at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_vilg.data.token_files import partial_path, read_json, whole_file, write_json


def test_writers_with_equal_process_numbers_do_not_meet(tmp_path: Path) -> None:
    """Threads are such writers, as are processes in containers that share a folder."""
    path = tmp_path / "manifest.json"
    content = {"shards": ["x" * 50] * 500}

    def write(_: int) -> None:
        for _ in range(50):
            write_json(path, content)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(4)))
    assert read_json(path) == content
    assert [found.name for found in tmp_path.iterdir()] == ["manifest.json"]
    assert partial_path(path) != partial_path(path)


def test_what_fails_half_way_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        partial.write_text("{")
        raise KeyboardInterrupt
    assert read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]
