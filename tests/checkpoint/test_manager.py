"""Training checkpoints of one process: saved, found again, kept or deleted, and refused where they do not fit."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
import torch

from megatron_vilg.checkpoint import files, manager
from megatron_vilg.checkpoint.manifest import Manifest
from megatron_vilg.errors import CheckpointError
from tests.checkpoint.checkpoint_case import assert_equal, empty_state, keeper, make_state, save


def shard_of(path: Path) -> Path:
    return next(path.glob("*.distcp"))


def test_save_then_load_in_place(tmp_path: Path) -> None:
    checkpointer = keeper(tmp_path / "checkpoints")
    assert checkpointer.latest() is None
    path = save(checkpointer, 3)
    assert path.name == "step-00000003"
    assert sorted(p.name for p in path.iterdir()) == [".metadata", "__0_0.distcp", "manifest.json"]
    state = empty_state()
    weight = state["model"]["w"]
    manifest = checkpointer.load(path, state)
    assert (manifest.step, manifest.samples_seen) == (3, 30)
    assert state["model"]["w"] is weight
    assert_equal(state, make_state(3))


def test_parameters_are_filled_in_place_and_views_take_only_their_own_bytes(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    checkpointer = keeper(tmp_path)
    view = torch.zeros(1_000_000)[:4]
    path = checkpointer.save(1, {"model": layer.state_dict(), "view": view}, Manifest(kind="test", step=1))
    assert shard_of(path).stat().st_size < 20_000
    other = torch.nn.Linear(3, 2)
    checkpointer.load(path, {"model": other.state_dict(), "view": torch.ones(4)})
    assert torch.equal(other.weight, layer.weight) and torch.equal(other.bias, layer.bias)


def test_retention_keeps_the_newest_and_the_multiples(tmp_path: Path) -> None:
    checkpointer = keeper(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 8):
        save(checkpointer, step)
    assert checkpointer.steps() == [4, 6, 7]
    assert len(list(tmp_path.iterdir())) == 3


def test_retention_keeps_what_the_run_may_go_back_to(tmp_path: Path) -> None:
    checkpointer = keeper(tmp_path, keep_last=1)
    for step, keep_from in ((1, -1), (2, -1), (4, 3), (5, 3), (6, 5)):
        checkpointer.save(step, make_state(step), Manifest(kind="test", step=step), keep_from)
    assert checkpointer.steps() == [5, 6]
    checkpointer = keeper(tmp_path / "other", keep_last=1)
    for step in (2, 4, 5):
        checkpointer.save(step, make_state(step), Manifest(kind="test", step=step), 3)
    assert checkpointer.steps() == [2, 5]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpointer = keeper(tmp_path)
    save(checkpointer, 1)
    checkpointer.save(1, make_state(99), Manifest(kind="test", step=1))
    state = empty_state()
    checkpointer.load(checkpointer.latest(), state)
    assert_equal(state, make_state(99))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_replacement_cut_short_between_its_renames_is_undone(tmp_path: Path) -> None:
    checkpointer = keeper(tmp_path)
    path = save(checkpointer, 1)
    path.rename(files.with_suffix(path, files.REPLACED))
    assert checkpointer.latest() == path


def test_a_checkpoint_in_the_background_holds_the_state_at_the_call(tmp_path: Path) -> None:
    checkpointer = keeper(tmp_path, async_save=True)
    state = make_state(3)
    path = checkpointer.save(3, state, Manifest(kind="test", step=3))
    for tensor in (state["model"]["w"], state["optimizer"]["step.w"]):
        tensor.add_(1000)  # training goes on at once
    checkpointer.finish()
    loaded = empty_state()
    checkpointer.load(path, loaded)
    assert_equal(loaded, make_state(3))


def test_what_fails_in_the_background_is_reported_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = keeper(tmp_path, async_save=True)
    monkeypatch.setattr(manager, "publish", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    save(checkpointer, 1)
    with pytest.raises(CheckpointError, match="in the background.*OSError: disk is full"):
        checkpointer.finish()
    assert checkpointer.latest() is None


def test_leftovers_are_ignored_and_cleaned_at_the_next_save(tmp_path: Path) -> None:
    checkpointer = keeper(tmp_path)
    path = save(checkpointer, 1)
    (tmp_path / "step-00000002.partial").mkdir()
    (tmp_path / "step-00000002.partial" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    assert checkpointer.latest() == path
    save(checkpointer, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-00000001", "step-00000003"]


def damage_truncate(path: Path) -> None:
    os.truncate(shard_of(path), 1000)


def damage_flip(path: Path) -> None:
    content = bytearray(shard_of(path).read_bytes())
    content[len(content) // 2] ^= 1
    shard_of(path).write_bytes(content)


def damage_missing(path: Path) -> None:
    shard_of(path).unlink()


def damage_metadata(path: Path) -> None:
    os.truncate(path / ".metadata", 5)


def damage_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_truncate, "__0_0.distcp has 1000 bytes instead of"),
        (damage_flip, "__0_0.distcp has the right size but its content changed"),
        (damage_missing, "__0_0.distcp is missing"),
        (damage_metadata, ".metadata has 5 bytes instead of"),
        (damage_manifest, "no manifest.json"),
    ],
)
def test_a_damaged_newest_is_named_and_passed_over(tmp_path: Path, caplog, damage, words: str) -> None:
    checkpointer = keeper(tmp_path)
    good = save(checkpointer, 1)
    bad = save(checkpointer, 2)
    damage(bad)
    with caplog.at_level(logging.WARNING, logger="megatron_vilg"):
        assert checkpointer.latest() == good
    assert "step-00000002" in caplog.text and words in caplog.text
    state = empty_state()
    with pytest.raises(CheckpointError, match="step-00000002") as caught:
        checkpointer.load(bad, state)
    assert words in str(caught.value)
    assert_equal(state, empty_state())


def test_a_damaged_checkpoint_does_not_push_out_a_sound_one_and_stays(tmp_path: Path) -> None:
    checkpointer = keeper(tmp_path, keep_last=2)
    save(checkpointer, 1)
    damage_flip(save(checkpointer, 3))
    checkpointer.latest()
    save(checkpointer, 4)
    assert checkpointer.steps() == [1, 3, 4]
    damage_flip(checkpointer.path(4))
    assert checkpointer.latest() == checkpointer.path(1)
    save(checkpointer, 4)
    assert checkpointer.steps() == [1, 3, 4]
    save(checkpointer, 5)
    assert checkpointer.steps() == [3, 4, 5]


def write_as_a_later_version(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"format_version": 2', '"format_version": 3'))


def forbid_reading(path: Path) -> None:
    os.rename(path / "manifest.json", path / "kept")
    (path / "manifest.json").mkdir()  # for root, too, this is a file that cannot be read


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (write_as_a_later_version, "format_version is 3, this package reads 1 and 2. Works: the version of megatron"),
        (forbid_reading, "manifest.json: cannot be read (Is a directory)\n"),
        (damage_flip, "content changed"),
    ],
)
def test_where_no_checkpoint_can_be_used_nothing_starts_anew(tmp_path: Path, damage, words: str) -> None:
    for step in (9000, 10000):
        damage(save(keeper(tmp_path, keep_every=1000), step))
    checkpointer = keeper(tmp_path, keep_every=1000, keep_last=1)
    with pytest.raises(CheckpointError, match="has 2 checkpoints, none of which can be used; nothing was") as caught:
        checkpointer.latest()
    text = str(caught.value)
    assert words in text and "step-00009000" in text and "step-00010000" in text
    assert "make one of them readable again" in text and "give another --out" in text
    save(checkpointer, 1000)  # whoever goes on all the same loses none of them
    save(checkpointer, 1001)
    assert checkpointer.steps() == [1000, 1001, 9000, 10000]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = keeper(tmp_path)
    save(checkpointer, 1)

    def stale(path: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "iterdir", stale)
    with pytest.raises(CheckpointError, match=r"cannot be read \(.*Stale file handle"):
        checkpointer.latest()


def test_another_configuration_is_refused_before_anything_changes(tmp_path: Path) -> None:
    checkpointer = keeper(tmp_path)
    path = save(checkpointer, 1)
    state = empty_state()
    with pytest.raises(CheckpointError, match=r"step-00000001: belongs to another configuration\n  model\.width: "):
        checkpointer.load(path, state, Manifest(kind="test", model={"width": 512}))
    assert_equal(state, empty_state())
    checkpointer.load(path, state, Manifest(kind="test"))
    assert_equal(state, make_state(1))


def test_names_shapes_and_dtypes_must_fit_and_all_misfits_are_listed(tmp_path: Path) -> None:
    checkpointer = keeper(tmp_path)
    path = save(checkpointer, 1)
    state = {
        "model": {"w": torch.zeros(64, 32), "c": torch.zeros(1)},
        "optimizer": {"step.w": torch.zeros((), dtype=torch.int64)},
    }
    with pytest.raises(CheckpointError) as caught:
        checkpointer.load(path, state)
    text = str(caught.value)
    assert "model.c: missing in the checkpoint" in text
    assert "model.b: in the checkpoint, but not expected" in text
    assert "model.w: checkpoint has shape (64, 64), expected (64, 32)" in text
    assert "optimizer.step.w: checkpoint has torch.float32, expected torch.int64" in text
    assert state["model"]["w"].abs().sum() == 0


def test_of_hundreds_of_misfits_the_first_are_named_and_what_works_is_said(tmp_path: Path) -> None:
    checkpointer = keeper(tmp_path)
    path = save(checkpointer, 1)
    with pytest.raises(CheckpointError) as caught:
        checkpointer.load(path, {"model": {f"w{number}": torch.zeros(1) for number in range(300)}})
    lines = str(caught.value).splitlines()
    assert len(lines) == 23 and lines[-2] == "  and 283 more"
    assert lines[-1] == "  Works: the options that it was written with, or another output folder"


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": {"lr": 0.1}}, r"state\[a.lr\]: is a float"),
        ({"a": {0: torch.zeros(1)}}, r"state\[a.0\]: key is a int"),
        ({"a": {"b.c": torch.zeros(1), "b": {"c": torch.zeros(1)}}}, r"state\[a.b.c\]: the name occurs twice"),
    ],
)
def test_only_named_tensors_are_saved(tmp_path: Path, state, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        keeper(tmp_path).save(1, state, Manifest(kind="test", step=1))


def test_step_and_manifest_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest\.step is 2, step is 1"):
        keeper(tmp_path).save(1, make_state(1), Manifest(kind="test", step=2))


@pytest.mark.parametrize("where", ["shard", "manifest", "rename"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch, where: str) -> None:
    checkpointer = keeper(tmp_path)
    good = save(checkpointer, 1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "shard":
            patch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
        else:
            patch.setattr(manager, "write_manifest" if where == "manifest" else "publish", full)
        with pytest.raises(CheckpointError, match=r"step-00000002: cannot be written .*No space left") as caught:
            save(checkpointer, 2)
    assert "checkpoints that stay: step-00000001" in str(caught.value)
    assert checkpointer.latest() == good
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert save(checkpointer, 2) == checkpointer.latest()
