"""Which pairs a run learns from, so that it does not go on with others by mistake."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_vilg.checkpoint.manifest import Manifest
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
    digest = hashlib.sha256("\n".join(str(read_json(note).get("fingerprint")) for note in notes).encode())
    return f"{sum(int(shard['pairs']) for shard in shards)} pairs {digest.hexdigest()[:16]}"


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
    run = path.parent.parent
    raise CheckpointError(
        f"{path}: was trained on other pairs than those of --data, data.val_share and data.shard_size now\n"
        f"  train: checkpoint has {before}, this run has {now}\n"
        "  Pairs that were learnt already would be measured as unseen. Works: the data and options of before; another "
        f"--out; or, to go on with other pairs on purpose, a run of its own: vilg checkpoint shard --load-dir {run} "
        "--save-dir NEW --to dcp --optimizer, then --out NEW"
    )
