"""``vilg generate``: draw pictures from text."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vilg.cli.device import add_device_option
from megatron_vilg.cli.sampling import (
    add_sampling_options,
    problems_of_sampling,
    require_none,
    sampling_from_args,
)
from megatron_vilg.cli.shares import GRID_IMAGES, GRID_PROMPTS, Share, chosen_share
from megatron_vilg.cli.tensor import add_tensor_option, generator_ranks, problems_of_tensor
from megatron_vilg.config.world import World, read_world
from megatron_vilg.errors import ConfigError
from megatron_vilg.log import get_logger

if TYPE_CHECKING:
    import torch

    from megatron_vilg.config.schema import SampleConfig
    from megatron_vilg.generate.pipeline import Pipeline
    from megatron_vilg.parallel.mesh import Mesh

_log = get_logger(__name__)
CODEBOOK, END_TO_END = "codebook", "end-to-end"
_BATCHES_TOGETHER = 4
"""Batches between two visits to the disk: more of them are full, and pass the image tokenizer behind the next one."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the options."""
    parser = subparsers.add_parser(
        "generate",
        help="draw pictures from text",
        description="Draw pictures from text. Writes one PNG per picture, with --max-batch after every few batches, "
        "and at the end generate.json with everything that is needed to draw them again, and grid.png with the first "
        f"{GRID_IMAGES} pictures of the first {GRID_PROMPTS} prompts.",
        epilog='example: vilg generate --load runs/demo --prompt "水彩画的红苹果" -n 4 --out drawn',
    )
    parser.add_argument("--load", metavar="RUN_OR_FOLDER", type=Path, required=True, help="run or exported folder")
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompt-file", metavar="F", type=Path, help="one prompt a line; lines with # are left out")
    parser.add_argument("-n", "--num-images", metavar="N", type=int, default=4, help="pictures per prompt (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same pictures (default: 0)")
    parser.add_argument("--out", metavar="D", type=Path, required=True, help="folder for the pictures")
    add_sampling_options(parser, default="the section `sample` of the run's configuration", with_guidance=True)
    parser.add_argument(
        "--decoder",
        choices=(CODEBOOK, END_TO_END),
        default=CODEBOOK,
        help="codes to pixels: the image tokenizer, or the reconstructor that was trained with the generator",
    )
    parser.add_argument("--max-batch", metavar="N", type=int, help="pictures drawn at a time (default: all)")
    _add_helper_options(parser)
    parser.add_argument("--image-prefix", metavar="IMG", type=Path, help="complete this picture, with --keep-rows")
    parser.add_argument("--keep-rows", metavar="R", type=int, help="rows of its tokens that are kept, from the top")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "int8"),
        default="fp32",
        help="arithmetic of matrix products; int8: weights in int8, products in bf16",
    )
    parser.add_argument(
        "--worker",
        metavar="I/N",
        default="auto",
        help="draw the I-th of N shares of the prompts; auto: one share per rank of torchrun or srun, or per T ranks",
    )
    add_tensor_option(parser)
    add_device_option(parser)
    parser.set_defaults(run=run)


def _add_helper_options(parser: argparse.ArgumentParser) -> None:
    """What chooses among the generator's drawings, and what draws in its place."""
    parser.add_argument(
        "--rerank",
        metavar="K",
        type=int,
        help="draw K pictures per prompt, keep the -n that both directions find likeliest; 0: keep all that is drawn",
    )
    parser.add_argument(
        "--reranker-weight",
        dest="rerank_contrastive_weight",
        metavar="X",
        type=float,
        help="how much that choice listens to a reranker (vilg train-reranker) where there is one; 0: not at all",
    )
    parser.add_argument(
        "--restyle",
        metavar="K",
        type=int,
        help="orders of the references behind a thing in a style that it was never shown in, where there is a restyler "
        "(vilg train-restyler); 0: the generator draws it",
    )


def run(args: argparse.Namespace) -> int:
    """Draw and write; the exit code is 0 when every picture is there."""
    prompts = _prompts(args)
    world = read_world()
    _check(args, world)
    share = chosen_share(args.worker, args.tensor)
    with generator_ranks(args.tensor, world, args.device) as mesh:
        return _run_share(args, prompts, share, mesh)


