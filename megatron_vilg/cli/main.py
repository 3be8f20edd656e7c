"""The ``vilg`` command: finds the verb, imports its module alone, turns errors into one message and an exit code."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import difflib
import errno
import importlib
import io
import itertools
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vilg import __version__, log
from megatron_vilg.config.world import World, read_world
from megatron_vilg.errors import LostRankError, VilgError
from megatron_vilg.parallel.slurm import adopt_slurm_ranks

EXIT_ERROR = 2
"""A mistake that the message explains, argparse's own included."""
EXIT_STOPPED = 75
"""A signal stopped the run and nothing is lost; the same command goes on (EX_TEMPFAIL of sysexits.h: try again)."""
EXIT_INTERRUPTED = 130
"""Ctrl-C, as shells count it (128 + SIGINT)."""
PATIENCE_SECONDS = 5.0
"""How long a rank keeps a message to itself that another one has probably printed."""


@dataclass(frozen=True, slots=True)
class Verb:
    """One word behind ``vilg``, and the module that knows what it does.

    The module has ``add_parser(subparsers)``, which sets the default ``run``: a function of the parsed arguments
    that returns None or an exit code. It imports torch inside functions only, so that ``--help`` answers at once.
    """

    name: str
    module: str
    summary: str
    has_overrides: bool = False
    """Whether ``section.option=value`` may follow."""
    has_aliases: bool = False
    """Whether flags such as ``--lr`` stand for options; not where they would mean something else."""


_CLI = "megatron_vilg.cli"
VERBS: tuple[Verb, ...] = (
    Verb("data", f"{_CLI}.data", "get and filter pairs, train the text tokenizer, encode pairs to tokens", True),
    Verb("train-vqgan", f"{_CLI}.train_vqgan", "train the image tokenizer", True),
    Verb("train", f"{_CLI}.train", "train the generator in both directions", True, has_aliases=True),
    Verb("train-reranker", f"{_CLI}.train_reranker", "train the model that chooses among drawings", True),
    Verb("train-restyler", f"{_CLI}.train_restyler", "train the model that draws things in other styles", True),
    Verb("generate", f"{_CLI}.generate", "draw pictures from text"),
    Verb("caption", f"{_CLI}.caption", "say what is in pictures"),
    Verb("evaluate", f"{_CLI}.evaluate", "measure what a run has learnt; score a file of captions", True),
    Verb("checkpoint", f"{_CLI}.checkpoint", "merge, shard, convert, inspect and verify checkpoints", True),
    Verb("config", f"{_CLI}.config", "print every option, its value, its origin, its meaning", True, has_aliases=True),
    Verb(
        "plan",
        f"{_CLI}.plan",
        "say what a layout costs in memory, traffic and time",
        True,
        has_aliases=True,
    ),
    Verb("doctor", f"{_CLI}.doctor", "say what this machine offers: versions, devices, disk, fonts, ranks", True),
)
"""All verbs, in the order of the help page."""


