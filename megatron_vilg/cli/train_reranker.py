"""``vilg train-reranker``: train the model that chooses among a run's drawings."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vilg.cli.device import add_device_option, chosen_device
from megatron_vilg.cli.outputs import full_disk_explained, require_writable
from megatron_vilg.cli.section import changed_section
from megatron_vilg.config.world import read_world
from megatron_vilg.errors import ConfigError
from megatron_vilg.log import get_logger

_log = get_logger(__name__)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the options."""
    parser = subparsers.add_parser(
        "train-reranker",
        help="train the model that chooses among drawings",
        description="Train a contrastive model of captions and pictures on a run's token cache. Where it lies beside a "
        "generator, choices among drawings (sample.rerank, --rerank) listen to it too.",
        epilog="example: vilg train-reranker --load runs/demo reranker.num_steps=300",
    )
    parser.add_argument("words", nargs="*", metavar="reranker.option=value", help="settings; vilg config lists them")
    parser.add_argument("--load", metavar="RUN", type=Path, required=True, help="run folder with its tokens/")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where to write it; default: RUN/reranker")
    add_device_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Train and write; an older reranker stays until the new one is complete."""
    from megatron_vilg.config.check import check_reranker
    from megatron_vilg.config.load import read_run_folder_config

    trained = read_run_folder_config(args.load)
    config = changed_section("reranker", trained.reranker, args.words, check_reranker)
    if (processes := read_world().size) > 1:
        raise ConfigError([f"vilg train-reranker: {processes} processes, but one does all the work. Works: one"])
    from megatron_vilg.checkpoint.image_tokenizer import image_tokenizer_hash, load_image_tokenizer
    from megatron_vilg.checkpoint.manifest import TOKENIZERS
    from megatron_vilg.checkpoint.reranker import FOLDER, save_reranker
    from megatron_vilg.data.text import TextTokenizer
    from megatron_vilg.data.token_cache import TokenCache
    from megatron_vilg.train.reranker import Wordings, train_reranker
    from megatron_vilg.train.stages import IMAGE_TOKENIZER, TEXT_TOKENIZER, TOKENS

    out = args.out or args.load / FOLDER
    require_writable(out, f"--out={out}")
    device = chosen_device(args.device)
    image_folder = args.load / IMAGE_TOKENIZER
    expect = {
        "image_tokenizer_sha256": image_tokenizer_hash(image_folder),
        "text_tokenizer_sha256": TextTokenizer.load(args.load / TEXT_TOKENIZER).sha256,
    }
    cache = TokenCache.open(args.load / TOKENS, expect=expect)
    wordings = Wordings(
        cache.settings["text_vocab_size"],
        cache.settings["num_text_slots"],
        trained.data.alternate_caption_probability,
    )
    with full_disk_explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        image_tokenizer = load_image_tokenizer(image_folder).to(device)
        encoder, found = train_reranker(config, cache, image_tokenizer, wordings, device=device, scratch=out.parent)
        save_reranker(
            encoder,
            out,
            tokenizers={name: cache.settings[f"{name}_sha256"] for name in TOKENIZERS},
            counters={f"caption_found/{split}": share for split, share in found.items()},
        )
    shares = ", ".join(f"{split} {share:.2f}" for split, share in found.items())
    _log.info("%s: of at most 1024 captions each, the right one is found for: %s", out, shares)
