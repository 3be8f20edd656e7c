"""``vilg checkpoint``: merge, shard, convert, inspect and verify checkpoints, on the CPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vilg.cli.checkpoint_early import require_convert, require_shard
from megatron_vilg.cli.checkpoint_end_to_end import split_run, start_end_to_end
from megatron_vilg.cli.outputs import require_json_place, write_json
from megatron_vilg.errors import CheckpointError, ConfigError
from megatron_vilg.log import get_logger

if TYPE_CHECKING:
    from megatron_vilg.checkpoint.new_folder import Progress
    from megatron_vilg.checkpoint.tensors import TensorSource
    from megatron_vilg.checkpoint.transfer import Options

_log = get_logger(__name__)
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_LOAD_HELP = "run folder (its newest checkpoint), checkpoint, canonical folder, per-rank folders or DeepSpeed folder"


def add_parser(subparsers: Any) -> None:
    """Register the verb and its sub-verbs; ``subparsers`` is what ``ArgumentParser.add_subparsers`` returns."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "checkpoint",
        help="merge, shard, convert, inspect and verify checkpoints",
        description="Change the form of checkpoints on the CPU, one piece of a tensor at a time. What is written is "
        "read back and compared before it gets its name; nothing is ever overwritten.",
        epilog="example: vilg checkpoint merge --load-dir runs/big --save-dir runs/big-merged",
    )
    verbs = parser.add_subparsers(dest="checkpoint_verb", metavar="WHAT", required=True)
    for add in (_add_merge, _add_shard, _add_convert, _add_inspect, _add_verify):
        add(verbs)


def _add_merge(verbs: Any) -> None:
    _verb(
        verbs,
        run_merge,
        "merge",
        help="any checkpoint to whole tensors in safetensors files",
        description="Write whole tensors under their canonical names, with configuration and tokenizers where they "
        "lie beside the source: a folder that `vilg generate --load` reads.",
        epilog="example: vilg checkpoint merge --load-dir runs/big --save-dir runs/big-merged --optimizer",
        groups=(_from_here_to_there, _with_optimizer, _on_the_way),
    )


def _add_shard(verbs: Any) -> None:
    parser = _verb(
        verbs,
        run_shard,
        "shard",
        help="whole tensors to per-rank files, or to a checkpoint for the trainer",
        description="Write mp_rank_TT_PPP/ for each rank of a tensor x pipeline layout; with --to dcp --optimizer a "
        "run folder that `vilg train --out` resumes in any layout. `merge` of the result gives the same bytes again.",
        epilog="examples: vilg checkpoint shard --load-dir runs/big --save-dir runs/big-2x2 "
        "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2; "
        "vilg checkpoint shard --load-dir runs/big-merged --save-dir runs/again --to dcp --optimizer",
        groups=(_from_here_to_there, _target_layout, _with_optimizer, _on_the_way),
    )
    parser.add_argument("--to", choices=("ranks", "dcp"), default="ranks", help="form of the result (default: ranks)")


def _add_convert(verbs: Any) -> None:
    parser = _verb(
        verbs,
        run_convert,
        "convert",
        help="foreign weights to ours, or ours to a folder to share",
        description="Read image tokenizers of taming-transformers (VQ and Gumbel, with their yaml), LlamaGen and "
        "DALL-E, checkpoints of DeepSpeed, or our own in any form. Foreign files are read as data; nothing in them is "
        "executed.",
        epilog="examples: vilg checkpoint convert --from taming --to vilg --load-dir vqgan_imagenet_f16_1024 "
        "--save-dir runs/mine/image_tokenizer; vilg checkpoint convert --from vilg --to pretrained "
        "--load-dir runs/demo --save-dir share --dtype bf16",
        groups=(_from_here_to_there, _with_optimizer, _on_the_way),
    )
    sources = ("taming", "llamagen", "dalle", "deepspeed", "vilg", "end-to-end")
    parser.add_argument("--from", dest="origin", choices=sources, required=True, help="what D is")
    parser.add_argument(
        "--to",
        choices=("vilg", "safetensors", "pretrained", "end-to-end"),
        required=True,
        help="canonical folder; one file; weights, configuration and tokenizers together; a run folder from which "
        "end-to-end training starts. --from end-to-end --to vilg takes such a run apart",
    )
    parser.add_argument("--config", metavar="FILE", type=Path, help="taming: its yaml, where D has none or several")
    parser.add_argument("--image-size", metavar="S", type=int, help="image tokenizers: pixels a side (default: theirs)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.option=value",
        help="with --to end-to-end: options of the new run, whose model stays",
    )


