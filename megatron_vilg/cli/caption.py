"""``vilg caption``: say what is in pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vilg.cli.device import add_device_option
from megatron_vilg.cli.outputs import require_json_place, write_json
from megatron_vilg.cli.sampling import (
    add_sampling_options,
    problems_of_sampling,
    require_none,
    sampling_from_args,
)
from megatron_vilg.cli.tensor import add_tensor_option, generator_ranks, problems_of_tensor
from megatron_vilg.config.world import World, read_world
from megatron_vilg.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_vilg.generate.pipeline import Pipeline

_CUTS = ("top_k", "top_p", "min_p")
"""Options that shorten the list of tokens to draw from."""
_READ_BATCH = 64
"""Pictures in memory at a time."""
_LONGEST = 10.0
"""Largest exponent of a caption's length: with more, powers of it leave the range of numbers."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the options."""
    parser = subparsers.add_parser(
        "caption",
        help="say what is in pictures",
        description="Say what is in pictures: one line for each, the file and its caption.",
        epilog="example: vilg caption --load runs/demo pictures/*.png --beam 5 --json captions.json",
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path)
    parser.add_argument("--load", metavar="RUN_OR_FOLDER", type=Path, required=True, help="run or exported folder")
    parser.add_argument("--beam", metavar="N", type=int, default=1, help="captions kept in mind at a time (default: 1)")
    parser.add_argument(
        "--length-penalty", metavar="X", type=float, help="beam search: higher favours longer captions (default: 1)"
    )
    parser.add_argument(
        "--candidates",
        metavar="K",
        type=int,
        help="sample K captions and say the one that both directions find likeliest; 0: greedy (default: the model's)",
    )
    parser.add_argument("--question", metavar="TEXT", help="answer a question about the pictures")
    parser.add_argument("--json", metavar="F", type=Path, help="write a list of {id, caption} there too")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    add_sampling_options(parser, default="the likeliest token at each step (temperature 0)", with_guidance=False)
    parser.add_argument("--max-batch", metavar="N", type=int, default=64, help="pictures at a time (default: 64)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="arithmetic of matrix products")
    add_tensor_option(parser)
    add_device_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Caption and print; the exit code is 0 when every picture has its caption.

    Raises:
        DataError: some cannot be read; with all of them, when the others have their captions.
    """
    world = read_world()
    _check(args, world)
    require_json_place(args.json)
    from megatron_vilg.data.source_parts import clean_name
    from megatron_vilg.generate.pipeline import Pipeline

    with generator_ranks(args.tensor, world, args.device) as mesh:
        pipeline = Pipeline.load(args.load, device=mesh.device, precision=args.precision, mesh=mesh, for_drawing=False)
        images, codes, problems = _read(args.images, pipeline)
        captions = _captions(args, pipeline, codes)
        if mesh.rank("tp") == 0:
            for path, caption in zip(images, captions, strict=True):
                print(f"{path}\t{caption}")
            found = [{"id": clean_name(str(p)), "caption": c} for p, c in zip(images, captions, strict=True)]
            write_json(args.json, found)
        if problems:
            rest = f"; the other {len(images)} have their captions" if images else ""
            raise DataError(f"{len(problems)} of {len(args.images)} pictures{rest}\n  " + "\n  ".join(problems))
    return 0


def _read(paths: list[Path], pipeline: Pipeline) -> tuple[list[Path], Tensor, list[str]]:
    """The pictures that can be read, their codes [B, N], and what is wrong with each of the others."""
    import torch

    from megatron_vilg.generate.picture_input import read_picture

    size, waiting = pipeline.image_tokenizer.config.image_size, []
    good, problems, codes = [], [], [pipeline.encode_images([])]
    for number, path in enumerate(paths, start=1):
        try:
            waiting.append(read_picture(path, size))
        except DataError as error:
            problems.append(str(error))
        else:
            good.append(path)
        if len(waiting) == _READ_BATCH or number == len(paths):
            codes.append(pipeline.encode_images(waiting))
            waiting = []
    return good, torch.cat(codes), problems


def _captions(args: argparse.Namespace, pipeline: Pipeline, codes: Tensor) -> list[str]:
    """One for each picture."""
    from megatron_vilg.generate.caption import GREEDY

    candidates = _candidates(args, pipeline.config.sample.caption_candidates)
    if candidates:
        return pipeline.caption_of_candidates(codes, candidates, seed=args.seed, max_batch=args.max_batch)
    return pipeline.caption(
        codes,
        settings=sampling_from_args(args, GREEDY),
        beam=args.beam,
        length_penalty=1.0 if args.length_penalty is None else args.length_penalty,
        seed=args.seed,
        max_batch=args.max_batch,
    )


def _candidates(args: argparse.Namespace, default: int) -> int:
    """How many captions to sample of each picture; other ways of decoding switch the model's default off."""
    if args.candidates is not None:
        return int(args.candidates)
    return 0 if args.beam > 1 or _sampled(args) else default


def _sampled(args: argparse.Namespace) -> list[str]:
    """The sampling options that were given."""
    return ["--" + name.replace("_", "-") for name in ("temperature", *_CUTS) if getattr(args, name) is not None]


def _check(args: argparse.Namespace, world: World) -> None:
    """Report everything that can be told wrong without the model."""
    problems = problems_of_sampling(args) + problems_of_tensor(args, world)
    if 1 < args.tensor < world.size and world.size % args.tensor == 0:
        problems.append(
            f"--tensor={args.tensor}: pictures are not shared out, so it must be the number of processes, "
            f"{world.size}. Works: {world.size}, or {args.tensor} processes"
        )
    if args.question is not None:
        problems.append(
            f"--question={args.question}: needs a generator trained on questions and answers, which this version does "
            "not train yet. Leave it out to get a caption"
        )
    for flag, value in (("--beam", args.beam), ("--max-batch", args.max_batch)):
        if value < 1:
            problems.append(f"{flag}={value}: must be at least 1")
    if args.length_penalty is not None and not abs(args.length_penalty) <= _LONGEST:
        problems.append(
            f"--length-penalty={args.length_penalty}: must be from {-_LONGEST:g} to {_LONGEST:g}, such as 1"
        )
    if args.length_penalty is not None and args.beam <= 1:
        problems.append(f"--length-penalty={args.length_penalty}: is of beam search. Works: beside --beam 5")
    names = ", ".join(_sampled(args))
    if args.beam > 1 and names:
        problems.append(f"--beam={args.beam}: beam search draws nothing at random, so it has no use for {names}")
    if args.candidates is not None and args.candidates < 0:
        problems.append(f"--candidates={args.candidates}: must be at least 0, which is greedy decoding")
    if args.candidates and (args.beam > 1 or names):
        other = names or f"--beam={args.beam}"
        problems.append(f"--candidates={args.candidates}: candidates are sampled at temperature 1; leave out {other}")
    if not args.temperature and args.beam <= 1 and not args.candidates:
        problems += [
            f"--{name.replace('_', '-')}={value}: leaves out unlikely tokens, and temperature 0 draws none anyway. "
            "Works: beside --temperature 1"
            for name in _CUTS
            if (value := getattr(args, name)) is not None
        ]
    require_none(problems)
