"""Damage, wrong companions, full disks, kills: a clear error or a complete result, never something in between."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from megatron_vilg.checkpoint import files, safetensors_file
from megatron_vilg.checkpoint import new_folder as new_folder_module
from megatron_vilg.checkpoint.dcp_folder import DcpSource
from megatron_vilg.checkpoint.files import write_text
from megatron_vilg.checkpoint.inert import read_pickle
from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import REMEDY, Manifest, read_manifest, read_sound_manifest, write_manifest
from megatron_vilg.checkpoint.reshape import merge, shard
from megatron_vilg.checkpoint.run_folder import write_run_folder
from megatron_vilg.checkpoint.sources import open_source
from megatron_vilg.checkpoint.transfer import Options
from megatron_vilg.checkpoint.verify import differences, problems_of
from megatron_vilg.config.schema import CheckpointConfig
from megatron_vilg.errors import CheckpointError
from tests.checkpoint.ckpt_source import DictSource, assert_same, memory_source, write_checkpoint
from tests.tiny import tiny_config


def forms(folder: Path) -> dict[str, Path]:
    """The same checkpoint as canonical folder in several files, as ranks, and as the trainer writes it."""
    source = memory_source()
    merge(source, folder / "canonical", optimizer=True, file_bytes=20_000)
    shard(source, folder / "ranks", 2, 2, optimizer=True)
    return {"canonical": folder / "canonical", "ranks": folder / "ranks", "dcp": write_checkpoint(folder, source)}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return forms(tmp_path_factory.mktemp("sound"))


def largest_file(folder: Path) -> Path:
    return max(
        (f for f in folder.rglob("*") if f.suffix in (".safetensors", ".distcp")), key=lambda f: f.stat().st_size
    )


def truncate(folder: Path) -> None:
    os.truncate(largest_file(folder), largest_file(folder).stat().st_size - 100)


def flip(folder: Path) -> None:
    content = bytearray(largest_file(folder).read_bytes())
    content[len(content) * 2 // 3] ^= 4
    largest_file(folder).write_bytes(content)


def drop(folder: Path) -> None:
    largest_file(folder).unlink()


def drop_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def edit_manifest(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["step"] = 8
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize("form", ["canonical", "ranks", "dcp"])
@pytest.mark.parametrize("damage", [truncate, flip, drop, drop_manifest, edit_manifest], ids=lambda f: f.__name__)
def test_damage_stops_the_tools_and_leaves_nothing(tmp_path: Path, sound, form: str, damage) -> None:
    folder = tmp_path / sound[form].name
    shutil.copytree(sound[form], folder)
    damage(folder)
    words = f"{folder.name}.*" + ("" if "manifest" in damage.__name__ else REMEDY)
    with pytest.raises(CheckpointError, match=words), open_source(folder) as source:
        merge(source, tmp_path / "result", optimizer=True)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("form", ["canonical", "ranks", "dcp"])
def test_verify_finds_a_flipped_byte_and_nothing_else(tmp_path: Path, sound, form: str) -> None:
    with open_source(sound[form]) as source:
        assert problems_of(source) == []
    folder = tmp_path / sound[form].name
    shutil.copytree(sound[form], folder)
    flip(folder)
    with open_source(folder) as source:
        (problem,) = problems_of(source)
        assert problem.endswith("has the right size but its content changed")


def test_verify_finds_wrong_names_values_and_copies(tmp_path: Path, sound) -> None:
    source = memory_source()
    source.values["model.norm.weight"][2] = float("inf")
    assert problems_of(source) == ["model.norm.weight: 1 of 16 values are not finite"]
    values = dict(memory_source().values)
    values["model.norm.gain"] = values.pop("model.norm.weight")
    del values["optimizer.exp_avg.norm.bias"]
    wrong = problems_of(DictSource(values, source.manifest, tmp_path))
    assert wrong == [
        "norm.gain: not part of this model",
        "norm.weight: missing",
        "optimizer.exp_avg.norm.weight: there is no such weight",
        "optimizer.exp_avg_sq.norm.weight: there is no such weight",
        "optimizer.step.norm.weight: there is no such weight",
        "optimizer.exp_avg.norm.bias: missing",
    ]
    quantised = dict(memory_source().values)
    moment = quantised.pop("optimizer.exp_avg.heads.text.weight")
    quantised["optimizer.exp_avg.codes.heads.text.weight"] = moment.to(torch.uint8)
    quantised["optimizer.exp_avg.scale.heads.text.weight"] = moment[:, :1].clone()
    assert problems_of(DictSource(quantised, source.manifest, tmp_path)) == []
    muon = dict(memory_source().values)
    matrices = [name for name in muon if name.startswith("model.blocks.") and muon[name].ndim == 2]
    for name in (name.removeprefix("model.") for name in matrices):
        muon[f"optimizer.momentum_buffer.{name}"] = muon.pop(f"optimizer.exp_avg.{name}")
        del muon[f"optimizer.exp_avg_sq.{name}"], muon[f"optimizer.step.{name}"]
    assert problems_of(DictSource(muon, source.manifest, tmp_path)) == []
    del muon["optimizer.momentum_buffer.blocks.0.mlp.up.weight"], muon["optimizer.exp_avg.norm.bias"]
    assert problems_of(DictSource(muon, source.manifest, tmp_path)) == [
        "optimizer.exp_avg.norm.bias: missing",
        "optimizer.momentum_buffer.blocks.0.mlp.up.weight: missing",
    ]
    other = memory_source()
    other.values["model.norm.bias"][0] += 0.5
    (line,) = differences(memory_source(), other)
    assert line == "model.norm.bias: values differ by up to 0.5"


def test_ranks_that_should_agree_must_agree(tmp_path: Path, sound) -> None:
    folder = tmp_path / "ranks"
    shutil.copytree(sound["ranks"], folder)
    file = folder / "mp_rank_01_000" / "model.safetensors"
    content = bytearray(file.read_bytes())
    with open_source(folder) as source:
        place = source._parts["model.blocks.0.norm1.weight"][1]._begin["blocks.0.norm1.weight"]  # type: ignore[attr-defined]
        content[place] ^= 1
        file.write_bytes(content)
    with open_source(folder) as source:
        assert source.verify() == ["model.blocks.0.norm1.weight differs between ranks that should hold the same"]


def test_a_pickle_that_runs_something_runs_nothing(tmp_path: Path, sound) -> None:
    class Command:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    folder = tmp_path / "step-00000007"
    shutil.copytree(sound["dcp"], folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Command()))
    write_manifest(folder, read_manifest(folder))  # on purpose, not by accident: the digest fits
    with pytest.raises(CheckpointError, match="is not what torch.distributed.checkpoint writes"):
        DcpSource(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\x80\x04\x8d" + b"\xff" * 8, "OverflowError"),
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f", "(MemoryError|OverflowError)"),
    ],
)
def test_a_length_that_is_damaged_in_a_pickle_is_damage(content: bytes, kind: str) -> None:
    with pytest.raises(CheckpointError, match=rf"m: cannot be read \({kind}: .*\); it is damaged"):
        read_pickle(io.BytesIO(content), "m")


def test_a_damaged_metadata_is_told_by_its_digest_and_an_older_step_is_taken(tmp_path: Path, sound) -> None:
    steps = tmp_path / "checkpoints"
    for step in ("step-00000007", "step-00000008"):
        shutil.copytree(sound["dcp"], steps / step)
    newest = steps / "step-00000008"
    content = (newest / ".metadata").read_bytes()
    (newest / ".metadata").write_bytes(b"\x80\x04\x8e" + b"\xff" * 8 + content[11:])
    with pytest.raises(CheckpointError, match=r"step-00000008: damaged: .metadata has the right size but its content"):
        DcpSource(newest)
    looked = []
    with open_source(tmp_path, looked.append) as source:
        assert source.path.name == "step-00000007" and looked == []


def test_metadata_cannot_point_outside_the_folder(tmp_path: Path, sound) -> None:
    folder = tmp_path / "step-00000007"
    shutil.copytree(sound["dcp"], folder)
    content = (folder / ".metadata").read_bytes()
    assert b"__0_0.distcp" in content
    (folder / ".metadata").write_bytes(content.replace(b"__0_0.distcp", b"../../stolen"))
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(CheckpointError, match="names a file outside the folder: ../../stolen"):
        DcpSource(folder)


def test_a_small_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_vilg.checkpoint.files.sync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "f.json", "{}")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_noticed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(new_folder_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        CheckpointError,
        match=r"--save-dir=.*: needs .* and 67.11 MB to spare, the disk has 1.00 kB free. Works: another",
    ):
        merge(memory_source(), tmp_path / "whole")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0

    def until_full(descriptor: int, view: memoryview) -> int:
        nonlocal written
        written += len(view)
        if written > 30_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(descriptor, view)

    class Os:
        write = staticmethod(until_full)
        open, close, posix_fallocate = os.open, os.close, staticmethod(lambda *_: None)
        O_WRONLY, O_CREAT, O_EXCL = os.O_WRONLY, os.O_CREAT, os.O_EXCL

    monkeypatch.setattr(safetensors_file, "os", Os)
    with pytest.raises(CheckpointError, match="cannot be written .No space left on device.. Nothing was left behind"):
        merge(memory_source(), tmp_path / "whole", optimizer=True)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_under_a_run_folder_is_told_by_the_folder_s_own_name(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_vilg.checkpoint.dcp_write.dcp.save", full)
    with pytest.raises(CheckpointError, match=r"/whole: cannot be written .No space left on device.. Nothing was left"):
        write_run_folder(memory_source(), tmp_path / "whole")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_that_torch_does_not_name_is_named(tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise CheckpointException("", {0: _wrap_exception(RuntimeError("unexpected pos 704 vs 598"))})

    monkeypatch.setattr("torch.distributed.checkpoint.save", fail)
    begun = tmp_path / "run.by-host-1-2.partial" / "checkpoints"  # what `convert --to end-to-end` writes into
    writes: list[tuple[str, Callable[[], object]]] = [
        ("/whole", lambda: write_run_folder(memory_source(), tmp_path / "whole")),
        ("/run", lambda: Checkpointer(begun, CheckpointConfig()).save(0, {}, Manifest(kind="test"))),
    ]
    for is_full, words in ((True, "the disk is full"), (False, ".*unexpected pos 704 vs 598.*")):
        for module in ("dcp_write", "manager"):
            monkeypatch.setattr(f"megatron_vilg.checkpoint.{module}.is_full", lambda _, found=is_full: found)
        for name, write in writes:
            with pytest.raises(CheckpointError, match=rf"{name}: cannot be written .{words}.\. ") as told:
                write()
            assert ".partial" not in str(told.value)
    usage = shutil.disk_usage(tmp_path)
    for free, is_full in ((0, True), (4 << 20, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: usage._replace(free=free))
        assert files.is_full(tmp_path) == is_full


def test_a_result_that_differs_from_its_source_is_not_published(tmp_path: Path, monkeypatch) -> None:
    class Forgetful(safetensors_file.SafetensorsWriter):
        def write(self, name: str, rows: torch.Tensor) -> int:
            return super().write(name, torch.zeros_like(rows) if name == "norm.bias" else rows)

    monkeypatch.setattr("megatron_vilg.checkpoint.transfer.SafetensorsWriter", Forgetful)
    with pytest.raises(CheckpointError, match="is not what .* holds: values of model.norm.bias differ"):
        merge(memory_source(), tmp_path / "whole")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(memory_source(), tmp_path / "whole", options=Options(progress=stop))
    assert not list(tmp_path.iterdir())


def _killed_at(moment: float, work: Callable[[], object]) -> bool:
    """Fork, kill after ``moment`` seconds; whether the child was still at work."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["merge", "shard", "dcp"])
