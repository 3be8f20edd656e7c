from __future__ import annotations

import dataclasses
import errno
import json
import logging
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_vilg.config.schema import LogConfig
from megatron_vilg.errors import MissingPackageError, TrainingError
from megatron_vilg.train.metrics import Column, MetricWriter, keep_until, peak_rss

QUIET = LogConfig(every=2, tensorboard=False)
LOSS = "loss/text_to_image(nats/token)"


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def run_steps(writer: MetricWriter, steps: range) -> None:
    for step in steps:
        with writer.loading():
            pass
        writer.count(items=4, tokens=100)
        if writer.due(step):
            writer.log(step, {LOSS: torch.tensor(5.0 - step), "grad_norm": 1.0})


def test_one_line_per_log_step_with_units(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, QUIET, num_steps=5) as writer:
        run_steps(writer, range(1, 6))
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [2, 4, 5]
    assert found[0][LOSS] == 3.0
    expected = {
        "step",
        LOSS,
        "grad_norm",
        "throughput(pairs/s)",
        "throughput(tokens/s)",
        "throughput(tokens/cpu_s)",
        "time/data(%)",
        "memory/peak_rss(GiB)",
    }
    assert set(found[0]) == expected


def test_rates_and_waiting_time_are_measured(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, QUIET, num_steps=10, items="pictures") as writer:
        start, cpu = time.perf_counter(), time.process_time()
        with writer.loading():
            time.sleep(0.15)
        while time.process_time() - cpu < 0.05:
            pass
        writer.count(items=30, tokens=600)
        values = writer.log(1, {})
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        assert values["throughput(pictures/s)"] == pytest.approx(30 / seconds, rel=0.1)
        assert values["throughput(tokens/s)"] == pytest.approx(600 / seconds, rel=0.1)
        assert values["throughput(tokens/cpu_s)"] == pytest.approx(600 / cpu_seconds, rel=0.2)
        assert values["time/data(%)"] == pytest.approx(100 * 0.15 / seconds, rel=0.1)
        again = writer.log(2, {})
        assert again["throughput(pictures/s)"] == 0.0 and again["time/data(%)"] == 0.0


def test_tokens_per_processor_second_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are counted over all ranks, processor time on the one that reports."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    with MetricWriter(tmp_path, QUIET, num_steps=10) as writer:
        cpu = time.process_time()
        while time.process_time() - cpu < 0.05:
            pass
        writer.count(items=30, tokens=600)
        values = writer.log(1, {})
        cpu_seconds = time.process_time() - cpu
    assert values["throughput(tokens/cpu_s)"] == pytest.approx(600 / 4 / cpu_seconds, rel=0.2)


def test_mfu_is_of_a_given_peak_over_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = dataclasses.replace(QUIET, peak_tflops=2.0)
    with MetricWriter(tmp_path, config, num_steps=10, item_flops=5e9) as writer:
        writer.count(items=30, tokens=600)
        values = writer.log(1, {})
    assert values["mfu(%)"] == pytest.approx(100 * values["throughput(pairs/s)"] * 5e9 / (4 * 2e12))
    with MetricWriter(tmp_path, QUIET, num_steps=10, start_step=1, item_flops=5e9) as writer:
        assert "mfu(%)" not in writer.log(2, {})


def test_memory_is_the_peak_of_the_process() -> None:
    before = peak_rss()
    assert before > 50 * 2**20
    block = torch.ones(before // 4 + 8 * 2**20, dtype=torch.float32)
    assert peak_rss() >= before + 16 * 2**20
    assert block[0] == 1


def test_resuming_drops_later_and_torn_lines(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, QUIET, num_steps=20) as writer:
        run_steps(writer, range(1, 11))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    with MetricWriter(tmp_path, QUIET, num_steps=20, start_step=6) as writer:
        run_steps(writer, range(7, 13))
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8, 10, 12]


def test_a_start_from_zero_drops_all(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricWriter(tmp_path, QUIET, num_steps=4) as writer:
            run_steps(writer, range(1, 5))
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]


