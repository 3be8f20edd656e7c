"""Heartbeats: every rank says in the job's store that it lives, so that a failing job can name the rank that is gone.

A collective that loses a partner says "connection closed" on every other rank, and not whose fault it was.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import torch.distributed as dist

from megatron_vilg.config.world import World
from megatron_vilg.log import get_logger

log = get_logger(__name__)
BEAT_SECONDS = 1.0
"""Time between two heartbeats; a rank without one for three times as long is called silent."""


class Heartbeat:
    """``with Heartbeat(...) as beat``: beats in a thread of its own until the end of the block.

    Args:
        world: who this process is.
        store: a connection of its own (``Store.clone``), since a thread uses it.
        place: where this process runs, for messages: node and process number.
    """

    def __init__(self, world: World, store: dist.Store, place: str) -> None:
        self._world, self._store = world, store
        self._store.set_timeout(timedelta(seconds=5 * BEAT_SECONDS))
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._store.set(f"place/{world.rank}", place)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(2 * BEAT_SECONDS)

    def note_failure(self, error: BaseException) -> None:
        """Leave word of what ends this rank, for the others to report."""
        words = " ".join(str(error).split())
        try:
            with self._lock:
                self._store.set(f"failure/{self._world.rank}", f"{type(error).__name__}: {words}"[:500])
        except RuntimeError as trouble:
            log.debug("no store to leave word in: %s", trouble)

    def missing(self) -> list[str]:
        """Ranks that have failed or gone silent, in words, each with its place; takes three heartbeats.

        If the store itself is gone, that is rank 0 (or the launcher on its node), which keeps it.
        """
        try:
            before = self._counts()
            time.sleep(3 * BEAT_SECONDS)
            after = self._counts()
            with self._lock:
                return [
                    self._describe(rank)
                    for rank in range(self._world.size)
                    if rank != self._world.rank and (before[rank] == after[rank] or self._failure(rank))
                ]
        except RuntimeError as trouble:
            log.debug("the store does not answer: %s", trouble)
            return ["rank 0, or the launcher on its node, which keeps the list of ranks"]

    def _counts(self) -> list[int]:
        with self._lock:
            return [self._store.add(f"beat/{rank}", 0) for rank in range(self._world.size)]

    def _failure(self, rank: int) -> str:
        key = f"failure/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _describe(self, rank: int) -> str:
        key = f"place/{rank}"
        place = self._store.get(key).decode() if self._store.check([key]) else "never seen"
        failure = self._failure(rank)
        return f"rank {rank} ({place}){': ' + failure if failure else ' gives no sign of life'}"

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            try:
                with self._lock:
                    self._store.add(f"beat/{self._world.rank}", 1)
            except RuntimeError:
                return  # the store is gone; the next collective says so
