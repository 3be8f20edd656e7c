"""What must exist before pre-training can start: both tokenizers and the token cache, made where they are missing.

Everything lands in the run folder, so that it holds all that generation needs. A stage that is complete is not
done again; one that was interrupted goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vilg.checkpoint.files import write_text
from megatron_vilg.checkpoint.image_tokenizer import image_tokenizer_hash, load_image_tokenizer
from megatron_vilg.config.check import require
from megatron_vilg.config.check_engine import missing_packages
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.config.world import World
from megatron_vilg.data.pair_pixels import PixelCache, write_pixel_cache
from megatron_vilg.data.pixels import read_train_and_held_out
from megatron_vilg.data.records import find_records, read_records
from megatron_vilg.data.text import TextTokenizer, train_text_tokenizer
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.data.token_files import MANIFEST_FILE as CACHE_MANIFEST
from megatron_vilg.data.token_files import read_json
from megatron_vilg.data.token_writer import write_token_cache
from megatron_vilg.errors import ConfigError, MissingPackageError
from megatron_vilg.log import get_logger
from megatron_vilg.models.tokenizers import AnyTokenizer
from megatron_vilg.parallel.launch import Job
from megatron_vilg.parallel.replicas import Replicas
from megatron_vilg.train.precision import settle_precision
from megatron_vilg.train.run_tokenizers import IMAGE_TOKENIZER, SECONDS, TEXT_TOKENIZER, read_seconds, settle_tokenizers
from megatron_vilg.train.same_pairs import require_same_sources
from megatron_vilg.train.vqgan import require_trainable, train_image_tokenizer, uneven_parts

log = get_logger(__name__)
TOKENS = "tokens"
PIXELS = "pixels"
_MOST_PASSES = 1000
"""How often one batch may go through all pairs."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that pre-training starts from."""

    run: RunConfig
    """Resolved: every size is known."""
    cache: TokenCache
    text_tokenizer: TextTokenizer
    image_tokenizer: AnyTokenizer
    pixels: PixelCache | None = None
    """The pictures themselves, for end-to-end runs."""


def prepare(
    run: RunConfig,
    data: Path,
    out: Path,
    *,
    text_tokenizer: Path | None = None,
    image_tokenizer: Path | None = None,
    device: torch.device | str = "cpu",
    job: Job | None = None,
    require_ours: Callable[[], None] = lambda: None,
) -> Prepared | None:
    """Make what is missing in ``out``: text tokenizer, image tokenizer, token cache.

    The main process does what one can do, and the others then read it; the image tokenizer is trained by all of them
    if they can share its batches evenly.

    Args:
        run: checked configuration.
        data: pairs in any form that ``read_records`` knows, or a finished token cache.
        out: run folder.
        text_tokenizer: folder of a trained one to copy instead of training one.
        image_tokenizer: the same for images.
        device: where the image tokenizer is trained and used.
        job: all processes, which make this call together; None: this one alone.
        require_ours: called before the main process writes; raises CheckpointError if another job works in ``out``.

    Returns:
        None when a signal stopped a stage; the same call goes on.

    Raises:
        ConfigError: a token cache was given without tokenizers, sizes (of a batch, too) do not fit together, or a
            tokenizer is not the one that the run has or would train.
        DataError, CheckpointError: unreadable pairs or tokenizers, a cache of other ones, other pairs than the run's.
    """
    job, asked = job or Job(World(), None), run
    # Before anything that the main process does alone: several of them settle it together.
    run = settle_precision(run, device, out)
    given = {TEXT_TOKENIZER: text_tokenizer, IMAGE_TOKENIZER: image_tokenizer}

    def configured() -> tuple[RunConfig, TextTokenizer, bool]:
        is_cache = (data / CACHE_MANIFEST).is_file() and "settings" in read_json(data / CACHE_MANIFEST)
        if job.world.is_main:
            if is_cache:
                _require_given(data, out, given)
            settle_tokenizers(asked, out, given)
        return *_configuration(run, data, out, job.world), is_cache

    run, text, is_cache = job.main_first("text", configured)
    if not _train_image_tokenizer(run, data, out, device, job, require_ours):
        return None
    images = load_image_tokenizer(out / IMAGE_TOKENIZER).to(device)

    def encoded() -> Prepared:
        finished = data if is_cache else None if job.world.is_main else out / TOKENS
        cache = _token_cache(run, data, out, text, images, finished, require_ours)
        pixels = _pixels(run, data, out, cache, is_cache, job.world) if run.reconstructor.enabled else None
        return Prepared(run, cache, text, images, pixels)

    return job.main_first("tokens", encoded)


def _require_given(data: Path, out: Path, given: Mapping[str, Path | None]) -> None:
    """A token cache says nothing without the tokenizers that it was made with."""
    missing = [name.replace("_", "-") for name, folder in given.items() if folder is None and not (out / name).is_dir()]
    if missing:
        raise ConfigError(
            [f"--data={data}: is a token cache; name its tokenizer with --{name} FOLDER" for name in missing]
        )


def _configuration(run: RunConfig, data: Path, out: Path, world: World) -> tuple[RunConfig, TextTokenizer]:
    """Train the text tokenizer if there is none; the checked and resolved configuration."""
    if world.is_main and not (out / IMAGE_TOKENIZER).is_dir():
        require_trainable(run)  # before the pictures are read for the text tokenizer
    text = _text_tokenizer(run, data, out, world)
    run = run.resolve(text_vocab_size=text.vocab_size)
    if run.model.text_vocab_size != text.vocab_size:
        raise ConfigError(
            [f"model.text_vocab_size={run.model.text_vocab_size}: the text tokenizer has {text.vocab_size}. Works: 0"]
        )
    require(run, world.size)
    if missing := missing_packages(run):
        raise MissingPackageError("\n".join(missing))
    return run, text


