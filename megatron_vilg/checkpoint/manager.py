"""Training checkpoints on disk: save, find the newest sound one, load in place, delete old ones.

A checkpoint is a folder ``step-00001000`` with what ``torch.distributed.checkpoint`` writes (``.metadata`` and
``*.distcp``) and ``manifest.json``. Names of tensors are their identity, so another layout can load it.

``.metadata`` is a pickle, as torch writes it: load checkpoints of people you trust only. The tensors themselves are
read without executing anything, and plain numbers live in the manifest. For passing weights on, use
``checkpoint.export``, which has no pickle at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial as partial_call
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vilg.checkpoint.background import BackgroundWrite
from megatron_vilg.checkpoint.files import FULL, PARTIAL, REPLACED, is_full, publish, recover, remove, sync, with_suffix
from megatron_vilg.checkpoint.manifest import (
    STEP_NAME,
    FileEntry,
    Manifest,
    entry_of,
    fair_share,
    find_damage,
    read_manifest,
    require_no_damage,
    require_own_step,
    write_manifest,
)
from megatron_vilg.checkpoint.nested_state import flatten, mismatches
from megatron_vilg.checkpoint.new_folder import named
from megatron_vilg.config.schema import CheckpointConfig
from megatron_vilg.errors import CheckpointError, VilgError
from megatron_vilg.log import get_logger
from megatron_vilg.parallel.mesh import Mesh

logger = get_logger(__name__)
Value = TypeVar("Value")
_MOST_NAMED = 20
"""Tensors that a message names: more are of no more help."""


class Checkpointer:
    """Checkpoints of one run. On several ranks all make the same calls: each writes its shards, the main one the rest.

    A state is a nested dict with string keys and tensors as leaves; ranks may hold different names, and shards of
    tensors (DTensor). ``save`` may be killed at any moment: the newest complete checkpoint stays loadable.

    Args:
        folder: where; on several machines a shared one.
        config: when to save and what to keep.
        mesh: the grid of ranks; None for one process.
        require_ours: called on the main rank before anything is written; raises ``CheckpointError`` if another job has
            taken over.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        mesh: Mesh | None = None,
        require_ours: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.config = config
        self._mesh = mesh or Mesh(torch.device("cpu"))
        self._require_ours = require_ours
        self._unusable: set[int] = set()
        self._checked: tuple[Path, Manifest] | None = None
        self._background = BackgroundWrite(self._mesh) if config.async_save else None

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after ``step`` finished steps."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a folder under a final name, in rising order; nothing is verified."""
        if not self.folder.is_dir():
            return []
        matches = (STEP_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, step: int, state: Mapping[str, Any], manifest: Manifest, keep_from: int = -1) -> Path:
        """Write a checkpoint, then delete those that ``keep_last``, ``keep_every`` and ``keep_from`` do not keep.

        With ``checkpoint.async_save`` it returns once the state is copied, and the rest goes on in the background.

        Args:
            step: finished optimizer steps; must equal ``manifest.step``.
            state: nested dict of tensors.
            manifest: identity and progress; its list of files is filled in here.
            keep_from: the newest checkpoint of this step or one before it stays, too.

        Raises:
            CheckpointError: a leaf is no tensor, another job has taken over, or the disk is full or not writable.
                Older checkpoints stay.
        """
        if manifest.step != step:
            raise ValueError(f"manifest.step is {manifest.step}, step is {step}")
        flatten(state)
        self._checked = None
        self.finish()
        self.require_ours()
        final = self.path(step)
        partial = with_suffix(final, PARTIAL)
        publish_it = partial_call(self._publish, final, manifest, keep_from)
        try:
            self._on_main(self._clean)
            with _one_process():
                writer = dcp.FileSystemWriter(partial, sync_files=True)
                if self._background is not None:
                    after, then = partial_call(self._own_files, partial), publish_it
                    self._background.start(dict(state), writer, after, then)
                    return final
                dcp.save(dict(state), storage_writer=writer, no_dist=not self._mesh.is_distributed)
            written = self._on_all(partial_call(self._own_files, partial))
            self._on_main(lambda: publish_it(written))
        except (OSError, RuntimeError, CheckpointException, CheckpointError) as error:
            is_unclear = not isinstance(error, CheckpointError)
            reason = FULL if is_unclear and is_full(self.folder) else _reason(error)  # before anything is removed
            if self._mesh.is_main and partial.exists() and self._is_ours():
                remove(partial)
            raise CheckpointError(
                f"{named(final)}: cannot be written ({reason}). Free space or choose another folder; "
                f"checkpoints that stay: {', '.join(f'step-{s:08d}' for s in self.steps()) or 'none'}"
            ) from error
        return final

    def finish(self) -> None:
        """Wait until what ``save`` writes in the background is complete; call it after the last save.

        Raises:
            CheckpointError: it could not be written; checkpoints before it stay.
        """
        if self._background is None:
            return
        failure = self._mesh.from_main(self._background.wait())
        if failure:
            raise CheckpointError(
                f"{self.folder}: the last checkpoint could not be written in the background ({failure})"
            )

    def require_ours(self) -> None:
        """Raise ``CheckpointError`` on all ranks if another job has taken over."""
        self._on_main(self._require_ours)

    def _is_ours(self) -> bool:
        try:
            self._require_ours()
        except CheckpointError:
            return False
        return True

    def _own_files(self, partial: Path) -> dict[str, FileEntry]:
        """The files that this rank has written: each reads its own again, so that more ranks take less time."""
        return {path.name: entry_of(path) for path in partial.glob(f"__{self._mesh.place[0]}_*")}

    def _publish(
        self, final: Path, manifest: Manifest, keep_from: int, written: Sequence[Mapping[str, FileEntry]]
    ) -> None:
        partial = with_suffix(final, PARTIAL)
        self._require_ours()
        sync(partial)
        write_manifest(partial, manifest, {name: entry for files in written for name, entry in files.items()})
        publish(partial, final)
        self._unusable.discard(manifest.step)
        self._retain(keep_from)

    def _on_main(self, work: Callable[[], Value]) -> Value:
        """Do it on the main rank, for all; its result, or its error, comes to every rank."""
        if not self._mesh.is_distributed:
            return work()
        answer: tuple[str, Any] = ("", None)
        if self._mesh.is_main:
            try:
                answer = ("", work())
            except (OSError, RuntimeError, VilgError) as error:
                answer = (f"{type(error).__name__}: {error}", None)
        failure, result = self._mesh.from_main(answer)
        if failure:
            raise CheckpointError(f"rank 0: {failure}")
        return result

    def _on_all(self, work: Callable[[], Value]) -> list[Value]:
        """Do it on every rank; the results by rank, or the first error, come to every rank."""
        if not self._mesh.is_distributed:
            return [work()]
        answer: tuple[str, Any] = ("", None)
        try:
            answer = ("", work())
        except (OSError, RuntimeError, VilgError) as error:
            answer = (f"{type(error).__name__}: {error}", None)
        answers = self._mesh.gather(answer)
        for rank, (failure, _) in enumerate(answers):
            if failure:
                raise CheckpointError(f"rank {rank}: {failure}")
        return [result for _, result in answers]

    def latest(self, until: int | None = None) -> Path | None:
        """The newest complete and undamaged checkpoint under its own name, or None if there is none at all.

        It warns about each one that it passes over; ``save`` neither counts nor deletes those. Ranks may see a shared
        folder differently for a while: the main one looks, for all.

        Args:
            until: only of this step or one before it count; None: all.

        Raises:
            CheckpointError: there are checkpoints, but none can be used. To start anew must be somebody's decision.
        """
        reasons = []
        for step in reversed(self._on_main(self._complete_steps)):
            if until is not None and step > until:
                continue
            path = self.path(step)
            try:
                manifest = self._sound_manifest(path)
                require_own_step(path, manifest)
                self._checked = (path, manifest)
            except CheckpointError as error:
                reasons.append(str(error))
                self._unusable.add(step)
                continue
            for reason in reasons if self._mesh.is_main else ():
                logger.warning("skipping a checkpoint, which checkpoint.keep_last does not count: %s", reason)
            return path
        if reasons:
            raise CheckpointError(
                f"{self.folder}: has {len(reasons)} checkpoint{'s' if len(reasons) > 1 else ''}, none of which can be "
                "used; nothing was started anew and nothing was deleted\n"
                + "\n".join(f"  {reason}" for reason in reasons)
                + "\n  Works: make one of them readable again (mount, permissions, the version of megatron_vilg that "
                "wrote it); or, to start at step 0, move these folders away or give another --out"
            )
        return None

    def _complete_steps(self) -> list[int]:
        try:
            self._recover()
            return self.steps()
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be read ({error})") from error

    def _sound_manifest(self, path: Path) -> Manifest:
        """:func:`read_sound_manifest` by all ranks together, each of which reads a share of the files."""
        manifest = self._on_main(partial_call(read_manifest, path))
        share = fair_share(manifest, *self._mesh.place)
        found = self._on_all(lambda: find_damage(path, manifest, share))
        require_no_damage(path, [problem for problems in found for problem in problems])
        return manifest

    def load(self, path: Path, state: Mapping[str, Any], expected: Manifest | None = None) -> Manifest:
        """Fill the tensors of ``state`` in place. The files of what :meth:`latest` has just given are not read twice.

        Args:
            path: a checkpoint, as :meth:`latest` gives it.
            state: nested dict of tensors of the right shapes and dtypes.
            expected: what this run is; the checkpoint must belong to it (:meth:`Manifest.compare`).

        Returns:
            The manifest, with step, samples seen and counters.

        Raises:
            CheckpointError: the checkpoint is incomplete, damaged, or of another configuration, or names, shapes or
                dtypes differ from ``state``; then nothing was changed.
        """
        checked, self._checked = self._checked, None
        manifest = checked[1] if checked and checked[0] == path else self._sound_manifest(path)
        if expected is not None:
            manifest.compare(expected, where=path)
        flat = flatten(state)
        try:
            reader = dcp.FileSystemReader(path)
            problems = list(mismatches(flat, reader.read_metadata().state_dict_metadata, self._all_names(flat)))
            problems = sorted({problem for found in self._mesh.gather(problems) for problem in found})
            if problems:
                raise CheckpointError(_misfit(path, problems))
            with _one_process():
                dcp.load(dict(flat), storage_reader=reader, no_dist=not self._mesh.is_distributed)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise CheckpointError(f"{path}: cannot be read ({_reason(error)})") from error
        return manifest

    def return_to(self, manifest: Manifest) -> None:
        """Note that the run has gone back to the checkpoint of ``manifest.step``, then delete all later ones.

        In this order, so that a process that dies in between either has all of it on disk or goes back once more. What
        could not be used stays, as always.

        Args:
            manifest: what takes the place of the checkpoint's own, with the same files.

        Raises:
            CheckpointError: another job has taken over, or the folder is not writable.
        """
        path = self.path(manifest.step)

        def work() -> None:
            self._require_ours()
            try:
                write_manifest(path, manifest, manifest.files)
                for step in self.steps():
                    if step > manifest.step and step not in self._unusable:
                        remove(self.path(step))
            except OSError as error:
                raise CheckpointError(
                    f"{path}: cannot note that the run went back to it ({_reason(error)}). Free space, or make the "
                    "folder writable; the same command goes back again"
                ) from error

        self._on_main(work)

    def _all_names(self, flat: Mapping[str, Tensor]) -> set[str]:
        """Names of tensors that any rank holds."""
        return {name for names in self._mesh.gather(sorted(flat)) for name in names}

    def _recover(self) -> None:
        for aside in sorted(self.folder.glob(f"step-*{REPLACED}")):
            recover(aside.with_name(aside.name.removesuffix(REPLACED)))

    def _clean(self) -> None:
        """Make the folder, and remove what killed processes left in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._recover()
        for leftover in self.folder.glob(f"step-*{PARTIAL}"):
            remove(leftover)

    def _retain(self, keep_from: int) -> None:
        # What could not be used may be readable again tomorrow (a mount, another version): it is left to people.
        sound = [step for step in self.steps() if step not in self._unusable]
        kept = {*sound[-self.config.keep_last :], *[step for step in sound if step <= keep_from][-1:]}
        if self.config.keep_every:
            kept |= {step for step in sound if step % self.config.keep_every == 0}
        for step in sound:
            if step not in kept:
                remove(self.path(step))


def newest_manifest(folder: Path) -> tuple[Path, Manifest | None]:
    """The newest checkpoint of a run whose manifest can be read, and that; the files that it lists are not read.

    Args:
        folder: of the checkpoints; without one, or where there is none, it comes back with None.
    """
    checkpointer = Checkpointer(folder, CheckpointConfig())
    for step in reversed(checkpointer.steps()):
        with suppress(CheckpointError):
            return checkpointer.path(step), read_manifest(checkpointer.path(step))
    return folder, None


def _misfit(path: Path, problems: Sequence[str]) -> str:
    more = [f"and {len(problems) - _MOST_NAMED} more"] if len(problems) > _MOST_NAMED else []
    lines = "\n".join(f"  {line}" for line in [*problems[:_MOST_NAMED], *more])
    return f"{path}: does not fit\n{lines}\n  Works: the options that it was written with, or another output folder"


@contextmanager
def _one_process() -> Iterator[None]:
    """Keep torch from warning at every call that it runs without a process group, which is what we asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _reason(error: BaseException) -> str:
    """The first cause inside what torch.distributed.checkpoint wraps; interrupts are raised again."""
    if isinstance(error, CheckpointException):
        for cause, _ in error.failures.values():
            if not isinstance(cause, Exception):
                raise cause
            return f"{type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {error}"