def _add_inspect(verbs: Any) -> None:
    parser = _verb(
        verbs,
        run_inspect,
        "inspect",
        help="what is in a checkpoint",
        description="Print what a checkpoint is, its tensors with shapes, types and sizes, one tensor's statistics, or "
        "how it differs from another one. With --preset: what a model would be, computed without any weights.",
        epilog="examples: vilg checkpoint inspect runs/demo; vilg checkpoint inspect runs/demo --tensor norm.weight; "
        "vilg checkpoint inspect --preset paper-10b --target-tensor-parallel-size 8 --target-pipeline-parallel-size 4",
        groups=(_target_layout,),
    )
    parser.add_argument("path", metavar="D", type=Path, nargs="?", help=_LOAD_HELP)
    parser.add_argument("--compare", metavar="E", type=Path, help="also say how D differs from E")
    parser.add_argument("--tensor", metavar="NAME", help="statistics of one tensor")
    parser.add_argument("--all", action="store_true", help="a line for each tensor; layers alike share one otherwise")
    parser.add_argument("--json", metavar="F", type=Path, help="also write what is printed as plain data")
    parser.add_argument("--preset", metavar="NAME", help="instead of D: a model that need not exist, and its ranks")


def _add_verify(verbs: Any) -> None:
    parser = _verb(
        verbs,
        run_verify,
        "verify",
        help="prove that a checkpoint is sound, or holds the same as another",
        description="Check digests of files, names, shapes and counts of tensors, and that values are finite; with "
        "--against, that both hold the same bits (or the same after rounding, where the types differ). A run folder "
        "stands for its newest checkpoint, never for an older one. The exit code is 0 only if everything holds.",
        epilog="example: vilg checkpoint verify runs/big-merged --against runs/big --logits",
    )
    parser.add_argument("path", metavar="D", type=Path, help=_LOAD_HELP)
    parser.add_argument("--against", metavar="E", type=Path, help="another one that should hold the same")
    parser.add_argument("--logits", action="store_true", help="with --against: run both models on the same input")


def _verb(
    verbs: Any,
    run: Callable[[argparse.Namespace], int],
    name: str,
    *,
    groups: Sequence[Callable[[argparse.ArgumentParser], None]] = (),
    **texts: str,
) -> argparse.ArgumentParser:
    """A sub-verb with the options of ``groups``; ``texts`` are its help, description and epilog."""
    parser: argparse.ArgumentParser = verbs.add_parser(name, **texts)
    for add in groups:
        add(parser)
    parser.set_defaults(run=run)
    return parser


