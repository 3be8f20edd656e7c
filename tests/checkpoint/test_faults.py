"""Damage, wrong companions, full disks, kills: a clear error or a complete result, never something in between."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vilg.checkpoint import new_folder as new_folder_module
from megatron_vilg.checkpoint import safetensors_file
from megatron_vilg.checkpoint.dcp_folder import DcpSource
from megatron_vilg.checkpoint.describe import statistics
from megatron_vilg.checkpoint.files import write_text
from megatron_vilg.checkpoint.inert import read_pickle
from megatron_vilg.checkpoint.manifest import REMEDY, read_manifest, read_sound_manifest, write_manifest
from megatron_vilg.checkpoint.reshape import convert, merge, shard
from megatron_vilg.checkpoint.run_folder import write_run_folder
from megatron_vilg.checkpoint.sources import open_source
from megatron_vilg.checkpoint.transfer import Options
from megatron_vilg.checkpoint.verify import differences, problems_of
from megatron_vilg.errors import CheckpointError
from tests.checkpoint.ckpt_source import DictSource, assert_same, memory_source, write_checkpoint
from tests.tiny import tiny_config
from tests.tiny_run import write_tiny_run


def forms(folder: Path) -> dict[str, Path]:
    """The same checkpoint as canonical folder in several files, as ranks, and as the trainer writes it."""
    source = memory_source()
    merge(source, folder / "canonical", optimizer=True, file_bytes=20_000)
    shard(source, folder / "ranks", 2, 2, optimizer=True)
    return {"canonical": folder / "canonical", "ranks": folder / "ranks", "dcp": write_checkpoint(folder, source)}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return forms(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with everything that belongs to it."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    write_tiny_run(folder, export=False)
    return folder


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


def test_types_are_compared_by_rounding_floats_only_and_in_both_directions(tmp_path: Path) -> None:
    value = torch.tensor([0.3, 1.7, -2.4])

    def found(one: torch.Tensor, other: torch.Tensor) -> list[str]:
        sources = [DictSource({"model.w": tensor}, None, tmp_path) for tensor in (one, other)]
        return differences(*sources)

    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert found(value, value.to(dtype)) == found(value.to(dtype), value) == []
    assert found(value, value.bfloat16() + 1) and found(value.bfloat16() + 1, value)
    pairs = [(value, value.to(dtype)) for dtype in (torch.int8, torch.int32, torch.int64)]
    pairs += [(value.half(), value.bfloat16()), (value.long(), value.int()), (value.half(), value.short())]
    for one, other in pairs:
        for pair in ((one, other), (other, one)):
            (line,) = found(*pair)
            types = f"{pair[0].dtype} and {pair[1].dtype}"
            assert line == f"model.w: element types {types}, and neither rounds to the other"


def test_a_weight_of_integers_is_not_sound() -> None:
    source = memory_source()
    values = dict(source.values)
    values["model.norm.weight"] = values["model.norm.weight"].int()
    assert problems_of(DictSource(values, source.manifest, source.path)) == [
        "norm.weight: has element type torch.int32, expected a floating-point type"
    ]


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


def test_a_wrong_tokenizer_or_configuration_beside_the_weights_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_tiny_run(run, export=False)
    (step,) = (run / "checkpoints").iterdir()
    manifest = json.loads((step / "manifest.json").read_text())
    source = open_source(run)
    assert source.manifest is not None and manifest["kind"] == "pretrain"
    source.manifest = type(source.manifest)(
        kind="pretrain", model=source.manifest.model, tokenizers={"text_tokenizer": "0" * 64}
    )
    with pytest.raises(CheckpointError, match=r"spm.model: is not the tokenizer of these weights .*0000"):
        merge(source, tmp_path / "whole")
    config = json.loads((run / "config.json").read_text())
    config["model"]["width"] = 32
    (run / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(CheckpointError, match="width: 16 in the manifest, 32 in config.json"),
        open_source(run) as again,
    ):
        merge(again, tmp_path / "whole")
    shutil.rmtree(run / "text_tokenizer")
    (run / "config.json").unlink()
    with open_source(run) as again, pytest.raises(CheckpointError, match="no text_tokenizer beside it"):
        convert(again, tmp_path / "whole", "pretrained", options=Options())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def change_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda run: change_json(run / "image_tokenizer" / "config.json", lambda c: c.update(channels=16)),
            "image_tokenizer: damaged: config.json has",
        ),
        (
            lambda run: (run / "image_tokenizer" / "manifest.json").unlink(),
            "image_tokenizer: no manifest.json, so this is no complete",
        ),
        (
            lambda run: (run / "text_tokenizer" / "manifest.json").write_text("{}"),
            "text_tokenizer: cannot be used .*one of them was replaced",
        ),
        (lambda run: (run / "text_tokenizer" / "manifest.json").write_text("[]"), "text_tokenizer: cannot be used"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json: is no configuration of a run"),
        (lambda run: (run / "config.json").write_text("null"), "config.json: is no configuration of a run"),
        (lambda run: (run / "config.json").write_text('{"model": null}'), "config.json: is no configuration of a run"),
        (
            lambda run: change_json(run / "config.json", lambda c: c["reconstructor"].update(enabled=True)),
            "reconstructor.enabled: False by the weights, True in config.json",
        ),
        (
            lambda run: change_json(run / "config.json", lambda c: c["image_tokenizer"].update(image_size=32)),
            "image_side: 4 in the manifest, 8 by image_tokenizer in config.json",
        ),
    ],
)
def test_what_lies_beside_the_weights_is_checked_by_merge_and_verify(tmp_path: Path, tiny, damage, words: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny, run)
    with open_source(run) as source:
        assert problems_of(source) == []
    damage(run)
    with open_source(run) as source:
        (problem,) = problems_of(source)
        assert re.search(words, problem)
        with pytest.raises(CheckpointError, match=words):
            merge(source, tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_nothing_is_written_into_a_tokenizer_of_the_source(tmp_path: Path, tiny) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny, run)
    inside = run / "image_tokenizer" / "inner"
    with open_source(run) as source, pytest.raises(CheckpointError, match="inner: lies in .*image_tokenizer, which is"):
        merge(source, inside)
    assert not inside.exists()


def test_statistics_are_json_whatever_the_values(tmp_path: Path) -> None:
    values = {
        "model.some": torch.tensor([float("inf"), -2.0, float("nan"), 3.0]),
        "model.none": torch.full((2,), float("-inf")),
    }
    source = DictSource(values, None, tmp_path)
    some, none = (statistics(source, name) for name in values)
    assert (some["min"], some["max"], some["first"]) == (-2.0, 3.0, ["inf", -2.0, "nan", 3.0])
    assert (none["min"], none["max"], none["mean"], none["first"]) == ("nan", "nan", "nan", ["-inf", "-inf"])
    json.dumps([some, none], allow_nan=False)


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
