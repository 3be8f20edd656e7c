"""The examples of drawing and captioning run, and their prompt files hold prompts."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.tiny_run import CAPTIONS, write_tiny_run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_draw_then_caption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_run(tmp_path / "run", checkpoint=False)
    draw = runpy.run_path(str(EXAMPLES / "generate_images.py"))["main"]
    draw(str(tmp_path / "run"), CAPTIONS[:2], tmp_path / "drawn")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[1] for line in lines] == [p for p in CAPTIONS[:2] for _ in range(2)]
    pictures = sorted(str(path) for path in (tmp_path / "drawn").iterdir())
    assert len(pictures) == 4
    caption = runpy.run_path(str(EXAMPLES / "caption_images.py"))["main"]
    caption(str(tmp_path / "run"), pictures)
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == pictures * 3
    assert {row[1] for row in rows} == {"greedy", "beam 5", "best of 32"}
    assert all(row[3].endswith(" nats") for row in rows)


@pytest.mark.parametrize("name", ["styles.txt", "poetry.txt"])
def test_prompt_files_hold_prompts(name: str) -> None:
    lines = (EXAMPLES / "prompts" / name).read_text(encoding="utf-8").splitlines()
    assert sum(not line.startswith("#") and bool(line.strip()) for line in lines) >= 8