def test_a_kill_at_fifty_random_moments_leaves_all_or_nothing(tmp_path: Path, what: str) -> None:
    config = tiny_config(width=64, num_heads=4, num_layers=6)
    source = memory_source(config)
    merge(source, tmp_path / "source", optimizer=True)

    def work() -> None:
        with open_source(tmp_path / "source") as opened:
            if what == "merge":
                merge(opened, tmp_path / "result", optimizer=True)
            elif what == "shard":
                shard(opened, tmp_path / "result", 4, 3, optimizer=True)
            else:
                write_run_folder(opened, tmp_path / "result")

    whole = float("inf")
    for _ in range(3):  # the first time imports, and a busy machine delays any
        start = time.perf_counter()
        work()
        whole = min(whole, time.perf_counter() - start)
        shutil.rmtree(tmp_path / "result")
    chance, killed = random.Random(0), 0
    for _ in range(50):
        killed += _killed_at(chance.uniform(0.0, 1.5 * whole), work)
        if (tmp_path / "result").exists():
            inner = next((tmp_path / "result").glob("checkpoints/step-*"), tmp_path / "result")
            read_sound_manifest(inner)
            with open_source(tmp_path / "result") as found:
                assert_same(found, source.values)
            shutil.rmtree(tmp_path / "result")
        else:
            left = {path.name for path in tmp_path.iterdir()} - {"source"}
            assert all(name.startswith("result.by-") and name.endswith(".partial") for name in left) and len(left) < 2
    assert killed > 10, "hardly any child was killed at work"
    work()
    with open_source(tmp_path / "result") as found:
        assert_same(found, source.values)
