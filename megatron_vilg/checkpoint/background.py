"""Write a checkpoint while training goes on: copy the state, then let a thread do the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megatron_vilg.parallel.mesh import Mesh


class BackgroundWrite:
    """One write at a time. All ranks start and await it together; what follows it happens on the main rank alone.

    Threads of several ranks talk in a process group of their own, beside what training sends meanwhile.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        # Any: the type stubs of torch say what ranks outside a group get, and since 2.14 no call takes that.
        self._group: Any = dist.new_group(backend="gloo") if mesh.is_distributed else None
        self._thread: threading.Thread | None = None
        self._failure = ""

    def start(
        self,
        state: Mapping[str, Any],
        writer: dcp.FileSystemWriter,
        after: Callable[[], Any],
        then: Callable[[list[Any]], None],
    ) -> None:
        """Copy ``state`` (nested dict of tensors) to main memory and return; the rest goes on in the background.

        Args:
            state: what is written.
            writer: where to.
            after: called on every rank when all have written; returns something picklable.
            then: called on the main rank with what ``after`` returned, by rank.
        """
        assert self._thread is None, "the write before is not awaited"
        self._failure = ""
        if self._group is None:
            copied = _copied(state)
            work = lambda: dcp.save(copied, storage_writer=writer, no_dist=True)  # noqa: E731
        else:
            answer: Any = dcp.async_save(dict(state), storage_writer=writer, process_group=self._group)
            written: Future[Any] = getattr(answer, "upload_completion", answer)
            work = written.result
        self._thread = threading.Thread(target=self._run, args=(work, after, then), name="checkpoint")
        self._thread.start()

    def wait(self) -> str:
        """Until the write is complete; empty, or why it failed on this rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, ""
        return failure

    def _run(self, work: Callable[[], Any], after: Callable[[], Any], then: Callable[[list[Any]], None]) -> None:
        failure, found = "", None
        try:
            work()
            found = after()
        except Exception as error:  # noqa: BLE001 - nothing may be lost in a thread: wait() reports it
            failure = f"{type(error).__name__}: {error}"
        try:
            answers = self._gather((failure, found))
            failure = next((failure for failure, _ in answers if failure), "")
            if not failure and self._mesh.is_main:
                then([found for _, found in answers])
        except Exception as error:  # noqa: BLE001 - as above
            failure = failure or f"{type(error).__name__}: {error}"
        self._failure = failure

    def _gather(self, answer: tuple[str, Any]) -> list[tuple[str, Any]]:
        """What every rank answers, also those that failed, so that none waits for them."""
        if self._group is None:
            return [answer]
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, answer, group=self._group)
        return answers


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else _copied(value)
        for key, value in state.items()
    }
