"""``vilg data``: get the demo pairs, filter pairs, train the text tokenizer, encode pairs to tokens."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vilg.cli.device import add_device_option, chosen_device
from megatron_vilg.cli.options import add_config_options, run_config_from_args
from megatron_vilg.cli.outputs import full_disk_explained, require_new_folder, require_writable
from megatron_vilg.cli.shares import chosen_share
from megatron_vilg.config.world import read_world
from megatron_vilg.errors import ConfigError, DataError
from megatron_vilg.log import get_logger

if TYPE_CHECKING:
    from torch import Tensor

logger = get_logger(__name__)

_SOURCE_HELP = "folder of NAME.png|jpg|webp + NAME.txt, .jsonl file, tar, folder of tars, or a quoted glob of tars"


def add_parser(subparsers: Any) -> None:
    """Register the verb and its sub-verbs; ``subparsers`` is what ``ArgumentParser.add_subparsers`` returns."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "data",
        help="get demo pairs, filter pairs, train the text tokenizer, encode pairs",
        description="Prepare pairs for training.",
        epilog="example: vilg data demo --out data/demo",
    )
    verbs = parser.add_subparsers(dest="data_verb", metavar="WHAT", required=True)
    _add_demo(verbs)
    _add_filter(verbs)
    _add_text_tokenizer(verbs)
    _add_encode(verbs)


def _add_demo(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "demo",
        help="draw emoji in several styles, with Chinese captions",
        description="Fetch emoji sets with the npm client (about 30 MB), draw them, and write WebDataset shards with "
        "held-out pairs and held-out concepts. A finished folder is kept.",
        epilog="examples: vilg data demo --out data/demo; vilg data demo --out data/full --concepts 0 --scenes 5000",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="D", help="new folder for the shards")
    parser.add_argument("--concepts", type=int, default=120, help="concepts to train on; 0: all, 1914 (default: 120)")
    parser.add_argument(
        "--held-out-concepts", type=int, default=8, metavar="N", help="concepts never trained on (default: 8)"
    )
    parser.add_argument(
        "--styles",
        default="",
        metavar="A,B",
        help="some of noto,twemoji,openmoji,fluent-flat,fluent-3d,emojione,fluent-contrast,emojione-mono, or all "
        "(default: noto,twemoji,openmoji,fluent-flat,fluent-3d,fluent-contrast)",
    )
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (default: 64)")
    parser.add_argument(
        "--languages", default="zh", metavar="zh,en", help="languages of other wordings; captions are Chinese"
    )
    parser.add_argument("--scenes", type=int, default=0, metavar="N", help="add pictures composed of several emoji")
    parser.add_argument(
        "--choice-seed", type=int, default=0, metavar="N", help="which concepts, and which of them are held out"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("~/.cache/megatron_vilg"),
        metavar="DIR",
        help="where fetched packages are kept (default: ~/.cache/megatron_vilg)",
    )
    parser.set_defaults(run=run_demo)


