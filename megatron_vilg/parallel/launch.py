"""Join the processes of a job in one process group, and let them wait for the first one."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_vilg.config.world import World
from megatron_vilg.errors import ConfigError, LostRankError, StopRequestedError
from megatron_vilg.log import get_logger
from megatron_vilg.parallel.slurm import (
    MOST_NAMED,
    gloo_address,
    loopback_problem,
    node_name,
    step_port,
)
from megatron_vilg.parallel.watch import READERS, Heartbeat, wait_for_readers

log = get_logger(__name__)
Value = TypeVar("Value")
_POLL_SECONDS = 0.5
"""Between two looks at the store. ``Store.wait`` would keep signals from being handled, and warns at each timeout."""
_POLLS_PER_MESSAGE = 60
_LOST = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)|[Tt]imed out|Broken pipe", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Job:
    """All processes of this run."""

    world: World
    store: dist.Store | None
    """Where processes leave each other small notes; None for one process."""
    failures: Callable[[], Sequence[str]] = tuple
    """Processes that have failed, in words."""
    _meetings: Iterator[int] = field(default_factory=itertools.count)
    """Numbers that tell meetings of one name apart."""

    def main_first(self, name: str, work: Callable[[], Value]) -> Value:
        """Do ``work`` on the main process, then on all others, however long the first takes; all make this call.

        Args:
            name: a word for this meeting, for messages.
            work: called once on every process.

        Raises:
            LostRankError: another process has failed while this one was waiting.
        """
        key = f"{next(self._meetings)} {name}"
        if self.store is None:
            return work()
        if self.world.is_main:
            with _threads_of_waiting_processes(self.world):
                result = work()
            self.store.set(key, "done")
            return result
        polls = 0
        while not self.store.check([key]):
            if found := self.failures():
                raise _lost(found, self.world, f"while it waited for the main process: {name}", is_explained=True)
            time.sleep(_POLL_SECONDS)
            polls += 1
            if polls % _POLLS_PER_MESSAGE == 0:
                log.info("waiting for the main process: %s", name)
        return work()


@contextmanager
def _threads_of_waiting_processes(world: World) -> Iterator[None]:
    """As many threads as all processes of this machine have, and it has cores for: the others do nothing meanwhile."""
    own = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(own, min(own * world.local_size, cores)))
    try:
        yield
    finally:
        torch.set_num_threads(own)


@contextmanager
def joined(world: World, device: torch.device, timeout_seconds: int) -> Iterator[Job]:
    """One process group of all processes for the time of the block; nothing at all for one process.

    CPU tensors travel by gloo, those of GPUs by NCCL. A collective that waits longer than ``timeout_seconds`` for
    another process fails.

    Raises:
        ConfigError: the launcher gave no address to meet at, its port is taken, not all processes came there in time,
            or nodes cannot reach each other.
        LostRankError: other processes failed or are gone; with their ranks and nodes.
    """
    if world.size == 1:
        yield Job(world, None)
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError([f"{name}: not set, so {world.size} processes cannot meet. Works: torchrun or srun."])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_seconds)
    store = _met(world, timeout)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    beats: Any = dist.PrefixStore("beats", store)  # the type stubs of torch before 2.14 do not know its clone()
    with Heartbeat(world, beats.clone(), place()) as beat:
        try:
            job = Job(world, dist.PrefixStore("notes", store), beat.failures)
            yield job
            # The main process may still be writing an export, for longer than a collective waits.
            job.main_first("its last files", lambda: None)
            # All ranks leave together: launchers take the first end as a reason to end the others.
            dist.all_reduce(torch.zeros(1))
        except (Exception, StopRequestedError) as error:
            _leave_word(world, beat, error)
            raise
        dist.destroy_process_group()


def all_agree(value: bool, device: torch.device | str) -> bool:
    """Whether ``value`` is true in all processes of the job, which make this call together; of one process: itself."""
    if not dist.is_initialized():
        return value
    flag = torch.tensor(float(value), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def _leave_word(world: World, beat: Heartbeat, error: BaseException) -> None:
    """Tell the other ranks what ends this one; raises what they have said, if that is the reason for ``error``."""
    if isinstance(error, StopRequestedError):
        # Launchers end the other ranks as soon as one has failed: then that is what ends this one as well.
        if failures := beat.failures():
            raise _lost(failures, world, f"when {error} came", is_explained=True) from None
        beat.note_stop()
    elif isinstance(error, LostRankError):
        pass  # the rank that failed has told everybody
    elif is_lost_connection(error):
        _report_lost(world, beat, error)
        beat.note_failure(error)
    else:
        beat.note_failure(error)
    beat.linger()


def _report_lost(world: World, beat: Heartbeat, error: BaseException) -> None:
    """Raise why other ranks are gone, if they are. The group stays: taking it down would wait for them."""
    # Launchers end the other ranks as soon as one has failed; the report must come first.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    if failures := beat.failures():
        beat.linger()
        raise _lost(failures, world, first_line, is_explained=True) from error
    if beat.is_stopped():
        raise StopRequestedError("a signal to another rank") from error
    if missing := beat.missing():
        raise _lost(missing, world, first_line) from error


def _lost(ranks: Sequence[str], world: World, when: str, *, is_explained: bool = False) -> LostRankError:
    shown = "; ".join(ranks[:MOST_NAMED])
    more = f"; and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    message = f"{shown}{more}. Noticed by rank {world.rank} ({place()}): {when}"
    return LostRankError(message, is_explained=is_explained)


def place() -> str:
    """Where this process runs, for messages."""
    return f"node {node_name()}, process {os.getpid()}"


def is_lost_connection(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, says that another process did not answer, rather than what is wrong with
    this one."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _LOST.search(str(error))):
            return True
        error = error.__cause__
    return False


def _met(world: World, timeout: timedelta) -> dist.Store:
    """The store, once all ranks have come to it and can reach each other; a ``ConfigError`` if they do not."""
    try:
        store = _meet(world, timeout)
        _require_reachable(world, store)
    except dist.DistError as error:
        place_to_meet = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
        why = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            [
                f"{place_to_meet}: not all WORLD_SIZE={world.size} processes met there within "
                f"{timeout.total_seconds():.0f} s, says RANK={world.rank} ({place()}): {why}. Works: ranks 0 to "
                f"{world.size - 1} all started, rank 0 on the node of MASTER_ADDR, and this address and port the same "
                "on all nodes and reachable from each; `vilg doctor` in place of this command shows who answers"
            ]
        ) from error
    return store


def _meet(world: World, timeout: timedelta) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT.

    torchrun gives every restart the same store, in which gloo would find the addresses of the dead group. On one node
    the count of restarts tells them apart; agents on several nodes count for themselves.
    """
    store = _rendezvous(world, timeout)
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        return dist.PrefixStore(f"attempt-{restarts}", store)
    if shares_store and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and world.is_main:
        log.warning(
            "torchrun on several nodes with --max-restarts: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, "
            "or processes may not find each other after a restart"
        )
    return store


