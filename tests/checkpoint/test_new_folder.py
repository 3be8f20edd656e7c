"""Two commands that write the same folder: each has its own, one gets the name, and neither harms the other."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from megatron_vilg.checkpoint.new_folder import new_folder, require_new, require_outside
from megatron_vilg.checkpoint.owner import Process, final_name, partial_of, partials_of
from megatron_vilg.errors import CheckpointError


def write(final: Path, text: str = "mine") -> None:
    with new_folder(final, 0) as partial:
        (partial / "file").write_text(text)


def leave(final: Path, process: Process) -> Path:
    partial = partial_of(final, process)
    partial.mkdir(parents=True)
    (partial / "file").write_text("half")
    return partial


def ended() -> Process:
    """A process of this machine that has ended."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return dataclasses.replace(Process.this(), pid=pid)


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_what_took_the_name_meanwhile_is_not_touched(tmp_path: Path, kind: str) -> None:
    final = tmp_path / "result"
    with pytest.raises(CheckpointError, match="--save-dir=.*result: somebody else made it meanwhile; it was not touch"):  # noqa: SIM117
        with new_folder(final, 0) as partial:
            (partial / "file").write_text("mine")
            if kind == "file":
                final.write_text("theirs")
            else:
                final.mkdir()
            if kind == "folder":
                (final / "file").write_text("theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert kind == "empty folder" or (final / "file" if kind == "folder" else final).read_text() == "theirs"


def test_names_that_cannot_be_are_told_at_once(tmp_path: Path) -> None:
    for size in (300, 240):
        with pytest.raises(CheckpointError, match=rf"its last part has {size} bytes, .*Works: up to \d+ bytes") as told:
            require_new(tmp_path / ("n" * size))
    works = int(str(told.value).split()[-2])
    write(tmp_path / ("n" * works))
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="link: exists already, nothing is overwritten. Works: a new name"):
        require_new(tmp_path / "link")
    with pytest.raises(CheckpointError, match="n/new: cannot be looked up .File name too long.. Works: another folder"):
        require_new(tmp_path / ("n" * 300) / "new")


@pytest.mark.parametrize("name", [".", "/", ""])
def test_a_folder_without_a_name_exists_already(name: str) -> None:
    with pytest.raises(CheckpointError, match="--save-dir=[./]: exists already, nothing is overwritten. Works: a new"):
        require_new(Path(name))


def test_a_loop_of_links_is_no_place(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match="loop/new: cannot be looked up .Too many levels of symbolic links.. Wor"):
        require_new(tmp_path / "loop" / "new")
    with pytest.raises(CheckpointError, match="loop: exists already, nothing is overwritten. Works: a new name"):
        require_new(tmp_path / "loop")


def test_a_new_folder_inside_one_that_is_copied_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "image_tokenizer"
    for inside in (folder, folder / "inner", tmp_path / "other" / ".." / "image_tokenizer" / "inner"):
        with pytest.raises(
            CheckpointError, match=r"lies in .*image_tokenizer, which is copied into it. Works: a place"
        ):
            require_outside(inside, {"image_tokenizer": folder})
    require_outside(tmp_path / "image_tokenizer-2", {"image_tokenizer": folder})


def test_a_copied_folder_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    failed = [("a/spm.model", "b/spm.model", "[Errno 28] No space left on device"), ("a/x", "b/x", "again")]
    words = r"whole: cannot be written .a/spm.model: .Errno 28. No space left on device, and 1 more files.. Nothing was"
    with pytest.raises(CheckpointError, match=words), new_folder(tmp_path / "whole", 0):
        raise shutil.Error(failed)
    assert not list(tmp_path.iterdir())


def test_a_process_that_still_writes_is_left_alone(tmp_path: Path) -> None:
    living = Process(Process.this().machine, os.getppid(), 0)
    living = dataclasses.replace(living, start=start_of(living.pid))
    partial = leave(tmp_path / "result", living)
    with pytest.raises(CheckpointError, match=f"process {living.pid} is writing it at this moment. Works: a new name"):
        write(tmp_path / "result")
    assert (partial / "file").read_text() == "half" and not (tmp_path / "result").exists()


def start_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def test_what_dead_processes_of_this_machine_left_is_removed(tmp_path: Path) -> None:
    leave(tmp_path / "a.b", ended())
    leave(tmp_path / "a.b", dataclasses.replace(Process.this(), start=1))  # the number is in use again
    other = leave(tmp_path / "a", ended())
    write(tmp_path / "a.b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b", other.name]


def test_what_another_machine_left_stays_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    partial = leave(tmp_path / "result", Process("far.away", 7, 8))
    with caplog.at_level(logging.WARNING, logger="megatron_vilg"):
        write(tmp_path / "result")
    assert f"{partial}: process 7 on far.away is writing it, or has left it behind" in caplog.text
    assert partial.is_dir() and (tmp_path / "result" / "file").read_text() == "mine"


def _write_beside(final: Path, may_end: multiprocessing.synchronize.Event, has_begun: object) -> None:
    with new_folder(final, 0) as partial:
        (partial / "file").write_text("theirs")
        has_begun.set()  # type: ignore[attr-defined]
        may_end.wait(20)


def test_a_second_command_ends_at_once_and_the_first_finishes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    begun, may_end = context.Event(), context.Event()
    first = context.Process(target=_write_beside, args=(tmp_path / "result", may_end, begun))
    first.start()
    assert begun.wait(20)
    with pytest.raises(CheckpointError, match=f"process {first.pid} is writing it"):
        write(tmp_path / "result")
    may_end.set()
    first.join()
    assert first.exitcode == 0 and (tmp_path / "result" / "file").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_names_say_whose_they_are(tmp_path: Path) -> None:
    process = Process("node-7.cluster", 12, 34)
    partial = leave(tmp_path / "whole.by-me.v1", process)
    assert partial.name == "whole.by-me.v1.by-node-7.cluster-12-34.partial"
    assert final_name(partial.name) == "whole.by-me.v1" and final_name("notes") == "notes"
    assert list(partials_of(tmp_path / "whole.by-me.v1")) == [(partial, process)]
    assert list(partials_of(tmp_path / "whole")) == []


def test_this_process_lives_and_others_of_its_number_did_not() -> None:
    this = Process.this()
    assert this.is_here and this.is_alive and Process.this() == this
    assert not dataclasses.replace(this, start=this.start + 1).is_alive
    assert not ended().is_alive
    assert not Process("elsewhere", this.pid, this.start).is_here


def test_a_process_whose_exit_code_nobody_has_asked_for_is_dead() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    start = start_of(pid)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert not Process(Process.this().machine, pid, start).is_alive
    os.waitpid(pid, 0)
