from __future__ import annotations

import pytest

from megatron_vilg.errors import ConfigError
from megatron_vilg.parallel import slurm
from megatron_vilg.parallel.slurm import (
    adopt_slurm_ranks,
    first_node,
    gloo_address,
    loopback_problem,
    node_name,
    slurm_ranks,
)

STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURMD_NODENAME": "gpu08",
}
BATCH = {"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
"""What the batch script sees: numbered like a task, but it is none."""


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[007-009,12],cpu1", "gpu007"),
        ("a,b", "a"),
        ("rack1-[03,07]-ib", "rack1-03-ib"),
        ("r[1-2]n[4-5],x", "r1n4"),
    ],
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_a_task_of_srun_gets_a_rank() -> None:
    ranks = slurm_ranks(STEP, address_of=lambda node: f"{node}.cluster")
    assert ranks["RANK"] == "3" and ranks["WORLD_SIZE"] == "4" and ranks["LOCAL_RANK"] == "1"
    assert ranks["MASTER_ADDR"] == "gpu07.cluster"
    others = [slurm_ranks(STEP | {"SLURM_PROCID": str(rank)}, lambda node: node) for rank in range(4)]
    assert len({other["MASTER_PORT"] for other in others}) == 1, "all ranks must meet at one port"
    for other in ({"SLURM_JOB_ID": "1235"}, {"SLURM_STEP_ID": "3"}, {"SLURM_RESTART_COUNT": "1"}):
        assert slurm_ranks(STEP | other, lambda node: node)["MASTER_PORT"] != ranks["MASTER_PORT"]


@pytest.mark.parametrize(
    "environ",
    [{}, BATCH, STEP | {"SLURM_STEP_NUM_TASKS": "1"}, STEP | {"RANK": "0", "WORLD_SIZE": "8"}],
    ids=["no SLURM", "batch script", "one task", "torchrun inside a task"],
)
def test_nothing_else_does(environ: dict[str, str]) -> None:
    assert slurm_ranks(environ) == {}


def test_what_the_user_sets_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "node_address", lambda node: node)
    environ = STEP | {"MASTER_PORT": "29500"}
    adopt_slurm_ranks(environ)
    assert environ["MASTER_PORT"] == "29500" and environ["MASTER_ADDR"] == "gpu07" and environ["RANK"] == "3"


def test_contradiction_is_named() -> None:
    with pytest.raises(ConfigError, match=r"SLURM_PROCID=4: is no task of SLURM_STEP_NUM_TASKS=4"):
        slurm_ranks(STEP | {"SLURM_PROCID": "4"})


def test_names_that_do_not_resolve_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "_controller_address", lambda node: "10.0.0.7" if node == "no-such-node.invalid" else "")
    assert slurm.node_address("no-such-node.invalid") == "10.0.0.7"
    assert slurm.node_address("unknown.invalid") == "unknown.invalid"
    assert slurm.node_address("localhost") == "localhost"


def test_name_of_this_node() -> None:
    assert node_name(STEP) == "gpu08"
    assert node_name({})


def test_nodes_that_know_themselves_by_a_loopback_address_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's default is 127.0.1.1 for a host's own name; gloo then listens where no other node can connect."""
    good, bad = ("gpu07", "10.0.0.7"), ("gpu08", "127.0.1.1")
    problem = loopback_problem({0: good, 1: bad, 2: bad})
    assert problem.startswith("GLOO_SOCKET_IFNAME: not set, and 1 nodes know themselves")
    assert "(gpu08 is 127.0.1.1; see /etc/hosts there)" in problem
    assert "Works: GLOO_SOCKET_IFNAME and, with GPUs, NCCL_SOCKET_IFNAME" in problem
    assert loopback_problem({0: bad, 1: bad}) == "", "one machine reaches itself"
    assert loopback_problem({0: good, 1: ("gpu08", "")}) == "", "the user has named the network"
    assert gloo_address({"GLOO_SOCKET_IFNAME": "eth0"}) == ""
    monkeypatch.setattr(slurm.socket, "gethostname", lambda: "localhost")
    assert gloo_address({}) in ("127.0.0.1", "::1")
    monkeypatch.setattr(slurm.socket, "gethostname", lambda: "no-such-node.invalid")
    assert gloo_address({}) == "127.0.0.1"
