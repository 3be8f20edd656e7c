"""The runner on invented numbers: arithmetic, options and files. Nothing here looks at a clock."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.measure import OURS, Bench, Goal, Row, rate_rows, time_rows
from benchmarks.run import main


def fake(bench: Bench) -> Iterator[Row]:
    seconds = {OURS: [1.0, 2.0, 90.0], "slow": [8.0, 4.0, 3.0], "fast": [1.0, 1.0, 1.0]}
    amounts = dict.fromkeys(seconds, 100.0)
    yield from rate_rows("F1", "an invented rate", "things/s", amounts, seconds, Goal("ratio", ">=", 1.5))


def alone(bench: Bench) -> Iterator[Row]:
    yield Row("F2", "an invented time", 0.5, "s", goal=Goal("value", "<=", 1.0), less_is_better=True)


METRICS = {"cpu": {"F1": fake, "F2": alone}, "gpu": {"F3": alone}}


def test_rates_are_of_medians_and_ratios_above_one_are_better() -> None:
    slow, fast = fake(Bench(torch.device("cpu")))
    assert (slow.value, slow.peer_value, slow.ratio, slow.ok) == (50.0, 25.0, 2.0, True)
    assert (fast.value, fast.peer_value, fast.ratio, fast.ok) == (50.0, 100.0, 0.5, False)


def test_times_count_the_other_way() -> None:
    (row,) = time_rows("F3", "t", {OURS: [0.002], "peer": [0.006]}, {"peer": Goal("ratio", ">=", 4.0)})
    assert (row.value, row.peer_value) == (2.0, 6.0)
    assert row.ratio == pytest.approx(3.0)
    assert row.ok is False


def test_a_row_without_goal_is_neither_met_nor_missed() -> None:
    assert (
        Row("F", "m", 1.0, "s").record() | {"ok": None, "goal": None, "ratio": None} == Row("F", "m", 1, "s").record()
    )
    assert not Goal("ratio", ">=", 1.0).met(5.0, None)


def test_contenders_take_turns_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    contenders = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = Bench(torch.device("cpu")).interleave(contenders, rounds=2)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_rows_are_printed_and_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "rows.json"
    assert main(["--suite", "cpu", "--json", str(target)], METRICS) == 0
    printed = capsys.readouterr().out
    assert "2.00x" in printed and "1 of 3 goals missed" in printed
    assert f"python benchmarks/run.py --suite cpu --json {target}" in printed
    written = json.loads(target.read_text())
    assert written["threads"] == 1 and "torch " in written["versions"]
    assert [(row["id"], row["ratio"], row["ok"]) for row in written["rows"]] == [
        ("F1", 2.0, True),
        ("F1", 0.5, False),
        ("F2", None, True),
    ]
    assert written["rows"][0]["rounds_s"] == {OURS: [1.0, 2.0, 90.0], "slow": [8.0, 4.0, 3.0]}


def test_only_some_metrics_and_strict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--suite", "cpu", "--only", "F2", "--strict"], METRICS) == 0
    assert "F1" not in capsys.readouterr().out
    assert main(["--suite", "cpu", "--only", "F1", "--strict"], METRICS) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "cpu", "--only", "F2,F9"], "no such metric: F9; there are F1, F2, F3"),
        (["--suite", "cpu", "--only", "F3"], "--only F3: not in the cpu suite, which has F1, F2"),
        (["--suite", "cpu", "--rounds", "0"], "'0' is no number of rounds; 1 or more work"),
        (["--suite", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments, METRICS)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_gpu_suite_says_when_there_is_none(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--suite", "gpu"], METRICS) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "no CUDA device" in captured.err
    assert captured.out == ""


def test_rows_say_how_near_the_limit_they_are() -> None:
    assert Row("F", "rate", 40.0, "x/s", limit=50.0).share_of_limit == pytest.approx(0.8)
    assert Row("F", "time", 5.0, "ms", limit=4.0, less_is_better=True).record()["share_of_limit"] == pytest.approx(0.8)


@pytest.mark.slow
def test_the_gpu_suite_runs_dry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--suite", "gpu", "--dry-run", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in ("G0", "G1", "G2", "G3", "G4", "G5", "G6", "C8"))
    assert "goals missed" not in printed and "no figure above says anything" in printed
