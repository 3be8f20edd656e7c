"""``vilg train-restyler``: train the model that draws a run's things in manners that they were never shown in."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vilg.cli.device import add_device_option, chosen_device
from megatron_vilg.cli.main import EXIT_STOPPED
from megatron_vilg.cli.outputs import full_disk_explained, require_writable
from megatron_vilg.cli.section import changed_section
from megatron_vilg.config.world import read_world
from megatron_vilg.errors import ConfigError
from megatron_vilg.log import get_logger

_log = get_logger(__name__)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the options."""
    parser = subparsers.add_parser(
        "train-restyler",
        help="train the model that draws things in other styles",
        description="Train a model that draws a thing behind pictures of it in other styles, on pairs whose source "
        "names both in the fields concept and style. Again with the same --load: goes on where it stopped.",
        epilog="example: vilg train-restyler --load runs/full --data data/full restyler.num_steps=9000",
    )
    parser.add_argument("words", nargs="*", metavar="restyler.option=value", help="settings; vilg config lists them")
    parser.add_argument("--load", metavar="RUN", type=Path, required=True, help="run folder with its tokens/")
    parser.add_argument("--data", metavar="D", type=Path, required=True, help="the pairs that it was trained on")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where to write it; default: RUN/restyler")
    add_device_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train and write; the exit code is 0 only when the restyler is complete."""
    from megatron_vilg.config.check import check_restyler
    from megatron_vilg.config.load import read_run_folder_config

    trained = read_run_folder_config(args.load)
    config = changed_section("restyler", trained.restyler, args.words, check_restyler)
    if (processes := read_world().size) > 1:
        raise ConfigError([f"vilg train-restyler: {processes} processes, but one does all the work. Works: one"])
    from megatron_vilg.checkpoint.claim import claimed
    from megatron_vilg.checkpoint.image_tokenizer import image_tokenizer_hash, load_image_tokenizer
    from megatron_vilg.checkpoint.restyler import FOLDER, save_restyler
    from megatron_vilg.data.library import Library
    from megatron_vilg.data.pair_pixels import write_pixel_cache
    from megatron_vilg.data.records import find_records
    from megatron_vilg.data.token_cache import TokenCache
    from megatron_vilg.parallel.replicas import Replicas
    from megatron_vilg.train.host_memory import keep_freed_memory
    from megatron_vilg.train.precision import settle_precision
    from megatron_vilg.train.restyler import WORK_NAME, train_restyler
    from megatron_vilg.train.restyler_batches import Batches, Source
    from megatron_vilg.train.stages import IMAGE_TOKENIZER, PIXELS, TOKENS

    out = args.out or args.load / FOLDER
    require_writable(out, f"--out={out}")
    device = chosen_device(args.device)
    digest = image_tokenizer_hash(args.load / IMAGE_TOKENIZER)
    cache = TokenCache.open(args.load / TOKENS, expect={"image_tokenizer_sha256": digest})
    if device.type == "cpu":
        keep_freed_memory()
    with full_disk_explained(out), claimed(out.with_name(WORK_NAME), Replicas()) as claim:
        library, pairs = Library.of(cache.split("train"))
        _log.info("%d pictures of %d things in %d styles", len(library), len(library.things), len(library.manners))
        records = find_records(args.data, val_share=trained.data.val_share, part_size=trained.data.shard_size)
        pixels = write_pixel_cache(out.parent / PIXELS, cache, records).split("train")
        image_tokenizer = load_image_tokenizer(args.load / IMAGE_TOKENIZER).to(device)
        in_bf16 = settle_precision(trained, device, args.load).train.precision == "bf16"
        found = train_restyler(
            config,
            Batches(config, Source(library, pixels, pairs, trained.data), image_tokenizer, device, in_bf16=in_bf16),
            cache,
            out=out,
            log_options=trained.log,
            require_ours=claim.require,
        )
        if found is None:
            return EXIT_STOPPED
        model, nats = found
        counters = {f"{split}/code(nats)": value for split, value in nats.items()}
        save_restyler(model, library, out, image_tokenizer=digest, counters=counters)
    told = ", ".join(f"{split} {value:.3f}" for split, value in nats.items()) or "no held-out pair to measure"
    _log.info("%s: nats per code: %s", out, told)
    return 0