def _rendezvous(world: World, timeout: timedelta) -> dist.Store:
    """torch's, in a thread of its own: it may wait long, in C++, where the main thread could not handle signals."""
    stores: list[dist.Store] = []
    problems: list[Exception] = []

    def meet() -> None:
        try:
            stores.append(next(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))[0])
        except Exception as error:  # noqa: BLE001 - raised in the main thread
            problems.append(error)

    thread = threading.Thread(target=meet, name="rendezvous", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
    if stores:
        return stores[0]
    if isinstance(problems[0], dist.DistNetworkError) and re.search("EADDRINUSE|already in use", str(problems[0])):
        raise ConfigError([_taken_port()]) from problems[0]
    raise problems[0]


def _taken_port() -> str:
    port = os.environ["MASTER_PORT"]
    origin = (
        "made from the numbers of job, step and restart" if port == step_port(os.environ) else "from the environment"
    )
    with socket.socket() as free:
        free.bind(("", 0))
        works = free.getsockname()[1]
    return (
        f"MASTER_PORT={port} ({origin}): is taken on node {node_name()}, where rank 0 listens. Works: a free port, the "
        f"same for all ranks, for example `export MASTER_PORT={works}` in front of srun"
    )


def _require_reachable(world: World, store: dist.Store) -> None:
    """Raise the same ``ConfigError`` on all ranks if gloo could not connect them; rank 0 looks, all others hear."""
    store = dist.PrefixStore("nodes", store)
    store.set(str(world.rank), f"{socket.gethostname()} {gloo_address()}")
    if world.is_main:
        ranks = [str(rank) for rank in range(world.size)]
        answers = [text.decode().split(" ") for text in store.multi_get(ranks)]
        store.set("problem", loopback_problem({rank: (host, own) for rank, (host, own) in enumerate(answers)}))
    if problem := store.get("problem").decode():
        if world.is_main:
            wait_for_readers(store, world.size - 1)
        else:
            store.add(READERS, 1)
        raise ConfigError([problem])


def ensure_group(device: torch.device) -> None:
    """A process group of this process alone, where none has been joined; for libraries that cannot do without one."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def device_of(world: World, device: torch.device) -> torch.device:
    """The device of this process: where there are several processes, the GPU of its local rank.

    Raises:
        ConfigError: the machine has fewer GPUs than processes.
    """
    if device.type != "cuda" or world.size == 1:
        return device
    count = torch.cuda.device_count()
    if count == 1 and has_own_gpu():
        return torch.device("cuda", 0)
    if world.local_rank >= count:
        raise ConfigError([f"LOCAL_RANK={world.local_rank}: this machine has {count} GPUs. Works: 0 to {count - 1}."])
    return torch.device("cuda", world.local_rank)


def has_own_gpu() -> bool:
    """Whether srun shows each task another GPU (``--gpus-per-task``)."""
    return "SLURM_STEP_ID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
