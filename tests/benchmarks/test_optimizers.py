"""Optimizers in turn on a tiny run folder, and the rows on invented courses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.courses import Course
from benchmarks.optimizers import DIRECTIONS, main, rows
from megatron_vilg.config.load import write_run_folder_config
from megatron_vilg.config.schema import ParallelConfig
from tests.tiny_run import write_tiny_run
from tests.train.token_caches import SLOTS, write_cache


def course(values: list[float], seconds: float) -> Course:
    curve = list(enumerate(values, 1))
    return Course([seconds] * len(values), {name: list(curve) for name in DIRECTIONS})


def test_rows_count_steps_to_the_peers_end() -> None:
    found = list(rows({"adamw": course([5.0, 4.0, 3.0, 2.0], 1.0), "muon": course([4.0, 2.0, 1.5, 1.0], 2.0)}))
    steps, last, *_, seconds = found
    assert (steps.value, steps.peer_value, steps.ratio) == (2, 4, 2.0)
    assert (last.value, last.peer_value, last.ratio) == (1.0, 2.0, 2.0)
    assert len(found) == 5 and seconds.ratio == 0.5


def test_equal_curves_are_level_also_where_they_turn() -> None:
    """The peer is credited with the first step at which it was as good as at its end, as ours is."""
    values = [4.0, 3.5, 3.6, 3.8]
    steps, *_ = rows({"adamw": course(values, 1.0), "muon": course(values, 1.0)})
    assert (steps.value, steps.peer_value, steps.ratio) == (2, 2, 1.0)


def test_an_end_that_is_never_reached_has_no_row() -> None:
    found = list(rows({"adamw": course([5.0, 2.0], 1.0), "muon": course([5.0, 4.0], 1.0)}))
    assert len(found) == 3 and found[0].ratio == 0.5


def test_a_run_folder_is_trained_by_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = write_cache(tmp_path / "run" / "tokens", {"train": 10, "val": 3})
    run = write_tiny_run(tmp_path / "run", export=False, checkpoint=False)
    vocabulary = cache.settings["text_vocab_size"]
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, num_text_slots=SLOTS, text_vocab_size=vocabulary),
        text_tokenizer=dataclasses.replace(run.text_tokenizer, vocab_size=vocabulary),
        parallel=ParallelConfig(replica=2),  # as `make demo` leaves it
    )
    write_run_folder_config(run, tmp_path / "run")
    command = ["optim.warmup_steps=2", "train.batch_size=4", "--run", str(tmp_path / "run"), "--steps", "8"]
    command += ["--json", str(tmp_path / "rows.json")]
    assert main([*command, "--split", "val"]) == 0
    record = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    ends = [row for row in record["rows"] if "after 8 steps" in row["metric"]]
    assert len(ends) == 2 and all(row["value"] != row["peer_value"] for row in ends)
    assert len(record["rows"][-1]["rounds_s"]["muon"]) == 8 and "--steps 8" in record["command"]
    assert record["curves"].keys() == {"adamw", "muon"}
    for name, place in (("muon", "value"), ("adamw", "peer_value")):
        curves = [record["curves"][name][direction] for direction in DIRECTIONS]
        assert [step for step, _ in curves[0]] == list(range(1, 9))
        assert [curve[-1][1] for curve in curves] == [row[place] for row in ends]
    assert "muon: training step" in capsys.readouterr().out
    assert main([*command, "--split", "test"]) == 2
    assert "--split=test: no such held-out split" in (error := capsys.readouterr().err) and "Works: val" in error
    assert main([*command, "--split", "val", "--names", "sgd"]) == 2
    assert "optim.name=sgd" in capsys.readouterr().err
