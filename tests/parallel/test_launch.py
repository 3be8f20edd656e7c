"""Processes meet, wait for the first one, and part."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_vilg.config.schema import ParallelConfig
from megatron_vilg.config.world import World, read_world
from megatron_vilg.errors import ConfigError, DataError, StopRequestedError, VilgError
from megatron_vilg.parallel.launch import device_of, joined
from megatron_vilg.parallel.mesh import build_mesh
from tests.helpers import run_distributed

SCRIPT = """
import sys, time, torch, torch.distributed as dist
from pathlib import Path
from megatron_vilg.config.world import read_world
from megatron_vilg.parallel.launch import joined
world = read_world()
with joined(world, torch.device("cpu"), 60) as job:
    torch.set_num_threads(1)
    def work():
        time.sleep(2.5 if world.is_main else 0.0)
        with Path(sys.argv[1]).open("a") as file:
            file.write(f"{world.rank}: {torch.get_num_threads()} ")
    job.main_first("stage", work)
    assert torch.get_num_threads() == 1
    total = torch.ones(())
    dist.all_reduce(total)
    assert total == 2
assert not dist.is_initialized()
"""


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    with joined(World(), torch.device("cpu"), 1) as job:
        assert job.main_first("x", lambda: 3) == 3 and not dist.is_initialized()


def test_the_main_process_goes_first_under_torchrun(tmp_path: Path) -> None:
    script, order = tmp_path / "script.py", tmp_path / "order"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, str(script), str(order)], check=True, env=environment, timeout=120, capture_output=True, text=True
    )
    # Nobody else works while the first process does, so it takes everybody's threads; those that there are cores for.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert order.read_text() == f"0: {min(2, cores)} 1: 1 "
    assert "timed out" not in done.stderr  # waiting is no trouble, and must not look like it


def test_a_meeting_place_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="MASTER_ADDR"), joined(World(0, 2, 0), torch.device("cpu"), 1):
        pass


def test_every_process_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda = torch.device("cuda")
    assert device_of(World(3, 4, 1), cuda) == torch.device("cuda", 1)
    assert device_of(World(), cuda) == cuda and device_of(World(1, 2, 1), torch.device("cpu")).type == "cpu"
    with pytest.raises(ConfigError, match="LOCAL_RANK=2.*2 GPUs.*0 to 1"):
        device_of(World(2, 4, 2), cuda)


def leave_or_fail(port: int) -> str:
    """What a rank says whose partner fails after the last collective, as one that writes may."""
    dist.barrier()  # who is still connecting would miss those who have gone on
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = read_world()
    try:
        with joined(world, torch.device("cpu"), 60):
            if world.rank == 1:
                raise ConfigError(["--out=nowhere"])
    except VilgError as error:
        return f"{type(error).__name__}: {error}"
    return "left"


def test_who_fails_while_the_others_are_leaving_is_named(free_port: int) -> None:
    first, second = run_distributed(leave_or_fail, 2, free_port)
    assert second.startswith("ConfigError: 1 problem")
    assert first.startswith("LostRankError: rank 1") and "--out=nowhere. Noticed by rank 0" in first


def outlast_the_time_limit(port: int) -> float:
    """Seconds that a rank took whose main rank works, in the job and at its end, for longer than a collective waits."""
    dist.barrier()
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world, start = read_world(), time.monotonic()

    def work() -> None:
        time.sleep(3.0 if world.is_main else 0.0)

    with joined(world, torch.device("cpu"), 2) as job:
        mesh = build_mesh(ParallelConfig(), "cpu", job)
        for _ in range(2):
            mesh.main_first("samples", work)
            assert not mesh.any(False)
        work()
    return time.monotonic() - start


def test_the_main_process_may_take_longer_than_a_collective_waits(free_port: int) -> None:
    assert min(run_distributed(outlast_the_time_limit, 2, free_port)) >= 9.0


def prepare_together(port: int, how: str) -> str:
    """What a rank says when rank 0 cannot do what comes first, or when rank 1 does and a signal comes for rank 0."""
    dist.barrier()
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = read_world()

    def work() -> None:
        if how == "data":
            raise DataError("found no pairs at 'tokenz'")
        raise StopRequestedError("SIGTERM")

    try:
        with joined(world, torch.device("cpu"), 60) as job:
            if how == "signal" and world.rank == 1:
                raise DataError("found no pairs at 'tokenz'")
            if how == "signal":
                while not job.failures():
                    time.sleep(0.05)
            if how == "collective" and world.rank == 1:
                dist.all_reduce(torch.ones(()))
            job.main_first("text", work)
    except (VilgError, StopRequestedError) as error:
        return f"{type(error).__name__}: {error}{' (explained)' if getattr(error, 'is_explained', False) else ''}"
    return "prepared"


def test_who_waits_for_the_main_process_hears_what_is_wrong_with_it(free_port: int) -> None:
    first, second = run_distributed(prepare_together, 2, free_port, "data")
    assert first == "DataError: found no pairs at 'tokenz'"
    assert second.startswith("LostRankError: rank 0 (node ") and "): DataError: found no pairs at 'tokenz'." in second
    assert second.endswith("while it waited for the main process: text (explained)")


def test_a_launcher_s_signal_after_a_failure_is_no_stop(free_port: int) -> None:
    """Launchers end the others once a rank has failed: their code must not say that nothing is lost."""
    first, second = run_distributed(prepare_together, 2, free_port, "signal")
    assert second == "DataError: found no pairs at 'tokenz'"
    assert first.startswith("LostRankError: rank 1 (node ") and first.endswith("when SIGTERM came (explained)")


def test_who_loses_a_rank_that_was_stopped_is_stopped_too(free_port: int) -> None:
    first, second = run_distributed(prepare_together, 2, free_port, "collective")
    assert first == "StopRequestedError: SIGTERM"
    assert second == "StopRequestedError: a signal to another rank"


def join_on_two_nodes(port: int) -> str:
    """What a rank says whose node has another name than that of the other rank, and no address of its own."""
    dist.barrier()
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    world = read_world()
    socket.gethostname = lambda: f"no-such-node-{world.rank}.invalid"
    try:
        with joined(world, torch.device("cpu"), 60):
            return "joined"
    except ConfigError as error:
        return str(error)


def test_nodes_that_cannot_reach_each_other_are_refused_on_all_ranks(free_port: int) -> None:
    first, second = run_distributed(join_on_two_nodes, 2, free_port)
    assert first == second and "GLOO_SOCKET_IFNAME: not set, and 2 nodes know themselves" in first


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port), ("RANK", 0), ("WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        message = rf"MASTER_PORT={port} \(from the environment\): is taken on node .* Works: a free port, the same for"
        with pytest.raises(ConfigError, match=message), joined(World(0, 2, 0), torch.device("cpu"), 60):
            pass


@pytest.mark.parametrize(
    ("rank", "why"), [(0, r"1/2 clients joined"), (1, r"while trying to connect to \(127\.0\.0\.1, {port}\)")]
)
def test_a_rank_that_stays_alone_says_where_it_waited(
    rank: int, why: str, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", free_port), ("RANK", rank), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    head = rf"MASTER_ADDR=127\.0\.0\.1, MASTER_PORT={free_port}: not all WORLD_SIZE=2 processes met there within 2 s"
    message = (
        rf"{head}, says RANK={rank} \(node .*\): .*{why.format(port=free_port)}.* Works: ranks 0 to 1 .*vilg doctor"
    )
    with pytest.raises(ConfigError, match=message), joined(World(rank, 2, rank), torch.device("cpu"), 2):
        pass


WAITING = """
import os, signal, threading, torch
from megatron_vilg.config.world import World
from megatron_vilg.parallel.launch import joined
from megatron_vilg.train.signals import StopRaises
with StopRaises(is_alone=True) as stop, stop.anywhere():
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with joined(World(1, 2, 1), torch.device("cpu"), 600):
        pass
print(stop.name, flush=True)
os._exit(75)  # as main does: a thread still waits
"""


def test_a_signal_ends_the_wait_for_a_meeting() -> None:
    """Rank 1 connects to something that is not rank 0 and does not answer, as on a port that another job has."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        environment = {**os.environ, **meeting, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", WAITING], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    assert (done.returncode, done.stdout) == (75, "SIGTERM\n"), done.stderr


def fail_on_rank_one() -> int:
    if dist.get_rank() == 1:
        raise ValueError("as asked")
    return dist.get_rank()


def test_the_harness_returns_values_and_names_the_rank_that_failed() -> None:
    assert run_distributed(dist.get_rank, 3) == [0, 1, 2]
    with pytest.raises(AssertionError, match="rank 1(.|\n)*as asked"):
        run_distributed(fail_on_rank_one, 2)
