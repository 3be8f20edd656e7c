"""The page of measured rows, on invented numbers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.measure import Goal, Row
from benchmarks.report import BEGIN, END, main, table


def rows() -> list[Row]:
    return [
        Row("C1", "a rate", 1234.5, "x/s", "peer", 600.0, Goal("ratio", ">=", 3.0), limit=2469.0),
        Row("C1", "a time", 0.5, "s", goal=Goal("value", "<=", 1.0), less_is_better=True),
    ]


def test_table_names_missed_goals_and_limits() -> None:
    lines = table([row.record() for row in rows()]).splitlines()
    assert lines[2] == "| a rate | 1234 | x/s | peer | 600 | 2.06 | 50% | >= 3x | **missed** |"
    assert lines[3] == "| a time | 0.5 | s |  |  |  |  | <= 1 |  |"


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_page_keeps_what_is_outside_the_markers(tmp_path: Path) -> None:
    page, record = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    header = {"command": "run", "date": "today", "device": "this", "versions": "1"}
    record.write_text(json.dumps({**header, "rows": [row.record() for row in rows()]}), encoding="utf-8")
    for _ in range(2):
        assert main([str(record)], page, tmp_path) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("### C1") == 1 and "results/performance-C1.svg" in text
    assert (tmp_path / "performance-C1.svg").read_text(encoding="utf-8").count("a rate / peer") == 1


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_sections_do_not_vanish_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, record = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text(f"{BEGIN}\n### C1: one\n### C17: another\n{END}\n", encoding="utf-8")
    header = {"command": "run", "date": "today", "device": "this", "versions": "1"}
    record.write_text(json.dumps({**header, "rows": [row.record() for row in rows()]}), encoding="utf-8")
    before = page.read_text(encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main([str(record)], page, tmp_path)
    assert stopped.value.code == 2 and "has C17, which none of these files has" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == before
    assert main([str(record), "--drop"], page, tmp_path) == 0 and "C17" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("arguments", "message"), [([], "usage"), (["none.json"], "no such file: none.json")])
def test_without_a_file_it_says_what_it_needs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