def _add_filter(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "filter",
        help="leave out pairs by the paper's rules, by size, and copies",
        description="Write the pairs that no rule rejects as WebDataset shards, report.json with the counts, and "
        "rejects.jsonl with each pair left out and the first rule that it breaks. docs/data-format.md defines the "
        "rules.",
        epilog="examples: vilg data filter --input data/web --output data/clean --min-side 128; with similarities "
        "computed elsewhere: ... --scores scores.jsonl; by a function of yours: ... --scorer my_clip:similarities",
    )
    parser.add_argument("--input", required=True, metavar="D", help=_SOURCE_HELP)
    parser.add_argument("--output", type=Path, required=True, metavar="E", help="new or empty folder for the shards")
    parser.add_argument(
        "--max-words", type=int, default=15, metavar="N", help="fewer than N words; 0: any number (default: 15)"
    )
    parser.add_argument(
        "--require-noun",
        choices=("auto", "yes", "no"),
        default="auto",
        help="at least one noun, which the package jieba tells (extra filter); auto: where it is installed (default)",
    )
    parser.add_argument(
        "--special-characters", choices=("reject", "keep"), default="reject", help="emoji, markup, addresses, ..."
    )
    parser.add_argument("--min-side", type=int, default=0, metavar="PIXELS", help="shorter side at least so long")
    parser.add_argument(
        "--duplicates",
        choices=("pairs", "pictures", "keep"),
        default="pairs",
        help="leave out what came before: the same picture with the same caption (pairs, default), or with any caption "
        "(pictures); keep: do not compare",
    )
    similarity = parser.add_mutually_exclusive_group()
    similarity.add_argument(
        "--scores", type=Path, metavar="FILE", help='similarities, lines of {"id": KEY, "score": NUMBER}'
    )
    similarity.add_argument(
        "--scorer", metavar="MODULE:FUNCTION", help="from a list of (PIL picture, caption) to a list of similarities"
    )
    parser.add_argument(
        "--min-similarity", type=float, metavar="X", help="similarity above X (default: 0.5, if there is any)"
    )
    parser.add_argument("--score-batch", type=int, default=64, metavar="N", help="pairs a call of --scorer, at most")
    parser.set_defaults(run=run_filter)


def _add_text_tokenizer(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "text-tokenizer",
        help="train SentencePiece on the captions",
        description="Train the text tokenizer on all captions of the split train, other wordings included.",
        epilog="example: vilg data text-tokenizer --data data/demo --out runs/a/text_tokenizer "
        "text_tokenizer.vocab_size=1200",
    )
    parser.add_argument("--data", required=True, metavar="D", help=_SOURCE_HELP)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="new; gets spm.model and manifest.json"
    )
    add_config_options(parser)
    parser.set_defaults(run=run_text_tokenizer)


def _add_encode(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "encode",
        help="turn pairs into tokens with frozen tokenizers",
        description="Write a token cache. It goes on where it stopped; with --worker, any number of jobs share the "
        "work, and the last one to finish completes the cache.",
        epilog="examples: vilg data encode --data data/demo --text-tokenizer runs/a/text_tokenizer "
        "--image-tokenizer runs/a/image_tokenizer --out runs/a/tokens --preset demo; in a SLURM array: "
        "... --worker $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT",
    )
    parser.add_argument("--data", required=True, metavar="D", help=_SOURCE_HELP)
    parser.add_argument("--text-tokenizer", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--image-tokenizer", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the token cache")
    parser.add_argument(
        "--worker",
        default="auto",
        metavar="I/N",
        help="do every N-th shard from I on; auto: one worker per rank of torchrun or srun",
    )
    add_device_option(parser)
    add_config_options(parser)
    parser.set_defaults(run=run_encode)


def run_demo(args: argparse.Namespace) -> int:
    """Write the demo set."""
    from megatron_vilg.data.demo import DemoOptions, write_demo
    from megatron_vilg.data.emoji import DEMO_STYLES, STYLES

    if not args.out.is_dir():
        require_writable(args.out, f"--out={args.out}")
    options = DemoOptions(
        concepts=args.concepts,
        held_out_concepts=args.held_out_concepts,
        styles=tuple(STYLES) if args.styles == "all" else _words(args.styles) or DEMO_STYLES,
        size=args.size,
        languages=_words(args.languages),
        scenes=args.scenes,
        seed=args.choice_seed,
    )
    with full_disk_explained(args.out, DataError):
        manifest = write_demo(args.out, args.cache.expanduser(), options)
    counts = ", ".join(f"{count} {split}" for split, count in manifest["pairs"].items())
    print(f"{args.out}: {counts}; licences and credits in {args.out / 'README.md'}")
    return 0