def command() -> int:
    """What ``vilg`` and ``python -m megatron_vilg`` call: ``main``, and an end that the libraries cannot spoil.

    PyTorch keeps process groups in its caches beyond ``destroy_process_group`` (DTensor's sharding rules do, and so do
    default arguments of ``torch.distributed.nn``). A thread of gloo that lets go of its last tensor while Python
    is already being taken down aborts the process ("terminate called without an active exception", SIGABRT), and the
    launcher calls a complete run failed. So one process among several leaves when its exit handlers have run.
    """
    code = 1  # of an exception that nobody explains

    def leave() -> None:
        if read_world().size > 1:
            _leave_at_once(code)

    atexit.register(leave)  # called behind those of everything that is imported from here on
    try:
        code = main()
    except SystemExit as end:  # argparse's; Python counts None as success and any other word as failure
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 only on full success, 2 on any error a message explains."""
    given = list(sys.argv[1:] if argv is None else argv)
    # The deepspeed launcher puts this in front of everything; the environment says the same.
    arguments = [word for word in given if not word.startswith(("--local_rank=", "--local-rank="))]
    try:
        adopt_slurm_ranks()
        world = read_world()
    except VilgError as error:
        print(f"vilg: {type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_ERROR
    log.configure(rank=world.rank, size=world.size)
    if world.size > 1:
        # torch's C++ side prints a stack of 20 frames for each partner that has left; our messages say who and why.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    args = _parsed(arguments, world)
    try:
        code: int = args.run(args) or 0
        # Here, where a reader that has left can still be dealt with; print, because without a stdout there is no flush.
        print(end="", flush=True)
        return code
    except LostRankError as error:
        _say(f"vilg {args.verb}: {type(error).__name__}: {error}\n", world, is_known=error.is_explained)
        return _leave_at_once(EXIT_ERROR)
    except VilgError as error:
        _say(f"vilg {args.verb}: {type(error).__name__}: {error}\n", world, is_known=world.rank > 0)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"vilg {args.verb}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (``vilg config | head``) has left; Python would complain again while closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        works = _works_instead(error)
        if works is None:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        text = f"vilg {args.verb}: {type(error).__name__}: {where}{error.strerror}. Works: {works}\n"
        _say(text, world, is_known=False)
        return EXIT_ERROR


def _parsed(arguments: list[str], world: World) -> argparse.Namespace:
    """The arguments; argparse's complaints are said like all others."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint) if world.rank > 0 else contextlib.nullcontext():
            verb = _find_verb(arguments)
            parser = _build_parser(verb)
            if verb is not None and verb.has_overrides:
                arguments = _settings_first(verb, arguments)
            return parser.parse_args(arguments)
    except SystemExit:
        if complaint.getvalue():
            _say(complaint.getvalue(), world, is_known=True)
        raise


def _say(message: str, world: World, *, is_known: bool) -> None:
    """Print what ends this process.

    Ranks share most mistakes, and cannot ask each other about those that they make before they have met. But launchers
    end all others once a rank has ended: so those whose message is probably known wait for that, and one that is not
    ended was alone with it.
    """
    if is_known and world.size > 1 and threading.current_thread() is threading.main_thread():
        is_ended = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: is_ended.set())
        if is_ended.wait(PATIENCE_SECONDS):
            return
    print(message, end="", file=sys.stderr, flush=True)


def _works_instead(error: OSError) -> str | None:
    """What helps where the system's own words explain an error of any file; None: a stack trace tells more."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "more room there (`df`, `quota`), or another place"
    if error.filename is None:
        return None
    if error.errno == errno.EROFS:
        return "a folder that can be written"
    return "as a user who may, or after chmod" if error.errno in (errno.EACCES, errno.EPERM) else None


def _leave_at_once(code: int) -> int:
    """End without taking Python and the process group down: the latter would wait for a rank that is lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _find_verb(arguments: Sequence[str]) -> Verb | None:
    """The verb that the first word names; None when the line starts with an option or is empty."""
    if not arguments or arguments[0].startswith("-"):
        return None
    for verb in VERBS:
        if verb.name == arguments[0]:
            return verb
    names = [verb.name for verb in VERBS]
    near = difflib.get_close_matches(arguments[0], names, n=1, cutoff=0.5)
    hint = f" Did you mean: vilg {near[0]}?" if near else ""
    print(f"vilg: no verb {arguments[0]!r}.{hint} Verbs: {', '.join(names)}.", file=sys.stderr)
    raise SystemExit(EXIT_ERROR)


def _build_parser(verb: Verb | None) -> argparse.ArgumentParser:
    """The whole parser, of which only the chosen verb knows its options."""
    parser = argparse.ArgumentParser(
        prog="vilg",
        description="ERNIE-ViLG: one transformer that draws pictures from text and captions pictures.",
        epilog="vilg VERB --help shows the options of a verb and an example.",
    )
    parser.add_argument("--version", action="version", version=f"megatron_vilg {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    if verb is None:
        for each in VERBS:
            subparsers.add_parser(each.name, help=each.summary)
    else:
        importlib.import_module(verb.module).add_parser(subparsers)
    return parser


def _settings_first(verb: Verb, arguments: Sequence[str]) -> list[str]:
    """Translate aliases where the verb has them, and move settings in front of the flags, behind the leading words.

    argparse takes positionals in one run only; ``a.b=1 --out D c.d=2`` would be an error, and ``--load A B c.d=2``
    a third value of ``--load``.
    """
    from megatron_vilg.config.aliases import ALIASES, split_settings

    rest, settings = split_settings(arguments[1:], ALIASES if verb.has_aliases else {})
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), rest))
    return [verb.name, *words, *settings, *rest[len(words) :]]
