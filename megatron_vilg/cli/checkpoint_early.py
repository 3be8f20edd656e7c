"""What ``vilg checkpoint`` refuses before it reads weights: options that cannot apply or do not go together."""

from __future__ import annotations

import argparse

from megatron_vilg.errors import ConfigError


def require_shard(args: argparse.Namespace) -> None:
    """Refuse options of ``shard`` that do not go together.

    Raises:
        ConfigError: with all of them.
    """
    sizes = (args.target_tensor_parallel_size, args.target_pipeline_parallel_size)
    problems = []
    if args.to == "ranks" and None in sizes:
        problems.append(
            "--target-tensor-parallel-size and --target-pipeline-parallel-size: per-rank files need both. Works: 2 and "
            "2, for example, or --to dcp, which fits every layout"
        )
    if args.to == "dcp" and sizes != (None, None):
        problems.append("--to=dcp: a training checkpoint fits every layout. Works: without --target-... sizes")
    if args.to == "dcp" and args.dtype:
        problems.append("--dtype: the trainer keeps weights in fp32. Works: without it, or --to ranks")
    if args.to == "dcp" and not args.optimizer:
        problems.append(
            "--to=dcp: the trainer goes on from weights and optimizer state together. Works: with --optimizer; or "
            "`merge`, for a folder to draw from"
        )
    if problems:
        raise ConfigError(problems)


def require_convert(args: argparse.Namespace) -> None:
    """Refuse options of ``convert`` that do not go together.

    Raises:
        ConfigError: with all of them.
    """
    problems = []
    is_foreign = args.origin in ("taming", "llamagen", "dalle")
    if not is_foreign and args.image_size is not None:
        problems.append(f"--image-size: --from {args.origin} knows its sizes. Works: without it")
    if args.image_size is not None and args.image_size < 1:
        problems.append(f"--image-size={args.image_size}: pixels a side. Works: 256, for example, or without it")
    if args.origin != "taming" and args.config is not None:
        problems.append(f"--config: --from {args.origin} needs none. Works: without it")
    if args.optimizer and (args.to != "vilg" or args.origin not in ("vilg", "deepspeed")):
        problems.append("--optimizer: only checkpoints of ours have its state. Works: --from vilg|deepspeed --to vilg")
    if (args.to == "end-to-end" and args.origin != "vilg") or (args.origin == "end-to-end" and args.to != "vilg"):
        problems.append(f"--from {args.origin} --to {args.to}: Works: --from vilg --to end-to-end, or the other way")
    if args.to == "end-to-end" and args.dtype:
        problems.append("--dtype: training starts from weights in fp32. Works: without it")
    if args.to == "end-to-end" and args.allow_non_finite:
        problems.append("--allow-non-finite: nobody can train on from such values. Works: without it")
    if args.overrides and args.to != "end-to-end":
        problems.append(f"{args.overrides[0]}: options are for --to end-to-end")
    if problems:
        raise ConfigError(problems)
