"""Try out what a job of several processes needs: do they meet, agree on versions, see one folder, and reduce together?

Everything is noted in a store that rank 0 keeps, so that ranks that do not answer are named instead of waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vilg.config.schema import ParallelConfig
from megatron_vilg.config.world import World
from megatron_vilg.errors import LostRankError
from megatron_vilg.parallel.launch import place
from megatron_vilg.parallel.mesh import AXES, Mesh, build_mesh
from megatron_vilg.parallel.slurm import gloo_address, loopback_problem

_FILE_WAIT = 10.0
"""Seconds after which a file that another node wrote should be seen; network file systems cache directories."""


@dataclass
class Finding:
    """One line of the report."""

    name: str
    answer: str
    problems: list[str] = field(default_factory=list)
    """What is wrong, each with the ranks concerned."""


class Probe:
    """One process of the trial; all processes make the same calls, rank 0 gets the findings.

    Args:
        world: this process.
        timeout_seconds: how long each part waits for ranks that do not answer.

    Raises:
        LostRankError: rank 0 cannot be reached, or on rank 0: nobody came.
    """

    def __init__(self, world: World, timeout_seconds: float) -> None:
        self.world = world
        self._timeout = timeout_seconds
        self._places: dict[int, str] = {}
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        is_host = world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        try:
            self._store = dist.TCPStore(
                address,
                port,
                world.size,
                is_master=is_host,
                timeout=timedelta(seconds=timeout_seconds),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            first_line = str(error).splitlines()[0]
            raise LostRankError(
                f"rank {world.rank} ({place()}) cannot reach rank 0 at {address}:{port} within "
                f"{timeout_seconds:.0f} s: {first_line}"
            ) from error

    def meet(self, versions: Mapping[str, str]) -> list[Finding]:
        """Who is there, whether their nodes can reach each other, and with which versions."""
        mine = {"place": place(), "versions": dict(versions), "node": (socket.gethostname(), gloo_address())}
        answers = self._collect("here", json.dumps(mine))
        found = {rank: json.loads(text) for rank, text in answers.items()}
        self._places = {rank: answer["place"] for rank, answer in found.items()}
        nodes = {text.split(",")[0] for text in self._places.values()}
        ranks = Finding("ranks", f"{len(found)} of {self.world.size} answer, {len(nodes)} nodes", self._silent(found))
        if problem := loopback_problem({rank: tuple(answer["node"]) for rank, answer in found.items()}):
            ranks.problems.append(problem)
        same = Finding("versions", "the same everywhere")
        first = found.get(0, mine)["versions"]
        for rank, answer in found.items():
            other = {name: value for name, value in answer["versions"].items() if value != first.get(name)}
            if other:
                shown = ", ".join(f"{name} {value} (rank 0: {first.get(name)})" for name, value in other.items())
                same.problems.append(f"{self._name(rank)}: {shown}")
        if same.problems:
            same.answer = "not the same everywhere"
        return [ranks, same]

    def share(self, folder: Path) -> Finding:
        """Every rank writes a file below ``folder`` and looks for those of all others."""
        trial = folder / f".vilg-doctor-{os.environ['MASTER_PORT']}"
        own = trial / f"rank-{self.world.rank}"
        try:
            trial.mkdir(parents=True, exist_ok=True)
            own.write_text(place())
            problem = ""
        except OSError as error:
            problem = f"cannot write {own} ({error.strerror})"
        written = self._collect("wrote", problem)
        finding = Finding("shared folder", f"{folder}: every rank sees the files of all", self._silent(written))
        finding.problems += [f"{self._name(rank)}: {text}" for rank, text in written.items() if text]
        missing = self._unseen(trial, [rank for rank, text in written.items() if not text])
        seen = self._collect("seen", json.dumps(missing))
        for rank, text in seen.items():
            if unseen := json.loads(text):
                finding.problems.append(f"{self._name(rank)} does not see files of ranks {unseen}")
        with contextlib.suppress(OSError):  # what could not be written is reported above; what is left is no fault
            own.unlink(missing_ok=True)
            if self.world.is_main:
                for file in trial.glob("rank-*"):
                    file.unlink(missing_ok=True)
                trial.rmdir()
        if finding.problems:
            finding.answer = f"{folder}: is not shared by all ranks"
        return finding

    def reduce(self, parallel: ParallelConfig, device: torch.device) -> list[Finding]:
        """One small sum along each axis of the mesh."""
        findings: list[Finding] = []
        reached: list[Mesh] = []
        self._try("group", lambda: reached.append(self._group(parallel, device)), findings)
        if reached:
            for axis in AXES:
                self._try(axis, lambda axis=axis: _sum_along(reached[0], axis), findings)  # type: ignore[misc]
        return findings

    def part(self) -> None:
        """Rank 0 stays, and keeps the store, until the others have left."""
        if self.world.is_main:
            self._collect("left", "")
        else:
            self._store.set(f"left/{self.world.rank}", "")

    def _group(self, parallel: ParallelConfig, device: torch.device) -> Mesh:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", self._store),
            rank=self.world.rank,
            world_size=self.world.size,
            timeout=timedelta(seconds=self._timeout),
        )
        return build_mesh(parallel, device)

    def _try(self, name: str, work: Callable[[], object], findings: list[Finding]) -> None:
        """Do ``work`` on all ranks, in a thread, so that one that hangs is left behind."""
        result = [f"no answer within {self._timeout:.0f} s"]

        def attempt() -> None:
            try:
                work()
                result[0] = ""
            except (RuntimeError, ValueError) as error:
                result[0] = (str(error) or type(error).__name__).splitlines()[0]

        start = time.perf_counter()
        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(self._timeout)
        milliseconds = 1000 * (time.perf_counter() - start)
        answers = self._collect(f"did-{name}", result[0])
        title = "process group" if name == "group" else f"axis {name}"
        finding = Finding(title, f"answers in {milliseconds:.0f} ms", self._silent(answers))
        finding.problems += [f"{self._name(rank)}: {text}" for rank, text in answers.items() if text]
        if finding.problems:
            finding.answer = "does not work"
        findings.append(finding)

    def _collect(self, key: str, value: str) -> dict[int, str]:
        """Everybody's value by rank; those that do not come within the time are left out."""
        self._store.set(f"{key}/{self.world.rank}", value)
        deadline = time.monotonic() + self._timeout
        answers: dict[int, str] = {}
        for rank in range(self.world.size):
            name = f"{key}/{rank}"
            left = max(0.01, deadline - time.monotonic())
            try:
                self._store.wait([name], timedelta(seconds=left))
            except dist.DistStoreError:
                continue
            answers[rank] = self._store.get(name).decode()
        return answers

    def _silent(self, answers: Mapping[int, object]) -> list[str]:
        return [f"{self._name(rank)} does not answer" for rank in range(self.world.size) if rank not in answers]

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._places[rank]})" if rank in self._places else f"rank {rank}"

    def _unseen(self, trial: Path, writers: list[int]) -> list[int]:
        deadline = time.monotonic() + min(_FILE_WAIT, self._timeout / 2)
        while True:
            missing = [rank for rank in writers if not (trial / f"rank-{rank}").is_file()]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.2)


def _sum_along(mesh: Mesh, axis: str) -> None:
    total = mesh.sum(torch.ones((), device=mesh.device), (axis,))
    if float(total) != mesh.size(axis):
        raise ValueError(f"the sum over {mesh.size(axis)} ranks of axis {axis} is {float(total):g}")