def run_filter(args: argparse.Namespace) -> int:
    """Write the pairs that no rule rejects and say how many each rule did."""
    from megatron_vilg.data.filter import FilterOptions, Similarity, filter_pairs
    from megatron_vilg.data.similarity import ScoreFile, load_scorer

    if args.min_similarity is not None and not (args.scores or args.scorer):
        raise ConfigError([f"--min-similarity={args.min_similarity:g}: needs similarities: --scores or --scorer"])
    options = FilterOptions(
        max_words=args.max_words,
        require_noun=args.require_noun,
        special_characters=args.special_characters,
        min_side=args.min_side,
        duplicates=args.duplicates,
        min_similarity=0.5 if args.min_similarity is None else args.min_similarity,
        score_batch=args.score_batch,
    )
    require_new_folder(args.output, f"--output={args.output}")
    similarity = Similarity(
        file=ScoreFile(args.scores) if args.scores else None,
        scorer=load_scorer(args.scorer) if args.scorer else None,
        name=str(args.scores or args.scorer or ""),
    )
    report = filter_pairs(args.input, args.output, options, similarity)
    splits = ", ".join(f"{counts['kept']} {split}" for split, counts in report["splits"].items())
    rejected = ", ".join(f"{count} {reason}" for reason, count in report["rejected"].items() if count)
    print(f"{args.output}: kept {report['kept']} of {report['read']} pairs ({splits}); rejected: {rejected or 'none'}")
    if report["not_checked"]:
        print(f"not checked: {', '.join(report['not_checked'])}")
    return 0


def run_text_tokenizer(args: argparse.Namespace) -> int:
    """Train the text tokenizer and say how it cuts a caption."""
    from megatron_vilg.data.records import read_records
    from megatron_vilg.data.text import train_text_tokenizer

    run = run_config_from_args(args)
    require_new_folder(args.out, f"--out={args.out}")
    data = run.data
    records = list(
        read_records(args.data, "train", max_bad_share=data.max_bad_share, val_share=data.val_share, with_images=False)
    )
    captions = (text for record in records for text in (record.caption, *record.alternates))
    tokenizer = train_text_tokenizer(captions, run.text_tokenizer, args.out)
    longest = tokenizer.longest(record.caption for record in records)
    example = records[0].caption
    print(
        f"{args.out}: {tokenizer.vocab_size} pieces from {len(records)} pairs; the longest caption has {longest} "
        f"tokens (model.num_text_slots = {run.model.num_text_slots}); {example} = {' '.join(tokenizer.pieces(example))}"
    )
    return 0


def run_encode(args: argparse.Namespace) -> int:
    """Write (this worker's part of) the token cache."""
    import torch

    from megatron_vilg.checkpoint.image_tokenizer import image_tokenizer_hash, load_image_tokenizer
    from megatron_vilg.data.records import find_records
    from megatron_vilg.data.text import TextTokenizer
    from megatron_vilg.data.token_cache import write_token_cache
    from megatron_vilg.parallel.launch import device_of
    from megatron_vilg.train.run_tokenizers import unusable_tokenizer

    run = run_config_from_args(args)
    require_writable(args.out, f"--out={args.out}")
    given = {"text_tokenizer": args.text_tokenizer, "image_tokenizer": args.image_tokenizer}
    if problems := [line for name, folder in given.items() for line in unusable_tokenizer(name, folder)]:
        raise ConfigError(problems)
    share = chosen_share(args.worker)
    device = device_of(read_world(), chosen_device(args.device))
    tokenizer = load_image_tokenizer(args.image_tokenizer).to(device)

    def encode(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return tokenizer.encode(pixels.to(device)).cpu()

    with full_disk_explained(args.out, DataError):
        complete = write_token_cache(
            args.out,
            find_records(args.data, val_share=run.data.val_share, part_size=run.data.shard_size),
            TextTokenizer.load(args.text_tokenizer),
            encode,
            image_size=tokenizer.config.image_size,
            views=run.data,
            image_tokenizer_hash=image_tokenizer_hash(args.image_tokenizer),
            codebook_size=tokenizer.config.codebook_size,
            grid_side=tokenizer.config.grid_side,
            num_text_slots=run.model.num_text_slots,
            seed=run.train.seed,
            worker=(share.index, share.count),
        )
    state = "complete" if complete else "this worker is done, others are not"
    print(f"{args.out}: {state}")
    return 0


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