def _pixels(run: RunConfig, data: Path, out: Path, cache: TokenCache, is_cache: bool, world: World) -> PixelCache:
    if is_cache:
        raise ConfigError(
            [
                f"--data={data}: is a token cache, which holds no pixels; reconstructor.enabled=true needs the pairs "
                "themselves. Works: the folder, .jsonl or shards that the cache was made from"
            ]
        )
    with timed(out, PIXELS) if world.is_main else nullcontext():
        records = find_records(data, val_share=run.data.val_share, part_size=run.data.shard_size)
        return write_pixel_cache(out / PIXELS, cache, records)


def _has_image_tokenizer(out: Path, everyone: Replicas) -> bool:
    """Whether ``out`` has a complete one. The main process looks for all: others may see a shared folder late."""
    return bool(everyone.from_main(everyone.is_main and (out / IMAGE_TOKENIZER).is_dir()))


def _train_image_tokenizer(
    run: RunConfig, data: Path, out: Path, device: torch.device | str, job: Job, require_ours: Callable[[], None]
) -> bool:
    """By all processes, or by the main one where its batches cannot be shared evenly; nothing if it is there.

    Returns:
        Whether it is complete; False: a signal stopped its training.
    """
    everyone = Replicas.of_group()
    if _has_image_tokenizer(out, everyone):
        return True

    def train(replicas: Replicas) -> None:
        with timed(out, IMAGE_TOKENIZER) if job.world.is_main else nullcontext():
            pictures, held_out = read_train_and_held_out(
                data,
                run.image_tokenizer.image_size,
                max_bad_share=run.data.max_bad_share,
                val_share=run.data.val_share,
            )
            folder = out / IMAGE_TOKENIZER
            train_image_tokenizer(
                run, pictures, held_out, folder, device=device, replicas=replicas, require_ours=require_ours
            )

    if problem := uneven_parts(run, everyone.size):
        log.warning("the first process trains the image tokenizer alone. %s", problem)
        job.main_first("image tokenizer", lambda: train(Replicas()) if job.world.is_main else None)
    else:
        train(everyone)
    return _has_image_tokenizer(out, everyone)


def _text_tokenizer(run: RunConfig, data: Path, out: Path, world: World) -> TextTokenizer:
    folder = out / TEXT_TOKENIZER
    # Other processes come once it is there; one that sees a shared folder late must not train a second one into it.
    if folder.is_dir() or not world.is_main:
        return TextTokenizer.load(folder)
    with timed(out, TEXT_TOKENIZER):
        captions: list[str] = []
        records = read_records(
            data,
            "train",
            max_bad_share=run.data.max_bad_share,
            val_share=run.data.val_share,
            with_images=False,
        )
        for record in records:
            captions += [record.caption, *record.alternates]
        return train_text_tokenizer(captions, run.text_tokenizer, folder)


def _token_cache(
    run: RunConfig,
    data: Path,
    out: Path,
    text: TextTokenizer,
    images: AnyTokenizer,
    finished: Path | None,
    require_ours: Callable[[], None],
) -> TokenCache:
    image_hash = image_tokenizer_hash(out / IMAGE_TOKENIZER)
    expect = {
        "text_tokenizer_sha256": text.sha256,
        "image_tokenizer_sha256": image_hash,
        "num_text_slots": run.model.num_text_slots,
        "codebook_size": run.image_tokenizer.codebook_size,
        "grid_side": run.image_tokenizer.grid_side,
    }
    if finished is not None:
        return _opened(run, finished, expect)
    require_ours()
    records = find_records(data, val_share=run.data.val_share, part_size=run.data.shard_size)
    require_same_sources(out, records.get("train", []), out / TOKENS)
    with timed(out, TOKENS):
        codebook = images.codebook

        def encode(pixels: Tensor) -> Tensor:
            return images.encode(pixels.to(codebook.device)).cpu()

        write_token_cache(
            out / TOKENS,
            records,
            text,
            encode,
            image_size=run.image_tokenizer.image_size,
            views=run.data,
            image_tokenizer_hash=image_hash,
            codebook_size=run.image_tokenizer.codebook_size,
            grid_side=run.image_tokenizer.grid_side,
            num_text_slots=run.model.num_text_slots,
            seed=run.train.seed,
        )
    return _opened(run, out / TOKENS, expect)


def _opened(run: RunConfig, folder: Path, expect: Mapping[str, Any]) -> TokenCache:
    """The token cache, if batches fit it: one may go through a small set several times, but not without end."""
    cache = TokenCache.open(folder, expect=expect)
    size, num_pairs = run.train.batch_size, cache.splits["train"]
    most = _MOST_PASSES * num_pairs
    if size > most:
        rule = f"each step would take each of the {num_pairs} training pairs {size // num_pairs} times"
        raise ConfigError([f"train.batch_size={size}: {rule}. Works: 1 to {most}, better up to {num_pairs}."])
    return cache


@contextmanager
def timed(out: Path, stage: str) -> Iterator[None]:
    """Add the wall seconds of a stage to ``seconds.json``.

    A stage that was resumed counts all its parts, but for one that ended by SIGKILL: nobody noted that.
    """
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = read_seconds(out)
        seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 1)
        try:
            write_text(out / SECONDS, json.dumps(seconds, indent=1) + "\n")
        except OSError as error:  # of no more weight than the stage itself, or than what ended it
            log.warning("%s: cannot be written (%s); the stage %s is not timed", out / SECONDS, error, stage)