@pytest.mark.parametrize("bad", ["half", "[1]\n", '{"loss": 1}\n', '{"step": 2}\n'])
def test_the_file_is_cut_at_the_first_line_that_does_not_fit(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n' + bad + '{"step": 6}\n')
    keep_until(path, 100)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'


def test_steps_must_rise(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, QUIET, num_steps=4, start_step=2) as writer:
        with pytest.raises(ValueError, match="step 2 was logged after step 2"):
            writer.log(2, {})
        writer.log(3, {})
    assert [line["step"] for line in lines(tmp_path)] == [3]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, QUIET, num_steps=4) as writer:
        values = writer.log(1, {"a": float("nan"), "b": float("inf")})
    assert values["b"] == float("inf")
    assert lines(tmp_path)[0]["a"] is None and lines(tmp_path)[0]["b"] is None


def test_console_has_one_legend_and_a_line_per_log_step(tmp_path: Path, caplog, capsys) -> None:
    columns = (Column(LOSS, "t2i", ".2f"), Column("absent", "x"))
    with (
        caplog.at_level(logging.INFO, logger="megatron_vilg"),
        MetricWriter(tmp_path, QUIET, num_steps=4, columns=columns) as writer,
    ):
        run_steps(writer, range(1, 5))
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].startswith("metrics of rank 0 of 1 (process ")
    assert messages[1] == f"legend: t2i = {LOSS}, x = absent"
    assert messages[2:] == ["step 2/4  t2i 3.00", "step 4/4  t2i 1.00"]
    assert capsys.readouterr().err == "", "no progress bar without a terminal"


def test_a_terminal_gets_a_progress_bar(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with MetricWriter(tmp_path, QUIET, num_steps=4, start_step=1) as writer:
        run_steps(writer, range(2, 5))
    assert "4/4" in capsys.readouterr().err


def test_tensorboard_gets_scalars_pictures_and_texts(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LogConfig(every=1)
    with MetricWriter(tmp_path, config, num_steps=4) as writer:
        run_steps(writer, range(1, 4))
        writer.images("samples/pictures", torch.rand(2, 3, 8, 8), 3)
        writer.text("samples/captions", "一只猫", 3)
    with MetricWriter(tmp_path, config, num_steps=4, start_step=2) as writer:
        run_steps(writer, range(3, 5))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars(LOSS)] == [1, 2, 3, 4]
    assert [e.value for e in events.Scalars(LOSS)] == [4.0, 3.0, 2.0, 1.0]
    texts = [tag for tag in events.Tags()["tensors"] if tag.startswith("samples/captions")]
    assert texts == ["samples/captions/text_summary"]
    assert "samples/pictures" in events.Tags()["images"]


def test_a_run_that_went_back_has_one_value_per_step_in_both_files(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricWriter(tmp_path, LogConfig(every=1), num_steps=3) as writer:
        for step in range(1, 4):
            writer.log(step, {LOSS: float(step)})
        writer.images("samples/pictures", torch.rand(2, 3, 8, 8), 3)
        writer.rewind(1)
        for step in (2, 3):
            writer.log(step, {LOSS: 100.0 + step})
    written = [(line["step"], line[LOSS]) for line in lines(tmp_path)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars(LOSS)] == written
    assert written == [(1, 1.0), (2, 102.0), (3, 103.0)]
    assert events.Images("samples/pictures") == []


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    message = r"metrics\.jsonl: cannot be written \(No space left on device\)\. Works: .* goes on from the newest"
    with (
        Path("/dev/full").open("w") as full,
        pytest.raises(TrainingError, match=message),
        MetricWriter(tmp_path, QUIET, num_steps=4) as writer,
    ):
        writer._file.close()
        writer._file = full
        writer.log(2, {LOSS: 1.0})


@pytest.mark.parametrize("name", ["add_scalar", "close", "__init__"])
def test_tensorboard_that_cannot_write_is_dropped_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, name, fail)
    with MetricWriter(tmp_path, LogConfig(every=1), num_steps=3) as writer:
        run_steps(writer, range(1, 3))
        writer.text("samples/captions", "一只猫", 2)
        writer.rewind(1)
        run_steps(writer, range(2, 4))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    warning = f"{tmp_path / 'tensorboard'}: cannot be written ([Errno 28] No space left on device); the run goes on"
    assert caplog.text.count(warning) == 1


def test_missing_tensorboard_is_explained(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingPackageError, match=r"log\.tensorboard=true needs .* or set log\.tensorboard=false"):
        MetricWriter(tmp_path, LogConfig(), num_steps=1)