def _from_here_to_there(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--load-dir", metavar="D", type=Path, required=True, help=_LOAD_HELP)
    parser.add_argument("--save-dir", metavar="E", type=Path, required=True, help="new folder; must not exist")


def _target_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target-tensor-parallel-size", metavar="T", type=int, help="ranks that share a layer")
    parser.add_argument("--target-pipeline-parallel-size", metavar="P", type=int, help="ranks that share the layers")


def _with_optimizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--optimizer", action="store_true", help="optimizer state too, to go on training from")


def _on_the_way(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=tuple(_DTYPES), help="element type of the weights (default: as they are)")
    parser.add_argument("--allow-non-finite", action="store_true", help="let NaN and infinite values pass")


def run_merge(args: argparse.Namespace) -> int:
    """Write whole tensors."""
    from megatron_vilg.checkpoint.new_folder import require_new
    from megatron_vilg.checkpoint.reshape import chosen_names, merge
    from megatron_vilg.checkpoint.sources import companions, open_source

    def look(source: TensorSource) -> None:
        chosen_names(source, optimizer=args.optimizer)
        companions(source)

    require_new(args.save_dir)
    with _at_work(args, open_source(args.load_dir, look)) as (source, options):
        manifest = merge(source, args.save_dir, optimizer=args.optimizer, options=options)
        _done(args.save_dir, len(manifest.tensors), source)
    return 0


def run_shard(args: argparse.Namespace) -> int:
    """Write per-rank files or a training checkpoint."""
    from megatron_vilg.checkpoint.new_folder import require_new
    from megatron_vilg.checkpoint.reshape import chosen_names, rank_layout, shard
    from megatron_vilg.checkpoint.run_folder import trainable_names, write_run_folder
    from megatron_vilg.checkpoint.sources import companions, manifest_of, open_source

    sizes = (args.target_tensor_parallel_size, args.target_pipeline_parallel_size)

    def look(source: TensorSource) -> None:
        if args.to == "dcp":
            trainable_names(source)
        else:
            names = chosen_names(source, optimizer=args.optimizer)
            rank_layout(manifest_of(source), source.tensors, names, *sizes)
        companions(source)

    require_shard(args)
    require_new(args.save_dir)
    with _at_work(args, open_source(args.load_dir, look)) as (source, options):
        if args.to == "dcp":
            count = write_run_folder(source, args.save_dir, options=options)
        else:
            count = len(shard(source, args.save_dir, *sizes, optimizer=args.optimizer, options=options).tensors)
        _done(args.save_dir, count, source)
    return 0


def run_convert(args: argparse.Namespace) -> int:
    """Read what others wrote, or ours; write a folder."""
    from megatron_vilg.checkpoint.new_folder import require_new

    require_convert(args)
    require_new(args.save_dir)
    if args.to == "end-to-end":
        return start_end_to_end(args)
    if args.origin == "end-to-end":
        with _options(args) as options:
            return split_run(args, options)
    return _convert(args)


def _convert(args: argparse.Namespace) -> int:
    from megatron_vilg.checkpoint.deepspeed_folder import DeepSpeedSource
    from megatron_vilg.checkpoint.foreign import read_dalle, read_llamagen, read_taming
    from megatron_vilg.checkpoint.reshape import chosen_names, convert, require_companions
    from megatron_vilg.checkpoint.sources import open_source

    def look(source: TensorSource) -> None:
        if args.origin == "deepspeed" and not isinstance(source, DeepSpeedSource):
            raise CheckpointError(f"--from=deepspeed: {source.path} is a {source.format}. Works: --from vilg")
        chosen_names(source, optimizer=args.optimizer)
        require_companions(source, args.to)

    if args.origin == "taming":
        foreign: TensorSource = read_taming(args.load_dir, args.config, args.image_size)
    elif args.origin == "llamagen":
        foreign = read_llamagen(args.load_dir, args.image_size)
    elif args.origin == "dalle":
        foreign = read_dalle(args.load_dir, args.image_size)
    else:
        foreign = open_source(args.load_dir, look)
    with _at_work(args, foreign) as (source, options):
        if args.origin in ("vilg", "deepspeed"):
            look(source)
        manifest = convert(source, args.save_dir, args.to, optimizer=args.optimizer, options=options)
        _done(args.save_dir, len(manifest.tensors), source)
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """Print what is there."""
    from megatron_vilg.checkpoint.describe import (
        facts,
        find_tensor,
        head_lines,
        manifest_differences,
        statistics,
        tensor_facts,
        tree_lines,
    )
    from megatron_vilg.checkpoint.sources import open_source
    from megatron_vilg.checkpoint.verify import differences, not_compared

    if (args.path is None) == (args.preset is None):
        raise ConfigError(["give either a folder D or --preset NAME"])
    require_json_place(args.json)
    if args.preset is not None:
        return _inspect_preset(args)
    if (args.target_tensor_parallel_size, args.target_pipeline_parallel_size) != (None, None):
        raise ConfigError(
            ["--target-...-parallel-size: plans the ranks of a --preset. Works: `shard` cuts D for ranks"]
        )
    with open_source(args.path) as source:
        found: dict[str, Any] = facts(source)
        lines = list(head_lines(source))
        if args.tensor is not None:
            found["statistics"] = statistics(source, find_tensor(source, args.tensor))
            lines += ["", *(f"{key:11} {value}" for key, value in found["statistics"].items())]
        elif args.compare is None:
            found["tensors"] = tensor_facts(source.tensors)
            lines += ["", *tree_lines(source.tensors, fold=not args.all)]
        if args.compare is not None:
            with open_source(args.compare) as other, _progress() as progress:
                found["manifest_differences"] = manifest_differences(source, other)
                found["tensor_differences"] = differences(source, other, progress)
                found["not_compared"] = not_compared(source, other)
            lines += ["", f"beside {args.compare}:", *(found["manifest_differences"] or ["same facts"])]
            lines += (found["tensor_differences"] or ["same tensors, same values"]) + found["not_compared"]
    _print(lines, found, args.json)
    return 0


def _inspect_preset(args: argparse.Namespace) -> int:
    """The canonical manifest and, for a layout, each rank's files, from sizes alone."""
    from megatron_vilg.checkpoint.plan_sizes import planned
    from megatron_vilg.config.load import load_run_config

    sizes = (args.target_tensor_parallel_size, args.target_pipeline_parallel_size)
    problems = [
        f"--{name}: looks into tensors, and --preset={args.preset} has none. Works: with a folder D"
        for name in ("compare", "tensor")
        if getattr(args, name) is not None
    ]
    if (None in sizes) != (sizes == (None, None)):
        problems.append("--target-tensor-parallel-size and --target-pipeline-parallel-size: give both or neither")
    if problems:
        raise ConfigError(problems)
    lines, found = planned(load_run_config(args.preset), sizes, fold=not args.all)
    _print(lines, found, args.json)
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Check; raises with every problem."""
    from megatron_vilg.checkpoint import verify
    from megatron_vilg.checkpoint.sources import open_newest

    if args.logits and args.against is None:
        raise ConfigError(["--logits: compares two models. Works: with --against E"])
    with open_newest(args.path) as source, _progress() as progress:
        verify.require_sound(verify.problems_of(source, progress), source.path)
        print(verify.verdict(source))
        if args.against is None:
            return 0
        with open_newest(args.against) as other:
            verify.require_sound(verify.problems_of(other, progress), other.path)
            verify.require_sound(verify.differences(source, other, progress), f"{args.path} against {args.against}")
            print(f"{args.path} and {args.against} hold the same values", *verify.not_compared(source, other), sep="\n")
            if args.logits:
                largest, allowed = verify.output_difference(source, other)
                if not largest <= allowed:
                    raise CheckpointError(f"outputs differ by up to {largest:.3g}; rounding explains {allowed:.3g}")
                print(f"outputs of both models differ by at most {largest:.3g} (rounding explains {allowed:.3g})")
    return 0


def _print(lines: list[str], found: dict[str, Any], file: Path | None) -> None:
    print("\n".join(lines))
    write_json(file, found)


def _done(folder: Path, count: int, source: TensorSource) -> None:
    print(f"{folder}: {count} tensors, read back and equal to {source.path}")


@contextmanager
def _at_work(args: argparse.Namespace, source: TensorSource) -> Iterator[tuple[TensorSource, Options]]:
    """A source, named in the log and closed in the end, and what may change on the way."""
    with source, _options(args) as options:
        _log.info("source: %s, %s", source.path, source.format)
        yield source, options


@contextmanager
def _options(args: argparse.Namespace) -> Iterator[Options]:
    """Conversion, tolerance, and a progress bar."""
    import torch

    from megatron_vilg.checkpoint.transfer import Options

    dtype = getattr(torch, _DTYPES[args.dtype]) if args.dtype else None
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # pieces are small and have threads of their own: torch's would wait for each other
    try:
        with _progress() as progress:
            yield Options(dtype, args.allow_non_finite, progress)
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar of bytes for what is being done; a new one when that changes."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in bars or done < bars[what].n:
            while bars:
                bars.popitem()[1].close()
            bars[what] = tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=None)
        bars[what].update(done - bars[what].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()
