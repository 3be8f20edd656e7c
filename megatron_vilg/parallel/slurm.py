"""Ranks from SLURM: what ``srun`` says about a task, in the variables that torch's launchers set. No torch in here."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable, Mapping, MutableMapping

from megatron_vilg.errors import ConfigError

FIRST_PORT, NUM_PORTS = 12_000, 18_000
"""Ports for rank 0 to listen on: below those that systems hand out by themselves."""
MOST_NAMED = 8
"""Nodes or ranks that a message names."""


def adopt_slurm_ranks(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for a task that ``srun`` started.

    What is set already stays, so a launcher inside the task (torchrun, one task per node) and users win. Nothing
    happens in the batch script itself: SLURM numbers it like a task, yet it is alone.
    """
    for name, value in slurm_ranks(environ).items():
        environ.setdefault(name, value)


def slurm_ranks(environ: Mapping[str, str], address_of: Callable[[str], str] | None = None) -> dict[str, str]:
    """The rank variables of a task of a step of several tasks; empty for everything else.

    Args:
        environ: the environment.
        address_of: from the name of a node to an address that other nodes reach; None: names where they resolve,
            else what the controller says.

    Raises:
        ConfigError: SLURM's variables contradict each other.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ or "SLURM_STEP_ID" not in environ:
        return {}
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1":
        return {}
    rank = environ.get("SLURM_PROCID", "")
    if not (rank.isdigit() and tasks.isdigit() and int(rank) < int(tasks)):
        raise ConfigError(
            [
                f"SLURM_PROCID={rank or '(not set)'}: is no task of SLURM_STEP_NUM_TASKS={tasks}. "
                "Works: start the command with srun, or set RANK and WORLD_SIZE"
            ]
        )
    ranks = {"RANK": rank, "WORLD_SIZE": tasks, "LOCAL_RANK": environ.get("SLURM_LOCALID", "0")}
    address, port = meeting_place(environ, address_of)
    return ranks | {"MASTER_ADDR": address, "MASTER_PORT": port}


def meeting_place(environ: Mapping[str, str], address_of: Callable[[str], str] | None = None) -> tuple[str, str]:
    """Address and port where the tasks of a step meet: on its first node, unless MASTER_ADDR and MASTER_PORT say where.

    Args:
        environ: the environment of a task.
        address_of: as for ``slurm_ranks``.
    """
    address = environ.get("MASTER_ADDR", "")
    if not address:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        address = (address_of or node_address)(first_node(nodes)) if nodes else "127.0.0.1"
    return address, environ.get("MASTER_PORT") or step_port(environ)


def step_port(environ: Mapping[str, str]) -> str:
    """A port for this start of a step; the next start of a requeued job does not find it taken by what is left."""
    job, step, restart = (
        _number(environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    )
    return str(FIRST_PORT + (job * 31 + step + restart * 997) % NUM_PORTS)


def gloo_address(environ: Mapping[str, str] = os.environ) -> str:
    """Where gloo will listen on this node: what its host name resolves to; empty if the user has named a network."""
    if environ.get("GLOO_SOCKET_IFNAME"):
        return ""
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return "127.0.0.1"  # what gloo then takes


def loopback_problem(nodes: Mapping[int, tuple[str, str]]) -> str:
    """Why ranks on several machines would not reach each other, or an empty text.

    Args:
        nodes: by rank the host name and ``gloo_address``.
    """
    if len({host for host, _ in nodes.values()}) < 2:
        return ""
    bad = {host: address for host, address in nodes.values() if address.startswith("127.") or address == "::1"}
    if not bad:
        return ""
    shown = ", ".join(f"{host} is {address}" for host, address in sorted(bad.items())[:MOST_NAMED])
    return (
        f"GLOO_SOCKET_IFNAME: not set, and {len(bad)} nodes know themselves by an address that others cannot reach "
        f"({shown}; see /etc/hosts there). Works: GLOO_SOCKET_IFNAME and, with GPUs, NCCL_SOCKET_IFNAME set to the "
        "name of the network between the nodes, for example eth0 (`ip -brief address` lists them)"
    )


def first_node(nodes: str) -> str:
    """``gpu[007-009,12],cpu1`` -> ``gpu007``: the node of task 0 in SLURM's block and cyclic distributions."""
    entry = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", entry[0] if entry else nodes)


def node_address(node: str) -> str:
    """The node's name if it resolves here, else the address that SLURM's controller knows it by."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        return _controller_address(node) or node
    return node


def _controller_address(node: str) -> str:
    """``NodeAddr`` of a node, or an empty text where ``scontrol`` cannot say."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "node", node, "--oneliner"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"\bNodeAddr=(\S+)", done.stdout)
    return found[1] if done.returncode == 0 and found else ""


def node_name(environ: Mapping[str, str] = os.environ) -> str:
    """This node as the launcher calls it, for messages: SLURM's name, else the host name."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
