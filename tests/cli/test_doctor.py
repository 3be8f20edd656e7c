from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vilg.cli import doctor
from megatron_vilg.cli.main import main


def lines_of(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_one_line_each(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--path", str(tmp_path / "not" / "there")]) == 0
    lines = lines_of(capsys)
    assert list(lines) == [
        "python",
        "megatron_vilg",
        "packages",
        "optional",
        "devices",
        "arithmetic",
        "threads",
        "memory",
        "npm",
        "fonts",
        "disk",
    ]
    shown = lines["packages"].split(", ")[0].removeprefix("torch ")
    assert shown.split("+")[0] == torch.__version__.split("+")[0]  # pip knows PyPI's wheels without "+cu130"
    assert lines["arithmetic"].startswith("precision=auto is ")
    assert lines["disk"].endswith(str(tmp_path.resolve()))


def test_missing_base_package_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PACKAGES", ("torch", "no-such-package"))
    assert main(["doctor"]) == 1
    assert lines_of(capsys)["missing"] == "no-such-package: install them with `pip install -e .`"


def test_missing_npm_says_what_needs_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main(["doctor"]) == 0
    assert lines_of(capsys)["npm"].startswith("missing: `vilg data demo` needs it")


def test_an_unknown_option_is_named_before_anything_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "parallel.tensr=2"]) == 2
    captured = capsys.readouterr()
    assert "parallel.tensr=2: no such option. Did you mean parallel.tensor?" in captured.err
    assert captured.out == ""


def test_a_device_and_a_place_that_do_not_work_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "nope"]) == 2
    assert "--device=nope: torch cannot use it (" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--path", str(tmp_path / "file")]) == 2
    captured = capsys.readouterr()
    assert f"--path={tmp_path / 'file'}: cannot be written ({tmp_path / 'file'} is no folder)" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf", "soon"])
def test_a_timeout_is_a_number_of_seconds(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", f"--timeout={value}"])
    assert f"must be a number of seconds above 0, got '{value}'" in capsys.readouterr().err
