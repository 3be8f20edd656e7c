"""A real SLURM of several nodes on this machine: munged, slurmctld and one slurmd per node, all in one folder."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CPUS_PER_NODE = 4
_CONF = """\
ClusterName=toy
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3600
"""


def why_not() -> str:
    """Why no cluster can be started here, or an empty text."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: munge slurmctld slurmd slurm-client)"
    return "" if os.geteuid() == 0 else "starts daemons, so it needs root"


@dataclass
class Cluster:
    """A running cluster; commands find it through ``SLURM_CONF``."""

    folder: Path
    nodes: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str, environ: Mapping[str, str] | None = None, timeout: float = 120) -> str:
        """Standard output of a SLURM command that must succeed."""
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environ | dict(environ or {}),
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def sbatch(self, *arguments: str, environ: Mapping[str, str] | None = None) -> int:
        """Submit a job; returns its number."""
        return int(self.run("sbatch", "--parsable", *arguments, environ=environ).split(";")[0])

    def field(self, job: int, name: str) -> str:
        """A field of ``scontrol show job``: JobState, ExitCode, Restarts, ..."""
        found = re.search(rf"\b{name}=(\S*)", self.run("scontrol", "show", "job", str(job), "--oneliner"))
        assert found is not None, name
        return found[1]

    def wait(self, job: int, states: Sequence[str], timeout: float) -> str:
        """Wait until the job is in one of these states; returns it."""
        deadline = time.monotonic() + timeout
        while (state := self.field(job, "JobState")) not in states:
            assert time.monotonic() < deadline, f"job {job} is still {state} after {timeout:.0f} s\n{self.logs()}"
            time.sleep(0.2)
        return state

    def logs(self) -> str:
        """The last lines of all daemons."""
        tails = {log.name: log.read_text().splitlines()[-8:] for log in self.folder.glob("*.log")}
        return "\n".join("\n".join([f"--- {name}", *lines]) for name, lines in tails.items())


@contextlib.contextmanager
def running_cluster(num_nodes: int = 2) -> Iterator[Cluster]:
    """Start a cluster in a folder of its own, stop all of it at the end."""
    # Sockets have short paths, and munge wants a folder that only its owner can write.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    folder.chmod(0o755)
    nodes = tuple(f"n{i + 1}" for i in range(num_nodes))
    cluster = Cluster(folder, nodes, {**_clean_environ(), "SLURM_CONF": str(folder / "slurm.conf")})
    try:
        _start(cluster)
        yield cluster
    finally:
        _cancel_jobs(cluster)
        _stop(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _clean_environ() -> dict[str, str]:
    """This environment without another cluster's variables and without a launcher's ranks."""
    dropped = ("SLURM", "SBATCH", "SRUN", "MASTER_", "TORCHELASTIC")
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    return {k: v for k, v in os.environ.items() if not k.startswith(dropped) and k not in ranks}


def _start(cluster: Cluster) -> None:
    folder = cluster.folder
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    munge = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munged.pid"}
    munge |= {"log-file": folder / "munged.log", "seed-file": folder / "munged.seed"}
    cluster.run("munged", "--force", *(f"--{name}={value}" for name, value in munge.items()))
    host, ports = socket.gethostname().split(".")[0], _free_ports(1 + len(cluster.nodes))
    user = cluster.run("id", "-un").strip()
    lines = [_CONF.format(host=host, port=ports[0], user=user, folder=folder)]
    for node, port in zip(cluster.nodes, ports[1:], strict=True):
        sizes = f"CPUs={CPUS_PER_NODE} RealMemory=4000 State=UNKNOWN"
        lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {sizes}\n")
        (folder / f"spool-{node}").mkdir()
    lines.append(f"PartitionName=all Nodes={','.join(cluster.nodes)} Default=YES MaxTime=INFINITE State=UP\n")
    (folder / "slurm.conf").write_text("".join(lines))
    (folder / "state").mkdir()
    cluster.run("slurmctld", "-c")
    for node in cluster.nodes:
        cluster.run("slurmd", "-N", node)
    deadline = time.monotonic() + 60
    while f"idle {len(cluster.nodes)}" not in cluster.run("sinfo", "-h", "-o", "%T %D"):
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.1)


def _cancel_jobs(cluster: Cluster) -> None:
    """End all jobs while their daemons still live; without them the processes would go on."""
    with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
        cluster.run("scancel", "--partition=all", timeout=20)
        deadline = time.monotonic() + 30
        while cluster.run("squeue", "--noheader", timeout=20).strip() and time.monotonic() < deadline:
            time.sleep(0.2)


def _stop(folder: Path) -> None:
    """End the daemons by the process numbers that they wrote."""
    pids = [int(file.read_text()) for file in folder.glob("*.pid") if file.read_text().strip()]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + 5
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
