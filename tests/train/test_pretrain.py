"""The loop: it finishes, resumes to the bit after a crash or a signal, stops on divergence, refuses other configs."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vilg.checkpoint.dcp_write import write_training_checkpoint
from megatron_vilg.checkpoint.export import load_model_folder
from megatron_vilg.checkpoint.manifest import Manifest, read_manifest
from megatron_vilg.checkpoint.sources import open_source
from megatron_vilg.config.load import read_run_folder_config
from megatron_vilg.config.schema import CheckpointConfig, DataConfig, LogConfig, RunConfig
from megatron_vilg.config.world import World
from megatron_vilg.data.batch import PairBatch
from megatron_vilg.data.loader import PairLoader
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.errors import CheckpointError, ConfigError, TrainingError
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.parallel.launch import Job
from megatron_vilg.parallel.mesh import Mesh, build_mesh
from megatron_vilg.train.course import Course
from megatron_vilg.train.engine import NativeEngine, StepResult
from megatron_vilg.train.metrics import MetricWriter
from megatron_vilg.train.pretrain import StepWindow, manifest_of, pretrain, samples_before
from megatron_vilg.train.same_pairs import PAIRS, require_same_pairs
from tests.helpers import run_distributed
from tests.tiny import tiny_config, tiny_run
from tests.train.token_caches import write_cache


class CrashError(Exception):
    """Stands for a killed process."""


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    return write_cache(tmp_path / "tokens", {"train": 10, "val": 3})


@pytest.fixture
def run(cache: TokenCache) -> RunConfig:
    model = tiny_config(text_vocab_size=cache.settings["text_vocab_size"])
    base = tiny_run(model, num_steps=8, eval_every=4, sample_every=1)
    data = DataConfig(caption_dropout=0.2, image_input_noise=0.1, image_source_noise=0.1)
    return dataclasses.replace(
        base, data=data, checkpoint=CheckpointConfig(every=3), log=LogConfig(every=1, tensorboard=False)
    )


def crash_at(crash_step: int):  # type: ignore[no-untyped-def]
    def hook(model: ViLG, step: int, writer: MetricWriter) -> None:
        if step == crash_step:
            raise CrashError

    return hook


def lines(out: Path) -> list[dict[str, float]]:
    kept = ("step", "loss/total", "loss/text_to_image(nats/token)", "loss/image_to_text(nats/token)", "grad_norm", "lr")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key in kept or key.startswith("val/")} for row in rows]


@pytest.mark.parametrize("crash_step", [1, 4, 7])
def test_resumed_run_equals_a_straight_one(tmp_path: Path, cache: TokenCache, run: RunConfig, crash_step: int) -> None:
    assert pretrain(run, cache, tmp_path / "straight")
    with pytest.raises(CrashError):
        pretrain(run, cache, tmp_path / "broken", on_sample=crash_at(crash_step))
    assert pretrain(run, cache, tmp_path / "broken")
    assert lines(tmp_path / "broken") == lines(tmp_path / "straight")
    (config, expected), (_, actual) = (load_model_folder(tmp_path / name / "export") for name in ("straight", "broken"))
    assert config["model"]["width"] == 16
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_held_out_losses_are_logged(tmp_path: Path, cache: TokenCache, run: RunConfig) -> None:
    pretrain(run, cache, tmp_path / "out")
    rows = lines(tmp_path / "out")
    measured = [row["step"] for row in rows if "val/text_to_image(nats/token)" in row]
    assert [row["step"] for row in rows] == list(range(1, 9)) and measured == [4, 8]


def test_a_signal_saves_the_step_and_stops(tmp_path: Path, cache: TokenCache, run: RunConfig) -> None:
    def hook(model: ViLG, step: int, writer: MetricWriter) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)

    out = tmp_path / "out"
    assert pretrain(run, cache, out, on_sample=hook) is False
    assert (out / "checkpoints" / "step-00000004" / "manifest.json").is_file() and not (out / "export").exists()
    assert pretrain(run, cache, out) is True
    assert [row["step"] for row in lines(out)] == list(range(1, 9))


def test_another_configuration_is_refused_with_both_sides(tmp_path: Path, cache: TokenCache, run: RunConfig) -> None:
    pretrain(run, cache, tmp_path / "out")
    wider = dataclasses.replace(run, model=dataclasses.replace(run.model, width=32))
    with pytest.raises(CheckpointError, match=r"model\.width: checkpoint has 16, this run has 32"):
        pretrain(wider, cache, tmp_path / "out")


def test_another_batch_size_goes_on_with_pairs_not_drawn_yet(
    tmp_path: Path, run: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = write_cache(tmp_path / "more" / "tokens", {"train": 40})
    model = dataclasses.replace(run.model, text_vocab_size=cache.settings["text_vocab_size"])
    drawn: list[int] = []
    train_step = NativeEngine.train_step

    def noted(engine: NativeEngine, batch: PairBatch) -> StepResult:
        drawn.extend(batch.sample_ids.tolist())
        return train_step(engine, batch)

    monkeypatch.setattr(NativeEngine, "train_step", noted)

    def go_on(batch_size: int, num_steps: int) -> Manifest:
        changed = dataclasses.replace(run.train, batch_size=batch_size, num_steps=num_steps)
        assert pretrain(dataclasses.replace(run, model=model, train=changed), cache, tmp_path / "out")
        return read_manifest(newest(tmp_path / "out"))

    assert go_on(8, 3).samples_seen == 24
    with caplog.at_level(logging.INFO, logger="megatron_vilg"):
        assert go_on(4, 6).samples_seen == 36
    assert "train.batch_size=4, 8 before: pairs not drawn yet come next" in caplog.text
    assert go_on(2, 8).samples_seen == 40
    assert sorted(drawn) == list(range(40)), "each pair of the first epoch once"
    manifest = go_on(8, 9)
    assert (manifest.samples_seen, manifest.counters["batch_size"]) == (48, 8)
    assert read_manifest(tmp_path / "out" / "export").samples_seen == 48
    loader = PairLoader(cache, "train", run.data, model.spec, 8, run.train.seed)
    assert drawn[40:] == loader.sample_ids(5).tolist(), "as a run of batches of 8 alone"


@pytest.mark.parametrize(
    ("samples_seen", "counters", "expected"),
    [
        (77, {"batch_size": 8, "batches_skipped": 2}, 77),
        (24, {}, 24),
        (24, {"batches_skipped": 2}, 40),
        (0, {"batches_skipped": 2}, 20),
    ],
    ids=["noted", "older", "older, gone back", "of other tools"],
)
def test_samples_before_a_checkpoint_of_step_3(
    run: RunConfig, samples_seen: int, counters: dict[str, int | float | str], expected: int
) -> None:
    manifest = Manifest(kind="pretrain", step=3, samples_seen=samples_seen, counters=counters)
    assert samples_before(manifest, Course(run.train, counters), run) == expected


def changed(run: RunConfig, section: str, **options: object) -> RunConfig:
    return dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **options)})  # type: ignore[arg-type]


def test_another_optimizer_is_refused_in_one_line(tmp_path: Path, cache: TokenCache, run: RunConfig) -> None:
    out = tmp_path / "out"
    assert pretrain(changed(changed(run, "train", num_steps=3), "optim", name="muon"), cache, out)
    with pytest.raises(CheckpointError) as caught:
        pretrain(run, cache, out)
    assert str(caught.value) == (
        f"optim.name: the checkpoint {newest(out)} has muon, this run has adamw. Works: optim.name=muon, or another "
        "--out"
    )


def test_a_refused_start_leaves_the_options_of_the_run(tmp_path: Path, cache: TokenCache, run: RunConfig) -> None:
    out, half = tmp_path / "out", changed(run, "train", num_steps=4)
    assert pretrain(half, cache, out)
    assert read_run_folder_config(out) == half
    refused = changed(changed(run, "train", precision="bf16"), "model", qk_norm=not run.model.qk_norm)
    with pytest.raises(CheckpointError, match=r"model\.qk_norm: checkpoint has"):
        pretrain(refused, cache, out)
    assert read_run_folder_config(out) == half
    assert pretrain(run, cache, out)
    assert read_run_folder_config(out) == run


def test_a_finished_run_keeps_the_options_it_was_trained_with(
    tmp_path: Path, cache: TokenCache, run: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    out, short = tmp_path / "out", changed(run, "train", num_steps=3)
    assert pretrain(short, cache, out)
    with caplog.at_level(logging.INFO):
        assert pretrain(changed(short, "train", precision="bf16"), cache, out)
    assert f"{out}: all 3 steps are done, nothing is left to train; its options stay what they were" in caplog.text
    assert read_run_folder_config(out) == read_run_folder_config(out / "export") == short


def test_fewer_steps_than_there_are_is_refused(tmp_path: Path, cache: TokenCache, run: RunConfig) -> None:
    out = tmp_path / "out"
    assert pretrain(changed(run, "train", num_steps=4), cache, out)
    with pytest.raises(ConfigError) as caught:
        pretrain(changed(run, "train", num_steps=3), cache, out)
    rule = f"{newest(out)} has more steps behind it, so that nothing would be trained"
    assert f"train.num_steps=3: {rule}. Works: 4, to export it as it is, or more to go on." in str(caught.value)
    assert read_run_folder_config(out).train.num_steps == 4


def newest(out: Path) -> Path:
    return max((out / "checkpoints").iterdir())


def other_pairs(folder: Path, cache: TokenCache, counts: dict[str, int]) -> TokenCache:
    """Of the same tokenizers."""
    other = write_cache(folder / "tokens", counts)
    other.settings |= {"text_tokenizer_sha256": cache.settings["text_tokenizer_sha256"]}
    return other


def test_other_pairs_are_refused_with_both_sides(tmp_path: Path, cache: TokenCache, run: RunConfig) -> None:
    pretrain(run, cache, tmp_path / "out")
    other = other_pairs(tmp_path / "others", cache, {"train": 9, "val": 4})
    before = [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()]
    with pytest.raises(CheckpointError) as caught:
        pretrain(run, other, tmp_path / "out")
    text = str(caught.value)
    assert "was trained on other pairs than those of --data, data.val_share and" in text
    assert re.search(r"train: checkpoint has 10 pairs [0-9a-f]{16}, this run has 9 pairs [0-9a-f]{16}", text)
    assert f"vilg checkpoint shard --load-dir {tmp_path / 'out'} --save-dir NEW --to dcp --optimizer" in text
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == before
    assert read_manifest(newest(tmp_path / "out")).counters[PAIRS] in text
    pretrain(run, other_pairs(tmp_path / "more", cache, {"train": 10, "val": 4}), tmp_path / "out")


def test_runs_from_before_pairs_were_noted_go_on(tmp_path: Path, cache: TokenCache, run: RunConfig) -> None:
    old = Manifest(kind="pretrain")
    now = manifest_of(run, cache, Mesh(torch.device("cpu")))
    assert now.counters[PAIRS].startswith("10 pairs ")
    require_same_pairs(tmp_path, old, now, Mesh(torch.device("cpu")))
    for note in cache.folder.glob("*-*.json"):
        note.unlink()
    assert manifest_of(run, cache, Mesh(torch.device("cpu"))).counters == {}


def test_what_the_tools_made_goes_on_with_any_pairs(
    tmp_path: Path, cache: TokenCache, run: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    short = dataclasses.replace(run, train=dataclasses.replace(run.train, num_steps=3))
    pretrain(short, cache, tmp_path / "out")
    with open_source(tmp_path / "out") as source:
        names, step = list(source.tensors), newest(tmp_path / "out").name
        write_training_checkpoint(source, tmp_path / "new" / "checkpoints" / step, names)
    other = other_pairs(tmp_path / "others", cache, {"train": 9, "val": 4})
    with caplog.at_level(logging.WARNING, logger="megatron_vilg"):
        assert pretrain(run, other, tmp_path / "new")
    assert "going on with other pairs: 10 pairs" in caplog.text
    manifest = read_manifest(newest(tmp_path / "new"))
    assert str(manifest.counters[PAIRS]).startswith("9 pairs ") and not manifest.source


def steal(out: Path) -> None:
    """Let a process of another machine own the run."""
    content = json.loads((out / "owner.json").read_text())
    content["process"]["machine"] = "elsewhere"
    (out / "owner.json").write_text(json.dumps(content))


def test_a_run_that_another_job_took_over_writes_nothing_more(
    tmp_path: Path, cache: TokenCache, run: RunConfig
) -> None:
    def hook(model: ViLG, step: int, writer: MetricWriter) -> None:
        if step == 4:
            steal(tmp_path / "out")
            (tmp_path / "out" / "checkpoints" / "step-00000006.partial").mkdir()

    with pytest.raises(
        CheckpointError, match="on elsewhere, since .* has taken over; this process writes nothing more"
    ):
        pretrain(run, cache, tmp_path / "out", on_sample=hook)
    names = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000006.partial"]
    assert (tmp_path / "out" / "owner.json").exists()


def test_a_run_that_is_being_trained_is_refused(tmp_path: Path, cache: TokenCache, run: RunConfig) -> None:
    def hook(model: ViLG, step: int, writer: MetricWriter) -> None:
        try:
            pretrain(run, cache, tmp_path / "out")
        finally:
            assert (tmp_path / "out" / "owner.json").exists()

    with pytest.raises(CheckpointError, match=f"--out=.*out: process {os.getpid()} on .* trains in it. Works: another"):
        pretrain(run, cache, tmp_path / "out", on_sample=hook)
    assert pretrain(run, cache, tmp_path / "out") and not (tmp_path / "out" / "owner.json").exists()


def result(skipped: float) -> StepResult:
    one = torch.tensor(1.0)
    return StepResult(one, one, one, one, torch.tensor(skipped))


def test_skipped_steps_are_counted_over_restarts() -> None:
    window = StepWindow(9)
    for skipped in (1.0, 0.0):
        window.add(torch.tensor([0]), result(skipped))
    assert window.read()["step/skipped"] == 1
    window.add(torch.tensor([0]), result(1.0))
    again = StepWindow(9, window.counters)
    again.add(torch.tensor([0]), result(0.0))
    assert again.read()["step/skipped"] == 2


def complaint_of_a_rank(run: RunConfig, cache: TokenCache, out: Path) -> str:
    """Why a run stops in which no step is finite."""
    train_step = NativeEngine.train_step

    def spoilt(engine: NativeEngine, batch: PairBatch) -> StepResult:
        return dataclasses.replace(train_step(engine, batch), skipped=torch.tensor(1.0))

    NativeEngine.train_step = spoilt  # type: ignore[method-assign]
    try:
        pretrain(run, cache, out, mesh=build_mesh(run.parallel, "cpu"))
    except TrainingError as error:
        return str(error)
    return ""


def test_every_rank_names_the_samples_of_all(tmp_path: Path, cache: TokenCache, run: RunConfig) -> None:
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, max_skipped_in_row=2, sample_every=0))
    loader = PairLoader(cache, "train", run.data, run.model.spec, run.train.batch_size, run.train.seed)
    expected = ", ".join(map(str, sorted({*loader.sample_ids(0).tolist(), *loader.sample_ids(1).tolist()})))
    found = run_distributed(complaint_of_a_rank, 2, run, cache, tmp_path / "out")
    assert expected.count(",") == 7
    assert all(
        f"max_skipped_in_row=2: that many steps in a row were not finite; samples {expected}. " in e for e in found
    )


def test_too_many_skipped_steps_in_a_row_stop_with_the_samples() -> None:
    window = StepWindow(3)
    for number, skipped in enumerate([1, 1, 0, 1]):
        window.add(torch.tensor([10 * number]), result(skipped))
    assert window.read()["step/skipped"] == 3 and not window.complaint
    window.add(torch.tensor([40]), result(1))
    window.add(torch.tensor([50, 51]), result(1))
    assert window.read()["step/skipped"] == 5
    assert (
        "max_skipped_in_row=3: that many steps in a row were not finite; samples 30, 40, 50, 51. " in window.complaint
    )
    window.add(torch.tensor([60]), result(1))
    assert window.read() and not window.complaint, "said once; the row begins anew"


def test_all_ranks_wait_for_the_samples_of_the_main_one(tmp_path: Path, cache: TokenCache, run: RunConfig) -> None:
    drawn: list[str] = []

    class Waiting(Job):
        def main_first(self, name: str, work: Any) -> Any:
            drawn.append(name)
            return work()

    every_four = dataclasses.replace(run, train=dataclasses.replace(run.train, sample_every=4))
    mesh = Mesh(torch.device("cpu"), job=Waiting(World(), None))
    pretrain(every_four, cache, tmp_path / "out", mesh=mesh, on_sample=lambda _, step, __: drawn.append(str(step)))
    assert drawn == ["samples", "4", "samples", "8"]
