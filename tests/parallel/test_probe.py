"""``vilg doctor`` behind a launcher: who answers, one folder, a sum along each axis; silent ranks are named."""

from __future__ import annotations

import os
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from megatron_vilg.config.schema import ParallelConfig
from megatron_vilg.config.world import World
from megatron_vilg.errors import LostRankError
from megatron_vilg.parallel.probe import Finding, Probe


def try_out(rank: int, size: int, port: int, folder: Path, timeout: float, answer: Connection) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), SLURMD_NODENAME=f"n{rank}")
    probe = Probe(World(rank, size, rank), timeout)
    findings = [*probe.meet({"torch": "2.13" if rank == 0 else "2.11"}), probe.share(folder)]
    if not findings[0].problems:
        findings += probe.reduce(ParallelConfig(tensor=2), torch.device("cpu"))
    answer.send(findings)
    probe.part()
    os._exit(0)


def findings_of(started: int, size: int, port: int, folder: Path, timeout: float) -> list[Finding]:
    context = get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    _, unused = context.Pipe(duplex=False)
    processes = [
        context.Process(target=try_out, args=(rank, size, port, folder, timeout, unused if rank else sending))
        for rank in range(started)
    ]
    for process in processes:
        process.start()
    try:
        assert receiving.poll(90)
        findings: list[Finding] = receiving.recv()
        return findings
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path, free_port: int) -> None:
    (tmp_path / "file").write_text("not a folder")
    findings = {finding.name: finding for finding in findings_of(2, 2, free_port, tmp_path / "file", 30.0)}
    assert [problem.split(": ", 1)[1].split(" ")[:2] for problem in findings["shared folder"].problems] == [
        ["cannot", "write"]
    ] * 2
    assert "process group" in findings, "what follows still runs"


def test_what_works_and_what_differs_is_told(tmp_path: Path, free_port: int) -> None:
    findings = {finding.name: finding for finding in findings_of(2, 2, free_port, tmp_path, 30.0)}
    assert findings["ranks"].answer == "2 of 2 answer, 2 nodes"
    (different,) = findings["versions"].problems
    assert "rank 1 (node n1" in different and "torch 2.11 (rank 0: 2.13)" in different
    assert findings["shared folder"].problems == [] and list(tmp_path.iterdir()) == []
    axes = [name for name in findings if name.startswith("axis")]
    assert axes == ["axis pp", "axis replica", "axis shard", "axis tp"]
    assert all("answers in" in findings[name].answer for name in (*axes, "process group"))


def test_a_rank_that_never_comes_is_named(tmp_path: Path, free_port: int) -> None:
    findings = {finding.name: finding for finding in findings_of(2, 3, free_port, tmp_path, 4.0)}
    assert findings["ranks"].problems == ["rank 2 does not answer"]
    assert "axis tp" not in findings


def test_an_unreachable_first_rank_is_named(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port))
    with pytest.raises(LostRankError, match=rf"rank 1 .* cannot reach rank 0 at 127\.0\.0\.1:{free_port} within 1 s"):
        Probe(World(1, 2, 1), 1.0)
