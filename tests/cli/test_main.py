from __future__ import annotations

import argparse
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import megatron_vilg
from megatron_vilg.cli import main as cli
from megatron_vilg.cli.main import EXIT_ERROR, EXIT_INTERRUPTED, VERBS, Verb, main
from megatron_vilg.errors import DataError, LostRankError

HEAVY = ("torch", "numpy", "sentencepiece", "PIL", "tensorboard")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


class ProbeVerb:
    """Stands in for the module of a verb."""

    def __init__(self, result: object = None) -> None:
        self.result = result
        self.seen: argparse.Namespace | None = None

    def add_parser(self, subparsers: Any) -> None:
        parser = subparsers.add_parser("probe")
        parser.add_argument("--out")
        parser.add_argument("--seed")
        parser.add_argument("overrides", nargs="*")
        parser.set_defaults(run=self.run)

    def run(self, args: argparse.Namespace) -> Any:
        self.seen = args
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> ProbeVerb:
    verb = ProbeVerb()
    monkeypatch.setitem(sys.modules, "probe_verb", verb)
    monkeypatch.setattr(cli, "VERBS", (Verb("probe", "probe_verb", "a test", has_overrides=True, has_aliases=True),))
    return verb


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (1, 1), (KeyboardInterrupt(), EXIT_INTERRUPTED)])
def test_exit_codes(probe: ProbeVerb, result: object, code: int) -> None:
    probe.result = result
    assert main(["probe"]) == code


def test_an_error_is_one_message_without_traceback(probe: ProbeVerb, capsys: pytest.CaptureFixture[str]) -> None:
    probe.result = DataError("pairs.tar: truncated. Works: download it again.")
    assert main(["probe"]) == EXIT_ERROR
    captured = capsys.readouterr()
    assert captured.err == "vilg probe: DataError: pairs.tar: truncated. Works: download it again.\n"
    assert captured.out == ""


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    monkeypatch.setattr(cli, "_leave_at_once", lambda code: code)


@pytest.mark.parametrize("is_ended", [True, False], ids=["ended", "alone"])
@pytest.mark.parametrize("line", [["probe"], ["probe", "--nonsense"]], ids=["ours", "argparse"])
def test_a_mistake_of_all_ranks_is_said_once(
    probe: ProbeVerb,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: list[str],
    is_ended: bool,
) -> None:
    """Rank 1 waits for the launcher, which ends it once rank 0 has said the same; a mistake of its own it says."""
    probe.result = DataError("pairs.tar: truncated. Works: download it again.")
    as_rank(monkeypatch, 1)
    monkeypatch.setattr(cli, "PATIENCE_SECONDS", 30.0 if is_ended else 0.1)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    former = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        if is_ended:
            timer.start()
        assert code_of(line) == EXIT_ERROR
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, former)
    said = capsys.readouterr().err
    assert (said == "") if is_ended else ("truncated" in said or "unrecognized arguments: --nonsense" in said)


def code_of(line: list[str]) -> object:
    try:
        return main(line)
    except SystemExit as end:
        return end.code


def test_rank_0_does_not_wait(
    probe: ProbeVerb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    probe.result = DataError("pairs.tar: truncated.")
    as_rank(monkeypatch, 0)
    monkeypatch.setattr(cli, "PATIENCE_SECONDS", 60.0)
    start = time.monotonic()
    assert main(["probe"]) == EXIT_ERROR and time.monotonic() - start < 30
    assert "truncated" in capsys.readouterr().err


def test_a_lost_rank_is_named_at_once_unless_it_has_said_why(
    probe: ProbeVerb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(monkeypatch, 1)
    monkeypatch.setattr(cli, "PATIENCE_SECONDS", 60.0)
    probe.result = LostRankError("rank 0 gives no sign of life")
    start = time.monotonic()
    assert main(["probe"]) == EXIT_ERROR and time.monotonic() - start < 30
    assert "vilg probe: LostRankError: rank 0 gives no sign of life" in capsys.readouterr().err


def test_what_may_not_be_read_is_one_message(probe: ProbeVerb, capsys: pytest.CaptureFixture[str]) -> None:
    probe.result = PermissionError(errno.EACCES, "Permission denied", "/runs/big/config.json")
    assert main(["probe"]) == EXIT_ERROR
    said = capsys.readouterr().err
    assert said.startswith("vilg probe: PermissionError: /runs/big/config.json: Permission denied. Works: as a user")
    probe.result = OSError(errno.EIO, "Input/output error", "/runs/big/config.json")
    with pytest.raises(OSError, match="Input/output error"):
        main(["probe"])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left", "/small/spm.model"), "/small/spm.model: No space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
    ],
    ids=["a named file", "no name"],
)
def test_a_full_disk_is_one_message(
    probe: ProbeVerb, capsys: pytest.CaptureFixture[str], error: OSError, words: str
) -> None:
    probe.result = error
    assert main(["probe"]) == EXIT_ERROR
    works = "Works: more room there (`df`, `quota`), or another place\n"
    assert capsys.readouterr().err == f"vilg probe: OSError: {words}. {works}"


