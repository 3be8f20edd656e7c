"""Heartbeats: every rank says in the job's store that it lives, so that a failing job can name the rank that is gone.

A collective that loses a partner says "connection closed" on every other rank, and not whose fault it was.
"""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch.distributed as dist

from megatron_vilg.config.world import World
from megatron_vilg.log import get_logger

log = get_logger(__name__)
BEAT_SECONDS = 1.0
"""Time between two heartbeats; a rank without one for three times as long is called silent."""

_FAILURE, _STOP = "failure", "stop"
READERS = "readers"
"""Counts the ranks that have read what ends the job."""
_KEYS = "keys"
"""Where the store lists the notes that ranks have left, so that a look costs one question and not one per rank."""


def wait_for_readers(store: dist.Store, count: int, lock: AbstractContextManager[object] | None = None) -> None:
    """Until so many ranks have counted themselves as readers, for 3 beats at most: then the store may go.

    Args:
        store: of rank 0.
        count: of readers.
        lock: held while the store is used.
    """
    end = time.monotonic() + 3 * BEAT_SECONDS
    while time.monotonic() < end:
        with lock or nullcontext():
            if store.add(READERS, 0) >= count:
                return
        time.sleep(BEAT_SECONDS / 20)


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
        self._notes: dict[str, str] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._name = f"rank {world.rank} ({place})"
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
        self._note(_FAILURE, f"{self._name}: {type(error).__name__}: {words}"[:600])

    def note_stop(self) -> None:
        """Leave word that a signal ends this rank, which is no failure."""
        self._note(_STOP, self._name)

    def failures(self) -> list[str]:
        """What other ranks have left word of that failed, each with its place; also once the store is gone."""
        return self._words_of_others(_FAILURE)

    def is_stopped(self) -> bool:
        """Whether another rank was ended by a signal."""
        return bool(self._words_of_others(_STOP))

    def linger(self) -> None:
        """Rank 0, which keeps the store, stays until the others have read what ended the job, for 3 beats at most."""
        if not self._world.is_main:
            return
        try:
            wait_for_readers(self._store, self._world.size, self._lock)
        except RuntimeError as trouble:
            log.debug("nobody to wait for: %s", trouble)

    def missing(self) -> list[str]:
        """Ranks that have gone silent, in words, each with its place; takes three heartbeats.

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
                    if rank != self._world.rank and before[rank] == after[rank]
                ]
        except RuntimeError as trouble:
            log.debug("the store does not answer: %s", trouble)
            return ["rank 0, or the launcher on its node, which keeps the list of ranks"]

    def _counts(self) -> list[int]:
        with self._lock:
            return [self._store.add(f"beat/{rank}", 0) for rank in range(self._world.size)]

    def _note(self, kind: str, words: str) -> None:
        try:
            with self._lock:
                key = f"{kind}/{self._world.rank}"
                self._store.set(key, words)
                self._store.append(_KEYS, f"{key} ")  # type: ignore[attr-defined]
                self._look()
        except RuntimeError as trouble:
            log.debug("no store to leave word in: %s", trouble)

    def _look(self) -> None:
        """Read the words that ranks have left, and count this one among the readers; the caller holds the lock."""
        if not self._store.check([_KEYS]):
            return
        if not self._notes:
            self._store.add(READERS, 1)
        for key in self._store.get(_KEYS).decode().split():
            if key not in self._notes:
                self._notes[key] = self._store.get(key).decode()

    def _words_of_others(self, kind: str) -> list[str]:
        with self._lock:
            try:
                self._look()
            except RuntimeError as trouble:
                log.debug("only what has been read already: %s", trouble)
            own = f"{kind}/{self._world.rank}"
            return [words for key, words in self._notes.items() if key.startswith(f"{kind}/") and key != own]

    def _describe(self, rank: int) -> str:
        key = f"place/{rank}"
        place = self._store.get(key).decode() if self._store.check([key]) else "never seen"
        return f"rank {rank} ({place}) gives no sign of life"

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            try:
                with self._lock:
                    self._store.add(f"beat/{self._world.rank}", 1)
                    self._look()
            except RuntimeError:
                return  # the store is gone; the next collective says so