def _run_share(args: argparse.Namespace, prompts: list[str], share: Share, mesh: Mesh) -> int:
    """Draw this worker's share; of several ranks that are one worker the first one writes."""
    from megatron_vilg.cli.drawn import PictureFolder
    from megatron_vilg.generate.pipeline import NO_RECONSTRUCTOR, Pipeline

    folder = PictureFolder(args.out, share, prompts)
    pipeline = Pipeline.load(args.load, device=mesh.device, precision=args.precision, mesh=mesh)
    if args.decoder == END_TO_END and pipeline.model.reconstructor is None:
        raise ConfigError([NO_RECONSTRUCTOR])
    settings = sampling_from_args(args, pipeline.config.sample)
    record, digest = _record(args, pipeline, settings), hashlib.sha256()
    slots = pipeline.model.spec.num_text_slots
    numbers = share.prompts(len(prompts))
    own = prompts[numbers.start : numbers.stop]
    for drawn in _draw(args, pipeline, own, numbers.start, settings):
        if mesh.rank("tp") > 0:
            continue
        digest.update(drawn.ids.cpu().numpy().astype("<i8").tobytes())
        lengths = [len(pipeline.text_tokenizer.encode(prompt)) for prompt in drawn.prompts]
        facts: list[dict[str, Any]] = [{"tokens": n, "tokens_cut": max(0, n - slots)} for n in lengths]
        is_restyled = pipeline.restyled(drawn.prompts, settings) if args.image_prefix is None else [False] * len(facts)
        for fact, answer in zip(facts, is_restyled, strict=True):
            fact["restyled"] = answer
        if drawn.scores is not None:
            for fact, row in zip(facts, drawn.scores.tolist(), strict=True):
                fact["scores"] = row
        folder.add(drawn.pixels, facts, record)
    if mesh.rank("tp") > 0:
        return 0
    complete = folder.finish(record, digest.hexdigest())
    done = f"{len(own) * args.num_images} pictures in {args.out}"
    if share.count == 1:
        is_all = len(prompts) <= GRID_PROMPTS and args.num_images <= GRID_IMAGES
        each = f"up to {GRID_IMAGES} for each of the first {GRID_PROMPTS} prompts"
        shown = "all of them" if is_all else each
        print(f"{done}, {shown} in {args.out / 'grid.png'}")
    else:
        rest = "complete" if complete else "other workers are not done"
        print(f"worker {share.index} of {share.count}: {done}; {rest}")
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompt_file is not None:
        try:
            lines = args.prompt_file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"--prompt-file={args.prompt_file}: cannot be read as UTF-8 text ({error})"]) from error
        prompts += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        source = f"--prompt-file={args.prompt_file} holds no prompt" if args.prompt_file else "no prompt given"
        raise ConfigError([f'{source}; works: --prompt "水彩画的红苹果", or a file with one prompt a line'])
    return prompts


def _check(args: argparse.Namespace, world: World) -> None:
    """Report everything that can be told wrong without the model."""
    problems = problems_of_sampling(args) + problems_of_tensor(args, world)
    for flag, value in (("-n", args.num_images), ("--max-batch", args.max_batch)):
        if value is not None and value < 1:
            problems.append(f"{flag}={value}: must be at least 1")
    if args.rerank and args.rerank < args.num_images:
        problems.append(f"--rerank={args.rerank}: must be at least -n={args.num_images}, the pictures that are kept")
    if (args.image_prefix is None) != (args.keep_rows is None):
        problems.append("--image-prefix and --keep-rows belong together; give both or neither")
    require_none(problems)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """What was drawn for some neighbouring prompts, B of them: codes, and pixels in [-1, 1]."""

    prompts: list[str]
    ids: torch.Tensor
    """[B, n, N]."""
    scores: torch.Tensor | None
    """[B, n] where more were drawn than are kept."""
    pixels: torch.Tensor
    """[B, n, 3, S, S]."""


def _draw(
    args: argparse.Namespace, pipeline: Pipeline, prompts: list[str], first_prompt: int, settings: SampleConfig
) -> Iterator[_Drawn]:
    """All prompts in order, as many at a time as fill a few batches, so that what is done can be written."""
    from tqdm import tqdm

    prefix = _image_prefix(args, pipeline)
    per_prompt = max(settings.rerank, args.num_images)
    together = max(1, _BATCHES_TOGETHER * args.max_batch // per_prompt) if args.max_batch else max(1, len(prompts))
    is_silent = True if pipeline.mesh.rank("tp") else None  # None: where nobody looks
    with tqdm(desc="drawing", unit=" tokens", disable=is_silent) as bar:
        for start in range(0, len(prompts), together):
            some, before = prompts[start : start + together], int(bar.n)

            def progress(done: int, total: int, part: int = len(some), before: int = before) -> None:
                bar.total = total * len(prompts) // part
                bar.update(before + done - bar.n)

            options: dict[str, Any] = {
                "num_images": args.num_images,
                "settings": settings,
                "seed": args.seed,
                "max_batch": args.max_batch,
                "first_prompt": first_prompt + start,
                "progress": progress,
            }
            if prefix is None and not settings.rerank and args.decoder != END_TO_END:
                ids, pixels = pipeline.draw_pixels(some, **options)
                yield _Drawn(some, ids, None, pixels)
                continue
            given = None if prefix is None else prefix.expand(len(some), -1)
            ids, scores = pipeline.draw_best_ids(some, image_prefix=given, **options)
            pixels = pipeline.decode_end_to_end(ids, some) if args.decoder == END_TO_END else pipeline.decode(ids)
            yield _Drawn(some, ids, scores, pixels)


def _image_prefix(args: argparse.Namespace, pipeline: Pipeline) -> torch.Tensor | None:
    """Codes [1, m] that every picture begins with."""
    if args.image_prefix is None:
        return None
    side = pipeline.model.spec.image_side
    if not 0 <= args.keep_rows <= side:
        raise ConfigError([f"--keep-rows={args.keep_rows}: this model has rows 0 to {side}"])
    return pipeline.encode_images([args.image_prefix])[:, : args.keep_rows * side]


def _record(args: argparse.Namespace, pipeline: Pipeline, settings: SampleConfig) -> dict[str, Any]:
    """What it takes to draw the same pictures again."""
    from megatron_vilg.checkpoint.manifest import current_versions

    return {
        "load": str(args.load),
        "step": pipeline.step,
        "seed": args.seed,
        "num_images": args.num_images,
        "sample": dataclasses.asdict(settings),
        "reranker": None if pipeline.reranker is None else dataclasses.asdict(pipeline.reranker.config),
        "restyler": None if pipeline.restyling is None else dataclasses.asdict(pipeline.restyling.model.config),
        "decoder": args.decoder,
        "image_prefix": None if args.image_prefix is None else str(args.image_prefix),
        "keep_rows": args.keep_rows,
        "max_batch": args.max_batch,
        "precision": args.precision,
        "tensor": args.tensor,
        "device": str(pipeline.device),
        "versions": current_versions(),
    }