def test_a_bug_is_not_hidden(probe: ProbeVerb) -> None:
    probe.result = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        main(["probe"])


def test_settings_may_stand_anywhere(probe: ProbeVerb) -> None:
    assert main(["probe", "optim.lr=1", "--out", "D", "--num-layers", "2", "model.width=8"]) == 0
    assert probe.seen is not None
    assert probe.seen.out == "D"
    assert probe.seen.overrides == ["optim.lr=1", "model.num_layers=2", "model.width=8"]


def test_verbs_without_aliases_keep_their_own_flags(probe: ProbeVerb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "VERBS", (Verb("probe", "probe_verb", "a test", has_overrides=True),))
    assert main(["probe", "more", "--seed", "3", "optim.lr=1"]) == 0
    assert probe.seen is not None
    assert (probe.seen.seed, probe.seen.overrides) == ("3", ["more", "optim.lr=1"])


def test_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["confg"])
    assert caught.value.code == EXIT_ERROR
    message = capsys.readouterr().err
    assert message.startswith("vilg: no verb 'confg'. Did you mean: vilg config? Verbs: ")


def test_no_verb_is_an_error() -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == EXIT_ERROR


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"megatron_vilg {megatron_vilg.__version__}\n"


def test_help_lists_every_verb_and_loads_none() -> None:
    done = run_python(
        "import sys\n"
        "from megatron_vilg.cli.main import VERBS, main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        f"assert not set({HEAVY!r}) & set(sys.modules)\n"
        "assert not {verb.module for verb in VERBS} & set(sys.modules)\n"
    )
    assert done.returncode == 0, done.stderr
    assert [verb.name for verb in VERBS if verb.name not in done.stdout] == []


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_help_of_each_verb_answers_without_torch(verb: Verb) -> None:
    done = run_python(
        "import sys\n"
        "from megatron_vilg.cli.main import main\n"
        "try:\n"
        f"    main([{verb.name!r}, '--help'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        f"heavy = set({HEAVY!r}) & set(sys.modules)\n"
        "assert not heavy, f'--help imports {heavy}'\n"
    )
    assert done.returncode == 0, done.stderr
    assert "example:" in done.stdout, "the help page shows an example"


def test_every_verb_module_is_registered() -> None:
    folder = Path(cli.__file__).parent
    helpers = {"__init__", "main", "options"}
    modules = {f"megatron_vilg.cli.{file.stem}" for file in folder.glob("*.py") if file.stem not in helpers}
    with_parser = {name for name in modules if "def add_parser" in (folder / f"{name.split('.')[-1]}.py").read_text()}
    assert with_parser == {verb.module for verb in VERBS}


def test_python_dash_m_is_the_same_command() -> None:
    command = [sys.executable, "-m", "megatron_vilg", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"megatron_vilg {megatron_vilg.__version__}\n"


ENDING = """
import atexit, os, sys, threading, time, types
from megatron_vilg.cli import main as cli

class Witness:
    def __del__(self):
        os.write(1, b"taken down ")

def run(args):
    atexit.register(print, "handlers", end=" ")
    threading.Thread(target=lambda: (time.sleep(0.2), print("threads", end=" "))).start()
    sys.modules["probe"].witness = Witness()
    {ends}

probe = types.ModuleType("probe")
probe.add_parser = lambda subparsers: subparsers.add_parser("probe").set_defaults(run=run)
sys.modules["probe"] = probe
cli.VERBS = (cli.Verb("probe", "probe", "a test"),)
sys.argv = ["vilg", "probe"]
sys.exit(cli.command())
"""


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ("return 0", 0),
        ("return 75", 75),
        ("raise SystemExit(2)", 2),
        ("raise SystemExit", 0),
        ("raise SystemExit('why')", 1),
        ("raise ZeroDivisionError", 1),
    ],
)
def test_one_process_among_several_is_not_taken_down(size: int, ends: str, code: int) -> None:
    """Threads of gloo abort a process that Python takes down, now and then; everything else happens as usual."""
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(ends=ends)],
        env=os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (code, ["threads", "handlers"] + ["taken", "down"] * (size == 1))
    assert ("why" in done.stderr, "ZeroDivisionError" in done.stderr) == ("why" in ends, "Zero" in ends)


@pytest.mark.parametrize("line", ["config | head -n 1", "plan --preset demo | true", "plan --preset demo >&-"])
def test_a_reader_that_leaves_early_is_no_error(line: str) -> None:
    done = subprocess.run(
        f"env -u PYTHONUNBUFFERED {sys.executable} -m megatron_vilg {line}; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
