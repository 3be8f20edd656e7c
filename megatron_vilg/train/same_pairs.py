"""Which pairs a run learns from, so that it does not go on with others by mistake."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_vilg.checkpoint.manager import newest_manifest
from megatron_vilg.checkpoint.manifest import FILE_NAME as MANIFEST_FILE
from megatron_vilg.checkpoint.manifest import Manifest, read_manifest
from megatron_vilg.data.records import RecordPart
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.data.token_files import read_json
from megatron_vilg.errors import CheckpointError
from megatron_vilg.log import get_logger
from megatron_vilg.parallel.mesh import Mesh

log = get_logger(__name__)
PAIRS = "pairs"
"""Name among the counters of a manifest."""


def pairs_of(cache: TokenCache, mesh: Mesh) -> dict[str, str]:
    """How many pairs the split ``train`` has, and a digest of what the cache says about their files.

    Tokens do not count: on another device an image tokenizer may give other ones for the same picture.

    Args:
        cache: what the run trains on.
        mesh: the ranks, which all make this call; the main one reads.

    Returns:
        An entry for ``Manifest.counters``; none if the notes on the cache's shards are not there.
    """
    found = mesh.from_main(_describe(cache) if mesh.is_main else "")
    return {PAIRS: found} if found else {}


def _describe(cache: TokenCache) -> str:
    shards = cache.manifest["shards"]["train"]
    notes = [cache.folder / f"{shard['name']}.json" for shard in shards]
    if not all(note.is_file() for note in notes):
        return ""
    digest = _digest(str(read_json(note).get("fingerprint")) for note in notes)
    return f"{sum(int(shard['pairs']) for shard in shards)} pairs {digest}"


def _digest(fingerprints: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()[:16]


def require_same_sources(run: Path, parts: Sequence[RecordPart], tokens: Path) -> None:
    """Check, before anything is encoded, that files are those that a run's newest checkpoint was trained on.

    Files that are untouched since they were encoded are not read, others as a whole.

    Args:
        run: run folder; without a checkpoint, or with one that goes on with any pairs, all files will do.
        parts: what the run would train on.
        tokens: its token cache, as far as it is there.

    Raises:
        CheckpointError: the newest checkpoint was trained on other files; with both sides.
    """
    path, found = newest_manifest(run / "checkpoints")
    before = str(found.counters.get(PAIRS, "")) if found else ""
    if found is None or not before or found.source:
        return
    notes = (tokens / f"train-{number:05d}.json" for number in range(len(parts)))
    now = _digest(_fingerprint(part, note) for part, note in zip(parts, notes, strict=True))
    if before.split()[-1] != now:
        raise _other_pairs(path, before, f"other files {now}")


def require_own_tokens(model: Path, cache: TokenCache) -> None:
    """Check that a token cache holds the pairs that a model was trained on, where both say on which.

    Args:
        model: exported folder, or a run folder, of which the export counts, else the newest checkpoint.
        cache: of that run.

    Raises:
        CheckpointError: it holds others; with both sides.
    """
    exported = next((f for f in (model, model / "export") if (f / MANIFEST_FILE).is_file()), None)
    path, found = (exported, read_manifest(exported)) if exported else newest_manifest(model / "checkpoints")
    trained, now = found.counters.get(PAIRS, "") if found else "", _describe(cache)
    if trained and now and trained != now:
        raise CheckpointError(
            f"{cache.folder}: holds other pairs than {path} was trained on\n"
            f"  train: trained on {trained}, there {now}\n"
            "  Works: `vilg train` again with the data and options of before, which encodes those pairs again"
        )


def _fingerprint(part: RecordPart, note: Path) -> str:
    """That of the part, as the token cache noted it if the files are untouched since."""
    if note.is_file():
        known = read_json(note)
        if known.get("stamp") == part.stamp:
            return str(known.get("fingerprint"))
    return part.fingerprint


def require_same_pairs(path: Path, found: Manifest, expected: Manifest, mesh: Mesh) -> None:
    """Check that a checkpoint was trained on the pairs of this run, where both say on which.

    What ``vilg checkpoint`` has made goes on with any pairs, as a start of its own.

    Raises:
        CheckpointError: it was trained on others; with both sides.
    """
    before, now = found.counters.get(PAIRS, ""), expected.counters.get(PAIRS, "")
    if not before or not now or before == now:
        return
    if found.source:
        if mesh.is_main:
            log.warning("%s: going on with other pairs: %s before, %s now", path, before, now)
        return
    raise _other_pairs(path, str(before), str(now))


def _other_pairs(path: Path, before: str, now: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: was trained on other pairs than those of --data, data.val_share and data.shard_size now\n"
        f"  train: checkpoint has {before}, this run has {now}\n"
        "  Pairs that were learnt already would be measured as unseen. Works: the data and options of before; another "
        "--out; or, to go on with other pairs on purpose, a run of its own: vilg checkpoint shard --load-dir "
        f"{path.parent.parent} --save-dir NEW --to dcp --optimizer, then --out NEW"
    )
